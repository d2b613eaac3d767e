"""The layer groups of a tower: an ordered, named, complete partition of its parameters, from input to output.

The trunk's groups are timm's own (`group_matcher`), so that counting them means what it means in timm and in open_clip:
the norm after the last block goes with that block, a downsampling layer with the block that it feeds. Trunks without a
matcher are cut in the same way along their containers of blocks. The head is one group, and so is every other part
that a subclass adds.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn as nn
from timm.models import group_parameters

from ..reader.freezing import keeps_statistics

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Containers are opened to this depth: stages, a stage, its blocks.
_DEPTH = 3


@dataclass(frozen=True)
class LayerGroup:
    """One group of layers.

    Attributes:
        name: Unique among the tower's groups: `stem`, `blocks.0`, `head`.
        part: `trunk`, `head`, or the tower's attribute that holds it.
        modules: Names of the largest modules that are wholly in the group, and of parameters that stand alone.
        parameters: Names of the parameters, as in `tower.named_parameters()`.
        statistics: Names of the modules that keep running statistics.
    """

    name: str
    part: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    statistics: tuple[str, ...]


def layer_groups(tower: nn.Module) -> list[LayerGroup]:
    """The groups from input to output; together they hold every parameter of the tower once.

    Args:
        tower: A module with a `trunk` and a `head`.
    """
    names = [name for name, _ in tower.named_parameters()]
    modules = dict(tower.named_modules())
    statistics = [name for name, module in modules.items() if keeps_statistics(module)]
    cut: list[tuple[str, list[str]]] = []
    for part in dict.fromkeys(("trunk", "head", *(_part(name) for name in (*names, *statistics)))):
        own = {name: None for name in names if _part(name) == part}
        if part == "trunk":
            groups = [[f"trunk.{name}" for name in group] for group in trunk_groups(modules["trunk"])]
            # a parameter that is tied to one of an earlier part is that part's
            found = [kept for group in groups if (kept := [name for name in group if name in own])]
        else:
            found = [list(own)] if own else []
        if not found and any(_part(name) == part for name in statistics):
            found = [[]]  # nothing but running statistics
        cut += [(part, group) for group in found]
    owned = _statistics_of(modules, set(statistics), cut)
    other_parts = {part for part, _ in cut if part != "trunk"}
    several = sum(part == "trunk" for part, _ in cut) > 1
    covers = _covers({name: index for index, (_, group) in enumerate(cut) for name in group})
    made: list[LayerGroup] = []
    for index, (part, group) in enumerate(cut):
        cover = tuple(covers.get(index, [part]))
        if part != "trunk":
            name = part
        elif several and index == 0:
            name = "stem"
        else:
            name = _name(cover, modules, {"stem", *other_parts, *(other.name for other in made)})
        made.append(LayerGroup(name, part, cover, tuple(group), tuple(owned[index])))
    return made


def trunk_groups(trunk: nn.Module) -> list[list[str]]:
    """Names of the trunk's parameters by group, from input to output."""
    if hasattr(trunk, "group_matcher"):
        found = group_parameters(trunk, trunk.group_matcher())  # type: ignore[operator]
        return [found[index] for index in sorted(found)]
    return _groups_by_blocks(trunk)


def smallest_cover(chosen: Iterable[str], everything: Collection[str]) -> list[str]:
    """The fewest dotted names of which each stands for itself and all that is under it: together just `chosen`.

    Args:
        chosen: Names from `everything`.
        everything: All dotted names, such as those of a model's parameters.

    Returns:
        In the order of `everything`; empty for nothing chosen.
    """
    wanted = set(chosen)
    return _covers({name: int(name in wanted) for name in everything}).get(1, [])


def _covers(label_of: Mapping[str, int]) -> dict[int, list[str]]:
    """For each label the smallest cover of the names that have it."""
    labels: dict[str, int | None] = {}
    for name, label in label_of.items():
        for prefix in _prefixes(name):
            if labels.setdefault(prefix, label) != label:
                labels[prefix] = None
    covers: dict[int, dict[str, None]] = {}
    for name, label in label_of.items():
        widest = next((prefix for prefix in _prefixes(name) if labels[prefix] == label), name)
        covers.setdefault(label, {})[widest] = None
    return {label: list(cover) for label, cover in covers.items()}


def _prefixes(name: str) -> Iterable[str]:
    """`a`, `a.b`, `a.b.c` of the name `a.b.c`."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
    yield name


def _part(name: str) -> str:
    return name.partition(".")[0]


def _statistics_of(
    modules: dict[str, nn.Module], statistics: Collection[str], cut: Sequence[tuple[str, list[str]]]
) -> list[list[str]]:
    """For each group its modules with statistics; one without parameters goes with the parameters before it."""
    group_of = {name: index for index, (_, group) in enumerate(cut) for name in group}
    current: dict[str, int] = {}
    for index, (part, _) in enumerate(cut):
        current.setdefault(part, index)
    owned: list[list[str]] = [[] for _ in cut]
    for name, module in modules.items():
        own = [group_of.get(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)]
        current[_part(name)] = next((index for index in own if index is not None), current.get(_part(name), 0))
        if name in statistics:
            owned[current[_part(name)]].append(name)
    return owned


def _name(cover: Sequence[str], modules: dict[str, nn.Module], taken: Collection[str]) -> str:
    """The name of a trunk's group: its block where it has one, else its largest module."""

    def rank(name: str) -> tuple[bool, int]:
        module = modules.get(name)
        size = 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
        return _block(name, modules).rpartition(".")[2].isdigit(), size

    ranked = sorted(cover, key=rank, reverse=True)
    names = [_block(name, modules).removeprefix("trunk.") for name in ranked]
    names += [f"trunk.{name}" for name in names] + [f"{names[0]}+{number}" for number in range(2, 2 + len(taken))]
    return next(name for name in names if name not in taken)


def _block(name: str, modules: dict[str, nn.Module]) -> str:
    """`trunk.stages.0` whose only content is `blocks.0.main` -> `trunk.stages.0.blocks.0`, the block itself."""
    deep, module = name, modules.get(name)
    while module is not None:
        inner = [key for key, child in module.named_children() if next(child.parameters(), None) is not None]
        if len(inner) != 1 or next(module.parameters(recurse=False), None) is not None:
            break
        deep, module = f"{deep}.{inner[0]}", module.get_submodule(inner[0])
    numbered = re.match(rf"{re.escape(name)}(.*\d)(\.|$)", deep)
    return name + numbered[1] if numbered else name


def _groups_by_blocks(trunk: nn.Module) -> list[list[str]]:
    """What timm's matchers do, for a trunk that has none: everything before the first block is the stem."""
    items = [(False, [name]) for name, _ in trunk.named_parameters(recurse=False)]
    items += _items(trunk, "", _DEPTH)
    if not any(is_block for is_block, _ in items):
        return [names for _, names in items]
    groups: list[list[str]] = []
    pending: list[str] = []
    for is_block, names in items:
        pending = pending + names
        if is_block:
            if not groups and len(pending) > len(names):
                groups.append(pending[: -len(names)])
                pending = names
            groups.append(pending)
            pending = []
    for name in dict.fromkeys(name.partition(".")[0] for name in pending):
        ends = [key for key in pending if key.partition(".")[0] == name]
        if "norm" in type(getattr(trunk, name)).__name__.lower() and not _has_parts(getattr(trunk, name)):
            groups[-1] += ends
            pending = [key for key in pending if key not in ends]
    return [*groups, pending] if pending else groups


def _items(module: nn.Module, prefix: str, depth: int) -> list[tuple[bool, list[str]]]:
    """The module's children in order, containers of blocks opened: whether each is a block, and its parameters."""
    items: list[tuple[bool, list[str]]] = []
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        names = [f"{name}.{inner}" for inner, _ in child.named_parameters()]
        if not names:
            continue
        opened = depth > 0 and (_holds_blocks(child) or any(_holds_blocks(part) for part in child.children()))
        if opened and next(child.parameters(recurse=False), None) is None:
            items += _items(child, f"{name}.", depth - 1)
        else:
            items.append((isinstance(module, _CONTAINERS) and _has_parts(child), names))
    return items


def _holds_blocks(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and any(_has_parts(child) for child in module.children())


def _has_parts(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())

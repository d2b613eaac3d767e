"""Locking and unlocking a tower by layer group or by name.

The result of a call depends on that call alone: an earlier one leaves no trace.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch.nn as nn

from ..reader.errors import ArgumentError
from .freezing import describe_frozen, freeze
from .layer_groups import LayerGroup, layer_groups

Patterns = str | Sequence[str]


def lock(
    tower: nn.Module,
    unlocked_groups: int = 0,
    freeze_bn_stats: bool = False,
    *,
    head: bool = False,
    until: str | None = None,
    only: Patterns | None = None,
    except_: Patterns | None = None,
) -> None:
    """Freeze the trunk, or the part of the tower that the selectors name; all else trains. Depends on this call alone.

    Args:
        tower: A module with a `trunk` and a `head`.
        unlocked_groups: Layer groups of the trunk, counted from the output, that stay trainable.
        freeze_bn_stats: Freeze the running statistics of the frozen part, also through later `.train()` calls.
        head: Freeze the head as well.
        until: Freeze from the input up to and including this group, module or parameter, such as `blocks.9`.
        only: Freeze just what matches: patterns (fnmatch) for names of groups or parameters.
        except_: Patterns for what stays trainable of what the other arguments freeze.

    Raises:
        ArgumentError: a selector matches nothing, selectors contradict each other, or there are fewer groups.
    """
    groups = layer_groups(tower)
    _check_together(unlocked_groups, until, only)
    if only is not None:
        frozen = _matching(groups, only, "only")
    elif until is not None:
        frozen = _members(groups[: _positions(groups, until)[-1] + 1])
    else:
        trunk = [group for group in groups if group.part == "trunk"]
        frozen = _members(trunk[: len(trunk) - _checked_count(tower, unlocked_groups, len(trunk))])
    if head:
        frozen |= _members(group for group in groups if group.part == "head")
    if except_ is not None:
        frozen -= _matching(groups, except_, "except_")
    _freeze(tower, groups, frozen, freeze_bn_stats)


def unlock(
    tower: nn.Module,
    unlocked_groups: int | None = None,
    freeze_bn_stats: bool = True,
    *,
    head: bool = True,
    until: str | None = None,
    only: Patterns | None = None,
    except_: Patterns | None = None,
) -> None:
    """Open the whole tower, or the head and what the selectors name of the trunk; all else is frozen.

    Depends on this call alone.

    Args:
        tower: A module with a `trunk` and a `head`.
        unlocked_groups: Open this many layer groups of the trunk, counted from the output.
        freeze_bn_stats: Freeze the running statistics of what stays frozen.
        head: Open the head as well.
        until: Open from the output down to and including this group, module or parameter, such as `blocks.9`.
        only: Open, beside the head, just what matches: patterns (fnmatch) for names of groups or parameters.
        except_: Patterns for what stays frozen of what the other arguments open.

    Raises:
        ArgumentError: as `lock`.
    """
    groups = layer_groups(tower)
    _check_together(unlocked_groups, until, only)
    trunk = [group for group in groups if group.part == "trunk"]
    if only is not None:
        opened = _matching(groups, only, "only")
    elif until is not None:
        opened = _members(groups[_positions(groups, until)[0] :])
    elif unlocked_groups is not None:
        opened = _members(trunk[len(trunk) - _checked_count(tower, unlocked_groups, len(trunk)) :])
    else:
        opened = _members(trunk)
    of_head = _members(group for group in groups if group.part == "head")
    opened = opened | of_head if head else opened - of_head
    opened |= _members(group for group in groups if group.part not in ("trunk", "head"))
    if except_ is not None:
        opened -= _matching(groups, except_, "except_")
    _freeze(tower, groups, _members(groups) - opened, freeze_bn_stats)


def _freeze(tower: nn.Module, groups: list[LayerGroup], frozen: set[str], statistics: bool) -> None:
    """Freeze these members; statistics go with the parameters of their module, or where it has none by its name."""
    frozen_statistics: set[str] = set()
    for group in groups if statistics else ():
        for name in group.statistics:
            own = {key for key in group.parameters if key.rpartition(".")[0] == name} or {name}
            if own <= frozen:
                frozen_statistics.add(name)
    freeze(tower, frozen, frozen_statistics)
    if hasattr(type(tower), "_is_tower_base"):  # a TimmModel; a transformers model says it when it is saved
        tower.config.frozen = describe_frozen(tower)  # type: ignore[union-attr]


def _members(groups: Iterable[LayerGroup]) -> set[str]:
    """Names of parameters and of modules with statistics."""
    return {name for group in groups for name in (*group.parameters, *group.statistics)}


def _check_together(count: int | None, until: str | None, only: Patterns | None) -> None:
    given = {"unlocked_groups": count or None, "until": until, "only": only}
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ArgumentError(f"{' and '.join(named)} contradict each other: give one of them")


def _checked_count(tower: nn.Module, count: int, most: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ArgumentError(f"unlocked_groups={count!r}: expected a whole number from 0")
    if count > most:
        raise ArgumentError(f"unlocked_groups={count}: {type(tower.trunk).__name__} has {most} layer groups")
    return count


def _positions(groups: list[LayerGroup], name: str) -> list[int]:
    """Indices of the groups that have something of the group, module or parameter of this name."""
    for index, group in enumerate(groups):
        if group.name == name:
            return [index]
    for full in (name, f"trunk.{name}"):
        found = [
            index
            for index, group in enumerate(groups)
            if any(key == full or key.startswith(f"{full}.") for key in group.parameters)
        ]
        if found:
            return found
    raise _no_match("until", name, groups)


def _matching(groups: list[LayerGroup], patterns: Patterns, argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _members(group for group in groups if fnmatchcase(group.name, pattern))
        hits |= {name for name in _members(groups) if fnmatchcase(name, pattern)}
        if not hits:
            raise _no_match(argument, pattern, groups)
        found |= hits
    return found


def _no_match(argument: str, wanted: str, groups: list[LayerGroup]) -> ArgumentError:
    names = [group.name for group in groups]
    known = names if argument == "until" else [*names, *(key for group in groups for key in group.parameters)]
    near = difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    shown = ", ".join(names if len(names) <= 12 else [*names[:4], "...", *names[-4:]])
    hint = f" Near names: {', '.join(near)}." if near else ""
    return ArgumentError(f"{argument}={wanted!r} matches nothing.{hint} The layer groups are {shown}.")

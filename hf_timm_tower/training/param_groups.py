"""Fine-tuning: parameter groups for an optimizer, and the table of what trains."""

import math
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

import torch.nn as nn
from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers

from ..reader.errors import ArgumentError
from ..reader.freezing import has_frozen_statistics
from .layer_groups import layer_groups

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    tower: nn.Module,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    *,
    min_scale: float = 0.0,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer; frozen parameters are left out.

    With `layer_decay` each layer group has its own learning rate: that of the last is `lr`, that of the one before is
    `lr * layer_decay`, and so on, counted over all groups, frozen or not. Norms, biases, all other parameters of one
    dimension and what the model itself names (`no_weight_decay`) get no weight decay.

    Args:
        tower: A module with a `trunk` and a `head`.
        lr: Learning rate of the last layer group.
        weight_decay: For the parameters that get any.
        layer_decay: Factor from one layer group to the one before, 0 < layer_decay <= 1; None: the same rate for all.
        min_scale: Least factor on `lr`.
        no_decay: Further parameters without weight decay: patterns (fnmatch) for their names.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `name` and `scale`, the factor that is already in `lr`. It is not
        called `lr_scale`, because timm's schedulers would apply that a second time.

    Raises:
        ArgumentError: a number is out of range, a pattern matches nothing, or everything is frozen.
    """
    _check_number("lr", lr, 0, math.inf)
    _check_number("weight_decay", weight_decay, 0, math.inf)
    _check_number("min_scale", min_scale, 0, 1)
    if layer_decay is not None:
        _check_number("layer_decay", layer_decay, 0, 1)
    groups = layer_groups(tower)
    parameters = dict(tower.named_parameters())
    undecayed = _undecayed(tower, no_decay)
    scale_of: dict[str, tuple[str, float]] = {}
    for index, group in enumerate(groups):
        depth = len(groups) - 1 - index
        scale = 1.0 if layer_decay is None else max(min_scale, layer_decay**depth)
        layer = "all" if layer_decay is None else group.name
        scale_of |= dict.fromkeys(group.parameters, (layer, scale))
    made: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        layer, scale = scale_of[name]
        decays = name not in undecayed
        key = (layer, decays)
        if key not in made:
            made[key] = {
                "params": [],
                "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
                "name": layer if decays else f"{layer}, no decay",
                "scale": scale,
            }
        made[key]["params"].append(parameter)
    if not made:
        raise ArgumentError("everything is frozen, so there is nothing to optimize; unlock() opens the tower")
    return list(made.values())


def group_matcher(tower: nn.Module, coarse: bool = False) -> Callable[[str], int | float]:
    """timm's layer groups for `timm.optim`, `timm.models.group_parameters` and whoever else asks a model for them.

    The trunk's groups are those of the bare trunk in timm, with the rates that timm gives them there: all that comes
    after the trunk (head, classifier) is the last one, as timm's classifier is.

    Args:
        tower: A module with a `trunk`.
        coarse: Stages instead of blocks, where timm tells them apart.

    Returns:
        Name of a parameter or of a module -> number of its group.
    """
    trunk: Any = tower.trunk
    after: int | float = math.inf
    if hasattr(trunk, "group_matcher"):
        names = [name for name, _ in trunk.named_parameters()]
        names += [
            name for name, part in trunk.named_modules() if next(part.parameters(recurse=False), None) is not None
        ]
        classifier = getattr(trunk, "pretrained_cfg", {}).get("classifier") or "classifier"
        classifier = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
        # numbered by timm itself, which closes the gaps between those that it then groups
        of = group_with_matcher(
            ((name, None) for name in dict.fromkeys([*names, classifier])),
            trunk.group_matcher(coarse=coarse),
            reverse=True,
        )
        after = of[classifier]
    else:
        of = auto_group_layers(trunk)  # type: ignore[no-untyped-call]
    known = {f"trunk.{name}": number for name, number in of.items()}
    return lambda name: known.get(name, after)


def no_weight_decay(tower: nn.Module) -> set[str]:
    """Names of parameters that get no weight decay because their own model says so: position embeddings, tokens, ..."""
    names: set[str] = set()
    for part in ("trunk", "head"):
        module = getattr(tower, part)
        if hasattr(module, "no_weight_decay"):
            patterns = [f"{part}.{pattern}" for pattern in module.no_weight_decay()]
            own = [name for name, _ in tower.named_parameters() if name.startswith(f"{part}.")]
            names |= {name for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return names


def summary_table(tower: nn.Module) -> str:
    """A table of the layer groups: name, modules, parameters, how many of them train; statistics where some are frozen.

    Args:
        tower: A module with a `trunk` and a `head`.
    """
    parameters = dict(tower.named_parameters())
    modules = dict(tower.named_modules())
    rows = [("group", "modules", "parameters", "trainable", "statistics")]
    totals = [0, 0, 0, 0]
    for group in layer_groups(tower):
        sizes = [(parameters[name].numel(), parameters[name].requires_grad) for name in group.parameters]
        counts = [
            sum(size for size, _ in sizes),
            sum(size for size, trains in sizes if trains),
            len(group.statistics),
            sum(has_frozen_statistics(modules[name]) for name in group.statistics),
        ]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append((group.name, _short(group.modules), *_cells(counts)))
    rows.append(("total", "", *_cells(totals)))
    columns = 5 if totals[3] else 4
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * columns - 2), *lines[1:]])


def _undecayed(tower: nn.Module, no_decay: Collection[str]) -> set[str]:
    parameters = dict(tower.named_parameters())
    names = no_weight_decay(tower)
    names |= {name for name, parameter in parameters.items() if parameter.ndim <= 1 or name.endswith(".bias")}
    for module_name, module in tower.named_modules():
        if isinstance(module, _NORMS):
            names |= {f"{module_name}.{key}" for key, _ in module.named_parameters(recurse=False)}
    for pattern in no_decay:
        hits = {name for name in parameters if fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(f"no_decay={pattern!r} matches no parameter of the tower")
        names |= hits
    return names


def _check_number(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        expected = f"a number from {least} to {most}" if math.isfinite(most) else f"a number from {least}"
        raise ArgumentError(f"{name}={value!r}: expected {expected}")


def _short(modules: tuple[str, ...]) -> str:
    return ", ".join(modules if len(modules) <= 3 else [*modules[:2], f"{len(modules) - 2} more"])


def _cells(counts: list[int]) -> tuple[str, str, str]:
    statistics = f"{counts[3]} of {counts[2]} frozen" if counts[3] else ""
    return f"{counts[0]:,}", f"{counts[1]:,}", statistics


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        f"{cell:>{width}}" if column in (2, 3) else f"{cell:<{width}}"
        for column, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]

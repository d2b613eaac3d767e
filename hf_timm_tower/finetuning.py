"""Freezing: which parameters train, and which normalisation layers keep their running statistics."""

import torch.nn as nn
from timm.models import group_modules, group_parameters

from .core.errors import ArgumentError, ConfigError


def lock_trunk(trunk: nn.Module, unlocked_groups: int) -> set[str]:
    """Freeze the trunk but for its last `unlocked_groups` layer groups, as timm's `group_matcher` cuts them.

    The result depends on this call alone: an earlier lock leaves no trace.

    Args:
        trunk: A timm model.
        unlocked_groups: Number of groups, counted from the output, that stay trainable.

    Returns:
        Names of the trunk's modules that hold frozen parameters or lie in a frozen group.

    Raises:
        ArgumentError: not a whole number from 0 to the number of groups.
        ConfigError: the trunk has no groups and more than 0 were asked for.
    """
    if isinstance(unlocked_groups, bool) or not isinstance(unlocked_groups, int) or unlocked_groups < 0:
        raise ArgumentError(f"unlocked_groups={unlocked_groups!r}: expected a whole number from 0")
    if unlocked_groups == 0:
        trunk.requires_grad_(False)
        return {name for name, _ in trunk.named_modules()}
    if not hasattr(trunk, "group_matcher"):
        raise ConfigError(
            f"unlocked_groups={unlocked_groups}: {type(trunk).__name__} has no layer groups in timm; only 0 works"
        )
    groups = group_parameters(trunk, trunk.group_matcher())  # type: ignore[operator]
    order = sorted(groups)
    if unlocked_groups > len(order):
        raise ArgumentError(f"unlocked_groups={unlocked_groups}: {type(trunk).__name__} has {len(order)} layer groups")
    open_groups = set(order[len(order) - unlocked_groups :])
    for index, names in groups.items():
        for name in names:
            trunk.get_parameter(name).requires_grad_(index in open_groups)
    modules = group_modules(trunk, trunk.group_matcher(), reverse=True)  # type: ignore[operator]
    return {name for name, index in modules.items() if index not in open_groups}


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module updates running statistics in train mode."""
    return getattr(module, "running_mean", None) is not None or getattr(module, "running_var", None) is not None


def summary_table(model: nn.Module) -> str:
    """A table of the tower's parts: name, module, parameters, trainable parameters."""
    rows = [("part", "module", "parameters", "trainable")]
    for root in ("trunk", "head"):
        part = getattr(model, root)
        rows.append(_row(root, part))
        rows += [_row(f"  {name}", child) for name, child in part.named_children()]
    rows.append(_row("total", model))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for index, (name, module, total, trainable) in enumerate(rows):
        lines.append(
            f"{name:<{widths[0]}}  {module:<{widths[1]}}  {total:>{widths[2]}}  {trainable:>{widths[3]}}".rstrip()
        )
        if index == 0:
            lines.append("-" * (sum(widths) + 6))
    return "\n".join(lines)


def _row(name: str, module: nn.Module) -> tuple[str, str, str, str]:
    parameters = list(module.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return name, type(module).__name__, f"{total:,}", f"{trainable:,}"

"""What of a stored tower is frozen: applied to a tower that was just built.

A parameter is frozen by `requires_grad`. Running statistics are frozen by a hook on the module that has them, which
puts it into eval mode before every forward: so they stay after `.train()` on any part, in copies and pickles and in
anybody's training loop, and neither the module tree nor the state dict changes.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch.nn as nn

from .errors import ConfigError, shown

_FROZEN_KEYS = ("parameters", "statistics")
_MOST_FROZEN = 100_000


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module itself has state that moves in train mode: running statistics, or spectral norm's vectors.

    Running statistics are buffers called `running_...` (`running_mean`; `running_std` in a BatchRenorm of somebody's
    own), as in torch and timm, or `moving_...`, as elsewhere. State under other names, such as a queue, is not known.
    """
    buffers = module._buffers
    return any(
        buffer is not None
        and (name.startswith(("running_", "moving_")) or (name.endswith("_u") and f"{name[:-1]}v" in buffers))
        for name, buffer in buffers.items()
    )


def eval_before_forward(module: nn.Module, inputs: Any) -> None:
    """The hook."""
    module.training = False


def has_frozen_statistics(module: nn.Module) -> bool:
    """Whether the module's statistics are frozen."""
    return any(hook is eval_before_forward for hook in module._forward_pre_hooks.values())


def freeze_statistics(module: nn.Module) -> None:
    """Freeze the module's statistics."""
    if not has_frozen_statistics(module):
        # before other hooks: that of the old spectral norm looks at the mode too
        module.register_forward_pre_hook(eval_before_forward, prepend=True)
    module.training = False


def keep_statistics(tower: nn.Module) -> None:
    """Put modules with frozen statistics into eval mode now; to be called at the end of a tower's `train`.

    They go there by themselves before each forward. But a module that took the place of another since (`SyncBatchNorm`
    for `BatchNorm`) has no hook yet; it gets one here.
    """
    names: tuple[str, ...] = getattr(tower, "_frozen_statistics", ())
    if not names:
        return
    modules = dict(tower.named_modules())
    for name in names:
        if name in modules and keeps_statistics(modules[name]):
            freeze_statistics(modules[name])


def check_frozen(frozen: dict[str, Any] | None) -> None:
    """Refuse, by `ConfigError`, what is not a frozen state: `parameters` and `statistics`, each a list of names."""
    for key, names in (frozen or {}).items():
        if key not in _FROZEN_KEYS:
            raise ConfigError(f"frozen: unknown key {shown(key)}; expected {' and '.join(_FROZEN_KEYS)}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"frozen[{key!r}]: expected a list of names, found {shown(names)}")
        if len(names) > _MOST_FROZEN:
            raise ConfigError(f"frozen[{key!r}]: {len(names)} names, expected at most {_MOST_FROZEN}")


def frozen_names(tower: nn.Module, frozen: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The parameters, and modules with statistics, that a frozen state names, each by itself or by a module above.

    `ConfigError` where it is none, or names what the tower does not have.
    """
    check_frozen(frozen)
    first_names = {id(parameter): name for name, parameter in tower.named_parameters()}
    every_name = dict(tower.named_parameters(remove_duplicate=False))
    # DETR has norms whose weight and bias are buffers in the place of BatchNorm: what was frozen there still is.
    fixed = [name for name, _ in tower.named_buffers() if name.endswith((".weight", ".bias"))]
    parameters = _names_under(frozen.get("parameters", []), [*every_name, *fixed], "parameters") - set(fixed)
    with_statistics = [name for name, module in tower.named_modules() if keeps_statistics(module)]
    statistics = _names_under(frozen.get("statistics", []), with_statistics, "statistics")
    return {first_names[id(every_name[name])] for name in parameters}, statistics


def apply_frozen(tower: nn.Module, frozen: dict[str, Any] | None) -> None:
    """Freeze what a config says was frozen, in a tower that was just built from it; `ConfigError` as `frozen_names`."""
    if frozen is None:
        return
    parameters, statistics = frozen_names(tower, frozen)
    for name, parameter in tower.named_parameters():
        if name in parameters:
            parameter.requires_grad_(False)
    freeze_statistics_of(tower, statistics)


def freeze_statistics_of(tower: nn.Module, names: Collection[str]) -> None:
    """Freeze the statistics of the modules of these names in the tower."""
    for name, module in tower.named_modules():
        if name in names:
            freeze_statistics(module)
    tower._frozen_statistics = tuple(sorted(names))  # type: ignore[assignment]


def _names_under(entries: Sequence[str], names: Iterable[str], key: str) -> set[str]:
    """The names that the entries stand for: each for itself and all under it."""
    under: dict[str, list[str]] = {}
    for name in names:
        at = len(name)
        while at >= 0:
            under.setdefault(name[:at], []).append(name)
            at = name.rfind(".", 0, at)
    missing = [entry for entry in entries if entry not in under]
    if missing:
        near = difflib.get_close_matches(missing[0][:80], list(under)[:10_000], n=3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise ConfigError(
            f"frozen[{key!r}]: the tower has no {shown(missing[0])[1:-1]}{hint}; the config is of another tower"
        )
    return {name for entry in entries for name in under[entry]}

"""Running statistics that stay where they are.

A hook on the module that has them puts it into eval mode before every forward. So they stay after `.train()` on any
part, in copies and pickles and in anybody's training loop, and neither the module tree nor the state dict changes.
"""

from collections.abc import Collection
from typing import Any

import torch.nn as nn


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


def hold_at_call(module: nn.Module, inputs: Any) -> None:
    """The hook."""
    module.training = False


def is_held(module: nn.Module) -> bool:
    """Whether the module's statistics are frozen."""
    return any(hook is hold_at_call for hook in module._forward_pre_hooks.values())


def hold(module: nn.Module) -> None:
    """Freeze the module's statistics."""
    if not is_held(module):
        # before other hooks: that of the old spectral norm looks at the mode too
        module.register_forward_pre_hook(hold_at_call, prepend=True)
    module.training = False


def release(module: nn.Module, training: bool) -> None:
    """Let them move again."""
    # not by the handle that registering gave: a copy of the module has none
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is hold_at_call]:
        del module._forward_pre_hooks[key]
    module.training = training


def hold_only(tower: nn.Module, names: Collection[str]) -> None:
    """Freeze the statistics of the modules of these names in the tower, and of no others."""
    for name, module in tower.named_modules():
        if name in names:
            hold(module)
        elif is_held(module):
            release(module, tower.training)
    tower._held_statistics = tuple(sorted(names))  # type: ignore[assignment]


def keep_statistics(tower: nn.Module) -> None:
    """Put modules with frozen statistics into eval mode now; to be called at the end of a tower's `train`.

    They go there by themselves before each forward. But a module that took the place of another since (`SyncBatchNorm`
    for `BatchNorm`) has no hook yet; it gets one here.
    """
    names: tuple[str, ...] = getattr(tower, "_held_statistics", ())
    if not names:
        return
    modules = dict(tower.named_modules())
    for name in names:
        if name in modules and keeps_statistics(modules[name]):
            hold(modules[name])

"""What of a tower is frozen: set, described for a config, and what a frozen trunk need not compute.

A parameter is frozen by `requires_grad`, running statistics by a hook (see `reader/freezing.py`). A custom head may
have parameters that it was made with as not trainable, and timm itself freezes some that only a classifier needs
(EfficientViM's `weights`); they are part of head and trunk, not of the frozen state: no lock or unlock touches them.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn

from ..heads.isolation import copy_module
from ..reader.freezing import (
    eval_before_forward,
    freeze_statistics,
    freeze_statistics_of,
    frozen_names,
    has_frozen_statistics,
    keeps_statistics,
)
from ..reader.trunk import every_module
from .layer_groups import smallest_cover


def freeze(tower: nn.Module, frozen: Collection[str], statistics: Collection[str]) -> None:
    """Freeze the parameters of these names, and the statistics of the modules of these names; open all others."""
    fixed = _fixed(tower)
    for name, parameter in tower.named_parameters():
        _set_grad(parameter, name not in frozen and name not in fixed)
    freeze_only_statistics_of(tower, statistics)


def note_fixed(tower: nn.Module) -> None:
    """Remember which parameters head and trunk were made with as not trainable; to be called when they are made."""
    fixed: list[str] = []
    with torch._C.DisableTorchFunction():  # inside `skip_init` every look at a tensor goes through Python
        parameters = (each for part in every_module(tower) for each in part._parameters.values())
        all_train = all(each is None or each.requires_grad for each in parameters)
    if not all_train:
        named = tower.named_parameters()
        fixed += [name for name, each in named if name.startswith("head.") and not each.requires_grad]
        fixed += [f"trunk.{name}" for name in _frozen_by_timm(tower.trunk)]  # type: ignore[arg-type]
    tower._fixed_in_head = frozenset(fixed)  # type: ignore[assignment]


def describe_frozen(tower: nn.Module) -> dict[str, list[str]] | None:
    """The frozen state for a config, None where everything trains.

    Returns:
        `parameters`: what is frozen; `statistics`: whose running statistics are; each absent where empty. A name is
        one of a parameter, or of a module and stands for all in it: `["trunk"]` is the whole trunk.
    """
    fixed = _fixed(tower)
    parameters = {name: parameter for name, parameter in tower.named_parameters() if _can_train(parameter)}
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad and name not in fixed]
    with_statistics = [name for name, module in tower.named_modules() if keeps_statistics(module)]
    frozen_modules = [name for name, module in tower.named_modules() if has_frozen_statistics(module)]
    state = {
        # a module whose other parameters never train is frozen as a whole
        "parameters": smallest_cover(frozen, [name for name in parameters if name not in fixed]),
        "statistics": smallest_cover(frozen_modules, with_statistics),
    }
    return {key: names for key, names in state.items() if names} or None


def restore_frozen(tower: nn.Module, frozen: dict[str, Any] | None) -> None:
    """Freeze what a config says was frozen, and open all else; without a word about it the tower stays as it was built.

    Args:
        tower: Built from the config.
        frozen: From `describe_frozen`.

    Raises:
        ConfigError: not a frozen state, or it names what the tower does not have.
    """
    if frozen is not None:
        freeze(tower, *frozen_names(tower, frozen))


@contextmanager
def head_without_lock(tower: nn.Module) -> Iterator[nn.Module]:
    """The tower's head as it is with nothing frozen, for a while: a lock is no part of the head's own form."""
    head: nn.Module = tower.head  # type: ignore[assignment]
    fixed = _fixed(tower)
    frozen = [
        parameter
        for name, parameter in tower.named_parameters()
        if name.startswith("head.") and name not in fixed and not parameter.requires_grad
    ]
    frozen_modules = [(module, module.training) for module in head.modules() if has_frozen_statistics(module)]
    try:
        for module, _ in frozen_modules:
            unfreeze_statistics(module, head.training)
        for parameter in frozen:
            _set_grad(parameter, True)
        yield head
    finally:
        for parameter in frozen:
            _set_grad(parameter, False)
        for module, mode in frozen_modules:
            freeze_statistics(module)
            module.training = mode


def frozen_context(trunk: nn.Module, *inputs: Any) -> AbstractContextManager[Any]:
    """What to run a trunk in: `torch.no_grad()` if no gradient can flow through it, else nothing.

    Args:
        trunk: A module.
        inputs: What it is called with.
    """
    if not torch.is_grad_enabled() or needs_graph(trunk, *inputs):
        return nullcontext()
    return torch.no_grad()


def needs_graph(module: nn.Module, *inputs: Any) -> bool:
    """Whether a gradient may flow through a call of the module, as it is now.

    It may if a parameter, a buffer or an input requires grad; and somebody's forward hook or replaced `forward` may
    bring in tensors from elsewhere (prompts), so these count as well.
    """
    for value in inputs:
        if not isinstance(value, torch.Tensor) or value.requires_grad:
            return True
    # written for speed, it runs in every training step: 0.1 ms for 300 modules
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if part._forward_hooks or "forward" in part.__dict__:
            return True
        if part._forward_pre_hooks:
            for hook in part._forward_pre_hooks.values():
                if hook is not eval_before_forward:
                    return True
        if part._parameters:
            for parameter in part._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    return True
        if part._buffers:
            for buffer in part._buffers.values():
                if buffer is not None and buffer.requires_grad:
                    return True
        if part._modules:
            waiting.extend(part._modules.values())
    return False


def _fixed(tower: nn.Module) -> set[str]:
    noted: frozenset[str] = getattr(tower, "_fixed_in_head", frozenset())
    return {name for name, parameter in tower.named_parameters() if name in noted and not parameter.requires_grad}


def _frozen_by_timm(trunk: nn.Module) -> list[str]:
    """Names of parameters that timm itself freezes, whatever else somebody has frozen in this trunk."""
    if all(parameter.requires_grad for parameter in trunk.parameters()) or not hasattr(trunk, "reset_classifier"):
        return []
    # timm freezes them in `reset_classifier`, so ask a copy, of no memory, that is open
    twin: Any = copy_module(trunk, device="meta")
    for parameter in twin.parameters():
        _set_grad(parameter, True)
    twin.reset_classifier(twin.num_classes)
    return [name for name, parameter in twin.named_parameters() if _can_train(parameter) != parameter.requires_grad]


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _set_grad(parameter: nn.Parameter, trains: bool) -> None:
    if parameter.requires_grad != trains and _can_train(parameter):
        parameter.requires_grad_(trains)


def unfreeze_statistics(module: nn.Module, training: bool) -> None:
    """Let them move again."""
    # not by the handle that registering gave: a copy of the module has none
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is eval_before_forward]:
        del module._forward_pre_hooks[key]
    module.training = training


def freeze_only_statistics_of(tower: nn.Module, names: Collection[str]) -> None:
    """Freeze the statistics of the modules of these names in the tower, and of no others."""
    for name, module in tower.named_modules():
        if has_frozen_statistics(module) and name not in names:
            unfreeze_statistics(module, tower.training)
    freeze_statistics_of(tower, names)

"""How a trunk differs from the one that its config makes: what acts in training alone, and what was done to it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

# Attributes that say how a module runs now, not what it is: they follow from the mode, from settings of the process,
# or are set anew by whoever trains. Blocks fused for inference show by their weights; timm's own flag need not.
_HOW_IT_RUNS = frozenset({"training", "grad_checkpointing", "fused_attn", "inference_mode"})
# Wrappers that leave the state dict's keys as they are: the names that they put between are left out.
_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
_SHOWN = 3


def compare_training(trunk: nn.Module, again: nn.Module) -> list[str]:
    """What a trunk has otherwise than the trunk that was built from its config, though outputs need not show it.

    Attributes that the layer's class does not have of itself are the user's own and not compared.

    Args:
        trunk: As it is now.
        again: Built from its config.

    Returns:
        One line for each layer that differs, such as `patch_drop (PatchDropout): prob is 0.0, built again 0.5`.
    """
    ours, theirs = dict(_named(trunk)), dict(_named(again))
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        live, twin = ours.get(name), theirs.get(name)
        if live is None or twin is None or not _is_same_kind(live, twin):
            lines.append(f"{name or 'it'} is {_kind(live)}, built again {_kind(twin)}")
            continue
        have, wanted = _plain_attributes(live), _plain_attributes(twin)
        odd = [key for key in wanted if _differ(have.get(key, _GONE), wanted[key])]
        if odd:
            told = (f"{key} is {have.get(key, _GONE)!r}, built again {wanted[key]!r}" for key in odd[:_SHOWN])
            lines.append(f"{name or 'it'} ({type(live).__name__}): {'; '.join(told)}")
    return lines


def what_changed(trunk: nn.Module, again: nn.Module) -> str:
    """Why a trunk is not the one that its config makes, in words about what was done to it, and the way out.

    Args:
        trunk: As it is now.
        again: Built from its config.

    Returns:
        One or two sentences.
    """
    parts = dict(_named(trunk))
    twins = dict(_named(again))
    kinds = {name: type(part).__name__ for name, part in trunk.named_modules()}
    modules = {name: type(part).__module__ for name, part in trunk.named_modules()}
    if found := [name for name, kind in kinds.items() if kind == "OptimizedModule"]:
        return (
            f"{_where(found)} is compiled by torch.compile, which wraps it and renames its weights. Save the module "
            "inside (tower.trunk = tower.trunk._orig_mod), or compile in place with tower.trunk.compile()."
        )
    if found := [name for name, module in modules.items() if module.split(".")[0] == "peft"]:
        return (
            f"adapters of peft were put into {_where(found)}. Merge them into the weights before the tower is saved "
            "(peft's merge_and_unload), or use peft's get_peft_model and save the adapter."
        )
    if found := [name for name, kind in kinds.items() if kind.startswith("FrozenBatchNorm")]:
        return (
            f"BatchNorm was exchanged for a frozen kind ({kinds[found[0]]}) in {_where(found)}, as timm.utils.freeze "
            "does it. Undo it with timm.utils.unfreeze before the tower is saved; tower.lock(freeze_bn_stats=True) "
            "freezes statistics so that they are saved with the tower."
        )
    if found := [name for name, module in modules.items() if module == "torch.nn.utils.parametrize"]:
        return (
            f"weights are parametrized (torch.nn.utils.parametrize) in {_where(found)}. Put them back before the tower "
            "is saved: torch.nn.utils.parametrize.remove_parametrizations."
        )
    if found := [name for name, part in parts.items() if any(key.endswith("_mask") for key in part._buffers)]:
        return (
            f"weights are pruned by a mask (torch.nn.utils.prune) in {_where(found)}. Make it permanent before the "
            "tower is saved: torch.nn.utils.prune.remove."
        )
    if found := [name for name, twin in twins.items() if _is_fused(parts.get(name), twin)]:
        return (
            f"blocks were fused for inference (timm.utils.reparameterize_model) in {_where(found)}, and timm cannot be "
            "told to build them so. Save the tower before they are fused, and fuse it after loading."
        )
    lines = compare_training(trunk, again)
    ours, theirs = trunk.state_dict(), again.state_dict()
    odd = sorted(key for key in ours.keys() | theirs.keys() if _shape(ours.get(key)) != _shape(theirs.get(key)))
    if odd:
        lines.append(f"{len(odd)} weights differ in name or shape ({', '.join(odd[:_SHOWN])})")
    lines += _changed_buffers(trunk, again)
    said = "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
    return (
        f"it was changed by hand: {said or 'its code or something that is no weight'}. Give values when the tower is "
        "built (drop_path=..., model_kwargs={...}); for other changes subclass TimmModel and override _create_trunk."
    )


def _changed_buffers(trunk: nn.Module, again: nn.Module) -> list[str]:
    """Buffers that are computed, not stored, and hold something else: cast down and up again, or overwritten."""
    ours, theirs = dict(trunk.named_buffers()), dict(again.named_buffers())
    stored = trunk.state_dict().keys()
    return [
        f"the buffer {key}, which timm computes, holds other values (a tower that was cast down and up again gets them "
        "back by init_non_persistent_buffers() of the layers that have it, or by loading it again)"
        for key in ours.keys() & theirs.keys()
        if key not in stored and not torch.equal(ours[key].cpu(), theirs[key].to("cpu", ours[key].dtype))
    ][:1]


class _Gone:
    def __repr__(self) -> str:
        return "not there"


_GONE = _Gone()


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules(remove_duplicate=False):
        yield ".".join(step for step in name.split(".") if step not in _WRAPPERS), part


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _HOW_IT_RUNS and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _differ(one: object, other: object) -> bool:
    return one != other and not (one != one and other != other)  # NaN is NaN


def _is_same_kind(live: nn.Module, twin: nn.Module) -> bool:
    # Classes that inherit from the layer's are made by FSDP and by users; SyncBatchNorm takes BatchNorm's place.
    return isinstance(live, type(twin)) or (isinstance(live, _NormBase) and isinstance(twin, _NormBase))


def _is_fused(live: nn.Module | None, twin: nn.Module) -> bool:
    can = any(hasattr(twin, name) for name in ("fuse", "reparameterize", "switch_to_deploy"))
    if not can or live is None:
        return False
    return {key: _shape(value) for key, value in live.state_dict().items()} != {
        key: _shape(value) for key, value in twin.state_dict().items()
    }


def _kind(part: nn.Module | None) -> str:
    return "not there" if part is None else type(part).__name__


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _where(names: list[str]) -> str:
    named = [f"trunk.{name}" if name else "the trunk" for name in names]
    return ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more layers" if len(named) > _SHOWN else "")

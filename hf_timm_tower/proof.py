"""The proof of a save: what was loaded back is the tower that was saved, in bits, behaviour and outputs.

It works on the **bare** tower: trunk and head as their classes run them, whatever a training script has wrapped around
the live ones (autocast, compiled or replaced forwards, activation checkpointing, hooks). The live tower's modes, caches
and gradients are not touched.
"""

import dis
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from .files.fingerprint import run_probe
from .files.ties import same_bits
from .heads.isolation import copy_head
from .reader.config import TimmTowerConfig
from .reader.errors import HeadError, TowerError, WeightsError
from .reader.freezing import eval_before_forward
from .reader.tower import Tower
from .reader.trunk import native_size
from .trunk_changes import compare_training, what_changed

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
# What compilers and trainers put on a module: torch.compile, accelerate, torch's own activation checkpointing.
_WRAPPED = ("_compiled_call_impl", "_original_forward", "_old_forward", "_hf_hook")
# What every module has: its tensors, parts and hooks are looked at by themselves, its mode is no part of its form.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_COMPARED = 4096  # numbers of a tensor that is neither parameter nor buffer; larger ones are known by their memory
_WRAPPER_CHILD = "_checkpoint_wrapped_module"


def bare_tower(tower: Any, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """A live tower without what is wrapped around it and its parts, on the same parameters.

    Args:
        tower: With `config`, `trunk`, `head` and maybe `classifier`. A TimmModel stays one of its class, since a
            subclass may have parts and a forward of its own; of a transformers model its parts are taken.
        weights: What the head's copy holds in place of the live head's tensors, where those are spread over processes.

    Raises:
        TowerError: a module of the trunk has a forward that was put on it by hand.
        HeadError: the head cannot be copied.
    """
    of_head = {key.removeprefix("head."): value for key, value in (weights or {}).items() if key.startswith("head.")}
    trunk, head = bare_copy(tower.trunk), copy_head(tower.head, of_head)
    if not hasattr(type(tower), "_is_tower_base"):
        classifier = getattr(tower, "classifier", None)
        classifier = None if classifier is None else bare_copy(classifier, "classifier")
        return Tower(tower.config, trunk, head, classifier)
    twin: nn.Module = object.__new__(type(tower))
    twin.__dict__.update(_own_fields(tower))
    twin.__dict__.pop("forward", None)
    made = {id(tower.trunk): trunk, id(tower.head): head}
    for key, child in tower._modules.items():
        twin._modules[key] = bare_copy(child, key, made)
    return twin


def bare_copy(module: nn.Module, name: str = "trunk", made: dict[int, nn.Module] | None = None) -> nn.Module:
    """The module tree anew, on the same parameters and buffers, as the classes of its modules run it.

    Args:
        module: A trunk, or a part of one.
        name: For messages.
        made: Copies of modules that are there already.

    Raises:
        TowerError: a module has a forward that was put on it by hand: a config cannot describe it.
    """
    made = {} if made is None else made
    while _WRAPPER_CHILD in module._modules:
        module = module._modules[_WRAPPER_CHILD]  # type: ignore[assignment]
    if id(module) in made:
        return made[id(module)]
    fields = _own_fields(module)
    replaced = fields.pop("forward", None)
    own = None if replaced is None else _own_method(replaced, module)
    if replaced is not None and own is None and not _wraps_own_forward(replaced, module):
        raise TowerError(
            f"the tower was not saved: the forward of {name} ({type(module).__name__}) was replaced on the module, "
            "which no config can describe. Take it off, or subclass TimmModel and override _create_trunk."
        )
    twin = made[id(module)] = object.__new__(type(module))
    twin.__dict__.update(fields)
    if own is not None:
        twin.__dict__["forward"] = getattr(twin, own)
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else bare_copy(child, f"{name}.{key}", made)
    return twin


def _own_fields(module: nn.Module) -> dict[str, Any]:
    """The attributes of a copy: containers anew, of the hooks those that are part of the module."""
    fields = {
        key: value.copy() if type(value) in (dict, OrderedDict, list, set) else value
        for key, value in vars(module).items()
        if key not in _WRAPPED
    }
    for key in _HOOKS:
        fields[key] = OrderedDict((handle, hook) for handle, hook in fields[key].items() if _is_structural(hook))
    return fields


def _own_method(replaced: Any, module: nn.Module) -> str | None:
    """The name of the module's own method that was made its forward, as FasterNet's layers do when they are built."""
    name = getattr(replaced, "__name__", "")
    bound = getattr(replaced, "__self__", None) is module
    return name if bound and getattr(type(module), name, None) is getattr(replaced, "__func__", None) else None


def _wraps_own_forward(replaced: Any, module: nn.Module) -> bool:
    """Whether a forward on the instance is the class's own with something around it that computes the same."""
    seen = 0
    while seen < 16:
        plain = getattr(replaced, "__func__", replaced)
        if plain is type(module).forward:
            return True
        inner = [getattr(plain, key, None) for key in ("_torchdynamo_orig_callable", "__wrapped__", "func")]
        replaced = next((each for each in inner if each is not None), None)
        if replaced is None:
            return False
        seen += 1
    return False


def _is_structural(hook: Any) -> bool:
    """Hooks that are part of what a module is: torch's old weight and spectral norm, and frozen statistics."""
    return hook is eval_before_forward or type(hook).__module__.startswith("torch.nn.utils.")


def _may_change(hook: Any) -> bool:
    """Whether a forward hook may give another input or output: one whose code returns nothing but None cannot."""
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if code is None:
        return True
    steps = list(dis.get_instructions(code))
    returns = [number for number, step in enumerate(steps) if step.opname == "RETURN_VALUE"]
    constants = [step.argval for step in steps if step.opname == "RETURN_CONST"]
    last = [steps[number - 1] for number in returns]
    return any(value is not None for value in constants) or any(
        step.opname != "LOAD_CONST" or step.argval is not None for step in last
    )


def refuse_changing_hooks(tower: Any, config: TimmTowerConfig, outputs: dict[str, torch.Tensor]) -> None:
    """Refuse a trunk whose forward hooks change what it gives: they are code, and would be lost without a word.

    Hooks that only look (profilers, features that are kept) are no part of the tower. Those whose code can return
    nothing are not called.

    Args:
        tower: Live.
        config: That of the save.
        outputs: Of the tower without hooks, from `prove`.

    Raises:
        TowerError: names the modules.
    """
    hooked = [
        f"trunk.{name}".rstrip(".")
        for name, module in tower.trunk.named_modules()
        for key in _FORWARD_HOOKS
        for hook in getattr(module, key).values()
        if not _is_structural(hook) and _may_change(hook)
    ]
    if not hooked:
        return
    live = Tower(tower.config, tower.trunk, copy_head(tower.head))
    if not _same_outputs(run_probe(live, config.in_chans, native_size(config)), outputs):
        raise TowerError(
            f"the tower was not saved: forward hooks of {', '.join(hooked[:4])} change what the trunk gives, and hooks "
            "are not stored. Remove them, or subclass TimmModel and override _create_trunk."
        )


def prove(bare: Any, again: Any, config: TimmTowerConfig, *, form_is_proven: bool) -> dict[str, torch.Tensor]:
    """Compare a tower with what was loaded back from its files.

    Args:
        bare: From `bare_tower`, on any device.
        again: Loaded back on the CPU.
        config: The config that was written.
        form_is_proven: An earlier save proved trunk and head of this form: only bits are compared.

    Returns:
        The outputs on the probe, on the tower's device: path -> tensor on the CPU.

    Raises:
        WeightsError, HeadError, TowerError: says what differs.
    """
    _compare_weights(bare, again)
    size = native_size(config)
    device = next(bare.parameters()).device
    outputs = run_probe(again.to(device), config.in_chans, size)
    if form_is_proven:
        return outputs
    _compare_behaviour(bare.trunk, again.trunk)
    here = run_probe(_reset(bare), config.in_chans, size)
    if device.type == "cpu" and not _same_outputs(here, outputs):
        # Weights in another memory format, or not aligned, may give other last bits than the same weights as a file
        # brings them: the comparison that counts is between equal layouts.
        here = run_probe(_plainly_laid_out(bare), config.in_chans, size)
    _compare_outputs(here, outputs, exact=device.type == "cpu")
    return outputs


def form_of(tower: Any) -> tuple[Any, ...]:
    """What a proof of a tower's form holds for: classes, structure and settings of all modules, not their weights."""
    found: list[Any] = []
    for part in ("trunk", "head"):
        for name, module in getattr(tower, part).named_modules():
            tensors = tuple(
                (key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                for table in (module._parameters, module._buffers)
                for key, tensor in table.items()
                if tensor is not None
            )
            hooks = tuple(id(hook) for key in _HOOKS for hook in getattr(module, key).values())
            settings = [(key, _setting(value)) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE]
            found.append((part, name, type(module), tensors, hooks, settings))
    return tuple(found)


def _setting(value: Any, depth: int = 4) -> Any:
    """Equal for equal settings of a module: numbers, words and what holds them by value, all else by identity."""
    kind = type(value).__qualname__
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
        return kind, value
    if isinstance(value, (tuple, list, set, frozenset, dict)) and depth:
        return kind, [_setting(item, depth - 1) for item in (value.items() if isinstance(value, dict) else value)]
    if isinstance(value, torch.Tensor):
        if value.numel() > _MOST_COMPARED or value.is_meta:
            return kind, id(value), value._version
        return kind, value.dtype, value.shape, value.detach().cpu().reshape(-1).tolist()
    if callable(value) or not hasattr(value, "__dict__") or not depth:
        return kind, id(value)
    return kind, id(value), _setting(vars(value), depth - 1)


def _compare_weights(bare: nn.Module, again: nn.Module) -> None:
    ours, theirs = bare.state_dict(), again.state_dict()
    if set(ours) != set(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise WeightsError(
            f"the tower was not saved: built again from its config it has other weights ({len(odd)} keys differ, "
            f"{', '.join(odd[:4])}). {what_changed(bare.trunk, again.trunk)}"  # type: ignore[arg-type]
        )
    changed = [key for key, tensor in ours.items() if not same_bits(tensor.detach().cpu(), theirs[key].detach())]
    if changed:
        raise WeightsError(
            f"the tower was not saved: {len(changed)} tensors came back with other bits ({', '.join(changed[:4])})"
        )


def _compare_behaviour(trunk: nn.Module, again: nn.Module) -> None:
    """Rates and momenta act in training only, so that no output shows them."""
    if odd := compare_training(trunk, again):
        raise TowerError(
            f"the tower was not saved: the trunk was changed after it was built: {'; '.join(odd[:4])}. "
            f"{what_changed(trunk, again)} Give such values when the tower is built (drop_path=..., patch_drop=..., "
            "model_kwargs={...})."
        )


def _reset(bare: Any) -> Any:
    """Drop what trunks cache between calls in evaluation (LeViT, TinyViT): timm does so on the way to train mode."""
    bare.trunk.train()
    bare.trunk.eval()
    return bare


def _plainly_laid_out(bare: Any) -> nn.Module:
    def plain(module: nn.Module) -> nn.Module:
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if tensor is not None:
                        new = tensor.detach().clone(memory_format=torch.contiguous_format)
                        table[key] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
        return module

    return plain(bare_tower(bare))


def _same_outputs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(same_bits(tensor, theirs[path]) for path, tensor in ours.items())


def _compare_outputs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], exact: bool) -> None:
    if set(ours) != set(theirs):
        raise HeadError(f"the tower was not saved: loaded back it gives {sorted(theirs)}, not {sorted(ours)}")
    for path, tensor in ours.items():
        back = theirs[path]
        if same_bits(tensor, back):
            continue
        close = tensor.shape == back.shape and torch.allclose(tensor, back, rtol=1e-4, atol=1e-5, equal_nan=True)
        if exact or not close:
            difference = (tensor.double() - back.double()).abs().max().item() if tensor.shape == back.shape else "shape"
            raise TowerError(
                f"the tower was not saved: loaded back it gives other outputs at {path or 'the embedding'} (largest "
                f"difference {difference}). The trunk or head holds something that neither its config nor its "
                "state dict has; subclass TimmModel and override _create_trunk or _create_head."
            )

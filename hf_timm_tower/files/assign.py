"""Putting tensors into a module, strictly: all keys fit or nothing is touched. Ties are found and kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..reader.errors import WeightsError
from .ties import same_bits, view_of

_SHOWN = 5


def assign_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    ties: Iterable[Sequence[str]] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    allow_missing: Collection[str] = (),
) -> None:
    """Make `tensors` the parameters and persistent buffers of `module`, without copying. All or nothing.

    Each parameter is replaced by a new one on the given tensor, with the old one's `requires_grad`; what the module
    had is never written to. Keys that hold the same tensor object become one parameter, keys whose tensors lie on
    the same memory become parameters on the same memory. A tie that the module itself has stays, and keys that only
    repeat it may be missing.

    Args:
        module: built on any device, `meta` included, its values never looked at.
        tensors: key -> tensor, as `read_weights` gives them.
        source: where they come from, for the error's text.
        ties: further groups of keys to make one parameter; their tensors must have equal bits.
        dtype: floating tensors are cast to it; None keeps each tensor's own.
        device: where everything goes; None leaves it where it is. Non-persistent buffers go along, except those on
            `meta`, which their owner has yet to compute.
        allow_missing: keys that may be missing: those stay what they are.

    Raises:
        WeightsError: missing, unexpected or wrongly shaped keys, or tied keys that differ: one error that lists them.
    """
    parts = list(module.named_modules(remove_duplicate=False))
    slots = {
        f"{prefix}.{name}" if prefix else name: _Slot(part, name, tensor)
        for prefix, part in parts
        for name, tensor in _persistent(part)
    }
    kinds = {type(part): part for _, part in parts}.values()
    is_plain = all(_loads_plainly(part, is_root=part is module) for part in kinds) and not any(
        part._load_state_dict_pre_hooks or part._state_dict_hooks or part._state_dict_pre_hooks for _, part in parts
    )
    state: Mapping[str, Any] = (
        {key: slot.tensor for key, slot in slots.items()} if is_plain else module.state_dict(keep_vars=True)
    )
    owned: dict[int, list[str]] = {}
    for key, slot in slots.items():
        if key in state:
            owned.setdefault(id(slot.tensor), []).append(key)
    groups = [keys for keys in owned.values() if len(keys) > 1] + [list(group) for group in ties]

    full = dict(tensors)
    differing: list[str] = []
    for keys in groups:
        present = [key for key in keys if key in full]
        if not present:
            continue
        first = full[present[0]]
        differing += [
            f"{key} and {present[0]}"
            for key in present[1:]
            if full[key] is not first and not same_bits(full[key], first)
        ]
        full.update((key, first) for key in keys)

    problems = _problems(state, full, set(allow_missing), differing)
    if problems:
        raise WeightsError(
            f"{source}: the weights do not fit, nothing was loaded.\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nThe config that builds this tower and the weights must come from the same save."
        )
    kept = {key: value for key, value in state.items() if key not in full and not value.is_meta}
    values = _values(state, {**full, **kept}, dtype, device)
    if is_plain:
        for key, value in values.items():
            # setattr, not the dictionaries below it: nn.LSTM keeps a list of its weights that way.
            setattr(slots[key].owner, slots[key].name, value)
        after = {key: _tensor_at(slots[key]) for key in values}
    else:
        # Several times slower, but what a module does to its own state dict is done.
        module.load_state_dict(values, strict=False, assign=True)
        after = module.state_dict(keep_vars=True)
    refused = [key for key in values if after[key] is not values[key]]
    if refused:
        raise WeightsError(
            f"{source}: {_some(refused)} did not reach the module: it overrides how attributes are set or a state dict "
            "is loaded, which a tower cannot use"
        )
    _move_other_buffers([part for _, part in parts], dtype, device)


@dataclass(frozen=True)
class _Slot:
    """Where a parameter or persistent buffer lives: attribute `name` of the module `owner`."""

    owner: nn.Module
    name: str
    tensor: Tensor


def _persistent(part: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What a module of its own (not its children) puts into a state dict, in that order."""
    for name, parameter in part._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in part._buffers.items():
        if buffer is not None and name not in part._non_persistent_buffers_set:
            yield name, buffer


def _tensor_at(slot: _Slot) -> Tensor | None:
    found = slot.owner._parameters.get(slot.name)
    return slot.owner._buffers.get(slot.name) if found is None else found


def _loads_plainly(part: nn.Module, is_root: bool) -> bool:
    """Whether the class leaves it to `nn.Module` what its state dict is."""
    kind = type(part)
    loads = kind._load_from_state_dict
    return (
        kind.state_dict is nn.Module.state_dict
        and kind.load_state_dict is nn.Module.load_state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        # BatchNorm's only makes up a counter that files from before 2018 lack.
        and (
            loads in (nn.Module._load_from_state_dict, nn.BatchNorm2d._load_from_state_dict)
            or (is_root and getattr(loads, "is_plain_at_the_root", False))
        )
        and kind.get_extra_state is nn.Module.get_extra_state
    )


def _problems(
    state: Mapping[str, object], given: Mapping[str, Tensor], allowed: Collection[str], differing: list[str]
) -> list[str]:
    """One line for each kind of misfit."""
    missing = [key for key in state if key not in given and key not in allowed]
    unexpected = [key for key in given if key not in state]
    shapes, kinds = [], []
    for key in state.keys() & given.keys():
        expected, found = state[key], given[key]
        if not isinstance(expected, Tensor):
            kinds.append(f"{key}: the module wants a {type(expected).__name__}, only tensors are stored")
        elif isinstance(expected, (UninitializedParameter, UninitializedBuffer)):
            continue  # a lazy module, which takes the shape it is given
        elif expected.shape != found.shape:
            shapes.append(f"{key}: found {list(found.shape)}, expected {list(expected.shape)}")
        elif _kind(expected) != _kind(found):
            kinds.append(f"{key}: found {found.dtype}, expected {expected.dtype}")
    lines = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("of another kind of number", kinds),
        ("one parameter in the tower but different in the file", differing),
    ]
    return [f"{len(keys)} {what}: {_some(keys)}" for what, keys in lines if keys]


def _values(
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
) -> dict[str, Tensor]:
    """Key -> the parameter or buffer to assign; one object for one tensor object, one memory for one memory."""
    memory: dict[tuple[object, ...], Tensor] = {}
    objects: dict[tuple[int, bool], Tensor] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in given.items():
        old = state[key]
        is_parameter = isinstance(old, nn.Parameter)
        name = (id(tensor), is_parameter)
        if name not in objects:
            moved = memory.setdefault(view_of(tensor), _converted(tensor.detach(), dtype, device))
            if is_parameter:
                objects[name] = nn.Parameter(moved, requires_grad=old.requires_grad)
            else:
                objects[name] = moved.view(moved.shape)
        values[key] = objects[name]
    return values


def _converted(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | int | None) -> Tensor:
    if dtype is None and device is None:
        return tensor
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _move_other_buffers(
    parts: Iterable[nn.Module], dtype: torch.dtype | None, device: torch.device | str | int | None
) -> None:
    if dtype is None and device is None:
        return
    moved: dict[int, Tensor] = {}
    for part in parts:
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None and not buffer.is_meta:
                # One buffer that several modules hold stays one.
                part._buffers[name] = moved.setdefault(id(buffer), _converted(buffer, dtype, device))








def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "real"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(sorted(keys)[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")

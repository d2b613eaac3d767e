"""Which keys of a state dict are one parameter, or share memory."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reader.errors import WeightsError
from ..reader.weights import same_bits as same_bits  # its users are where ties are asked for


@dataclass(frozen=True)
class Ties:
    """Groups of keys, each sorted, that are one thing.

    Attributes:
        tied: one parameter or buffer object under several names.
        shared: several objects on the same memory (same address, shape, strides and dtype).
    """

    tied: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[str, ...], ...]


def find_ties(module: nn.Module, state: Mapping[str, Tensor]) -> Ties:
    """Find keys of `state` that are the same parameter or buffer of `module`, or lie on the same memory.

    Raises:
        WeightsError: a parameter overlaps another tensor in memory without being equal to it (a transposed or sliced
            view). Such weights would come back as two independent tensors.
    """
    by_object: dict[int, list[str]] = {}
    for key, tensor in _named_tensors(module):
        if key in state:
            by_object.setdefault(id(tensor), []).append(key)
    tied = [tuple(sorted(keys)) for keys in by_object.values() if len(keys) > 1]
    aliases = {key for group in tied for key in group[1:]}

    parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    by_storage: dict[tuple[torch.device, int], list[str]] = {}
    for key in state:
        tensor = state[key]
        if key not in aliases and tensor.numel() and not tensor.is_meta and tensor.layout == torch.strided:
            by_storage.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(key)
    shared = []
    for keys in by_storage.values():
        if len(keys) == 1:
            continue
        views: dict[tuple[object, ...], list[str]] = {}
        for key in keys:
            views.setdefault(view_of(state[key]), []).append(key)
        shared += [tuple(sorted(group)) for group in views.values() if len(group) > 1]
        _refuse_overlaps([group[0] for group in views.values()], state, parameters)
    return Ties(tuple(sorted(tied)), tuple(sorted(shared)))


def view_of(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same view of the same memory; unique for those that hold none."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout != torch.strided:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _refuse_overlaps(keys: list[str], state: Mapping[str, Tensor], parameters: Collection[str]) -> None:
    def span(key: str) -> tuple[int, int]:
        tensor = state[key]
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.dtype.itemsize

    ordered = sorted(keys, key=span)
    reach, widest = 0, ""
    for key in ordered:
        begin, end = span(key)
        if begin < reach and (key in parameters or widest in parameters):
            both = ", ".join(sorted((widest, key)))
            raise WeightsError(
                f"{both} overlap in memory but are different views of it; a file keeps no views, so they would "
                "come back as two independent tensors. Compute one from the other in forward, or clone it"
            )
        if end > reach:
            reach, widest = end, key

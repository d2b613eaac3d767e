"""Buffers that no checkpoint holds, and memory, where transformers builds on the meta device."""

from collections.abc import Mapping

import torch
import torch.nn as nn


def computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that are not in the state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}"] = buffer
    return found


def put_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put buffers into the places of uninitialised ones, on the device of those."""
    moved: dict[int, torch.Tensor] = {}
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        device = owner._buffers[leaf].device  # type: ignore[union-attr]
        # One buffer that several modules hold stays one.
        owner._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device=device))


def align(module: nn.Module) -> None:
    """Copy what begins at odd places in memory to places that are multiples of 64 bytes.

    Another model's checkpoint is mapped by transformers as it is; kernels may give other last bits for such tensors.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.detach().clone()


def move_to_meta(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to("meta", dtype)`, except that tied parameters stay tied."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    twin = tensor.detach().to("meta", dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                setattr(part, name, moved[id(tensor)])

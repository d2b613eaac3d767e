"""Building a model the way transformers builds it: on the meta device, without losing what is computed."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.nn as nn

from .build import Tower, build
from .config import TimmTowerConfig
from .skip_init import Budget, skip_init, within_budget


def build_for_transformers(
    config: TimmTowerConfig,
    *,
    with_classifier: bool,
    budget: Budget | None = None,
    make_head: Callable[[], nn.Module] | None = None,
) -> Tower:
    """Build on the CPU where transformers wants the meta device, with parameters that are not initialised.

    Everything is computed in float32 and then cast, as for a tower that is loaded and cast.

    Args:
        config: Completed or not; it is not changed.
        with_classifier: Add the classifier of `config.num_labels` classes.
        budget: What building may cost; the default limits if None.
        make_head: As in `build`.
    """
    wanted = torch.get_default_dtype()
    on_meta = torch.empty(0).is_meta
    with torch.device("cpu") if on_meta else nullcontext():
        torch.set_default_dtype(torch.float32)
        try:
            with skip_init(budget or Budget.default()) if on_meta else within_budget(budget or Budget.default()):
                tower = build(config, with_classifier=with_classifier, make_head=make_head)
        finally:
            torch.set_default_dtype(wanted)
    return tower if on_meta or wanted == torch.float32 else tower.to(wanted)


def take_computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that are not in the state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}"] = buffer
    return found


def put_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Put buffers into the places of uninitialised ones, on the device of those."""
    moved: dict[int, torch.Tensor] = {}
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        device = owner._buffers[leaf].device  # type: ignore[union-attr]
        cast = dtype if buffer.is_floating_point() else None
        # One buffer that several modules hold stays one.
        owner._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device=device, dtype=cast))


def align(module: nn.Module) -> None:
    """Copy what lies at odd places in memory to places that are multiples of 64 bytes.

    Another model's checkpoint is mapped by transformers as it is; kernels may give other last bits for tensors that do
    not lie so.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.detach().clone()


def move_to_meta(module: nn.Module) -> None:
    """As `module.to("meta")`, except that tied parameters stay tied, and the default dtype is theirs."""
    wanted = torch.get_default_dtype()
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    twin = tensor.detach().to("meta", wanted if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                setattr(part, name, moved[id(tensor)])


def can_checkpoint(trunk: nn.Module) -> bool:
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        trunk.set_grad_checkpointing(False)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True

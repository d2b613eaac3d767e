"""A custom head as data: a small JSON graph, which `reader.graph_head.construct` turns into a head again.

The graph lists the head's modules (layers with their constructor arguments, other modules as plain parts with their
tensors), and the calls its forward makes, one list if training and evaluation make the same calls and two if not. It
holds no weights: those travel in the state dict, under the same keys.
"""

import base64
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..reader.errors import GraphError
from ..reader.graph_schema import MAX_EMBEDDED_BYTES, VERSION, parse_graph
from .arguments import dtype_name
from .batch_formula import flat_bytes
from .dead_code import Constants, prune
from .isolation import copy_head
from .layers import has_hooks, read_layer
from .trace import callable_layers, named_tensors
from .trace_modes import record_mode

Json = Any


def to_graph(head: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Write `head` as a JSON-able graph, equal for equal heads.

    `example` is an input as the head really gets it, ``[B, C]``, ``[B, N, C]`` or ``[B, C, H, W]``, on the CPU,
    floating point; its batch and values do not matter. The head's weights, buffers, modes and the random states stay as
    they are. One head at a time: parts of torch are watched while it runs. Raises GraphError with the reason, and the
    line of the head's code, where it cannot be data.
    """
    _check_head(head)
    described, whole = _describe_modules(head)
    if whole:
        graph = {"version": VERSION, "input": _input(example), **described}
        parse_graph(graph)
        return graph
    train, evaluation = record_mode(head, example, training=True), record_mode(head, example, training=False)
    constants = Constants()
    programs = [constants.renumber(prune(mode.nodes, mode.output), mode.constants) for mode in (train, evaluation)]
    if programs[0] == programs[1]:
        forwards = {"forward": programs[0]}
    else:
        forwards = {"train": programs[0], "eval": programs[1]}
    free = train.free & evaluation.free
    graph = {"version": VERSION, "input": _input(example, free), **described, **forwards}
    if constants.tensors:
        budget = [MAX_EMBEDDED_BYTES]
        graph["constants"] = [_embed(tensor, budget, "a constant of the forward") for tensor in constants.tensors]
    parse_graph(graph)
    return graph


def _input(example: torch.Tensor, free: frozenset[int] = frozenset()) -> Json:
    return {"shape": [None if dim in free | {0} else size for dim, size in enumerate(example.shape)]}


# --- the modules


def _check_head(head: nn.Module) -> None:
    for name, module in head.named_modules():
        where = f"module {name or 'the head itself'} ({type(module).__name__})"
        if module._backward_hooks or module._backward_pre_hooks:
            raise GraphError(f"{where} has a backward hook, which is code")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise GraphError(f"{where} puts extra state into its state dict, which is not data")
        if any(
            isinstance(p, (UninitializedBuffer, UninitializedParameter))
            for p in (*module._parameters.values(), *module._buffers.values())
        ):
            raise GraphError(f"{where} is lazy and has not seen an input yet: call the head once")
    for name, parameter in head.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise GraphError(f"parameter {name} has a gradient hook, which is code")
    storages: dict[int, str] = {}
    for name, tensor in {**dict(head.named_parameters()), **dict(head.named_buffers())}.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise GraphError(f"{name} is a tensor of class {type(tensor).__qualname__}, which is not data")
        if tensor.numel():
            other = storages.setdefault(tensor.untyped_storage()._cdata, name)
            if other != name:
                raise GraphError(f"{name} and {other} share memory without being one tensor; tie them by assignment")


def _describe_modules(head: nn.Module) -> tuple[dict[str, Json], bool]:
    """The part of the graph about modules, and whether the head needs no recorded forward at all."""
    held = _held_modes(head)
    ties, layouts = _ties(head), _layouts(head)
    whole = not (held or ties or layouts or has_hooks(head)) and _is_whole(head)
    layers = callable_layers(head)
    specs: list[dict[str, Json]] = []
    seen: dict[nn.Module, str] = {}
    closed: list[str] = []
    budget = [MAX_EMBEDDED_BYTES]
    layer_tensors: dict[str, torch.Tensor] = {}
    for name, module in head.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in closed):
            continue
        if module in seen:
            specs.append({"name": name, "same": seen[module]})
            closed.append(name + ".")
            continue
        seen[module] = name
        spec = _module_spec(name, module, whole or name in layers, budget)
        specs.append(spec)
        if "layer" in spec:
            closed.append(name + "." if name else "")
            tensors = named_tensors(module)
            layer_tensors.update({f"{name}.{key}" if name else key: tensor for key, tensor in tensors.items()})
        if "layer" in spec and not name:
            break
    described: dict[str, Json] = {"modules": specs}
    dtypes = [
        [name, dtype_name(tensor.dtype)]
        for name, tensor in layer_tensors.items()
        if (tensor.is_floating_point() and tensor.dtype != torch.float32) or tensor.is_complex()
    ]
    frozen = [
        name
        for name, parameter in head.named_parameters()
        if not parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex())
    ]
    found = {"dtypes": dtypes, "frozen": frozen, "ties": ties, "layouts": layouts, "held": held}
    described.update({key: value for key, value in found.items() if value})
    return described, whole


def _is_whole(head: nn.Module) -> bool:
    if type(head) is nn.Sequential:
        return "0" in callable_layers(nn.Sequential(head))
    return read_layer(head) is not None


def _held_modes(head: nn.Module) -> list[list[Json]]:
    copy = copy_head(head)
    flags: dict[str, list[bool]] = {}
    for mode in (True, False):
        copy.train(mode)
        for name, module in copy.named_modules():
            flags.setdefault(name, []).append(module.training)
    return [[name, *pair] for name, pair in flags.items() if pair != [True, False]]


def _module_spec(name: str, module: nn.Module, may_be_layer: bool, budget: list[int]) -> dict[str, Json]:
    layer = read_layer(module) if may_be_layer and type(module) is not nn.Sequential else None
    if layer is not None:
        return {"name": name, "layer": layer[0], "args": layer[1]}
    bare = not module._parameters and not module._buffers
    if (name or may_be_layer) and bare and type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return {"name": name, "container": type(module).__name__}
    spec: dict[str, Json] = {"name": name, "part": True}
    params = [[key, list(p.shape), dtype_name(p.dtype)] for key, p in module._parameters.items() if p is not None]
    buffers = [(key, tensor) for key, tensor in module._buffers.items() if tensor is not None]
    passing = module._non_persistent_buffers_set
    kept = [[key, list(tensor.shape), dtype_name(tensor.dtype)] for key, tensor in buffers if key not in passing]
    values = [
        [key, _embed(tensor, budget, f"the buffer {name}.{key}, which is not in the state dict,")]
        for key, tensor in buffers
        if key in passing
    ]
    for key, value in (("params", params), ("buffers", kept), ("values", values)):
        if value:
            spec[key] = value
    return spec


def _layouts(head: nn.Module) -> list[list[Json]]:
    """Tensors whose dimensions lie in memory in another order than written (channels last, transposes).

    Kernels may give other last bits for another layout. Each with its dimensions from the outermost to the innermost.
    """
    layouts: list[list[Json]] = []
    for name, tensor in {**dict(head.named_parameters()), **dict(head.named_buffers())}.items():
        order = [dim for *_, dim in sorted((-tensor.stride(d), -tensor.shape[d], d) for d in range(tensor.dim()))]
        if not tensor.is_contiguous() and tensor.permute(order).is_contiguous():
            layouts.append([name, order])
    return layouts


def _ties(head: nn.Module) -> list[list[str]]:
    """Tensors that one name shares with an earlier one, where the sharing does not come from a shared module."""
    first: dict[int, str] = {}
    ties = []
    for name, tensor in named_tensors_once(head):
        known = first.setdefault(id(tensor), name)
        if known != name:
            ties.append([name, known])
    return ties


def named_tensors_once(head: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of every module, each module visited once, shared tensors under each of their names."""
    for name, module in head.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    yield (f"{name}.{key}" if name else key), tensor


def _embed(tensor: torch.Tensor, budget: list[int], what: str) -> Json:
    budget[0] -= tensor.nbytes
    if budget[0] < 0:
        raise GraphError(
            f"{what} has {tensor.nbytes} bytes; a graph embeds at most {MAX_EMBEDDED_BYTES} in all. Register it as a "
            "persistent buffer, so that it travels with the weights"
        )
    data = flat_bytes(tensor).cpu().numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "data": base64.b64encode(data).decode("ascii"),
    }

"""Whether a module is exactly a layer of the graph's table, and with which arguments.

It is if it is of that very class, carries no hooks, and a fresh one built from the arguments read back agrees with it
in every attribute and tensor shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..reader.errors import GraphError
from ..reader.graph_layers import LAYER_ARGUMENTS, LAYERS, build_layer
from .arguments import encode_float

Reader = Callable[[Any], Any]


def _attribute(name: str) -> Reader:
    return lambda module: getattr(module, name)  # names from the table, never from a file


def _has(name: str) -> Reader:
    return lambda module: getattr(module, name) is not None


def _activation_name(function: Any) -> str:
    for name in ("relu", "gelu"):
        if function is getattr(nn.functional, name):
            return name
    raise AttributeError(f"activation {function!r} is neither relu nor gelu")


_TRANSFORMER_LAYER: dict[str, Reader] = {
    "d_model": lambda m: m.linear1.in_features,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "activation": lambda m: _activation_name(m.activation),
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}
_STACK: dict[str, Reader] = {
    "layer": lambda m: read_layer(m.layers[0], stacked=True),
    "norm": lambda m: None if m.norm is None else read_layer(m.norm, stacked=True),
}
_CHANNELS: Reader = lambda m: m.normalized_shape[0]  # noqa: E731
_OTHER: dict[str, dict[str, Reader]] = {
    "LayerNorm": {"bias": lambda m: not m.elementwise_affine or m.bias is not None},
    "MultiheadAttention": {"bias": _has("in_proj_bias"), "add_bias_kv": _has("bias_k")},
    "TransformerEncoderLayer": _TRANSFORMER_LAYER,
    "TransformerDecoderLayer": _TRANSFORMER_LAYER,
    "TransformerEncoder": _STACK,
    "TransformerDecoder": _STACK,
    "timm.LayerScale": {"dim": lambda m: m.gamma.numel()},
    "timm.LayerNorm": {"num_channels": _CHANNELS, "affine": _attribute("elementwise_affine")},
    "timm.LayerNorm2d": {"num_channels": _CHANNELS, "affine": _attribute("elementwise_affine")},
    "timm.RmsNorm": {"channels": _CHANNELS, "affine": _attribute("elementwise_affine")},
    "timm.RmsNorm2d": {"channels": _CHANNELS, "affine": _attribute("elementwise_affine")},
}
"""How arguments are read that are not attributes of the same name."""


def _readers() -> dict[str, dict[str, Reader]]:
    readers = {}
    for name, (_, arguments) in LAYERS.items():
        asked = {part.rstrip("?") for part in LAYER_ARGUMENTS[name].split() if part.endswith("?")}
        plain = {key: _has(key) if key in asked else _attribute(key) for key in sorted(arguments)}
        readers[name] = {**plain, **_OTHER.get(name, {})}
    return readers


_READERS = _readers()
_NAMES = {cls: name for name, (cls, _) in LAYERS.items()}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_IGNORED = frozenset(
    {
        *("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        *("_flat_weights", "_flat_weight_refs", "_all_weights"),
        *(name for name in vars(nn.Module())),
    }
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on `module` itself."""
    return any(getattr(module, name, None) for name in _HOOKS)


def read_layer(module: nn.Module, *, stacked: bool = False) -> list[Any] | None:
    """`[name, {argument: value}]` if `module` is exactly a layer of the table and a fresh one equals it, else None.

    With `stacked` (a layer inside a transformer stack) not being one raises AttributeError instead of giving None.
    """
    name = _NAMES.get(type(module))
    if name is not None:
        try:
            args = {key: _to_json(reader(module)) for key, reader in _READERS[name].items()}
            with torch.device("meta"):
                fresh = build_layer(name, args)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, GraphError):
            fresh = None  # someone took the layer apart: trace through it instead
        if fresh is not None and _same_layer(module, fresh):
            return [name, args]
    if stacked:
        raise AttributeError(f"{type(module).__name__} is not a plain layer")
    return None


def _to_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
            return value  # an inner layer, already read
        return [_to_json(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return encode_float(value)
    raise AttributeError(f"argument {value!r} is not plain data")


def _same_layer(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether `module` behaves like `fresh`: class, attributes, tensor names and shapes, children; and no hooks."""
    if type(module) is not type(fresh) or has_hooks(module):
        return False
    ours, theirs = ({**each._parameters, **each._buffers} for each in (module, fresh))
    if list(ours) != list(theirs) or module._non_persistent_buffers_set or fresh._non_persistent_buffers_set:
        return False
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor is None) != (other is None):
            return False
        if tensor is not None and other is not None and (type(tensor), tensor.shape) != (type(other), other.shape):
            return False
    if list(module._modules) != list(fresh._modules):
        return False
    return _same_attributes(module, fresh) and all(
        (child is None and fresh._modules[name] is None)
        or (child is not None and fresh._modules[name] is not None and _same_layer(child, fresh._modules[name]))  # type: ignore[arg-type]
        for name, child in module._modules.items()
    )


def _same_attributes(module: nn.Module, fresh: nn.Module) -> bool:
    expected = {name: value for name, value in vars(fresh).items() if name not in _IGNORED}
    for name, value in vars(module).items():
        if name in _IGNORED:
            continue
        if name not in expected:
            if hasattr(type(module), name):
                return False  # an instance attribute that replaces a method or a class attribute
            continue  # a remark somebody left on the layer; its class does not know it
        if not _same_value(value, expected[name]):
            return False
    return all(hasattr(module, name) for name in expected)


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float, str, bool, type(None))) and isinstance(other, (int, float, str, bool, type(None))):
        return type(one) is type(other) and (one == other or (one != one and other != other))
    return one is other

"""The layers a stored head may name: classes of `torch.nn` and `timm.layers` with arguments that can be read back.

A layer is stored as its table name and constructor arguments only if it is exactly that class, carries no hooks, and a
fresh one built from the arguments read back agrees with it in every attribute and tensor shape. Anything else (a
subclass, a parametrized layer, a patched method) is not a layer here: it becomes a plain part, its forward is traced.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import norm as timm_norm
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from torch import nn

from .errors import GraphError

Reader = Callable[[nn.Module], Any]
ReadArgs = Mapping[str, Any]

_MAX_STACKED = 64
"""Most layers a recurrent network or a transformer stack may have: constructing is linear in it."""

_MAX_INT = 2**31
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid none tanh relu gelu nearest linear bilinear bicubic trilinear area "
    "nearest-exact".split()
)


@dataclass(frozen=True)
class Layer:
    """One row of the table: a class and how its constructor arguments are read from an instance."""

    cls: type[nn.Module]
    readers: Mapping[str, Reader]


def _attribute(name: str) -> Reader:
    return lambda module: getattr(module, name)  # names from the table below, never from a file


def _has(name: str) -> Reader:
    return lambda module: getattr(module, name) is not None


def _first_size(module: nn.Module) -> Any:
    shape: Any = module.normalized_shape
    return shape[0]


def _length(name: str) -> Reader:
    return lambda module: getattr(module, name).numel()


_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias? padding_mode"
_DECONV = "in_channels out_channels kernel_size stride padding output_padding groups bias? dilation padding_mode"
_BATCH = "num_features eps momentum affine track_running_stats"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_MAX = "kernel_size stride padding dilation return_indices ceil_mode"

_NN = {
    "Linear": "in_features out_features bias?",
    "Bilinear": "in1_features in2_features out_features bias?",
    "Identity": "",
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Conv1d": _CONV, "Conv2d": _CONV, "Conv3d": _CONV,
    "ConvTranspose1d": _DECONV, "ConvTranspose2d": _DECONV, "ConvTranspose3d": _DECONV,
    "BatchNorm1d": _BATCH, "BatchNorm2d": _BATCH, "BatchNorm3d": _BATCH,
    "InstanceNorm1d": _BATCH, "InstanceNorm2d": _BATCH, "InstanceNorm3d": _BATCH,
    "LayerNorm": "normalized_shape eps elementwise_affine",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine",
    "LocalResponseNorm": "size alpha beta k",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "Dropout": "p inplace", "Dropout1d": "p inplace", "Dropout2d": "p inplace", "Dropout3d": "p inplace",
    "AlphaDropout": "p inplace", "FeatureAlphaDropout": "p inplace",
    "ReLU": "inplace", "ReLU6": "inplace", "SiLU": "inplace", "Mish": "inplace", "SELU": "inplace",
    "Hardswish": "inplace", "Hardsigmoid": "inplace", "GELU": "approximate",
    "ELU": "alpha inplace", "CELU": "alpha inplace", "LeakyReLU": "negative_slope inplace",
    "RReLU": "lower upper inplace", "Hardtanh": "min_val max_val inplace", "Threshold": "threshold value inplace",
    "Softplus": "beta threshold", "Softshrink": "lambd", "Hardshrink": "lambd", "GLU": "dim",
    "Sigmoid": "", "Tanh": "", "Tanhshrink": "", "Softsign": "", "LogSigmoid": "", "Softmax2d": "",
    "Softmax": "dim", "LogSoftmax": "dim", "Softmin": "dim",
    "PReLU": "num_parameters init",
    "AdaptiveAvgPool1d": "output_size", "AdaptiveAvgPool2d": "output_size", "AdaptiveAvgPool3d": "output_size",
    "AdaptiveMaxPool1d": "output_size return_indices", "AdaptiveMaxPool2d": "output_size return_indices",
    "AdaptiveMaxPool3d": "output_size return_indices",
    "AvgPool1d": "kernel_size stride padding ceil_mode count_include_pad",
    "AvgPool2d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "AvgPool3d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "MaxPool1d": _MAX, "MaxPool2d": _MAX, "MaxPool3d": _MAX,
    "LPPool1d": "norm_type kernel_size stride ceil_mode", "LPPool2d": "norm_type kernel_size stride ceil_mode",
    "ZeroPad1d": "padding", "ZeroPad2d": "padding", "ReflectionPad1d": "padding", "ReflectionPad2d": "padding",
    "ReplicationPad1d": "padding", "ReplicationPad2d": "padding",
    "ConstantPad1d": "padding value", "ConstantPad2d": "padding value",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "PixelShuffle": "upscale_factor", "PixelUnshuffle": "downscale_factor", "ChannelShuffle": "groups",
    "Fold": "output_size kernel_size dilation padding stride", "Unfold": "kernel_size dilation padding stride",
    "CosineSimilarity": "dim eps", "PairwiseDistance": "norm eps keepdim",
    "RNN": _RNN + " nonlinearity", "GRU": _RNN, "LSTM": _RNN + " proj_size",
    "RNNCell": "input_size hidden_size bias nonlinearity", "GRUCell": "input_size hidden_size bias",
    "LSTMCell": "input_size hidden_size bias",
}  # fmt: skip
"""Argument names of each `torch.nn` layer. Attributes have the same names; ``bias?`` reads `bias is not None`."""


def _plain(cls: type[nn.Module], names: str) -> Layer:
    readers = {}
    for name in names.split():
        bare = name.rstrip("?")
        readers[bare] = _has(bare) if name.endswith("?") else _attribute(bare)
    return Layer(cls, readers)


def _transformer_layer_readers() -> dict[str, Reader]:
    return {
        "d_model": lambda m: m.linear1.in_features,
        "nhead": lambda m: m.self_attn.num_heads,
        "dim_feedforward": lambda m: m.linear1.out_features,
        "dropout": lambda m: m.dropout.p,
        "activation": lambda m: _activation_name(m.activation),
        "layer_norm_eps": lambda m: m.norm1.eps,
        "batch_first": lambda m: m.self_attn.batch_first,
        "norm_first": lambda m: m.norm_first,
        "bias": lambda m: m.linear1.bias is not None,
    }


def _activation_name(function: Any) -> str:
    for name in ("relu", "gelu"):
        if function is getattr(nn.functional, name):
            return name
    raise AttributeError(f"activation {function!r} is neither relu nor gelu")


def _stack_readers(**more: Reader) -> dict[str, Reader]:
    return {
        "layer": lambda m: read_layer(m.layers[0], stacked=True),
        "num_layers": lambda m: m.num_layers,
        "norm": lambda m: None if m.norm is None else read_layer(m.norm, stacked=True),
        **more,
    }


def _make_table() -> dict[str, Layer]:
    table = {name: _plain(getattr(nn, name), names) for name, names in _NN.items() if hasattr(nn, name)}
    table["LayerNorm"] = Layer(
        nn.LayerNorm,
        {**table["LayerNorm"].readers, "bias": lambda m: not m.elementwise_affine or m.bias is not None},
    )
    table["MultiheadAttention"] = Layer(
        nn.MultiheadAttention,
        {
            **_plain(nn.Module, "embed_dim num_heads dropout add_zero_attn kdim vdim batch_first").readers,
            "bias": _has("in_proj_bias"),
            "add_bias_kv": _has("bias_k"),
        },
    )
    table["TransformerEncoderLayer"] = Layer(nn.TransformerEncoderLayer, _transformer_layer_readers())
    table["TransformerDecoderLayer"] = Layer(nn.TransformerDecoderLayer, _transformer_layer_readers())
    table["TransformerEncoder"] = Layer(
        nn.TransformerEncoder,
        _stack_readers(enable_nested_tensor=_attribute("enable_nested_tensor"), mask_check=_attribute("mask_check")),
    )
    table["TransformerDecoder"] = Layer(nn.TransformerDecoder, _stack_readers())
    table["timm.DropPath"] = _plain(DropPath, "drop_prob scale_by_keep")
    table["timm.LayerScale"] = Layer(LayerScale, {"dim": _length("gamma"), "inplace": _attribute("inplace")})
    for name in ("LayerNorm", "LayerNorm2d", "RmsNorm", "RmsNorm2d"):
        cls = getattr(timm_norm, name, None)
        if cls is not None:
            table[f"timm.{name}"] = Layer(
                cls,
                {
                    "num_channels" if "Layer" in name else "channels": _first_size,
                    "eps": _attribute("eps"),
                    "affine": _attribute("elementwise_affine"),
                },
            )
    return table


LAYERS = _make_table()
_NAMES = {layer.cls: name for name, layer in LAYERS.items()}

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
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
            args = {key: _to_json(reader(module)) for key, reader in LAYERS[name].readers.items()}
            with torch.device("meta"):
                fresh = build_layer(name, args)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, GraphError):
            fresh = None  # someone took the layer apart: trace through it instead
        if fresh is not None and _same_layer(module, fresh):
            return [name, args]
    if stacked:
        raise AttributeError(f"{type(module).__name__} is not a plain layer")
    return None


def build_layer(name: str, args: ReadArgs) -> nn.Module:
    """Construct a layer of the table from audited arguments, on the ambient default device.

    Raises GraphError for an unknown name, wrong argument names, or values that no layer takes.
    """
    layer = LAYERS.get(name) if isinstance(name, str) else None
    if layer is None:
        raise GraphError(f"the stored head names a layer {name!r} that is not in the table of layers")
    if not isinstance(args, Mapping) or set(args) != set(layer.readers):
        found = sorted(args) if isinstance(args, Mapping) else args
        raise GraphError(f"layer {name}: found arguments {found!r}, expected exactly {sorted(layer.readers)}")
    values = {key: _from_json(value, f"{name}.{key}") for key, value in args.items()}
    _check_sizes(name, values)
    depth = values.get("num_layers", 1)
    if type(depth) is not int or not 1 <= depth <= _MAX_STACKED:
        raise GraphError(f"layer {name}: num_layers is {depth!r}, expected 1 to {_MAX_STACKED}")
    if "layer" in values:
        return _build_stack(name, values)
    try:
        return layer.cls(**values)
    except GraphError:
        raise
    except Exception as error:  # whatever torch says of impossible arguments is one refusal for the caller
        raise GraphError(f"layer {name}{dict(args)!r} cannot be constructed: {error}") from error


_GROWING = frozenset(
    "output_size padding stride dilation output_padding scale_factor size upscale_factor kernel_size".split()
)


def _check_sizes(name: str, values: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a layer without weights answer with enormous tensors."""
    total = 1.0
    for key, value in values.items():
        if key in _GROWING:
            for number in value if isinstance(value, tuple) else (value,):
                total *= max(abs(number), 1) if isinstance(number, (int, float)) else 1
    if not total <= 2**31:
        raise GraphError(f"layer {name}: sizes {dict(values)!r:.200} are beyond what a layer can need")


def _build_stack(name: str, values: dict[str, Any]) -> nn.Module:
    single: Any = {"TransformerEncoder": nn.TransformerEncoderLayer, "TransformerDecoder": nn.TransformerDecoderLayer}[
        name
    ]
    layer: Any = values["layer"]
    if not isinstance(layer, single):
        raise GraphError(f"layer {name}: expected a {single.__name__} to stack")
    if values["norm"] is not None and not isinstance(values["norm"], (nn.LayerNorm, nn.RMSNorm)):
        raise GraphError(f"layer {name}: the final norm must be LayerNorm or RMSNorm")
    try:
        if name == "TransformerDecoder":
            return nn.TransformerDecoder(layer, values["num_layers"], values["norm"])
        return nn.TransformerEncoder(
            layer,
            values["num_layers"],
            values["norm"],
            enable_nested_tensor=values["enable_nested_tensor"],
            mask_check=values["mask_check"],
        )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise GraphError(f"layer {name} cannot be constructed: {error}") from error


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
        return float(value) if abs(value) < float("inf") else {"f": str(float(value))}
    raise AttributeError(f"argument {value!r} is not plain data")


def _from_json(value: Any, where: str, depth: int = 0) -> Any:
    """Constructor argument from JSON: plain numbers, words of the list above, tuples of them, or an inner layer."""
    if value is None or isinstance(value, bool) or (type(value) is float):
        return value
    if type(value) is int and abs(value) <= _MAX_INT:
        return value
    if isinstance(value, str) and value in _STRINGS:
        return value
    if isinstance(value, dict) and set(value) == {"f"} and value["f"] in ("inf", "-inf", "nan"):
        return float(value["f"])
    if isinstance(value, list) and len(value) <= 8 and depth < 3:
        if len(value) == 2 and isinstance(value[1], dict) and isinstance(value[0], str):
            if depth or where.split(".")[-1] not in ("layer", "norm") or value[0].endswith(("coder", "coder.")):
                raise GraphError(f"{where}: a layer cannot stand here")
            return build_layer(value[0], value[1])
        return tuple(_from_json(item, where, depth + 1) for item in value)
    raise GraphError(f"{where}: {value!r} is not an argument that a layer can take")


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    for kind in (module._parameters, module._buffers):
        yield from kind.items()


def _same_layer(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether `module` behaves like `fresh`: class, attributes, tensor names and shapes, children; and no hooks."""
    if type(module) is not type(fresh) or has_hooks(module):
        return False
    ours, theirs = dict(_tensors(module)), dict(_tensors(fresh))
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

"""The layers a stored head may name: classes of `torch.nn` and `timm.layers`, and the arguments each is made with.

A layer is stored as its name in this table and its constructor arguments (`heads/layers.py` reads them off a layer).
Anything else (a subclass, a parametrized layer, a patched method) is a plain part, whose forward is traced.
"""

from collections.abc import Mapping
from typing import Any

from timm.layers import norm as timm_norm
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from torch import nn

from .errors import ConfigError, GraphError, shown

_MAX_STACKED = 64
"""Most layers a recurrent network or a transformer stack may have; GPT-2 XL and ViT-22B have 48."""
_MAX_GROWTH = 2**31
_MAX_INT = 2**31
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid none tanh relu gelu nearest linear bilinear bicubic trilinear area "
    "nearest-exact".split()
)
_SIZES_RESULT = frozenset(
    "output_size padding stride dilation output_padding scale_factor size upscale_factor kernel_size".split()
)

_CONV_ARGS = "in_channels out_channels kernel_size stride padding dilation groups bias? padding_mode"
_DECONV_ARGS = "in_channels out_channels kernel_size stride padding output_padding groups bias? dilation padding_mode"
_BATCH_ARGS = "num_features eps momentum affine track_running_stats"
_RNN_ARGS = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_MAX_POOL_ARGS = "kernel_size stride padding dilation return_indices ceil_mode"

NN_LAYERS = {
    "Linear": "in_features out_features bias?",
    "Bilinear": "in1_features in2_features out_features bias?",
    "Identity": "",
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Conv1d": _CONV_ARGS, "Conv2d": _CONV_ARGS, "Conv3d": _CONV_ARGS,
    "ConvTranspose1d": _DECONV_ARGS, "ConvTranspose2d": _DECONV_ARGS, "ConvTranspose3d": _DECONV_ARGS,
    "BatchNorm1d": _BATCH_ARGS, "BatchNorm2d": _BATCH_ARGS, "BatchNorm3d": _BATCH_ARGS,
    "InstanceNorm1d": _BATCH_ARGS, "InstanceNorm2d": _BATCH_ARGS, "InstanceNorm3d": _BATCH_ARGS,
    "LayerNorm": "normalized_shape eps elementwise_affine bias?",
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
    "MaxPool1d": _MAX_POOL_ARGS, "MaxPool2d": _MAX_POOL_ARGS, "MaxPool3d": _MAX_POOL_ARGS,
    "LPPool1d": "norm_type kernel_size stride ceil_mode", "LPPool2d": "norm_type kernel_size stride ceil_mode",
    "ZeroPad1d": "padding", "ZeroPad2d": "padding", "ReflectionPad1d": "padding", "ReflectionPad2d": "padding",
    "ReplicationPad1d": "padding", "ReplicationPad2d": "padding",
    "ConstantPad1d": "padding value", "ConstantPad2d": "padding value",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "PixelShuffle": "upscale_factor", "PixelUnshuffle": "downscale_factor", "ChannelShuffle": "groups",
    "Fold": "output_size kernel_size dilation padding stride", "Unfold": "kernel_size dilation padding stride",
    "CosineSimilarity": "dim eps", "PairwiseDistance": "norm eps keepdim",
    "RNN": _RNN_ARGS + " nonlinearity", "GRU": _RNN_ARGS, "LSTM": _RNN_ARGS + " proj_size",
    "RNNCell": "input_size hidden_size bias nonlinearity", "GRUCell": "input_size hidden_size bias",
    "LSTMCell": "input_size hidden_size bias",
}  # fmt: skip
"""Argument names of each `torch.nn` layer. Attributes have the same names; ``bias?`` reads `bias is not None`."""

_ENCODER_LAYER_ARGS = "d_model nhead dim_feedforward dropout activation layer_norm_eps batch_first norm_first bias"
_OTHER_LAYERS: dict[str, tuple[Any, str]] = {
    "MultiheadAttention": (
        nn.MultiheadAttention,
        "embed_dim num_heads dropout add_zero_attn kdim vdim batch_first bias add_bias_kv",
    ),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer, _ENCODER_LAYER_ARGS),
    "TransformerDecoderLayer": (nn.TransformerDecoderLayer, _ENCODER_LAYER_ARGS),
    "TransformerEncoder": (nn.TransformerEncoder, "layer num_layers norm enable_nested_tensor mask_check"),
    "TransformerDecoder": (nn.TransformerDecoder, "layer num_layers norm"),
    "timm.DropPath": (DropPath, "drop_prob scale_by_keep"),
    "timm.LayerScale": (LayerScale, "dim inplace"),
    "timm.LayerNorm": (timm_norm.LayerNorm, "num_channels eps affine"),
    "timm.LayerNorm2d": (timm_norm.LayerNorm2d, "num_channels eps affine"),
    "timm.RmsNorm": (timm_norm.RmsNorm, "channels eps affine"),
    "timm.RmsNorm2d": (getattr(timm_norm, "RmsNorm2d", None), "channels eps affine"),
}
LAYERS: dict[str, tuple[type[nn.Module], frozenset[str]]] = {
    name: (cls, frozenset(names.replace("?", "").split()))
    for name, (cls, names) in (
        *((name, (getattr(nn, name, None), names)) for name, names in NN_LAYERS.items()),
        *_OTHER_LAYERS.items(),
    )
    if cls is not None  # older versions lack some
}
"""Name in a graph -> the class, and the arguments that must be there."""


def build_layer(name: Any, args: Any) -> nn.Module:
    """A layer of the table from JSON arguments; GraphError for an unknown name, or arguments that it does not take."""
    if not isinstance(name, str) or name not in LAYERS:
        raise GraphError(f"the stored head names a layer {shown(name)} that is not in the table of layers")
    cls, names = LAYERS[name]
    if not isinstance(args, Mapping) or set(args) != names:
        found = sorted(map(str, args)) if isinstance(args, Mapping) else args
        raise GraphError(f"layer {name}: found arguments {shown(found)}, expected exactly {sorted(names)}")
    values = {key: _argument(args[key], f"{name}.{key}") for key in sorted(names - {"layer", "norm"})}
    _check_growth(name, values)
    depth = values.get("num_layers", 1)
    if type(depth) is not int or not 1 <= depth <= _MAX_STACKED:
        raise GraphError(f"layer {name}: num_layers is {shown(depth)}, expected 1 to {_MAX_STACKED}")
    try:
        return _build_stack(cls, args, values) if "layer" in names else cls(**values)
    except (GraphError, ConfigError) as error:
        raise GraphError(f"layer {name}: {error}") from error
    except Exception as error:  # whatever torch says of impossible arguments is one refusal for the caller
        raise GraphError(f"layer {name} with {shown(dict(args))} cannot be constructed: {error}") from error


def _check_growth(name: str, values: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a layer without weights answer with enormous tensors."""
    total = 1.0
    for key in _SIZES_RESULT & values.keys():
        for number in values[key] if isinstance(values[key], tuple) else (values[key],):
            total *= max(abs(number), 1) if isinstance(number, (int, float)) else 1
    if not total <= _MAX_GROWTH:
        raise GraphError(f"layer {name}: sizes {shown(dict(values))} are beyond what a layer can need")


def _build_stack(cls: Any, args: Mapping[str, Any], values: dict[str, Any]) -> nn.Module:
    """A transformer stack of equal layers, each made by itself: torch's own constructor copies one, weights and all."""
    depth = values.pop("num_layers")
    single = f"{cls.__name__}Layer"
    made = [_inner_layer(args["layer"], (single,)) for _ in range(depth)]
    norm = None if args["norm"] is None else _inner_layer(args["norm"], ("LayerNorm", "RMSNorm"))
    stack: nn.Module = cls(made[0], 0, norm, **values)
    stack.layers = nn.ModuleList(made)
    stack.num_layers = depth
    return stack


def _inner_layer(value: Any, names: tuple[str, ...]) -> nn.Module:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in names:
        raise GraphError(f"expected a layer {' or '.join(names)} inside, found {shown(value)}")
    return build_layer(value[0], value[1])


def _argument(value: Any, where: str, depth: int = 0) -> Any:
    """Constructor argument from JSON: plain numbers, words of the list above, or tuples of them."""
    if value is None or isinstance(value, bool) or (type(value) is float):
        return value
    if type(value) is int and abs(value) <= _MAX_INT:
        return value
    if isinstance(value, str) and value in _STRINGS:
        return value
    if isinstance(value, dict) and set(value) == {"f"} and value["f"] in ("inf", "-inf", "nan"):
        return float(value["f"])
    if isinstance(value, list) and len(value) <= 8 and depth < 3:
        return tuple(_argument(item, where, depth + 1) for item in value)
    raise GraphError(f"{where}: {shown(value)} is not an argument that a layer can take")

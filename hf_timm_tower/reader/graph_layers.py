"""The layers a stored head may name: classes of `torch.nn` and `timm.layers`, and the arguments each is made with.

A layer is stored as its name in this table and its constructor arguments (`heads/layers.py` reads them off a layer).
Anything else (a subclass, a parametrized layer, a patched method) is a plain part, whose forward is traced.
"""

from collections.abc import Mapping
from typing import Any

import timm.layers
import torch.nn as nn

from .errors import ConfigError, GraphError, shown
from .graph_program import MAX_ELEMENTS

_MAX_STACKED = 64
"""Most layers a recurrent network or a transformer stack may have; GPT-2 XL and ViT-22B have 48."""
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid none tanh relu gelu nearest linear bilinear bicubic trilinear area "
    "nearest-exact".split()
)
_SIZES_RESULT = frozenset(
    "output_size padding stride dilation output_padding scale_factor size upscale_factor kernel_size".split()
)

LAYER_ARGUMENTS: dict[str, str] = {
    name: arguments
    for line in """
Bilinear: in1_features in2_features out_features bias?
Linear: in_features out_features bias?
Flatten: start_dim end_dim
Unflatten: dim unflattened_size
Identity Sigmoid Tanh Tanhshrink Softsign LogSigmoid Softmax2d:
ReLU ReLU6 SiLU Mish SELU Hardswish Hardsigmoid: inplace
ELU CELU: alpha inplace
GELU: approximate
LeakyReLU: negative_slope inplace
RReLU: lower upper inplace
Hardtanh: min_val max_val inplace
Threshold: threshold value inplace
Softplus: beta threshold
Softshrink Hardshrink: lambd
Softmax LogSoftmax Softmin GLU: dim
PReLU: num_parameters init
Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout: p inplace
Conv1d Conv2d Conv3d: in_channels out_channels kernel_size stride padding dilation groups bias? padding_mode
ConvTranspose1d ConvTranspose2d ConvTranspose3d: \
    in_channels out_channels kernel_size stride padding output_padding groups bias? dilation padding_mode
BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d: \
    num_features eps momentum affine track_running_stats
LayerNorm: normalized_shape eps elementwise_affine bias?
RMSNorm: normalized_shape eps elementwise_affine
GroupNorm: num_groups num_channels eps affine
LocalResponseNorm: size alpha beta k
Embedding: num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d: output_size
AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d: output_size return_indices
AvgPool1d: kernel_size stride padding ceil_mode count_include_pad
AvgPool2d AvgPool3d: kernel_size stride padding ceil_mode count_include_pad divisor_override
MaxPool1d MaxPool2d MaxPool3d: kernel_size stride padding dilation return_indices ceil_mode
LPPool1d LPPool2d: norm_type kernel_size stride ceil_mode
ZeroPad1d ZeroPad2d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d: padding
ConstantPad1d ConstantPad2d: padding value
Upsample: size scale_factor mode align_corners recompute_scale_factor
PixelShuffle: upscale_factor
PixelUnshuffle: downscale_factor
ChannelShuffle: groups
Fold: output_size kernel_size dilation padding stride
Unfold: kernel_size dilation padding stride
CosineSimilarity: dim eps
PairwiseDistance: norm eps keepdim
RNN: input_size hidden_size num_layers bias batch_first dropout bidirectional nonlinearity
GRU: input_size hidden_size num_layers bias batch_first dropout bidirectional
LSTM: input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size
RNNCell: input_size hidden_size bias nonlinearity
GRUCell LSTMCell: input_size hidden_size bias
MultiheadAttention: embed_dim num_heads dropout add_zero_attn kdim vdim batch_first bias add_bias_kv
TransformerEncoderLayer TransformerDecoderLayer: \
    d_model nhead dim_feedforward dropout activation layer_norm_eps batch_first norm_first bias
TransformerEncoder: layer num_layers norm enable_nested_tensor mask_check
TransformerDecoder: layer num_layers norm
timm.DropPath: drop_prob scale_by_keep
timm.LayerScale: dim inplace
timm.LayerNorm timm.LayerNorm2d: num_channels eps affine
timm.RmsNorm timm.RmsNorm2d: channels eps affine
""".strip().splitlines()
    for names, _, arguments in [line.partition(":")]
    for name in names.split()
}
"""Arguments of each layer. Attributes have the same names; ``bias?`` reads `bias is not None`."""

LAYERS: dict[str, tuple[type[nn.Module], frozenset[str]]] = {
    name: (cls, frozenset(arguments.replace("?", "").split()))
    for name, arguments in LAYER_ARGUMENTS.items()
    if (cls := getattr(timm.layers if "." in name else nn, name.removeprefix("timm."), None))  # older ones lack some
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
    if not total <= MAX_ELEMENTS:
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
    if type(value) is int and abs(value) <= MAX_ELEMENTS:
        return value
    if isinstance(value, str) and value in _STRINGS:
        return value
    if isinstance(value, dict) and set(value) == {"f"} and value["f"] in ("inf", "-inf", "nan"):
        return float(value["f"])
    if isinstance(value, list) and len(value) <= 8 and depth < 3:
        return tuple(_argument(item, where, depth + 1) for item in value)
    raise GraphError(f"{where}: {shown(value)} is not an argument that a layer can take")

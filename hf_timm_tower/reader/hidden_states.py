"""What a trunk's inner layers give, in the form that transformers has for it: hidden states and attention maps."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.utils.attention_extract import AttentionExtract

from .errors import ArgumentError, ConfigError, shown
from .skip_init import tensors_in
from .trunk import eval_mode

HiddenStates = bool | int | Sequence[int] | None

# Classes of timm that compute softmax(q k) as a matrix and hand it to `attn_drop`, where they do not run fused.
_ATTENTION = {"Attention", "AttentionRope", "EvaAttention", "RelPosAttention", "WindowAttention"}
# Trunks that give `[B, C, H, W]` or tokens, and run their blocks on `[B, H, W, C]`.
_NHWC_INSIDE = {"PyramidVisionTransformerV2", "VisionTransformerSAM", "VOLO"}


def forward_hidden(
    trunk: nn.Module, images: Any, wanted: bool | int | Sequence[int]
) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    """Run a trunk on images `[B, in_chans, H, W]`, or a dict of patches, and keep what its layers give.

    Returns the trunk's features, and a tuple: what its stem gives, then each block or stage as timm's
    `forward_intermediates` has it. Tokens `[B, N, C]`, prefix tokens first, where the features are tokens; maps
    `[B, C, H, W]` elsewhere. `wanted` is True for all, or an index, or several: all other places are None.

    `ConfigError` where timm has no intermediates of this trunk, `ArgumentError` where there is no such index.
    """
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(f"{type(trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
    layers: Any = trunk.feature_info
    first, thread, taken = first_block(trunk), get_ident(), list[torch.Tensor]()
    stems = 0 if first is None else 1
    length = len(layers) + stems
    places = _chosen(wanted, length)

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not taken and get_ident() == thread:
            taken.extend(tensors_in((args, kwargs)))

    run: Any = trunk.forward_intermediates
    taken_apart = "return_prefix_tokens" in inspect.signature(run).parameters
    has_prefix = taken_apart and bool(getattr(trunk, "num_prefix_tokens", 0))
    extra: dict[str, Any] = {"return_prefix_tokens": True} if has_prefix else {}
    if isinstance(images, dict):
        extra["output_fmt"] = "NLC"  # patches of any aspect make no map
    indices = sorted({max(place - stems, 0) for place in places})
    with nullcontext() if first is None else first.register_forward_pre_hook(take, with_kwargs=True):
        features, found = run(images, indices=indices, **extra)
    as_tokens = isinstance(features, torch.Tensor) and features.ndim == 3
    states = dict(zip((index + stems for index in indices), found, strict=True))
    if stems and 0 in places:
        nearest = states[1][0] if has_prefix else states[1]
        states[0] = _stem_output(trunk, taken, layers[0]["num_chs"], None if as_tokens else nearest.shape[2:])
    return features, tuple(_in_form(states[n], as_tokens) if n in places else None for n in range(length))


def _chosen(wanted: Any, length: int) -> set[int]:
    if wanted is True:
        return set(range(length))
    indices = list(wanted) if isinstance(wanted, Sequence) else [wanted]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -length <= i < length for i in indices):
        raise ArgumentError(
            f"output_hidden_states={shown(wanted)}: expected True, or indices of the {length} hidden states of this "
            f"trunk, from {-length} to {length - 1}"
        )
    return {index % length for index in indices}


def first_block(trunk: nn.Module) -> nn.Module | None:
    """The module that takes what the trunk's stem gives; None where timm's first intermediate is the stem's own."""
    layers: Any = trunk.feature_info
    # blocks.0, blocks.1, ... and stage1, stage2, ... are of one kind; a stem is named otherwise: stem, stages.0, ...
    names = [layer["module"] for layer in layers[:2]]
    if len({name.rstrip("0123456789") for name in names}) > 1:
        return None
    modules, name = dict(trunk.named_modules()), names[0]
    if name not in modules:  # some lists of timm name a module otherwise than the model does
        name = next(each for each in modules if each.endswith(("blocks.0", "stages.0")))
    # The list may name the last block of each stage.
    block: nn.Module = next(modules[name.rpartition(".")[0]].children()) if "." in name else modules[name]
    while isinstance(block, nn.ModuleList):
        block = next(block.children())
    # A sequence that begins with the stem takes the image.
    own = next(trunk.parameters())
    if any(parameter is own for parameter in block.parameters()):
        return None
    # Gradient checkpointing runs the parts of a sequence and not the sequence.
    while type(block) is nn.Sequential and len(block):
        block = next(block.children())
    return block


def _stem_output(trunk: nn.Module, taken: list[torch.Tensor], width: int, grid: Sequence[int] | None) -> torch.Tensor:
    """Of what the first block took, the features; as a map where there is a `grid` of the first layer's."""
    state = next((each for each in taken if each.ndim > 2 and width in (each.shape[1], each.shape[-1])), taken[0])
    if state.ndim == 4:
        inside = getattr(trunk, "output_fmt", None) == "NHWC" or type(trunk).__name__ in _NHWC_INSIDE
        return state.permute(0, 3, 1, 2) if inside else state
    if grid is not None:
        patches = state[:, state.shape[1] - grid[0] * grid[1] :]
        return patches.transpose(1, 2).reshape(*patches.shape[::2], *grid)
    return state


def _in_form(state: Any, as_tokens: bool) -> torch.Tensor:
    patches, prefix = state if isinstance(state, tuple) else (state, None)
    if as_tokens and patches.ndim == 4:
        patches = patches.flatten(2).transpose(1, 2)
    return patches if prefix is None else torch.cat([prefix, patches], dim=1)


@contextmanager
def attention_maps(trunk: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what the attention layers of a trunk compute in a forward inside: `[B, heads, N, N]` each, after softmax.

    The list is filled when the block is left. `ConfigError` where there are no such layers of timm, or they run fused.
    """
    layers = {
        name: part
        for name, part in trunk.named_modules()
        if type(part).__name__ in _ATTENTION and hasattr(part, "attn_drop")
    }
    if not layers:
        raise ConfigError(f"output_attentions: {type(trunk).__name__} has no attention layers whose maps timm can give")
    if any(getattr(part, "fused_attn", False) for part in layers.values()):
        raise ConfigError(
            "output_attentions: fused attention computes no maps. Load with attn_implementation='eager', or call "
            "set_attn_implementation('eager')"
        )
    with eval_mode(trunk):  # it sets a mode and leaves it so
        hooks: Any = AttentionExtract(trunk, [f"{name}.attn_drop" for name in layers], method="hook").hooks
    maps = list[torch.Tensor]()
    try:
        yield maps
        maps += hooks.get_output(next(trunk.parameters()).device).values()
    finally:
        for handle in hooks._handles:
            handle.remove()

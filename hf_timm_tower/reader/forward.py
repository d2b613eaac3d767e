"""One forward of a tower as transformers asks for it: features, embedding, inner layers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .errors import ArgumentError
from .hidden_states import HiddenStates, attention_maps, forward_hidden
from .tower import run_head


@dataclass
class TimmTowerModelOutput(ModelOutput):
    """What `TimmTowerModel` gives.

    Args:
        last_hidden_state: The trunk's unpooled features, as timm's `forward_features` gives them: tokens
            `[B, N, C]` or a map in the trunk's own order; a list for CoaT, CrossViT and EfficientViM.
        pooler_output: The embedding `[B, embed_dim]`; the whole tuple or dict where a custom head gives one.
        hidden_states: What the stem gives, then each block or stage as timm's `forward_intermediates` has it: tokens
            `[B, N, C]`, prefix tokens first, where `last_hidden_state` is tokens, maps `[B, C, H, W]` elsewhere. None
            in the place of a layer that was not asked for.
        attentions: Attention maps after softmax, `[B, heads, N, N]` of each attention layer.
    """

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def run_tower(
    model: Any,
    images: torch.Tensor | None,
    hidden: HiddenStates,
    attentions: bool | None,
    other_size: bool | None,
    pools: bool | None = True,
    patches: tuple[Any, ...] = (),
) -> tuple[Any, Any, Any, Any]:
    """The trunk's features, the embedding, and hidden states and attention maps where asked for."""
    if not isinstance(images, torch.Tensor) or any(each is not None for each in patches):
        raise ArgumentError(
            "expected images as pixel_values, a tensor, and nothing else; patches (patches, patch_coord, patch_valid) "
            "are taken where hf_timm_tower is installed"
        )
    trunk, images = model.trunk, prepared(model, images, other_size)
    hidden = model.config.output_hidden_states if hidden is None else hidden
    attentions = model.config.output_attentions if attentions is None else attentions
    states = None
    embedding = None
    with weights_in_place(trunk):
        with attention_maps(trunk) if attentions else nullcontext() as maps:
            # As in transformers an empty list or 0 asks for none.
            if hidden:
                features, states = forward_hidden(trunk, images, hidden)
            else:
                features = trunk.forward_features(images)
        if pools or pools is None:
            if model.steps == "features":
                pooled = features
            else:
                # Where the trunk's forward is more than these two steps, it runs whole: the embedding is what it gives.
                pooled = trunk.forward_head(features) if model.steps == "features, head" else trunk(images)
    if pools or pools is None:
        embedding = run_head(model.head, model._head_input, pooled)
    return features, embedding, states, None if maps is None else tuple(maps)


@contextmanager
def _hooked(trunk: Any, hook: Any) -> Iterator[None]:
    hook.pre_forward(trunk)
    try:
        yield
    finally:
        hook.post_forward(trunk, None)


def weights_in_place(trunk: nn.Module) -> Any:
    """A context in which the trunk's own parameters (class token, positions) are there, where accelerate offloads them.

    Its hook brings them for `trunk(...)` alone, and most of what runs of a trunk are other methods.
    """
    hook = getattr(trunk, "_hf_hook", None)
    return nullcontext() if hook is None else _hooked(trunk, hook)


def prepared(model: Any, images: torch.Tensor, other_size: bool | None = None) -> torch.Tensor:
    """The images as the trunk takes them; `ArgumentError` for whole numbers, or a size that it does not take."""
    model.follow_attn_implementation()
    if not images.is_floating_point():
        raise ArgumentError(
            f"pixel_values are {images.dtype}: expected floats as the image processor gives them, scaled and normalised"
        )
    found, own = list(images.shape[-2:]), model.config.image_size
    traits_of = getattr(timm.models, "get_model_traits", None)  # from timm 1.0.31 on
    # The trunk first: of one that takes any size, an export may leave the size open.
    if traits_of is not None and traits_of(model.trunk).get("fixed_input_size") and found != own:
        asked = "interpolate_pos_encoding=True: " if other_size else ""
        raise ArgumentError(
            f"{asked}pixel_values are {found[0]} x {found[1]}, but {type(model.trunk).__name__} takes images of "
            f"{own[0]} x {own[1]} pixels only. Load model and image processor with the same image_size=..., or build "
            "the tower with model_kwargs={'dynamic_img_size': True} where timm's trunk has that"
        )
    return images.to(model.dtype)


def wants_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


def steps_of(trunk: nn.Module) -> str:
    """What the trunk's forward is made of, for a tensor x: `forward_head(forward_features(x))` and nothing else
    (`features, head`), `forward_features(x)` alone (`features`), or something that is not known (`whole`).

    Told from the names that the code of its class uses: one that this does not know is not taken for steps.
    """
    code = getattr(type(trunk).forward, "__code__", None)
    names = set(code.co_names) if code is not None else set()
    if names == {"forward_features"}:
        return "features"
    more = tuple(sorted(names - {"forward_features", "forward_head"}))
    known = not more or (type(trunk).__name__, *more) in _STEPS_WITH_SWITCHES
    return "features, head" if known and {"forward_features", "forward_head"} <= names else "whole"


# Classes of timm whose forward has switches that a tower never turns: features of inner layers (CoaT, FastViT), a
# second classifier for training (Inception), packed patches of several sizes (NaFlexVit).
_STEPS_WITH_SWITCHES = {
    ("CoaT", "is_scripting", "jit", "return_interm_layers", "torch"),
    ("FastVit", "fork_feat"),
    ("InceptionV3", "aux_logits"),
    ("NaFlexVit", "_assert", "dict", "get", "isinstance"),
}


def can_checkpoint(trunk: nn.Module) -> bool:
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        trunk.set_grad_checkpointing(False)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True

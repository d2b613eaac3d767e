"""One forward of a tower as transformers asks for it: features, embedding, inner layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .errors import ArgumentError, ConfigError
from .tower import run_head

HiddenStates = bool | int | Sequence[int] | None


@dataclass
class TimmTowerModelOutput(ModelOutput):
    """What `TimmTowerModel` gives.

    Args:
        last_hidden_state: The trunk's unpooled features, as timm's `forward_features` gives them: tokens
            `[B, N, C]` or a map in the trunk's own order; a list for CoaT, CrossViT and EfficientViM.
        pooler_output: The embedding `[B, embed_dim]`; the whole tuple or dict where a custom head gives one.
        hidden_states: Features of inner layers, as timm's `forward_intermediates` gives them: `[B, C, H, W]` each.
    """

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def run_tower(
    model: Any, images: torch.Tensor, wanted: HiddenStates, attentions: bool | None
) -> tuple[Any, Any, tuple[torch.Tensor, ...] | None]:
    """The trunk's features, the embedding, and features of inner layers where asked for."""
    trunk = model.trunk
    if model.config.output_attentions if attentions is None else attentions:
        raise ConfigError("output_attentions: timm's models do not give their attentions")
    if not images.is_floating_point():
        raise ArgumentError(
            f"pixel_values are {images.dtype}: expected floats as the image processor gives them, scaled and normalised"
        )
    images = images.to(model.dtype)
    wanted = model.config.output_hidden_states if wanted is None else wanted
    inner = None
    # An empty list or 0 asks for none; True, and no number, for all.
    if wanted:
        if not hasattr(trunk, "forward_intermediates"):
            raise ConfigError(f"{type(trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
        indices = None if wanted is True else wanted if isinstance(wanted, int) else list(wanted)
        features, found = trunk.forward_intermediates(images, indices=indices)
        inner = tuple(found)
    else:
        features = trunk.forward_features(images)
    if model.steps == "features":
        pooled = features
    else:
        # Where the trunk's forward is more than these two steps, it runs whole: the embedding is what it gives.
        pooled = trunk.forward_head(features) if model.steps == "features, head" else trunk(images)
    return features, run_head(model.head, model._head_input, pooled), inner


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

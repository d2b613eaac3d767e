"""transformers' faces of a tower: `TimmTowerModel`, and `TimmTowerForImageClassification` with a classifier on top."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import ModelOutput

from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, HeadError
from .modeling_base import TimmTowerPreTrainedModel
from .tower import run_head

__all__ = ["TimmTowerForImageClassification", "TimmTowerModel", "TimmTowerModelOutput"]

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


class TimmTowerModel(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower as a transformers model: images in, features and embedding out.

    Its `pooler_output` has the bits of `TimmModel.forward`. Both read and write the same folders.

    Args:
        config: Completed (from a folder) or not; the model's own `config` is the completed one.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TimmTowerModelOutput | tuple[Any, ...]:
        """Run the tower.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: True for all inner layers, a list of indices for those, an int for the last n.
            return_dict: False gives a tuple of the fields that are there.
            output_attentions: Refused: timm gives none.

        Raises:
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        features, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        output = TimmTowerModelOutput(features, embedding, inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


class TimmTowerForImageClassification(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower with a linear classifier on its embedding.

    Starts from a plain tower (`num_labels=...` or `id2label=...` give a fresh classifier, and a warning says so) and
    saves with its labels; `classifier.safetensors` lies beside the tower's files.

    Args:
        config: With `id2label` or `num_labels`, and `problem_type` (single label, multi label, regression; None
            follows from the labels' dtype, as everywhere in transformers).

    Raises:
        ConfigError: the tower's embedding is not one vector of a known width.
    """

    _has_classifier = True

    classifier: nn.Linear

    def __init__(self, config: TimmTowerConfig) -> None:
        super().__init__(config)
        self.num_labels = self.config.num_labels
        names = self.config.id2label or {}
        if set(names.values()) != set(self.config.label2id or ()):
            # given alone, id2label leaves transformers' default labels in the other table
            self.config.label2id = {str(label): int(index) for index, label in names.items()}

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Run tower and classifier.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            labels: `[B]` integers for one label each, `[B, num_labels]` floats for several, floats for regression;
                the loss follows `config.problem_type`.
            output_hidden_states: As `TimmTowerModel.forward`.
            return_dict: As `TimmTowerModel.forward`.
            output_attentions: Refused: timm gives none.

        Raises:
            HeadError: the embedding is not `[B, embed_dim]`.
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        _, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            found = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
            raise HeadError(f"a classifier needs an embedding [B, embed_dim], this tower gives {found}; choose a pool")
        logits = self.classifier(embedding)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


def _run(
    model: TimmTowerPreTrainedModel, images: torch.Tensor, wanted: HiddenStates, attentions: bool | None
) -> tuple[Any, Any, tuple[torch.Tensor, ...] | None]:
    """The trunk's features, the embedding, and features of inner layers where asked for."""
    trunk: Any = model.trunk
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
    return features, run_head(model.head, model._arrangement, pooled), inner


def _wants_dict(model: TimmTowerPreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)

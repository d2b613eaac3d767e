"""Towers as transformers models: `TimmTowerModel`, and `TimmTowerForImageClassification` with a classifier on top."""

from typing import Any

import torch
import torch.nn as nn
from transformers.modeling_outputs import ImageClassifierOutput

from .config import TimmTowerConfig
from .errors import HeadError
from .forward import TimmTowerModelOutput, wants_dict
from .hidden_states import HiddenStates
from .loading import TowerLoading
from .pretrained import TimmTowerPreTrainedModel
from .tower import Tower


class TimmTowerModel(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower as a transformers model: images in, features and embedding out.

    Its `pooler_output` has the bits of `TimmModel.forward`. Both read and write the same folders.

    Args:
        config: The model's own `config` is a completed copy.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        do_pooling: bool | None = None,
        patches: torch.Tensor | None = None,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
    ) -> TimmTowerModelOutput | tuple[Any, ...]:
        """Run the tower.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: True for all; an index or a list of them for those, None in all other places.
            return_dict: False gives a tuple of the fields that are there.
            output_attentions: Of a trunk with timm's attention layers that runs with `attn_implementation="eager"`.
            interpolate_pos_encoding: True says that the images may have another size than `config.image_size`, which
                the trunk must be able to take.
            do_pooling: False leaves the embedding out.
            patches, patch_coord, patch_valid: In place of `pixel_values`, of `naflex`. By hf_timm_tower only.

        Raises:
            ConfigError: hidden states or attentions were asked for and timm does not give them.
            ArgumentError: an index of no hidden state, or images of a size that the trunk does not take.
        """
        wanted = (output_hidden_states, output_attentions, interpolate_pos_encoding, do_pooling)
        output = TimmTowerModelOutput(*self._run(pixel_values, *wanted, patches=(patches, patch_coord, patch_valid)))
        return output if wants_dict(self, return_dict) else output.to_tuple()


class TimmTowerForImageClassification(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower with a linear classifier on its embedding.

    Starts from a plain tower (`num_labels=...` or `id2label=...` give a fresh classifier, and a warning says so) and
    saves with its labels; `classifier.safetensors` is stored beside the tower's files.

    Args:
        config: With `id2label` or `num_labels`, and `problem_type` (single label, multi label, regression; None
            follows from the labels' dtype, as everywhere in transformers).

    Raises:
        ConfigError: the tower's embedding is not one vector of a known width.
    """

    _has_classifier = True
    _leaves_out = ()

    classifier: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None, **unknown: Any) -> None:
        super().__init__(config, _loading, **unknown)
        self.num_labels = self.config.num_labels
        names = self.config.id2label or {}
        if set(names.values()) != set(self.config.label2id or ()):
            # given alone, id2label leaves transformers' default labels in the other table
            self.config.label2id = {str(label): int(index) for index, label in names.items()}

    @property
    def base_model(self) -> nn.Module:
        """Trunk and head without the classifier, as one module on the same parameters."""
        return Tower(self.config, self.trunk, self.head)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        patches: torch.Tensor | None = None,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Run tower and classifier.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            labels: `[B]` integers for one label each, `[B, num_labels]` floats for several, floats for regression;
                the loss follows `config.problem_type`.
            output_hidden_states, return_dict, output_attentions, interpolate_pos_encoding, patches, patch_coord,
                patch_valid: As `TimmTowerModel.forward`.

        Raises:
            HeadError: the embedding is not `[B, embed_dim]`.
            ConfigError, ArgumentError: as `TimmTowerModel.forward`.
        """
        wanted = (output_hidden_states, output_attentions, interpolate_pos_encoding)
        _, embedding, states, maps = self._run(pixel_values, *wanted, patches=(patches, patch_coord, patch_valid))
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            found = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
            raise HeadError(f"a classifier needs an embedding [B, embed_dim], this tower gives {found}; choose a pool")
        logits = self.classifier(embedding)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states, attentions=maps)
        return output if wants_dict(self, return_dict) else output.to_tuple()

"""A tower's trunk as a transformers backbone: the feature maps of its stages, for models of dense prediction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .config import TimmTowerConfig
from .errors import ConfigError, shown
from .forward import prepared, wants_dict, weights_in_place
from .hidden_states import HiddenStates
from .loading import TowerLoading
from .pretrained import TimmTowerPreTrainedModel
from .tower import CLASSIFIER, Tower, without_head
from .weights import StoredTower


class TimmTowerBackbone(BackboneMixin, TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """The trunk of a tower as transformers' `AutoBackbone` gives it, for UperNet, DETR, Mask2Former and their kin.

    Stages are those of timm's `forward_intermediates`, under the names of its `feature_info`. Of a tower with a head
    the head is left out, and a warning lists the weights that are.

    Args:
        config: A tower's config; `out_indices` or `out_features` say which feature maps are given, the last one where
            both are None. The model's own `config` is a copy of it without the head.

    Raises:
        ConfigError: timm gives no feature maps of this trunk, or has none of these names or indices.
    """

    has_attentions = False
    _leaves_out = ("head.", f"{CLASSIFIER}.")

    def _init_transformers_backbone(self) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:
            # Where this package is absent: now a model with this backbone inside can be loaded in this process.
            AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig)
        stages: Any = getattr(self.trunk, "feature_info", None)
        if not stages or not hasattr(self.trunk, "forward_intermediates"):
            raise ConfigError(f"{type(self.trunk).__name__} gives no feature maps in timm {timm.__version__}")
        self.stage_names = [stage["module"] for stage in stages]
        self.num_features = [stage["num_chs"] for stage in stages]
        self._activated = [name for name, part in self.trunk.named_modules() if isinstance(part, BatchNormAct2d)]
        if self.config.out_features is not None:
            self.out_features = self.config.out_features
        else:
            self.out_indices = [-1] if self.config.out_indices is None else self.config.out_indices

    @property
    def out_indices(self) -> list[int]:
        """Which of the stages the model gives."""
        return list(self.config.out_indices or ())

    @out_indices.setter
    def out_indices(self, indices: Sequence[int]) -> None:
        count = len(self.stage_names)
        found = [index % count for index in indices if -count <= index < count]
        if not found or len(found) < len(indices) or found != sorted(set(found)):
            raise ConfigError(
                f"out_indices={shown(indices)}: {self.config.architecture} has stages 0 to {count - 1}; expected some "
                "of them, each once and in this order"
            )
        self.config.out_indices = found

    @property
    def out_features(self) -> list[str]:
        """The same by timm's names."""
        return [self.stage_names[index] for index in self.out_indices]

    @out_features.setter
    def out_features(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if self.stage_names.count(name) != 1]:
            raise ConfigError(f"out_features: no stage {shown(unknown[0])}; there are {', '.join(self.stage_names)}")
        self.out_indices = [self.stage_names.index(name) for name in names]

    @property
    def channels(self) -> list[int]:
        """Channels of each feature map that the model gives."""
        return [self.num_features[index] for index in self.out_indices]

    def _build(self, config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:  # type: ignore[override]
        return super()._build(without_head(config), False, None)

    def _read(self, files: Sequence[str], loading: TowerLoading) -> StoredTower:  # type: ignore[override]
        stored = super()._read(files, loading)
        return replace(stored, config=without_head(stored.config))

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """The feature maps of `out_indices`, `[B, C, H, W]` each, without class token and registers.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: Give the maps of all stages as well.
            output_attentions: Refused.
            return_dict: False gives a tuple of the fields that are there.

        Raises:
            ConfigError: attentions were asked for, or the trunk lost its activations.
            ArgumentError: whole numbers, or images of a size that the trunk does not take.
        """
        if bare := [name for name in self._activated if not hasattr(self.trunk.get_submodule(name), "act")]:
            raise ConfigError(
                f"the activation of trunk.{bare[0]} is gone with the norm that it is part of, as where DETR freezes "
                "norms; take a trunk that has the two apart (ResNet, ConvNeXt), or convert with timm.layers"
            )
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ConfigError("output_attentions: a backbone gives feature maps; TimmTowerModel gives attentions")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with weights_in_place(self.trunk):
            maps = self.trunk.forward_intermediates(  # type: ignore[operator]
                prepared(self, pixel_values),
                indices=None if wanted else self.out_indices,
                output_fmt="NCHW",
                intermediates_only=True,
                stop_early=True,
            )
        chosen = tuple(maps[index] for index in self.out_indices) if wanted else tuple(maps)
        output = BackboneOutput(feature_maps=chosen, hidden_states=tuple(maps) if wanted else None)
        return output if wants_dict(self, return_dict) else output.to_tuple()

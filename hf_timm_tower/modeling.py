"""Towers as transformers models, as this package has them: the reader's, which here save and push (`pretrained.py`)."""

import os
from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from typing_extensions import Self

from .encoder_config import as_part
from .hub.trunk_source import refuse_as_part
from .interop.faces import Labels, parts_of
from .patches import TakesPatches
from .pretrained import SavesTower
from .reader import modeling as reader
from .reader.forward import TimmTowerModelOutput

__all__ = ["TimmTowerForImageClassification", "TimmTowerModel", "TimmTowerModelOutput"]


class TimmTowerModel(SavesTower, TakesPatches, reader.TimmTowerModel):  # type: ignore[no-untyped-call]
    __doc__ = reader.TimmTowerModel.__doc__

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and "trunk" in self._modules:  # a model of several parts gives this one its own
            refuse_as_part(value)
            value = as_part(value, int(self.trunk.num_features))  # type: ignore[arg-type]
        super().__setattr__(name, value)

    @classmethod
    def from_tower(cls, tower: nn.Module) -> Self:
        """A tower that is in memory as this class: on the very same trunk and head, with no files in between.

        What is done to one's weights is done to the other's; `copy.deepcopy(tower)` first where they shall be apart.

        Args:
            tower: A `TimmModel`, or another of the transformers models. `TimmModel.from_tower` is the way back.

        Raises:
            ArgumentError: it is no tower.
            ConfigError: its class makes or runs it by code of its own.
        """
        return cls._on(parts_of(tower))

    @classmethod
    def from_timm(cls, source: str | os.PathLike[str], **arguments: Any) -> Self:
        """A timm repository or folder, or one of transformers' `TimmWrapperModel`, as a tower, in eval mode.

        Args:
            source: As in `TimmModel.from_timm`.
            arguments: As in `TimmModel.from_timm`.

        Raises:
            TowerError: as `TimmModel.from_timm`.
        """
        from .timm_model import TimmModel  # which an AutoModel does not need

        return cls.from_tower(TimmModel.from_timm(source, **arguments))


class TimmTowerForImageClassification(SavesTower, TakesPatches, reader.TimmTowerForImageClassification):  # type: ignore[no-untyped-call]
    __doc__ = reader.TimmTowerForImageClassification.__doc__

    @classmethod
    def from_tower(
        cls,
        tower: nn.Module,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        problem_type: str | None = None,
    ) -> Self:
        """A tower that is in memory, with a classifier on top: on the very same trunk and head.

        Args:
            tower: As `TimmTowerModel.from_tower`. Without labels, one that has a classifier keeps it.
            num_labels: For a fresh classifier of so many classes.
            id2label: Or of these.
            problem_type: As in transformers.

        Raises:
            ArgumentError: no labels, and no classifier.
            ConfigError: as `TimmTowerModel.from_tower`.
        """
        return cls._on(parts_of(tower, Labels(num_labels, id2label, problem_type)))

    @classmethod
    def from_timm(
        cls,
        source: str | os.PathLike[str],
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        problem_type: str | None = None,
        **arguments: Any,
    ) -> Self:
        """A timm repository or folder with a classifier, in eval mode: timm's own, or a fresh one for other labels.

        Args:
            source: As in `TimmModel.from_timm`.
            num_labels: For a fresh classifier of so many classes.
            id2label: Or of these. With neither, timm's classifier gives the logits.
            problem_type: As in transformers.
            arguments: As in `TimmTowerModel.from_timm`.

        Raises:
            ConfigError: no labels, and the timm model has no classifier.
            TowerError: as `TimmModel.from_timm`.
        """
        from .timm_model import TimmModel

        if num_labels is None and id2label is None:
            arguments["proj"] = None
        tower = TimmModel.from_timm(source, **arguments)
        return cls.from_tower(tower, num_labels=num_labels, id2label=id2label, problem_type=problem_type)

"""A tower in memory as a transformers model, on the same modules."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn as nn

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError, ConfigError
from ..reader.tower import CLASSIFIER, Tower, make_classifier
from ..subclassing import OVERRIDABLE, overrides
from .eval_tower import tower_parts


@dataclass(frozen=True)
class Labels:
    """What a classifier on top of a tower is for.

    Attributes:
        num_labels: How many classes.
        id2label: Their names by index.
        problem_type: `single_label_classification`, `multi_label_classification`, `regression`, or None.
    """

    num_labels: int | None = None
    id2label: Mapping[int, str] | None = None
    problem_type: str | None = None

    @property
    def given(self) -> bool:
        """Whether they say how many classes there are."""
        return self.num_labels is not None or self.id2label is not None

    def put_into(self, config: TimmTowerConfig) -> None:
        """Set them in a config.

        Raises:
            ArgumentError: number and names contradict each other.
        """
        if self.id2label is not None:
            if self.num_labels not in (None, len(self.id2label)):
                raise ArgumentError(f"num_labels={self.num_labels}, but id2label has {len(self.id2label)} names")
            config.id2label = {int(index): name for index, name in self.id2label.items()}
            config.label2id = {name: index for index, name in config.id2label.items()}
        elif self.num_labels is not None:
            config.num_labels = self.num_labels
        if self.problem_type is not None:
            config.problem_type = self.problem_type  # type: ignore[assignment]  # checked by transformers


def parts_of(source: nn.Module, labels: Labels | None = None) -> Tower:
    """The trunk and head of a tower in memory, themselves and no copies, for a transformers model.

    Args:
        source: `TimmModel` or a transformers model of a tower.
        labels: For a classifier on top: a fresh one, or the source's own where there are no labels. None for a model
            without.

    Raises:
        ArgumentError: the source is no tower, or nobody says how many labels there are.
        ConfigError: its class makes or runs it by code of its own.
    """
    config, trunk, head = tower_parts(source)
    own = [step for step in OVERRIDABLE if hasattr(source, "_is_tower_base") and overrides(type(source), step)]
    if own:
        raise ConfigError(f"{type(source).__name__} has its own {', '.join(own)}, of which no other class knows")
    config, classifier = copy.deepcopy(config), None
    if labels is not None:
        labels.put_into(config)
        classifier = None if labels.given else getattr(source, CLASSIFIER, None)
        if classifier is None:
            if not labels.given and not config.is_classifier:
                raise ArgumentError("a classifier needs labels: pass num_labels=... or id2label={0: ..., ...}")
            anchor = next(trunk.parameters())
            classifier = make_classifier(config).to(device=anchor.device, dtype=anchor.dtype)
    parts = Tower(config, trunk, head, classifier)
    parts.training = source.training  # not `train()`, which would reach into the source's own modules
    return parts

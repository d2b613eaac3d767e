"""The least that is a tower, and what moves in it, for the tests of freezing."""

from typing import Any

import timm
import torch
import torch.nn as nn

from hf_timm_tower.training.freezing import frozen_context, note_fixed


class Tower(nn.Module):
    """The least that is a tower; its forward is that of both faces."""

    def __init__(self, architecture: str, head: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.trunk = timm.create_model(architecture, num_classes=0, **kwargs)
        self.head = nn.Linear(self.trunk.num_features, 8) if head is None else head
        note_fixed(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with frozen_context(self.trunk, x):
            features = self.trunk(x)
        return self.head(features)


def trainable(tower: nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def everything(tower: nn.Module) -> set[str]:
    return {name for name, _ in tower.named_parameters()}


def statistics(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in tower.named_buffers()}


def moved(tower: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    now = dict(tower.named_buffers())
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


def under(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{prefix}." for prefix in prefixes)) or name in prefixes}

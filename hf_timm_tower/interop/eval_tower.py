"""A tower's forward in eval mode alone, and how far another program's outputs are from it: what the exporters share."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError
from ..reader.tower import CLASSIFIER, HeadInput, run_head
from ..reader.trunk import float_dtype, native_size


def tower_parts(tower: nn.Module) -> tuple[TimmTowerConfig, nn.Module, nn.Module]:
    """Config, trunk and head of a tower, whichever its class.

    Raises:
        ArgumentError: it is no tower.
    """
    config, trunk, head = (getattr(tower, name, None) for name in ("config", "trunk", "head"))
    if not (isinstance(config, TimmTowerConfig) and isinstance(trunk, nn.Module) and isinstance(head, nn.Module)):
        raise ArgumentError(f"a {type(tower).__name__} is no tower: it has no config, trunk and head of a tower")
    return config, trunk, head


class EvalTower(nn.Module):
    """A tower's forward in eval mode and nothing else: what is exported.

    Args:
        tower: Anything with `config`, `trunk` and `head`.

    Raises:
        ArgumentError: it is no tower.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.config, self.trunk, self.head = tower_parts(tower)
        self.arrangement = HeadInput.of(self.config, self.trunk)
        if hasattr(tower, CLASSIFIER):
            warnings.warn(
                f"the classifier of a {type(tower).__name__} is not exported: what is exported gives the embedding",
                stacklevel=4,
            )

    def forward(self, images: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]` -> what the tower gives."""
        return run_head(self.head, self.arrangement, self.trunk(images))

    def images(self, batch: int) -> torch.Tensor:
        """Random images of the tower's size, on its device."""
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn((batch, self.config.in_chans, *native_size(self.config)), generator=generator)
        return images.to(device=next(self.trunk.parameters()).device, dtype=float_dtype(self.trunk))


def relative_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference over the largest expected value, infinite where number, shapes or finiteness differ."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
        if a.numel() == 0:
            continue
        difference = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst

#!/usr/bin/env python3
"""What huggingface_hub's plain mixin does to a custom head: run it, and look at the three lines it prints.

The model below is how one writes it by hand: a timm trunk, a head of one's own, `PyTorchModelHubMixin` for saving and
loading. Nothing here is of hf_timm_tower; needs timm and huggingface_hub.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import timm
import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin


class CustomHead(nn.Module):
    """The head that shall come back."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, in_features]` -> `[B, embed_dim]`."""
        return self.relu(self.linear(x))


class PlainTower(nn.Module, PyTorchModelHubMixin):
    """A timm trunk and a head, saved and loaded by the mixin as it is."""

    def __init__(self, model_name: str, embed_dim: int, custom_head: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = timm.create_model(model_name, num_classes=0)
        self.head = custom_head or nn.Linear(self.trunk.num_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` -> `[B, embed_dim]`."""
        return self.head(self.trunk(x))


class _Heard(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def main() -> None:
    """Save a tower with a custom head, load it back, and say what came back and who complained."""
    torch.manual_seed(0)
    width = timm.create_model("test_resnet", num_classes=0).num_features
    tower = PlainTower("test_resnet", 64, custom_head=CustomHead(width, 64)).eval()
    image = torch.rand(1, 3, 96, 96)
    said: list[str] = []
    logging.getLogger().addHandler(_Heard(said))
    logging.getLogger("huggingface_hub").addHandler(_Heard(said))
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(printed),
    ):
        warnings.simplefilter("always")
        tower.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        back = PlainTower.from_pretrained(folder)
    said += [str(warning.message) for warning in warned]
    with torch.no_grad():
        same = torch.equal(tower(image), back(image))
    print(f"config.json  {json.dumps(config)}")
    print(f"head         saved as {type(tower.head).__name__}, loaded as {type(back.head).__name__}", end="")
    print(", with its weights" if torch.equal(back.head.weight, tower.head.linear.weight) else ", its weights random")
    print(f"result       {'the same' if same else 'another'} embedding, {len(said)} warnings, no error", end="")
    print(f"; all that was said: {' '.join((printed.getvalue() + ' '.join(said)).split())!r}")


if __name__ == "__main__":
    main()

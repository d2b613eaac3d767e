"""Tiny random models of ours and of each peer, as folders on the disk; and what a cell of the table may say."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperModel,
    ViTImageProcessor,
)

from hf_timm_tower import TimmModel

SIZE = 64
TIMM_SIZE = 160  # of timm's test models


class NotThereError(Exception):
    """The library has no such call."""


class DiffersError(Exception):
    """The call went through and gave something else than asked for, without a word."""


def images(size: int = SIZE, count: int = 2) -> torch.Tensor:
    """Images `[count, 3, size, size]`, the same at every call."""
    return torch.linspace(-1, 1, count * 3 * size * size).sin().reshape(count, 3, size, size)


def picture(width: int = 90, height: int = 70) -> Image.Image:
    """A picture of other sides than any model takes."""
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def there(value: Any, name: str) -> Any:
    """An attribute, or the finding that there is none."""
    if not hasattr(value, name):
        raise NotThereError(f"no `{name}`")
    return getattr(value, name)


def same(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 0.0) -> None:
    """Raise `DiffersError` unless two tensors agree."""
    if found.shape != expected.shape:
        raise DiffersError(f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}")
    if not torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance):
        raise DiffersError(f"{what}: other numbers, by up to {(found - expected).abs().max():.2g}")


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The least cosine of two batches of vectors."""
    return float(torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1).min())


def make_all(root: Path) -> None:
    """Write every model that the calls load."""
    torch.manual_seed(0)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    for name, architecture in (("vit", "test_vit"), ("resnet", "test_resnet"), ("convnext", "test_convnext")):
        pool = "token" if name == "vit" else "avg"
        tower = TimmModel(architecture, 16, image_size=SIZE, pool=pool).eval()
        tower.save_pretrained(root / name)
    TimmModel("test_vit", image_size=SIZE, pool="token", proj="none").save_pretrained(root / "vit_bare")
    for name, architecture in (("timm", "test_vit"), ("timm_resnet", "test_resnet")):
        save_for_hf(timm.create_model(architecture, num_classes=10), root / name, safe_serialization=True)
        # transformers cannot read `model_args`, which what is on the Hub does not have yet
        shutil.copytree(root / name, root / f"{name}_hub")
        config = json.loads((root / name / "config.json").read_text())
        del config["model_args"]
        (root / f"{name}_hub" / "config.json").write_text(json.dumps(config))
    transformer = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"image_size": SIZE, "patch_size": 16, **transformer}
    peers: dict[str, Any] = {
        "wrapper": TimmWrapperModel.from_pretrained(root / "timm_hub"),
        "wrapper_resnet": TimmWrapperModel.from_pretrained(root / "timm_resnet_hub"),
        "dinov2": Dinov2Model(Dinov2Config(**vision)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**vision, intermediate_size=64)),
        "convnext_hf": ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
    }
    for name, model in peers.items():
        model.save_pretrained(root / name)
        if not name.startswith("wrapper"):
            processor.save_pretrained(root / name)


def quiet() -> None:
    """No warnings or progress bars: what counts is what comes back."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

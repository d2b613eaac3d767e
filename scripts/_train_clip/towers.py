"""Two towers as one module: inputs in, embeddings of length 1 out, with the scale and bias of the loss."""

import math
import os
import tempfile
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from hf_timm_tower import TimmModel, TimmTowerModel
from hf_timm_tower.training.lock import lock

from .options import Options

# Embeddings `[B, D]` of images and of what belongs to them; the scale; the bias, where the loss has one.
Embeddings = tuple[Tensor, Tensor, Tensor, Tensor | None]

DIGIT_SIZE = 32
# Where the papers start, and CLIP's bound: a temperature below 1/100 makes training unstable.
CLIP_SCALE, SIGLIP_SCALE, SIGLIP_BIAS = math.log(1 / 0.07), math.log(10), -10.0
LARGEST_SCALE = math.log(100)


def make_tower(options: Options) -> TimmTowerModel:
    """The image tower that the options ask for, locked if they say so."""
    tower = _new(options.architecture, options) if options.tower is None else _load(options.tower, options)
    if options.lock_image:
        lock(tower, options.lock_image_unlocked_groups, freeze_bn_stats=True, head=options.lock_image_head)
    return tower


def make_second_tower(options: Options) -> TimmTowerModel:
    """The second image tower: `--second-tower` is a folder, a repository's id (with a slash) or an architecture."""
    name = options.second_tower
    assert name is not None
    return _load(name, options) if "/" in name or os.path.isdir(name) else _new(name, options)


def _load(name: str, options: Options) -> TimmTowerModel:
    given = {} if options.image_size is None else {"image_size": options.image_size}
    tower: TimmTowerModel = TimmTowerModel.from_pretrained(name, **given)
    return tower


def _new(architecture: str, options: Options) -> TimmTowerModel:
    size = DIGIT_SIZE if options.image_size is None and options.data is None else options.image_size
    made = TimmModel(architecture, options.embed_dim, image_size=size, pretrained=options.pretrained)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        tower: TimmTowerModel = TimmTowerModel.from_pretrained(folder)
    tower.name_or_path = tower.config.name_or_path = ""  # not a place that is gone
    return tower


def _scale_and_bias(loss: str) -> tuple[float, nn.Parameter | None]:
    if loss == "clip":
        return CLIP_SCALE, None
    return SIGLIP_SCALE, nn.Parameter(torch.tensor(SIGLIP_BIAS))


class ImageAndText(nn.Module):
    """transformers' `VisionTextDualEncoderModel`, and SigLIP's bias, for which that has no place.

    Args:
        tower: The image tower.
        text_model: A transformers text model with a `pooler_output`.
        width: Of the embeddings that are compared.
        loss: `clip` or `siglip`.
    """

    def __init__(self, tower: TimmTowerModel, text_model: Any, width: int, loss: str) -> None:
        super().__init__()
        scale, self.logit_bias = _scale_and_bias(loss)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            tower.config, text_model.config, projection_dim=width, logit_scale_init_value=scale
        )
        self.model = VisionTextDualEncoderModel(config, vision_model=tower, text_model=text_model)

    @property
    def image_towers(self) -> dict[str, nn.Module]:
        return {"model.vision_model": self.model.vision_model}

    @property
    def log_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, width]`."""
        return F.normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)

    def embed_texts(self, **tokens: Tensor) -> Tensor:
        """Tokens `[B, L]` -> `[B, width]`."""
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def forward(self, pixel_values: Tensor, **tokens: Tensor) -> Embeddings:
        """Embeddings, scale and bias."""
        scale = self.log_scale.exp()
        return self.embed_images(pixel_values), self.embed_texts(**tokens), scale, self.logit_bias


class TwoImages(nn.Module):
    """Two image towers, each for one image of a pair.

    Args:
        tower: Of the first image.
        second: Of the second, with the same width.
        loss: `clip` or `siglip`.

    Raises:
        SystemExit: the widths differ.
    """

    def __init__(self, tower: TimmTowerModel, second: TimmTowerModel, loss: str) -> None:
        super().__init__()
        widths = [each.config.embed_dim for each in (tower, second)]
        if widths[0] != widths[1] or widths[0] is None:
            raise SystemExit(f"train_clip: embeddings of widths {widths[0]} and {widths[1]} cannot be compared")
        self.image, self.second = tower, second
        scale, self.logit_bias = _scale_and_bias(loss)
        self.log_scale = nn.Parameter(torch.tensor(scale))

    @property
    def image_towers(self) -> dict[str, nn.Module]:
        return {"image": self.image, "second": self.second}

    def forward(self, pixel_values: Tensor, second_pixel_values: Tensor) -> Embeddings:
        """Embeddings, scale and bias."""
        image, second = self.image(pixel_values).pooler_output, self.second(second_pixel_values).pooler_output
        return F.normalize(image, dim=-1), F.normalize(second, dim=-1), self.log_scale.exp(), self.logit_bias

"""What transformers.js needs beside the ONNX file: which outputs, and config and preprocessing in keys that it reads.

Where a picture has to be made smaller its pixels are not PIL's there: it resizes without antialiasing (sharp's affine
transform, or the browser's canvas), and a crop of an odd number of pixels may begin one pixel elsewhere. A picture of
the tower's size gives the same.
"""

import math
from typing import Any

import torch
import torch.nn as nn

from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, ExportError
from ..reader.image_processing import INTERPOLATIONS, completed_preprocess
from ..reader.tower import run_head
from ..reader.trunk import eval_mode
from .eval_tower import EvalTower

INPUT, OUTPUTS = "pixel_values", ("pooler_output", "last_hidden_state")
# Of PIL's, those that transformers.js has; in place of the others it takes bilinear, with a line in its log.
_RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")


class BrowserTower(EvalTower):
    """A tower's forward with transformers' two outputs.

    Attributes:
        steps: The trunk's forward is `forward_head(forward_features(x))`, so that it runs once for both outputs.

    Raises:
        ExportError: the embedding is not one tensor.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__(tower)
        if self.config.embed_dim is None:
            raise ExportError("transformers.js takes one tensor as pooler_output; this tower's head gives several")
        trunk: Any = self.trunk
        images = self.images(1)
        with torch.no_grad(), eval_mode(self):
            features = trunk.forward_features(images)
            self.tokens = isinstance(features, torch.Tensor)
            whole = trunk(images)
            try:
                self.steps = self.tokens and torch.equal(trunk.forward_head(features), whole)
            except (AttributeError, NotImplementedError, TypeError):  # some trunks have no head of their own
                self.steps = self.tokens and torch.equal(features, whole)

    def forward(self, images: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]` -> the embedding, and the trunk's unpooled features where they are a tensor."""
        trunk: Any = self.trunk
        if not self.steps:
            return (run_head(self.head, self.arrangement, trunk(images)),)
        features = trunk.forward_features(images)
        pooled = trunk.forward_head(features) if hasattr(trunk, "forward_head") else features
        return run_head(self.head, self.arrangement, pooled), features

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` gives."""
        return list(OUTPUTS if self.steps else OUTPUTS[:1])


def browser_config(config: TimmTowerConfig) -> dict[str, Any]:
    """What `config.json` says there: what kind of model it is, and its sizes."""
    height, width = config.image_size  # type: ignore[misc]
    return {
        "model_type": config.model_type,
        "architectures": ["TimmTowerModel"],
        "architecture": config.architecture,
        "hidden_size": config.embed_dim,
        "image_size": height if height == width else [height, width],
        "num_channels": config.in_chans,
    }


def browser_preprocessing(config: TimmTowerConfig) -> dict[str, Any]:
    """A tower's preprocessing in the keys that transformers.js reads from `preprocessor_config.json`.

    Raises:
        ConfigError: these keys cannot say it.
    """
    block, (height, width) = completed_preprocess(config)
    lo, hi = block["value_range"]
    resized = [math.floor(side / block["crop_pct"]) for side in (height, width)]
    crops = resized != [height, width] or block["crop_mode"] == "center"
    odd = {
        f"{config.in_chans} channels": config.in_chans != 3,
        "padding to a square": block["padding"] is not None,
        f"interpolation={block['interpolation']!r}": block["interpolation"] not in _RESAMPLING,
        "crop_mode='border'": block["crop_mode"] == "border",
        "a centre crop that is no square": block["crop_mode"] == "center" and height != width,
        f"crop_pct={block['crop_pct']}, which leaves a border": block["crop_pct"] > 1,
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise ConfigError(
            f"transformers.js has no keys for {', '.join(found)}: it would show the model other pixels. Use "
            "export_onnx without a layout and prepare images yourself, or change the tower's preprocessing."
        )
    squashes = block["crop_mode"] == "squash"
    return {
        "image_processor_type": "ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resized[0], "width": resized[1]} if squashes else {"shortest_edge": resized[0]},
        "resample": INTERPOLATIONS[block["interpolation"]],
        "do_center_crop": crops,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": (hi - lo) / 255,
        "do_normalize": True,
        "image_mean": [value - lo for value in block["mean"]],
        "image_std": block["std"],
        "do_flip_channel_order": block["channel_order"] == "BGR",
    }

"""The preprocess block of the config, and timm's own transform made from it.

The block holds what timm's `pretrained_cfg` says of preprocessing, and three facts that some models need beside it
(padding, channel order, value range). The size is not in it: `config.image_size` is its only owner, so that trunk,
config and transform cannot disagree.
"""

import math
from collections.abc import Callable
from typing import Any

from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
CROP_MODES = ("center", "squash", "border")


def preprocess_from_timm(pretrained_cfg: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """timm's `pretrained_cfg` -> the preprocess block.

    Args:
        pretrained_cfg: of the trunk as it was built.
        in_chans: Channels of the image; where they are not as many as timm has means for, each channel gets the
            average of timm's means and standard deviations, as timm's first convolution is averaged over channels.
    """
    data = resolve_data_config(pretrained_cfg=pretrained_cfg)  # type: ignore[no-untyped-call]
    mean, std = list(data["mean"]), list(data["std"])
    if len(mean) != in_chans:
        mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
    return {
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        "crop_mode": data["crop_mode"],
        "mean": mean,
        "std": std,
        "padding": None,
        "channel_order": "RGB",
        "value_range": [0.0, 1.0],
    }


def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used.

    Raises:
        ConfigError: names the entry and its value.
    """
    expected = {"interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range"}
    if set(block) != expected:
        raise ConfigError(
            f"preprocess: missing {sorted(expected - set(block))}, unknown {sorted(set(block) - expected)}"
        )
    for key, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if block[key] not in choices:
            raise ConfigError(f"preprocess.{key}={block[key]!r}: expected one of {', '.join(choices)}")
    crop = block["crop_pct"]
    if not _is_number(crop) or not 0.05 <= crop <= 2:
        raise ConfigError(f"preprocess.crop_pct={crop!r}: expected a number from 0.05 to 2")
    for key, length in (("mean", in_chans), ("std", in_chans)):
        values = block[key]
        if not isinstance(values, list) or len(values) != length or not all(_is_number(value) for value in values):
            raise ConfigError(f"preprocess.{key}={values!r}: expected {length} numbers")
    if not all(value > 0 for value in block["std"]):
        raise ConfigError(f"preprocess.std={block['std']!r}: expected positive numbers")
    for key, only in (("padding", None), ("channel_order", "RGB"), ("value_range", [0.0, 1.0])):
        if block[key] != only:
            raise ConfigError(
                f"preprocess.{key}={block[key]!r}: this version preprocesses with {only!r} only; it would prepare "
                "other pixels than the tower was made for"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def make_transform(config: TimmTowerConfig, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
    """timm's own transform for a tower, from the config alone.

    Args:
        config: A completed config.
        is_training: The random transform for training instead of the one for evaluation.
        kwargs: Further arguments of `timm.data.create_transform` (augmentation).

    Returns:
        PIL image -> float tensor `[in_chans, height, width]`, normalised.

    Raises:
        ConfigError: the config is not completed.
        ArgumentError: an argument that the config decides, or that timm does not know.
    """
    block = config.preprocess
    if block is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    decided = {
        "input_size": (config.in_chans, *config.image_size),  # type: ignore[misc]  # checked: a pair
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple(block["mean"]),
        "std": tuple(block["std"]),
    }
    if twice := sorted(set(decided) & set(kwargs)):
        raise ArgumentError(f"transform: {', '.join(twice)} come from the tower's config; change them there")
    try:
        transform: Callable[[Any], Any] = create_transform(is_training=is_training, **decided, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"transform: timm.data.create_transform refuses: {error}") from error
    return transform

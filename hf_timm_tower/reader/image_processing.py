"""The preprocess block of the config, and timm's own transform made from it.

The block holds what timm's `pretrained_cfg` says of preprocessing, and three facts that some models need beside it:

- `padding`: None, or `{"mode": "square", "color": [255, 255, 255]}`: the image is laid in the middle of a square of its
  longer side before it is resized. One number from 0 to 255 for each channel.
- `value_range`: `[lo, hi]`, what black and white are before mean and std are applied; `[0, 1]` is timm's own.
- `channel_order`: `RGB`, or `BGR`: the channels are reversed last. `mean`, `std` and `color` are in the order R, G, B
  in either case.

Where these have their defaults, the transform is timm's and nothing else. The size is not in the block:
`config.image_size` is its only owner, so that trunk, config and transform cannot disagree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose, Normalize

from .config import TimmTowerConfig, check_size
from .errors import ArgumentError, ConfigError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
CHANNEL_ORDERS = ("RGB", "BGR")

_WHITE_IS_ONE = [0.0, 1.0]
_KEYS = {"interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range"}


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
        "value_range": list(_WHITE_IS_ONE),
    }


def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used.

    Raises:
        ConfigError: names the entry and its value.
    """
    if set(block) != _KEYS:
        raise ConfigError(f"preprocess: missing {sorted(_KEYS - set(block))}, unknown {sorted(set(block) - _KEYS)}")
    for key, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if block[key] not in choices:
            raise ConfigError(f"preprocess.{key}={block[key]!r}: expected one of {', '.join(choices)}")
    crop = block["crop_pct"]
    if not _is_number(crop) or not 0.05 <= crop <= 2:
        raise ConfigError(f"preprocess.crop_pct={crop!r}: expected a number from 0.05 to 2")
    for key in ("mean", "std"):
        if not _are_numbers(block[key], in_chans):
            raise ConfigError(f"preprocess.{key}={block[key]!r}: expected {in_chans} numbers")
    if not all(value > 0 for value in block["std"]):
        raise ConfigError(f"preprocess.std={block['std']!r}: expected positive numbers")
    padding = block["padding"]
    if padding is not None and not _is_padding(padding, in_chans):
        raise ConfigError(
            f"preprocess.padding={padding!r}: expected None or {{'mode': 'square', 'color': [...]}} with {in_chans} "
            "whole numbers from 0 to 255"
        )
    order = block["channel_order"]
    if order not in CHANNEL_ORDERS:
        raise ConfigError(f"preprocess.channel_order={order!r}: expected one of {', '.join(CHANNEL_ORDERS)}")
    if order == "BGR" and in_chans != 3:
        raise ConfigError(f"preprocess.channel_order='BGR': an image with in_chans={in_chans} has no red and blue")
    bounds = block["value_range"]
    if not _are_numbers(bounds, 2) or not bounds[0] < bounds[1]:
        raise ConfigError(
            f"preprocess.value_range={bounds!r}: expected [lo, hi] with lo < hi, what black and white are before mean "
            "and std are applied ([0, 1] is timm's own)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(_is_number(value) for value in values)


def _is_padding(padding: Any, in_chans: int) -> bool:
    if not isinstance(padding, dict) or set(padding) != {"mode", "color"} or padding["mode"] != "square":
        return False
    color = padding["color"]
    return _are_numbers(color, in_chans) and all(isinstance(value, int) and 0 <= value <= 255 for value in color)


class PadToSquare:
    """PIL image -> the same in the middle of a square of its longer side.

    Args:
        color: of what is around it, one number from 0 to 255 for each channel.
    """

    def __init__(self, color: Sequence[int]) -> None:
        self.color = tuple(color)

    def __call__(self, image: Image.Image) -> Image.Image:
        if len(image.getbands()) != len(self.color):
            raise ArgumentError(
                f"transform: an image of mode {image.mode}, but the tower pads in {len(self.color)} channels: "
                f"image.convert({'L' if len(self.color) == 1 else 'RGB'!r}) first"
            )
        side = max(image.size)
        canvas = Image.new(image.mode, (side, side), self.color if len(self.color) > 1 else self.color[0])
        canvas.paste(image, self.corner(image.width, image.height))
        return canvas

    @staticmethod
    def corner(width: int, height: int) -> tuple[int, int]:
        """Where the image's left upper pixel goes: (x, y)."""
        side = max(width, height)
        return (side - width) // 2, (side - height) // 2

    def __repr__(self) -> str:
        return f"PadToSquare(color={self.color})"


class ScaleValues:
    """Float tensor in [0, 1] -> [lo, hi]."""

    def __init__(self, lo: float, hi: float) -> None:
        self.lo, self.hi = lo, hi

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images * (self.hi - self.lo) + self.lo

    def __repr__(self) -> str:
        return f"ScaleValues(lo={self.lo}, hi={self.hi})"


class ReverseChannels:
    """`[..., 3, H, W]` -> the same with red and blue exchanged."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., [2, 1, 0], :, :]

    def __repr__(self) -> str:
        return "ReverseChannels()"


def make_transform(config: TimmTowerConfig, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
    """timm's own transform for a tower, from the config alone.

    It pads first, and scales to `value_range` and reverses the channels around the normalisation, where the preprocess
    block says so; otherwise it is what `timm.data.create_transform` gives.

    Args:
        config: A completed config.
        is_training: The random transform for training instead of the one for evaluation.
        kwargs: Further arguments of `timm.data.create_transform` (augmentation).

    Returns:
        PIL image -> float tensor `[in_chans, height, width]`, normalised.

    Raises:
        ConfigError: the config is not completed.
        ArgumentError: an argument that the config decides, or that timm does not know, or with which the transform
            does not normalise although the tower needs what is done there.
    """
    block, size = completed_preprocess(config)
    transform: Callable[[Any], Any] = transform_of(block, size, is_training, **kwargs)
    return transform


def transform_of(block: dict[str, Any], size: Sequence[int], is_training: bool = False, **kwargs: Any) -> Any:
    """`make_transform` from a checked preprocess block and `[height, width]`."""
    lo, hi = block["value_range"]
    scaled = [lo, hi] != _WHITE_IS_ONE
    # timm also makes colours of the mean (of borders, and in augmentation), which it takes to be in [0, 1].
    mean = [(value - lo) / (hi - lo) for value in block["mean"]] if scaled else block["mean"]
    std = [value / (hi - lo) for value in block["std"]] if scaled else block["std"]
    decided = {
        "input_size": (len(mean), *size),
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple(mean),
        "std": tuple(std),
    }
    if twice := sorted(set(decided) & set(kwargs)):
        raise ArgumentError(f"transform: {', '.join(twice)} come from the tower's config; change them there")
    try:
        transform = create_transform(is_training=is_training, **decided, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"transform: timm.data.create_transform refuses: {error}") from error
    reverse = block["channel_order"] == "BGR"
    if block["padding"] is None and not scaled and not reverse:
        return transform
    steps = list(transform.transforms) if isinstance(transform, Compose) else []
    places = [place for place, step in enumerate(steps) if isinstance(step, Normalize)]
    if len(places) != 1:
        raise ArgumentError(
            f"transform: with {kwargs} timm does not normalise within one transform, and this tower's padding, "
            "value_range or channel_order would get lost; leave such arguments out"
        )
    place = places[0]
    if scaled:
        normalise = Normalize(mean=torch.tensor(block["mean"]), std=torch.tensor(block["std"]))
        steps[place : place + 1] = [ScaleValues(lo, hi), normalise]
        place += 1
    if reverse:
        steps.insert(place + 1, ReverseChannels())
    if block["padding"] is not None:
        steps.insert(0, PadToSquare(block["padding"]["color"]))
    return Compose(steps)


def completed_preprocess(config: TimmTowerConfig) -> tuple[dict[str, Any], list[int]]:
    """The preprocess block and `[height, width]` of a config.

    Raises:
        ConfigError: the config is not completed.
    """
    if config.preprocess is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    return config.preprocess, check_size("image_size", config.image_size)

"""The preprocess block of a config, timm's evaluation steps made from it, and the facts of `preprocessor_config.json`.

The block is what timm's `pretrained_cfg` says of preprocessing, and `padding` (None, or `{"mode": "square", "color":
[...]}`: first the image is centred on a square of its longer side), `value_range` (`[lo, hi]`, what black and white are
before mean and std) and `channel_order` (`BGR`: reversed last; mean, std and color are R, G, B in either case).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio
from torchvision.transforms import InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional as tv_functional

from .config import MAX_IN_CHANS, TimmTowerConfig, check_size
from .errors import ArgumentError, ConfigError, shown

READER_MODULE = "modeling_timm_tower"  # which travels with a tower and holds the classes, for transformers' `auto_map`
PROCESSOR_TYPE = "TimmTowerImageProcessor"
# A list: of a plain name transformers makes a video processor's, and asks every pipeline's user to trust its code.
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": [f"{READER_MODULE}.{PROCESSOR_TYPE}", None]}

INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "lanczos": 1}  # PIL's numbers
CROP_MODES = ("center", "squash", "border")
PIL_MODES = {1: "L", 3: "RGB"}
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # PIL's, for damaged files
# Three channels of 8192 x 8192, 0.8 GB as float32; the largest size in timm is 1024. Padded are bytes.
MAX_RESIZED_VALUES = 3 * 2**26
MAX_PADDED_SIDE = 2**14
_BLOCK_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range")
_FILE_NAMES = {key: {"mean": "image_mean", "std": "image_std"}.get(key, key) for key in _BLOCK_KEYS}
PROCESSOR_FACTS = ("size", *_FILE_NAMES.values())
# Keys that transformers itself writes into a processor's file.
PROCESSOR_KEYS = frozenset({"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"})
STANDARD_KEYS = tuple("do_resize resample do_center_crop do_rescale rescale_factor do_normalize do_convert_rgb".split())


def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used by a `ConfigError` that names the entry and its value."""
    if set(block) != set(_BLOCK_KEYS):
        missing, unknown = set(_BLOCK_KEYS) - set(block), set(block) - set(_BLOCK_KEYS)
        raise ConfigError(f"preprocess: missing {sorted(missing)}, unknown {shown(sorted(unknown, key=str))}")
    order, padding, bounds = block["channel_order"], block["padding"], block["value_range"]
    square = isinstance(padding, dict) and set(padding) == {"mode", "color"} and padding["mode"] == "square"
    padded = padding is None or (square and _are_numbers(padding["color"], in_chans, 0, 255, int))
    rules = {
        "interpolation": (block["interpolation"] in tuple(INTERPOLATIONS), f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (block["crop_mode"] in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
        "crop_pct": (_are_numbers([block["crop_pct"]], 1, 0.05, 2), "a number from 0.05 to 2"),
        "mean": (_are_numbers(block["mean"], in_chans), f"{in_chans} numbers from -1e6 to 1e6"),
        "std": (_are_numbers(block["std"], in_chans, 1e-6), f"{in_chans} numbers from 1e-6 to 1e6"),
        "padding": (padded, f"None or {{'mode': 'square', 'color': [{in_chans} whole numbers from 0 to 255]}}"),
        "channel_order": (order == "RGB" or (order == "BGR" and in_chans == 3), f"RGB or BGR, with {in_chans=}"),
        "value_range": (_are_numbers(bounds, 2) and bounds[1] - bounds[0] >= 1e-6, "[lo, hi], lo < hi; timm's: [0, 1]"),
    }
    for key, (fits, expected) in rules.items():
        if not fits:
            raise ConfigError(f"preprocess.{key}={shown(block[key])}: expected {expected}")


# The bounds are those of mean, std and value_range: 16-bit images and Hounsfield units fit in.
def _are_numbers(values: Any, length: int, least: float = -1e6, most: float = 1e6, kind: Any = (int, float)) -> bool:
    return (isinstance(values, list) and len(values) == length) and all(
        isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most for value in values
    )


@dataclass(frozen=True)
class PadToSquare:
    """PIL image, or tensor `[..., C, H, W]` -> the same in the middle of a square of its longer side, in this color."""

    color: tuple[int, ...]

    def __call__(self, image: Any) -> Any:
        return _padded(image, _size_after(self, image), self.color)


@dataclass(frozen=True)
class NormalizeRange:
    """Float tensor `[..., C, H, W]` in [0, 1] -> scaled to [lo, hi] and normalised, and the channels reversed."""

    normalize: Normalize
    lo: float
    hi: float
    reverse: bool

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.normalize(images * (self.hi - self.lo) + self.lo)
        return made.flip(-3) if self.reverse else made


def timm_arguments(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """What `timm.data.create_transform` is told; `ConfigError` where that is images of too many pixels, or of none."""
    channels, (lo, hi) = len(block["mean"]), block["value_range"]
    resized = [math.floor(side / block["crop_pct"]) for side in size]
    if 0 in resized or channels * max(math.prod(resized), math.prod(size)) > MAX_RESIZED_VALUES:
        raise ConfigError(
            f"image_size={list(size)} with crop_pct={block['crop_pct']}: {channels} channels would be resized to "
            f"{resized[0]} x {resized[1]}; one pixel to {MAX_RESIZED_VALUES} values (8192 x 8192 in colour) are taken"
        )
    # timm makes colours of the mean (of borders, and in augmentation), which it takes to be in [0, 1].
    return {
        "input_size": (channels, *size),
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple((value - lo) / (hi - lo) for value in block["mean"]),
        "std": tuple(value / (hi - lo) for value in block["std"]),
    }


def with_tower_steps(steps: Sequence[Any], block: dict[str, Any]) -> list[Any]:
    """timm's steps, with padding, range and order of the channels where the block says other than timm."""
    (lo, hi), padding, reverse = block["value_range"], block["padding"], block["channel_order"] == "BGR"
    normalize = Normalize(mean=torch.tensor(block["mean"]), std=torch.tensor(block["std"]))
    own = NormalizeRange(normalize, lo, hi, reverse) if (lo, hi) != (0, 1) or reverse else normalize
    padded = [] if padding is None else [PadToSquare(tuple(padding["color"]))]
    return [*padded, *(own if isinstance(step, Normalize) else step for step in steps)]


def run_steps(steps: Sequence[Any], image: Any) -> Any:
    """timm's steps on a PIL image -> float32 `[C, height, width]`; on `[B, C, H, W]` torch resizes instead of PIL.

    `ArgumentError` where the image becomes too large, or nothing, on its way, or torch has no such interpolation.
    """
    for step in steps:
        size = _size_after(step, image)
        if size is not None:
            channels, height, width = tv_functional.get_dimensions(image)
            pads = isinstance(step, PadToSquare)
            if 0 in size or channels * math.prod(size) > (
                channels * MAX_PADDED_SIDE**2 if pads else MAX_RESIZED_VALUES
            ):
                made = f"it would be {'padded' if pads else 'resized'} to {size[0]} x {size[1]}"
                raise ArgumentError(f"an image of {height} x {width} pixels, too large or too unequal: {made}")
        if not isinstance(image, torch.Tensor):
            image = step(image)
        elif isinstance(step, MaybeToTensor):
            image = image if image.is_floating_point() else image.float().div(255)
        elif size is not None and isinstance(step, (Resize, ResizeKeepRatio)):
            image = _resized(image, size, step.interpolation)
        else:  # timm pads tensors with one number only
            image = step(_padded(image, size, step.fill) if isinstance(step, CenterCropOrPad) else image)
    return image


def _size_after(step: Any, image: Any) -> Any:
    """Height and width that a step resizes or pads an image to, None of other steps."""
    if not isinstance(step, (PadToSquare, Resize, ResizeKeepRatio, CenterCropOrPad)):
        return None
    _, height, width = tv_functional.get_dimensions(image)
    if isinstance(step, PadToSquare):
        return [max(height, width)] * 2
    if isinstance(step, CenterCropOrPad):
        return [max(height, step.size[0]), max(width, step.size[1])]
    if isinstance(step, ResizeKeepRatio):
        return step.get_params(image, step.size, step.longest)  # type: ignore[no-untyped-call]
    if not isinstance(step.size, int):
        return list(step.size)
    longer = int(step.size * max(height, width) / min(height, width))
    return [step.size, longer] if height <= width else [longer, step.size]


def _padded(image: Any, size: Any, color: Any) -> Any:
    """PIL image, or tensor `[..., C, H, W]`, in the middle of this height and width."""
    _, height, width = tv_functional.get_dimensions(image)
    high, wide, fill = size[0] - height, size[1] - width, list(color)
    if isinstance(image, torch.Tensor):
        fill = [min(max(value, 0), 255) / (255 if image.is_floating_point() else 1) for value in color]
    return tv_functional.pad(image, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=fill)


def _resized(images: torch.Tensor, size: Sequence[int], mode: InterpolationMode) -> torch.Tensor:
    (rows, columns), (height, width) = size, images.shape[-2:]
    if mode == InterpolationMode.NEAREST:
        return images[..., _nearest(height, rows), :][..., _nearest(width, columns)]
    try:
        # As PIL does: rows first, then columns, and what bicubic and lanczos overshoot is cut after each of them. uint8
        # is also rounded in between, as PIL's is, where torch has no kernel of its own for it.
        for target in ([height, columns], [rows, columns]):
            images = tv_functional.resize(images, target, interpolation=mode, antialias=True)
            images = images.clamp(0, 1) if images.is_floating_point() else images
    except (NotImplementedError, ValueError) as error:
        raise ArgumentError(f"torch cannot resize tensors by {mode.value!r}: pass images or uint8 arrays") from error
    return images


def _nearest(before: int, after: int) -> list[int]:
    """The pixels that PIL takes: it adds up the step in double precision, where torch's modes multiply in single."""
    positions = accumulate(repeat(before / after, after - 1), initial=before / after * 0.5)
    return [min(int(position), before - 1) for position in positions]


def load_pixels(image: Image.Image) -> None:
    """Read a PIL image to its end; `ArgumentError` where it has no pixels, or its file is damaged."""
    if 0 in image.size:
        raise ArgumentError(f"an empty image, of {image.height} x {image.width} pixels")
    try:
        image.load()
    except UNREADABLE as error:
        raise ArgumentError(f"the image cannot be read: {shown(str(error))}") from error


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image in the mode of the tower, as timm's datasets have it: `image.convert("RGB")`, "L" for one channel.

    So transparency is dropped; 16-bit and floating point images are clipped to 255, with a warning where that shows.
    `ArgumentError` where no mode has so many channels, or the image is empty or damaged.
    """
    if channels not in PIL_MODES:
        raise ArgumentError(f"a PIL image, but the tower takes {channels} channels: pass arrays or tensors")
    load_pixels(image)
    try:
        if image.mode.startswith(("I", "F")):
            extrema: Any = image.getextrema()
            if not 0 <= extrema[0] <= extrema[1] <= 255 or (image.mode == "F" and extrema[1] <= 1):
                found = f"an image of mode {image.mode} with values from {extrema[0]} to {extrema[1]}"
                warnings.warn(
                    f"{found}: PIL's convert clips what is not from 0 to 255; scale it to 8 bits", stacklevel=2
                )
        return image if image.mode == PIL_MODES[channels] else image.convert(PIL_MODES[channels])
    except ValueError as error:  # 16 bits with the high byte first, as TIFF may have them
        raise ArgumentError(f"an image of mode {image.mode}, which PIL cannot convert; scale it to 8 bits") from error


def completed_preprocess(config: TimmTowerConfig) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]` of a config; `ConfigError` where it has none to use."""
    if config.preprocess is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    check_preprocess(config.preprocess, config.in_chans)
    return config.preprocess, check_size("image_size", config.image_size)


def facts_of(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocess block and `[height, width]` under their names in `preprocessor_config.json`."""
    named = {name: _plain_fact(block[key]) for key, name in _FILE_NAMES.items()}
    return {"size": {"height": size[0], "width": size[1]}, **named}


def block_of(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]`; `ConfigError` names the fact that is missing or wrong."""
    if missing := [name for name in PROCESSOR_FACTS if name not in facts]:
        raise ConfigError(f"{PROCESSOR_TYPE}: {', '.join(missing)} missing")
    block, size = {key: _plain_fact(facts[name]) for key, name in _FILE_NAMES.items()}, facts["size"]
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        size = [size["height"], size["width"]]
    if not isinstance(block["mean"], list) or not 1 <= len(block["mean"]) <= MAX_IN_CHANS:
        raise ConfigError(f"image_mean={shown(block['mean'])}: expected a list with a number for each channel")
    check_preprocess(block, len(block["mean"]))
    return block, check_size("size", size)


def _plain_fact(value: Any) -> Any:
    """What JSON gives back: lists for tuples, and nothing shared with the config."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return {key: _plain_fact(item) for key, item in value.items()} if hasattr(value, "items") else value


def standard_keys(block: dict[str, Any]) -> dict[str, Any]:
    """How others (transformers.js, ...) name steps, where that is exact; resizing only where it squashes to `size`."""
    lo, hi = block["value_range"]
    keys: dict[str, Any] = {"do_convert_rgb": True} if len(block["mean"]) == 3 else {}
    if block["channel_order"] == "RGB" and lo == 0:
        keys |= {"do_rescale": True, "rescale_factor": hi / 255, "do_normalize": True}
    if block["crop_mode"] == "squash" and block["crop_pct"] == 1 and block["padding"] is None:
        keys |= {"do_resize": True, "resample": INTERPOLATIONS[block["interpolation"]], "do_center_crop": False}
    return keys

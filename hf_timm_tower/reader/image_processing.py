"""The preprocess block of the config, timm's own transform made from it, and what `preprocessor_config.json` holds.

The block holds what timm's `pretrained_cfg` says of preprocessing, and three facts that some models need beside it:

- `padding`: None, or `{"mode": "square", "color": [255, 255, 255]}`: the image is put in the middle of a square of its
  longer side before it is resized. One whole number from 0 to 255 for each channel.
- `value_range`: `[lo, hi]`, what black and white are before mean and std are applied; `[0, 1]` is timm's own.
- `channel_order`: `RGB`, or `BGR`: the channels are reversed last. `mean`, `std` and `color` are in the order R, G, B
  in either case.

Where these have their defaults, the steps are timm's and nothing else. The size is not in the block:
`config.image_size` is its only owner, so that trunk, config and transform cannot disagree.
"""

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose, Normalize

from .config import MAX_IN_CHANS, TimmTowerConfig, check_size
from .errors import ArgumentError, ConfigError, shown

READER_MODULE = "modeling_timm_tower"
"""The module that travels with a tower and holds the classes, for transformers' `auto_map`."""

PROCESSOR_TYPE = "TimmTowerImageProcessor"
# A list: of a plain name transformers makes a video processor's, and asks every pipeline's user to trust its code.
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": [f"{READER_MODULE}.{PROCESSOR_TYPE}", None]}

INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "lanczos": 1}  # PIL's numbers
CROP_MODES = ("center", "squash", "border")
CHANNEL_ORDERS = ("RGB", "BGR")
PIL_MODES = {1: "L", 3: "RGB"}

# Three channels of 8192 x 8192, 0.8 GB as float32; the largest size in timm is 1024.
MAX_RESIZED_VALUES = 3 * 2**26
MAX_PADDED_SIDE = 2**14
# Of mean, std and value_range: 16-bit images and Hounsfield units fit in.
_LEAST_STEP, _MOST_VALUE = 1e-6, 1e6

_BLOCK_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range")
_FILE_NAMES = {"mean": "image_mean", "std": "image_std"}  # the other entries keep their names
PROCESSOR_FACTS = ("size", *(_FILE_NAMES.get(key, key) for key in _BLOCK_KEYS))
# Keys that transformers itself writes into a processor's file.
TRANSFORMERS_PROCESSOR_KEYS = frozenset(
    {"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"}
)
STANDARD_KEYS = (
    "do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb",
)  # fmt: skip


def preprocess_from_timm(pretrained_cfg: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """timm's `pretrained_cfg` -> the preprocess block.

    Args:
        pretrained_cfg: Of the trunk as it was built.
        in_chans: Channels of the image; where they are not as many as timm has means for, each channel gets the
            average of timm's means and standard deviations, as timm's first convolution is averaged over channels.
    """
    data = resolve_data_config(pretrained_cfg=pretrained_cfg)  # type: ignore[no-untyped-call]
    mean, std = list(data["mean"]), list(data["std"])
    if len(mean) != in_chans:
        mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
    timms = {key: data[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return {**timms, "mean": mean, "std": std, "padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0]}


def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used.

    Raises:
        ConfigError: names the entry and its value.
    """
    if set(block) != set(_BLOCK_KEYS):
        missing, unknown = set(_BLOCK_KEYS) - set(block), set(block) - set(_BLOCK_KEYS)
        raise ConfigError(f"preprocess: missing {sorted(missing)}, unknown {shown(sorted(unknown, key=str))}")
    bounds, padding = block["value_range"], block["padding"]
    range_fits = _are_numbers(bounds, 2) and bounds[1] - bounds[0] >= _LEAST_STEP
    rules = {
        "interpolation": (block["interpolation"] in tuple(INTERPOLATIONS), f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (block["crop_mode"] in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
        "crop_pct": (_are_numbers([block["crop_pct"]], 1, 0.05, 2), "a number from 0.05 to 2"),
        "mean": (_are_numbers(block["mean"], in_chans), f"{in_chans} numbers from -1e6 to 1e6"),
        "std": (_are_numbers(block["std"], in_chans, _LEAST_STEP), f"{in_chans} numbers from 1e-6 to 1e6"),
        "padding": (
            padding is None or _is_padding(padding, in_chans),
            f"None or {{'mode': 'square', 'color': [...]}} with {in_chans} whole numbers from 0 to 255",
        ),
        "channel_order": (block["channel_order"] in CHANNEL_ORDERS, f"one of {', '.join(CHANNEL_ORDERS)}"),
        "value_range": (
            range_fits,
            "[lo, hi] with lo < hi, what black and white are before mean and std are applied ([0, 1] is timm's own)",
        ),
    }
    for key, (fits, expected) in rules.items():
        if not fits:
            raise ConfigError(f"preprocess.{key}={shown(block[key])}: expected {expected}")
    if block["channel_order"] == "BGR" and in_chans != 3:
        raise ConfigError(f"preprocess.channel_order='BGR': an image with in_chans={in_chans} has no red and blue")


def _are_numbers(values: Any, length: int, least: float = -_MOST_VALUE, most: float = _MOST_VALUE) -> bool:
    if not isinstance(values, list) or len(values) != length:
        return False
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return len(numbers) == length and all(least <= value <= most for value in numbers)


def _is_padding(padding: Any, in_chans: int) -> bool:
    if not isinstance(padding, dict) or set(padding) != {"mode", "color"} or padding["mode"] != "square":
        return False
    return _are_numbers(padding["color"], in_chans, 0, 255) and all(
        isinstance(value, int) for value in padding["color"]
    )


@dataclass(frozen=True)
class PadToSquare:
    """PIL image -> the same in the middle of a square of its longer side, in this color."""

    color: tuple[int, ...]

    def __call__(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        canvas = Image.new(image.mode, (side, side), self.color if len(self.color) > 1 else self.color[0])
        canvas.paste(image, self.corner(image.width, image.height))
        return canvas

    @staticmethod
    def corner(width: int, height: int) -> tuple[int, int]:
        """Where the image's left upper pixel goes: (x, y)."""
        side = max(width, height)
        return (side - width) // 2, (side - height) // 2


@dataclass(frozen=True)
class ScaleValues:
    """Float tensor in [0, 1] -> [lo, hi]."""

    lo: float
    hi: float

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images * (self.hi - self.lo) + self.lo


@dataclass(frozen=True)
class ReverseChannels:
    """`[..., 3, H, W]` -> the same with red and blue exchanged."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., [2, 1, 0], :, :]


class TowerTransform(Compose):  # type: ignore[misc]  # torchvision carries no types
    """timm's steps, before which a PIL image that they cannot take, or only at great cost, is refused in words.

    Args:
        steps: PIL image -> float tensor `[in_chans, height, width]`.
        block: A checked preprocess block.
        resized: Height and width that the image is resized to before the crop; None where that is random.
    """

    def __init__(self, steps: list[Any], block: dict[str, Any], resized: Sequence[int] | None) -> None:
        super().__init__(steps)
        self.channels, self.crop_mode, self.padded = (
            len(block["mean"]),
            block["crop_mode"],
            block["padding"] is not None,
        )
        self.resized = resized

    def __call__(self, image: Any) -> Any:
        """One image through all steps.

        Raises:
            ArgumentError: the image is of another mode, empty, damaged, or too large once it is padded or resized.
        """
        if isinstance(image, Image.Image):
            load_pixels(image)
            mode = PIL_MODES.get(self.channels, image.mode)
            if image.mode != mode or len(image.getbands()) != self.channels:
                deep = " (after scaling it to 8 bits)" if image.mode.startswith(("I", "F")) else ""
                raise ArgumentError(
                    f"transform: an image of mode {image.mode}, but the tower takes {self.channels} channels: "
                    f"image.convert({mode!r}) first{deep}"
                )
            self.check_cost(image.height, image.width)
        return super().__call__(image)

    def check_cost(self, height: int, width: int) -> None:
        """Refuse an image that becomes too large, or nothing, on its way to the crop.

        Raises:
            ArgumentError: with the size that it would have.
        """
        found, longer = f"an image of {height} x {width} pixels", max(height, width)
        if self.padded:
            if longer > MAX_PADDED_SIDE:
                raise ArgumentError(f"{found}: padded to a square it would be larger than {MAX_PADDED_SIDE} a side")
            height = width = longer
        if self.resized is None:
            return
        tall, wide = self.resized
        if self.crop_mode != "squash":
            choose = max if self.crop_mode == "center" else min
            scale = choose(tall / height, wide / width)
            tall, wide = round(height * scale), round(width * scale)
        if min(tall, wide) < 1 or self.channels * tall * wide > MAX_RESIZED_VALUES:
            raise ArgumentError(
                f"{found}: its sides are too unequal, it would be resized to {tall} x {wide} before it is cropped. Cut "
                "it to the part that matters."
            )

    def __repr__(self) -> str:
        return repr(Compose(self.transforms))  # timm's


def load_pixels(image: Image.Image) -> None:
    """Read a PIL image to its end.

    Raises:
        ArgumentError: it has no pixels, or its file is damaged.
    """
    if 0 in image.size:
        raise ArgumentError(f"an empty image, of {image.height} x {image.width} pixels")
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # PIL raises any of these for a damaged file
        raise ArgumentError(f"the image cannot be read: {shown(str(error))}") from error


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image in the mode of the tower, as timm's datasets have it: `image.convert("RGB")`, "L" for one channel.

    So transparency is dropped and not blended. 16-bit and floating point images have white at 255 and are clipped,
    with a warning where that changes a value.

    Raises:
        ArgumentError: no image mode has so many channels; the image is empty or damaged.
    """
    mode = PIL_MODES.get(channels)
    if mode is None:
        raise ArgumentError(
            f"a PIL image (mode {image.mode}), but the tower takes {channels} channels: pass arrays or tensors"
        )
    load_pixels(image)
    if image.mode == mode:
        return image
    if image.mode.startswith(("I", "F")):
        extrema: Any = image.getextrema()
        least, most = extrema
        if not 0 <= least <= most <= 255 or (image.mode == "F" and most <= 1):
            warnings.warn(
                f"an image of mode {image.mode} with values from {least} to {most}: PIL's convert takes white for 255 "
                "and clips what is not from 0 to 255, and timm has the same. Scale it to 8 bits first.",
                stacklevel=2,
            )
    return image.convert(mode)


def make_transform(config: TimmTowerConfig, is_training: bool = False, **kwargs: Any) -> Any:
    """timm's own transform for a tower, from the config alone.

    It pads first, and scales to `value_range` and reverses the channels around the normalisation, where the preprocess
    block says so; otherwise its steps are those of `timm.data.create_transform`.

    Args:
        config: A completed config.
        is_training: The random transform for training instead of the one for evaluation.
        kwargs: Further arguments of `timm.data.create_transform` (augmentation).

    Returns:
        PIL image -> float32 tensor `[in_chans, height, width]`, normalised.

    Raises:
        ConfigError: the config is not completed, or asks for images of too many pixels.
        ArgumentError: an argument that the config decides, or that timm does not know, or with which the transform
            does not normalise although the tower needs what is done there.
    """
    return transform_of(*completed_preprocess(config), is_training, **kwargs)


def transform_of(block: dict[str, Any], size: Sequence[int], is_training: bool = False, **kwargs: Any) -> Any:
    """`make_transform` from a checked preprocess block and `[height, width]`."""
    resized = [math.floor(side / block["crop_pct"]) for side in size]
    values = len(block["mean"]) * max(math.prod(resized), math.prod(size))
    if min(resized) < 1 or values > MAX_RESIZED_VALUES:
        raise ConfigError(
            f"image_size={list(size)} with crop_pct={block['crop_pct']}: images of {len(block['mean'])} channels would "
            f"be resized to {resized[0]} x {resized[1]}; at most {MAX_RESIZED_VALUES} values (8192 x 8192 in colour), "
            "and at least one pixel, are taken"
        )
    lo, hi = block["value_range"]
    scaled, reverse, padded = [lo, hi] != [0, 1], block["channel_order"] == "BGR", block["padding"] is not None
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
    except (TypeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"transform: timm.data.create_transform refuses: {error}") from error
    steps = list(transform.transforms) if isinstance(transform, Compose) else []
    if scaled or reverse or padded:
        places = [place for place, step in enumerate(steps) if isinstance(step, Normalize)]
        if len(places) != 1:
            raise ArgumentError(
                f"transform: with {kwargs} timm does not normalise within one transform, and this tower's padding, "
                "value_range or channel_order would get lost; leave such arguments out"
            )
        normalise = steps[places[0]]
        if scaled:
            normalise = Normalize(mean=torch.tensor(block["mean"]), std=torch.tensor(block["std"]))
        around = [*[ScaleValues(lo, hi)] * scaled, normalise, *[ReverseChannels()] * reverse]
        steps[places[0] : places[0] + 1] = around
        steps[:0] = [PadToSquare(tuple(block["padding"]["color"]))] if padded else []
    return TowerTransform(steps, block, None if is_training else resized) if steps else transform


def completed_preprocess(config: TimmTowerConfig) -> tuple[dict[str, Any], list[int]]:
    """The preprocess block and `[height, width]` of a config.

    Raises:
        ConfigError: the config is not completed.
    """
    if config.preprocess is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    return config.preprocess, check_size("image_size", config.image_size)


# --- preprocessor_config.json: the block and the size under transformers' names


def facts_of(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocess block and `[height, width]` under their names in `preprocessor_config.json`."""
    named = {_FILE_NAMES.get(key, key): _plain_fact(block[key]) for key in _BLOCK_KEYS}
    return {"size": {"height": size[0], "width": size[1]}, **named}


def block_of(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]` from the facts of `preprocessor_config.json`.

    Raises:
        ConfigError: a fact is missing or wrong; names it.
    """
    if missing := [name for name in PROCESSOR_FACTS if name not in facts]:
        raise ConfigError(f"{PROCESSOR_TYPE}: {', '.join(missing)} missing")
    block = {key: _plain_fact(facts[_FILE_NAMES.get(key, key)]) for key in _BLOCK_KEYS}
    size = facts["size"]
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise ConfigError(f"size={shown(dict(size))}: expected {{'height': ..., 'width': ...}} in pixels")
        size = [size["height"], size["width"]]
    if not isinstance(block["mean"], list) or not 1 <= len(block["mean"]) <= MAX_IN_CHANS:
        raise ConfigError(f"image_mean={shown(block['mean'])}: expected a list with a number for each channel")
    check_preprocess(block, len(block["mean"]))
    return block, check_size("size", size)


def _plain_fact(value: Any) -> Any:
    """What JSON gives back: lists for tuples, and nothing shared with the config."""
    if isinstance(value, Mapping):
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
    return list(value) if isinstance(value, (list, tuple)) else value


def standard_keys(block: dict[str, Any]) -> dict[str, Any]:
    """How other readers of `preprocessor_config.json` (transformers.js, ...) name steps, where that is exact.

    `size` is the result's, so that resizing can be named only where the image is squashed to it; elsewhere the key is
    left out, and a reader that then does not resize meets a wrong shape, not other pixels.
    """
    (lo, hi), channels = block["value_range"], len(block["mean"])
    keys: dict[str, Any] = {"do_convert_rgb": True} if channels == 3 else {}
    if block["channel_order"] == "RGB" and lo == 0:
        keys.update(do_rescale=True, rescale_factor=hi / 255, do_normalize=True)
    if block["crop_mode"] == "squash" and block["crop_pct"] == 1 and block["padding"] is None:
        keys.update(do_resize=True, resample=INTERPOLATIONS[block["interpolation"]], do_center_crop=False)
    return keys


def processor_dict(config: TimmTowerConfig) -> dict[str, Any]:
    """What `preprocessor_config.json` of a tower holds, from its config alone.

    Written with `json.dumps(..., indent=2, sort_keys=True)` and a newline it is, byte for byte, what
    `TimmTowerImageProcessor.save_pretrained` writes.

    Raises:
        ConfigError: the config is not completed, or its preprocess block cannot be used.
    """
    block, size = completed_preprocess(config)
    check_preprocess(block, config.in_chans)
    named = {"image_processor_type": PROCESSOR_TYPE, "auto_map": dict(PROCESSOR_AUTO_MAP)}
    return {**facts_of(block, size), **standard_keys(block), **named}


def facts_in_tower(processor: dict[str, Any]) -> dict[str, Any]:
    """What `preprocessor_config.json` holds beside a tower's `config.json`, which names the class.

    Here the class's name and `auto_map` would make transformers look for a video processor too, and ask every user of a
    pipeline whether to trust the code, although the class is registered.
    """
    return {name: value for name, value in processor.items() if name not in ("image_processor_type", "auto_map")}


def processor_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """How the entries of a `preprocessor_config.json` differ from the expected ones, in words; ours must be there."""
    named = [*PROCESSOR_FACTS, *(name for name in STANDARD_KEYS if name in found)]
    differ = [
        f"{name} is {shown(found.get(name, 'missing'))} there and should be {shown(expected.get(name, 'left out'))}"
        for name in named
        if name not in found or name not in expected or found[name] != expected[name]
    ]
    unknown = sorted(set(found) - set(expected) - set(STANDARD_KEYS) - TRANSFORMERS_PROCESSOR_KEYS, key=str)
    return differ + [f"unknown {shown(name)}{near_names(name, PROCESSOR_FACTS)}" for name in unknown[:4]]


def near_names(name: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """` (did you mean ...?)`, or nothing where no name is near, or the text is too long to look for one."""
    near = difflib.get_close_matches(name, names, n=2, cutoff=cutoff) if len(name) <= 64 else []
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_processor(found: Mapping[str, Any], config: TimmTowerConfig) -> None:
    """Refuse a `preprocessor_config.json` that would prepare other pixels than the tower's config says.

    Args:
        found: The parsed file; towers saved by earlier versions have none of `STANDARD_KEYS`.
        config: The completed config of the same folder, before any override.

    Raises:
        ConfigError: names every fact that differs, with both values.
    """
    kind = found.get("image_processor_type")  # not beside a tower, but whoever saved the processor alone wrote it
    if kind not in (None, PROCESSOR_TYPE):
        raise ConfigError(
            f"preprocessor_config.json: image_processor_type is {shown(kind)}, not {PROCESSOR_TYPE!r}: it would "
            "prepare other pixels than this tower was made for. Save the tower again to write its own."
        )
    if differ := processor_differences(found, processor_dict(config)):
        raise ConfigError(
            f"preprocessor_config.json and config.json disagree: {'; '.join(differ)}. One of them was edited; save the "
            "tower again to write both."
        )

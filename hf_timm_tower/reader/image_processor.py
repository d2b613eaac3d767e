"""`TimmTowerImageProcessor`: timm's eval transform as transformers' image processor.

- PIL images, uint8 numpy arrays, paths and URLs give, bit for bit, what timm's transform gives for
  `image.convert("RGB")` (`"L"` for towers of one channel); see `in_channels` for transparency and 16-bit images.
- Tensors and floating point arrays are resized by torch, in whole batches and on any device: close and not equal. The
  largest difference before mean and std, in steps of an 8-bit pixel (of 255), from a fifth to three times the size, is
  0 for nearest and 2 otherwise; 11 where an image is squashed to less than a fifth of its height, because Pillow then
  resizes columns before rows. The means are at most 0.36. Measured by `scripts/bench_image_processor.py`.
- EXIF rotation: paths and URLs are turned upright, as transformers' `load_image` does. A PIL image is taken as it is,
  as timm takes it: `PIL.ImageOps.exif_transpose` is the caller's.

In a file of its own: importing transformers' image processing is not free, and `TimmModel` does without.
"""

import base64
import json
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio, center_crop_or_pad
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as tv_functional
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, shown
from .image_processing import (
    PIL_MODES,
    PROCESSOR_AUTO_MAP,
    PROCESSOR_FACTS,
    STANDARD_KEYS,
    PadToSquare,
    TowerTransform,
    block_of,
    facts_in_tower,
    facts_of,
    in_channels,
    near_names,
    processor_dict,
    processor_differences,
    standard_keys,
    transform_of,
)

_DEEPEST_LIST = 4


class TimmTowerImagesKwargs(TypedDict, total=False):
    """What a call takes beside the images. transformers' processors sort their keywords by these names."""

    return_tensors: str | None
    device: str | torch.device | None
    input_data_format: str | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    do_convert_rgb: bool | None


class TimmTowerImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` for a tower, as timm's eval transform makes them.

    The attributes are the arguments; they may be set, and hold from the next call on.

    Args:
        size: Height and width of the result in pixels: `{"height": ..., "width": ...}`, a pair, or an int for a square.
        interpolation: `nearest`, `bilinear`, `bicubic`, `box`, `hamming` or `lanczos`.
        crop_pct: Side of the crop divided by the side resized to.
        crop_mode: `center`, `squash` or `border`.
        image_mean: A number for each channel; how many there are is the tower's `in_chans`.
        image_std: Likewise.
        padding: None, or `{"mode": "square", "color": [...]}`.
        channel_order: `RGB` or `BGR`.
        value_range: `[lo, hi]`, what black and white are before mean and std are applied.

    Raises:
        ConfigError: an argument is wrong, missing or unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' declaration
    valid_kwargs = TimmTowerImagesKwargs  # type: ignore[assignment]  # narrower than the base's on purpose

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        facts = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0], **facts}
        block, size = block_of(facts)
        checked = facts_of(block, size)
        if wrong := processor_differences({**facts, **checked}, {**checked, **standard_keys(block)}):
            raise ConfigError(f"{type(self).__name__}: {'; '.join(wrong)}")
        for name, value in checked.items():
            setattr(self, name, value)

    @classmethod
    def from_tower_config(cls, config: TimmTowerConfig) -> "TimmTowerImageProcessor":
        """The processor of a tower.

        Raises:
            ConfigError: the config is not completed: build a tower from it first.
        """
        return cls(**processor_dict(config))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': keywords that are facts override the file's, others are what `pipeline` hands to everyone.

        `image_size`, the config's name for it, is taken for `size`: `pipeline(..., model_kwargs={"image_size": 384})`
        hands it to the model and to us, and both follow.

        Raises:
            ArgumentError: a keyword looks like a fact misspelt, or belongs into the call.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in PROCESSOR_FACTS if name in kwargs}
        if "image_size" in kwargs:
            if "size" in given:
                raise ArgumentError(f"{cls.__name__}: image_size is another name of size; give one of them")
            given["size"] = kwargs.pop("image_size")
        for name in kwargs:
            if name in ("mean", "std", *STANDARD_KEYS) or near_names(name, PROCESSOR_FACTS, 0.75):
                raise ArgumentError(
                    f"{cls.__name__}: unknown {name}{near_names(name, PROCESSOR_FACTS)}; steps are left out in the call"
                )
        processor = cls(**image_processor_dict)
        processor = cls(**{**processor._facts(), **given}) if given else processor
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        named = {"image_processor_type": type(self).__name__, "auto_map": dict(PROCESSOR_AUTO_MAP)}
        facts = self._facts()
        return {**facts, **standard_keys(block_of(facts)[0]), **named}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`; beside a tower, as the tower itself writes it."""
        path, content = Path(json_file_path), self.to_dict()
        if _is_tower(path.with_name("config.json")):
            content = facts_in_tower(content)
        path.unlink(missing_ok=True)  # a link is replaced, what it points to stays
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        input_data_format: str | None = None,
        **steps: bool | None,
    ) -> BatchFeature:
        """Preprocess one image or a list of them.

        Args:
            images: PIL images; numpy arrays `[H, W]`, `[H, W, C]`, `[C, H, W]` or a batch of these, uint8 or floats
                in [0, 1], and uint16 or int32 where they are grey; tensors `[C, H, W]` or `[B, C, H, W]`, uint8 or
                floats; paths and URLs; or a list of these, which may hold further lists.
            return_tensors: `"pt"` or `"np"`: one array of the batch; None: a list of tensors `[C, height, width]`.
            device: Where the tensor path runs and where the result is; by default each image's own.
            input_data_format: `channels_first` or `channels_last` of arrays and tensors. By default tensors have their
                channels first, and arrays where their shape shows them.
            steps: transformers' names of steps, taken where they say what is done. `do_resize=False`: the images have
                the tower's size already, and are neither padded nor cropped. `do_rescale=False`: they are floats in
                [0, 1]; True: they are not. `do_convert_rgb=False`: they have the tower's mode.

        Returns:
            `pixel_values`: `[B, C, height, width]`, float32.

        Raises:
            ArgumentError: an image, or a keyword, that cannot be used.
            ConfigError: an attribute has been set to what cannot be used.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ArgumentError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ArgumentError(f"input_data_format={input_data_format!r}: not 'channels_first' or 'channels_last'")
        prepared = _Call(self._facts(), device, input_data_format, steps)
        done = [made for image in _flat_images(images) for made in prepared(image)]
        if not done:
            raise ArgumentError("no images: expected one at least")
        if return_tensors is None:
            return BatchFeature({"pixel_values": done})
        batch = torch.stack(done)
        return BatchFeature({"pixel_values": batch if return_tensors == "pt" else batch.cpu().numpy()})

    def _facts(self) -> dict[str, Any]:
        """The attributes as they are now, checked again: they may have been set."""
        return facts_of(*block_of({name: getattr(self, name) for name in PROCESSOR_FACTS}))


def _is_tower(config: Path) -> bool:
    try:
        found = json.loads(config.read_bytes()) if config.is_file() else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("model_type") == TimmTowerConfig.model_type


def _flat_images(images: Any, depth: int = 0) -> Iterator[Any]:
    if not isinstance(images, (list, tuple)):
        yield images
        return
    if depth == _DEEPEST_LIST:
        raise ArgumentError(f"images: lists within lists, more than {_DEEPEST_LIST} deep")
    for image in images:
        yield from _flat_images(image, depth + 1)


def _opened(source: str) -> Image.Image:
    """The image of a path, a URL or base64 text, upright and in its own mode: transformers' `load_image` clips it."""
    try:
        if source.startswith(("http://", "https://")):
            with urlopen(Request(source, headers={"User-Agent": "transformers"}), timeout=60) as response:
                image = Image.open(BytesIO(response.read()))
        elif os.path.isfile(source):
            image = Image.open(source)
        else:
            text = source.partition(",")[2] if source.startswith("data:image/") else source
            image = Image.open(BytesIO(base64.b64decode(text, validate=True)))
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ArgumentError(
            f"{shown(source)}: expected the path or the URL of an image, or its base64 text: {shown(str(error))}"
        ) from error


class _Call:
    """One call of the processor: image -> its `[C, height, width]` tensors."""

    def __init__(self, facts: dict[str, Any], device: Any, data_format: str | None, given: dict[str, Any]) -> None:
        self.block, self.size = block_of(facts)
        self.channels = len(self.block["mean"])
        self.transform = transform_of(self.block, self.size)
        self.device, self.data_format = device, data_format
        self.given = {name: value for name, value in given.items() if value is not None}
        whole = self.given.get("do_resize") is False or standard_keys(self.block).get("do_center_crop") is False
        only_true = ("do_normalize",) if whole else ("do_normalize", "do_center_crop")
        for name, value in self.given.items():
            usable = (True,) if name in only_true else (True, False)
            if name not in TimmTowerImagesKwargs.__annotations__ or value not in usable:
                raise ArgumentError(
                    f"TimmTowerImageProcessor: {name}={shown(value)} cannot be had. A call takes "
                    f"{', '.join(TimmTowerImagesKwargs.__annotations__)}; the other steps are the tower's (size, "
                    "interpolation, ...) and none is left out."
                )
        if self.given.get("do_resize") is False:
            steps = self.transform.transforms
            self.transform.transforms = steps[[isinstance(step, MaybeToTensor) for step in steps].index(True) :]

    def __call__(self, image: Any) -> Iterator[torch.Tensor]:
        if isinstance(image, (str, os.PathLike)):
            image = _opened(os.fspath(image))
        if isinstance(image, Image.Image):
            yield self._exact(image)
        elif isinstance(image, np.ndarray):
            for array in image if image.ndim == 4 else [image]:
                yield self._from_array(array)
        elif isinstance(image, torch.Tensor):
            yield from self._from_tensor(image, self.data_format or "channels_first")
        else:
            raise ArgumentError(
                f"an image of type {type(image).__name__}: expected a PIL image, a numpy array, a torch tensor, a path "
                "or a URL"
            )

    def _exact(self, image: Image.Image) -> torch.Tensor:
        converted = in_channels(image, self.channels)
        if converted is not image and self.given.get("do_convert_rgb") is False:
            raise ArgumentError(f"do_convert_rgb=False, but the image has mode {image.mode} and not {converted.mode}")
        self._check_steps([image.height, image.width], rescales=True)
        made: torch.Tensor = self.transform(converted)
        return made if self.device is None else made.to(self.device)

    def _check_steps(self, size: list[int], rescales: bool) -> None:
        """Refuse a step that was asked for, or out, and does not fit an image of this height and width."""
        if self.given.get("do_rescale", rescales) is not rescales:
            raise ArgumentError(
                f"do_rescale={not rescales}: uint8 and PIL images are divided by 255, floats are in [0, 1] already"
            )
        if self.given.get("do_resize") is False and size != self.size:
            raise ArgumentError(f"do_resize=False: an image of {size}, but the tower takes {self.size} (height, width)")

    def _from_array(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """One image; uint8 of one, three or four channels and deeper grey through PIL, all else through torch."""
        if array.ndim == 2:
            array = array[:, :, None]
        elif array.ndim != 3:
            raise ArgumentError(f"an array of shape {array.shape}: expected [H, W], [H, W, C] or [C, H, W]")
        elif self._data_format(array.shape) == "channels_first":
            array = array.transpose(1, 2, 0)
        if 0 in array.shape:
            raise ArgumentError(f"an array of shape {array.shape}: it is empty")
        depth = {"uint8": (1, 3, 4), "uint16": (1,), "int32": (1,)}.get(array.dtype.name, ())
        if self.channels in PIL_MODES and array.shape[-1] in depth:
            pixels = array[:, :, 0] if array.shape[-1] == 1 else array
            return self._exact(Image.fromarray(np.array(pixels, array.dtype.newbyteorder("="))))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ArgumentError(f"an array of {array.dtype}: expected uint8, or floating point in [0, 1]")
        kind = np.uint8 if array.dtype == np.uint8 else np.float32
        return next(self._from_tensor(torch.from_numpy(np.array(array.transpose(2, 0, 1), kind)), "channels_first"))

    def _data_format(self, shape: tuple[int, ...]) -> str:
        if self.data_format is not None:
            return self.data_format
        counts = {1, 3, 4} if self.channels in PIL_MODES else {1, self.channels}
        first, last = shape[0] in counts, shape[-1] in counts
        if first == last:
            raise ArgumentError(
                f"an array of shape {shape}: its channels could be first or last. Pass input_data_format="
                "'channels_first' or 'channels_last'"
                if first
                else f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W] with C of {sorted(counts)}"
            )
        return "channels_first" if first else "channels_last"

    def _from_tensor(self, tensor: torch.Tensor, data_format: str) -> Iterator[torch.Tensor]:
        batch = tensor[None] if tensor.ndim == 3 else tensor
        if data_format == "channels_last" and batch.ndim == 4:
            batch = batch.permute(0, 3, 1, 2)
        if self.device is not None:
            batch = batch.to(self.device)
        batch = _checked_tensor(batch, self.channels)
        self._check_steps(list(batch.shape[-2:]), rescales=not batch.is_floating_point())
        yield from transform_tensor(batch, self.transform)


def transform_tensor(images: torch.Tensor, transform: TowerTransform) -> torch.Tensor:
    """timm's steps on a batch; only the resizing is done by torch instead of PIL.

    Args:
        images: `[B, C, H, W]`, uint8, or floating point in [0, 1].
        transform: The tower's, for evaluation.

    Returns:
        `[B, C, height, width]`, float32, on the device of `images`; differentiable where `images` are floats.

    Raises:
        ArgumentError: torch has no such interpolation, or the images become too large on the way.
    """
    transform.check_cost(*images.shape[-2:])
    for step in transform.transforms:
        if isinstance(step, PadToSquare):
            images = _pad_tensor(images, step)
        elif isinstance(step, Resize):
            images = _resize_tensor(images, _resize_target(images, step.size), step.interpolation)
        elif isinstance(step, ResizeKeepRatio):
            target = step.get_params(images, step.size, step.longest)  # type: ignore[no-untyped-call]
            images = _resize_tensor(images, target, step.interpolation)
        elif isinstance(step, CenterCropOrPad):  # channel by channel: torchvision pads tensors with one number only
            fill = _color_of(images, step.fill).tolist()
            images = torch.cat(
                [center_crop_or_pad(images[:, i : i + 1], step.size, fill=value) for i, value in enumerate(fill)], 1
            )
        elif isinstance(step, MaybeToTensor):
            images = images if images.is_floating_point() else images.float().div(255)
        else:
            images = step(images)  # cropping, normalising and our own steps take both kinds
    return images


def _checked_tensor(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.ndim != 4 or 0 in images.shape or images.is_meta:
        raise ArgumentError(f"a tensor of shape {list(images.shape)}: expected [C, H, W] or [B, C, H, W], not empty")
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, channels, -1, -1)
    if images.shape[1] != channels:
        raise ArgumentError(
            f"a tensor of shape {list(images.shape)}: expected {channels} channels first, [B, {channels}, H, W]; with "
            "channels last pass input_data_format='channels_last'"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ArgumentError(f"a tensor of {images.dtype}: expected uint8, or floating point in [0, 1]")
    images = images.float()
    least, most = (bound.item() for bound in images.detach().aminmax())
    if not (least >= 0 and most <= 1):
        raise ArgumentError(
            f"a floating point tensor with values from {least:.4g} to {most:.4g}: expected [0, 1], before mean and "
            "std. Divide by 255 what goes to 255; what is normalised already goes to the model as it is."
        )
    return images


def _resize_target(images: torch.Tensor, size: int | Sequence[int]) -> list[int]:
    """Height and width that torchvision's `Resize` gives: a single number is the shorter side."""
    if not isinstance(size, int):
        return list(size)
    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    return [size, longer] if height <= width else [longer, size]


def _resize_tensor(images: torch.Tensor, size: Sequence[int], mode: InterpolationMode) -> torch.Tensor:
    height, width = size
    if mode == InterpolationMode.NEAREST:
        rows, columns = _nearest(images.shape[-2], height), _nearest(images.shape[-1], width)
        return images[..., rows, :][..., columns]
    try:
        # As PIL does: rows first, then columns, and what bicubic and lanczos overshoot is cut after each of them. uint8
        # is also rounded in between, as PIL's is, where torch has no kernel of its own for it.
        for target in ([images.shape[-2], width], [height, width]):
            images = tv_functional.resize(images, target, interpolation=mode, antialias=True)
            images = images.clamp(0, 1) if images.is_floating_point() else images
    except (NotImplementedError, ValueError) as error:
        raise ArgumentError(
            f"this torch and torchvision cannot resize tensors with interpolation {mode.value!r}; pass PIL images or "
            "uint8 numpy arrays"
        ) from error
    return images


def _nearest(before: int, after: int) -> list[int]:
    """The pixels that PIL takes: it adds up the step in double precision, where torch's modes multiply in single."""
    step = before / after
    position, taken = step * 0.5, []
    for _ in range(after):
        taken.append(min(int(position), before - 1))
        position += step
    return taken


def _color_of(images: torch.Tensor, color: Any) -> torch.Tensor:
    fill = torch.tensor(color, device=images.device).clamp(0, 255)
    return (fill / 255 if images.is_floating_point() else fill).to(images.dtype)


def _pad_tensor(images: torch.Tensor, step: PadToSquare) -> torch.Tensor:
    batch, channels, height, width = images.shape
    side = max(height, width)
    left, top = step.corner(width, height)
    canvas = _color_of(images, step.color).view(1, channels, 1, 1).repeat(batch, 1, side, side)
    canvas[..., top : top + height, left : left + width] = images
    return canvas

"""`TimmTowerImageProcessor`: timm's evaluation transform as transformers' image processor.

PIL images, uint8 arrays, paths and URLs give, bit for bit, what timm's transform gives for `image.convert("RGB")` ("L"
for one channel). Tensors and floats are resized by torch: before mean and std at most 2 of 255 away from that (0 for
nearest; 11 where an image is squashed to less than a fifth of its height, as Pillow then resizes columns first), 0.36
in the mean, from a fifth to three times the size (`scripts/bench_image_processor.py`). Its imports take a second.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import MaybeToTensor
from timm.data.transforms_factory import create_transform
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, did_you_mean, file_errors, shown
from .image_processing import (
    PIL_MODES,
    PROCESSOR_AUTO_MAP,
    PROCESSOR_FACTS,
    PROCESSOR_KEYS,
    STANDARD_KEYS,
    UNREADABLE,
    block_of,
    completed_preprocess,
    facts_of,
    in_channels,
    run_steps,
    standard_keys,
    timm_arguments,
    with_tower_steps,
)


# What a call takes beside the images. transformers' processors sort their keywords by these names.
class TimmTowerImagesKwargs(TypedDict, total=False):
    return_tensors: str | None
    device: str | torch.device | None
    input_data_format: str | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    do_convert_rgb: bool | None


class TimmTowerImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` for a tower. The attributes are the arguments; set, they hold from the next call on.

    `ConfigError` where an argument is wrong, missing or unknown.

    Args:
        size: Of the result in pixels: `{"height": ..., "width": ...}`, a pair, or an int for a square.
        interpolation, crop_pct, crop_mode, padding, channel_order, value_range: As in the config's preprocess block.
        image_mean, image_std: A number for each channel; how many there are is the tower's `in_chans`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' declaration
    valid_kwargs = TimmTowerImagesKwargs  # type: ignore[assignment]  # narrower than the base's on purpose

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        facts = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0], **facts}
        block, size = block_of(facts)
        checked, known = facts_of(block, size), standard_keys(block)
        for name in sorted(facts.keys() - checked.keys() - PROCESSOR_KEYS):
            if name not in known or facts[name] != known[name]:
                near = did_you_mean(name, PROCESSOR_FACTS)
                expected = f"should be {known[name]!r}" if name in known else f"is unknown{near}"
                raise ConfigError(f"{type(self).__name__}: {shown(name)}: {shown(facts[name])} {expected}")
        for name, value in checked.items():
            setattr(self, name, value)

    @classmethod
    def from_tower_config(cls, config: TimmTowerConfig) -> "TimmTowerImageProcessor":
        """The processor of a tower; `ConfigError` where the config is not completed: build a tower from it first."""
        return cls(**facts_of(*completed_preprocess(config)))

    @classmethod
    def get_image_processor_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `FolderError`, `FormatError` where the file is missing or damaged."""
        with file_errors():
            found, rest = super().get_image_processor_dict(*args, **kwargs)
            return dict(**found), rest

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': keywords that are facts override the file's, others are what `pipeline` hands to everyone.

        `size` may be named `image_size`, as `pipeline(..., model_kwargs={"image_size": 384})` names it to the model.
        `ArgumentError` where a keyword looks like a fact misspelt, or belongs into the call.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        if "image_size" in kwargs:
            if "size" in kwargs:
                raise ArgumentError(f"{cls.__name__}: image_size is another name of size; give one of them")
            kwargs["size"] = kwargs.pop("image_size")
        given = {name: kwargs.pop(name) for name in PROCESSOR_FACTS if name in kwargs}
        for name in kwargs:
            if name in ("mean", "std", *STANDARD_KEYS) or did_you_mean(name, PROCESSOR_FACTS, 0.75):
                near = did_you_mean(name, PROCESSOR_FACTS)
                raise ArgumentError(f"{cls.__name__}: unknown {name}{near}; steps are left out in the call")
        processor = cls(**image_processor_dict)
        processor = cls(**{**facts_of(*processor._block()), **given}) if given else processor
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        (block, size), kind = self._block(), type(self).__name__
        named = {"image_processor_type": kind, "auto_map": dict(PROCESSOR_AUTO_MAP)}
        return {**facts_of(block, size), **standard_keys(block), **named}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`; it names the class, except beside a tower that has no code."""
        path, content = Path(json_file_path), self.to_dict()
        with suppress(OSError, ValueError, RecursionError, TypeError, LookupError):  # no config, or not a tower's
            beside = json.loads(path.with_name("config.json").read_bytes())
            if beside["model_type"] == TimmTowerConfig.model_type and "auto_map" not in beside:
                del content["image_processor_type"], content["auto_map"]
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
        """Preprocess one image or a list of them, which may hold further lists.

        Args:
            images: PIL images; paths and URLs, turned upright by their EXIF data; numpy arrays `[H, W]`, `[H, W, C]`,
                `[C, H, W]` or a batch, uint8 or floats in [0, 1], and uint16 or int32 where they are grey; tensors
                `[C, H, W]` or `[B, C, H, W]`, uint8 or floats in [0, 1].
            return_tensors: `"pt"` or `"np"`: one array of the batch; None: a list of tensors `[C, height, width]`.
            device: Where the tensor path runs and where the result is; by default each image's own.
            input_data_format: `channels_first` or `channels_last`; by default tensors have their channels first, and
                arrays where their shape shows them.
            steps: transformers' names of steps, taken where they say what is done. `do_resize=False`: the images have
                the tower's size already. `do_rescale=False`: they are floats. `do_convert_rgb=False`: none need be.

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
        call = _Call(*self._block(), device, input_data_format, steps)
        done = [made for image in call.opened(images) for made in call.pixels(image)]
        if not done:
            raise ArgumentError("no images: expected one at least")
        batch: Any = done if return_tensors is None else torch.stack(done)
        return BatchFeature({"pixel_values": batch.cpu().numpy() if return_tensors == "np" else batch})

    def _block(self) -> tuple[dict[str, Any], list[int]]:
        """The attributes as they are now, checked again: they may have been set."""
        return block_of({name: getattr(self, name) for name in PROCESSOR_FACTS})


def _opened_source(source: str) -> Image.Image:
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
    except UNREADABLE as error:
        raise ArgumentError(f"{shown(source)}: no path, URL or base64 text of an image: {shown(str(error))}") from error


class _Call:
    """One call of the processor: every way in -> PIL images and batches of tensors -> `[C, height, width]` tensors."""

    def __init__(self, block: Any, size: list[int], device: Any, layout: str | None, given: dict[str, Any]) -> None:
        self.size, self.channels, self.device, self.layout = size, len(block["mean"]), device, layout
        self.given = {name: value for name, value in given.items() if value is not None}
        self.steps = with_tower_steps(create_transform(**timm_arguments(block, size)).transforms, block)
        self.whole = standard_keys(block).get("do_center_crop") is False  # nothing is cropped
        if self.given.get("do_resize") is False:
            sized = [isinstance(step, MaybeToTensor) for step in self.steps].index(True)
            self.steps, self.whole = self.steps[sized:], True

    def opened(self, image: Any, depth: int = 0) -> Iterator[Image.Image | torch.Tensor]:
        """Whatever was given -> PIL images, and tensors `[B, C, H, W]` that are not yet checked."""
        if isinstance(image, (list, tuple)):
            if depth == 4:
                raise ArgumentError("images: lists within lists, more than 4 deep")
            for one in image:
                yield from self.opened(one, depth + 1)
        elif isinstance(image, (str, os.PathLike)):
            yield _opened_source(os.fspath(image))
        elif isinstance(image, Image.Image):
            yield image
        elif isinstance(image, np.ndarray):
            yield from map(self._of_array, image if image.ndim == 4 else [image])
        elif isinstance(image, torch.Tensor):
            batch = image[None] if image.ndim == 3 else image
            yield batch.permute(0, 3, 1, 2) if self.layout == "channels_last" and batch.ndim == 4 else batch
        else:
            expected = "a PIL image, a numpy array, a torch tensor, a path or a URL"
            raise ArgumentError(f"an image of type {type(image).__name__}: expected {expected}")

    def _of_array(self, array: np.ndarray[Any, Any]) -> Image.Image | torch.Tensor:
        """One image; uint8 of one, three or four channels and deeper grey as PIL's, all else as a tensor."""
        counts, shape = {1, 3, 4} if self.channels in PIL_MODES else {1, self.channels}, array.shape
        first, last = self.layout == "channels_first", self.layout == "channels_last"
        if array.ndim == 2:
            array, first, last = array[:, :, None], False, True
        elif array.ndim == 3 and self.layout is None:
            first, last = shape[0] in counts, shape[-1] in counts
        if array.ndim != 3 or 0 in shape or first == last:
            raise ArgumentError(
                f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W], not empty, with C of {counts}; "
                "where C could be either side, pass input_data_format='channels_first' or 'channels_last'"
            )
        array = array.transpose(1, 2, 0) if first else array
        depth = {"uint8": (1, 3, 4), "uint16": (1,), "int32": (1,)}.get(array.dtype.name, ())
        if self.channels in PIL_MODES and array.shape[-1] in depth:
            pixels = array[:, :, 0] if array.shape[-1] == 1 else array
            return Image.fromarray(np.array(pixels, array.dtype.newbyteorder("=")))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ArgumentError(f"an array of {array.dtype}: expected uint8, or floating point in [0, 1]")
        kind = np.float32 if array.dtype.kind == "f" else np.uint8
        return torch.from_numpy(np.array(array.transpose(2, 0, 1), kind))[None]

    def pixels(self, image: Image.Image | torch.Tensor) -> Iterator[torch.Tensor]:
        """An image `[C, H, W]`, or a batch `[B, C, H, W]` -> `[C, height, width]` each."""
        if isinstance(image, Image.Image):
            ours = in_channels(image, self.channels)
            self._check_steps([image.height, image.width], True, image.mode if ours is not image else None)
            yield run_steps(self.steps, ours).to(self.device)
        else:
            batch = _checked_tensor(image if self.device is None else image.to(self.device), self.channels)
            self._check_steps(list(batch.shape[-2:]), not batch.is_floating_point())
            yield from run_steps(self.steps, batch)

    def _check_steps(self, size: list[int], rescales: bool, converted: str | None = None) -> None:
        """Refuse a step that was asked for, or out, where an image of this `[H, W]` is treated otherwise."""
        takes = f"a call takes {', '.join(TimmTowerImagesKwargs.__annotations__)}; no other step is left out"
        usable = {
            "do_resize": ((True, size != self.size), f"the image is {size}, but the tower takes {self.size}"),
            "do_center_crop": ((True, not self.whole), takes),
            "do_rescale": ((rescales,), "uint8 and PIL images are divided by 255, floats are in [0, 1] already"),
            "do_convert_rgb": ((True, converted is not None), f"the image has mode {converted}"),
            "do_normalize": ((True,), takes),
        }
        for name, value in self.given.items():
            values, reason = usable.get(name, ((), takes))
            if value not in values:
                raise ArgumentError(f"TimmTowerImageProcessor: {name}={shown(value)} cannot be had: {reason}")


def _checked_tensor(images: torch.Tensor, channels: int) -> torch.Tensor:
    """A batch `[B, channels, H, W]`, uint8 or float32 in [0, 1]; grey is repeated for three channels."""
    if images.ndim == 4 and images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, channels, -1, -1)
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape or images.is_meta:
        raise ArgumentError(
            f"a tensor of shape {list(images.shape)}: expected {channels} channels first, [C, H, W] or [B, C, H, W], "
            "not empty; with channels last pass input_data_format='channels_last'"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ArgumentError(f"a tensor of {images.dtype}: expected uint8, or floating point in [0, 1]")
    images = images.float()
    least, most = (bound.item() for bound in images.detach().aminmax())
    if not (least >= 0 and most <= 1):
        found = f"a floating point tensor with values from {least:.4g} to {most:.4g}"
        raise ArgumentError(f"{found}: expected [0, 1], not yet normalised. Divide by 255 what goes to 255.")
    return images

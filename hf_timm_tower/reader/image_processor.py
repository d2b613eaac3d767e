"""`TimmTowerImageProcessor`: timm's eval transform as transformers' image processor.

- PIL images, uint8 numpy arrays and paths give, bit for bit, what timm's transform gives for `image.convert("RGB")`
  (`"L"` for towers of one channel). So transparency is dropped and not blended, and PIL clips what 16-bit images hold
  above 255.
- Tensors and floating point arrays take the path of `tensor_transform.py`, which is close and not equal.
- EXIF rotation: paths and URLs are read by transformers' `load_image`, as in pipelines, which turns the image upright.
  A PIL image is taken as it is, as timm takes it: `PIL.ImageOps.exif_transpose` is the caller's.

In a file of its own: importing transformers' image processing is not free, and `TimmModel` does without.
"""

import difflib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from ..training.layer_groups import layer_groups as _layer_groups  # noqa: F401
from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError
from .freezing import check_frozen as _check_frozen  # noqa: F401  # see below
from .freezing import hold as _hold  # noqa: F401
from .image_processing import transform_of
from .model_args import check_names as _check_names  # noqa: F401
from .processor_config import (
    PROCESSOR_AUTO_MAP,
    PROCESSOR_FACTS,
    PROCESSOR_FOREIGN_KEYS,
    block_of,
    facts_in_tower,
    facts_of,
    processor_dict,
)
from .tensor_transform import transform_tensor

# From a folder, transformers 5.4 copies the files that a remote file imports, and not those that these import in turn:
# so all that are needed are imported above.

_PIL_MODES = {1: "L", 3: "RGB"}


class TimmTowerImagesKwargs(TypedDict, total=False):
    """What a call takes beside the images. transformers' processors sort their keywords by these names."""

    return_tensors: str | None
    device: str | torch.device | None
    input_data_format: str | None


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
        # transformers sets this on the class of remote code and would then, at each save, copy the code into the
        # folder's top and point `auto_map` there. `save_pretrained` below keeps it in core/.
        self._auto_class = None
        if unknown := sorted(set(facts) - set(PROCESSOR_FACTS) - PROCESSOR_FOREIGN_KEYS):
            raise ConfigError(f"{type(self).__name__}: unknown {', '.join(map(_with_near_names, unknown))}")
        defaults = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0]}
        for name, value in facts_of(*block_of({**defaults, **facts})).items():
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
            ArgumentError: a keyword looks like a fact misspelt.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in PROCESSOR_FACTS if name in kwargs}
        if "image_size" in kwargs:
            if "size" in given:
                raise ArgumentError(f"{cls.__name__}: image_size is another name of size; give one of them")
            given["size"] = kwargs.pop("image_size")
        for name in kwargs:
            if name in ("mean", "std") or difflib.get_close_matches(name, PROCESSOR_FACTS, n=1, cutoff=0.75):
                raise ArgumentError(f"{cls.__name__}: unknown {_with_near_names(name)}")
        processor = cls(**{**image_processor_dict, **given})
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        kind, auto_map = type(self).__name__, dict(PROCESSOR_AUTO_MAP)
        return {**self._facts(), "image_processor_type": kind, "auto_map": auto_map}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write `preprocessor_config.json`, and for remote code `core/` with the code, unless the folder has one."""
        code = Path(save_directory) / "core"
        if type(self)._auto_class is not None and not code.exists():
            code.mkdir(parents=True)
            for file in {__file__, *get_relative_import_files(__file__)}:
                shutil.copyfile(file, code / Path(file).name)
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        path, config = (Path(save_directory, name) for name in ("preprocessor_config.json", "config.json"))
        if config.is_file() and json.loads(config.read_text()).get("model_type") == TimmTowerConfig.model_type:
            facts = facts_in_tower(json.loads(path.read_text()))  # as the tower itself writes it
            path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        return saved

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        input_data_format: str | None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Preprocess one image or a list of them.

        Args:
            images: PIL images; numpy arrays `[H, W]`, `[H, W, C]`, `[C, H, W]` or a batch of these, uint8 or floats
                in [0, 1]; tensors `[C, H, W]` or `[B, C, H, W]`, likewise; paths and URLs; or a flat list of these.
            return_tensors: `"pt"` or `"np"`: one array of the batch; None: a list of tensors `[C, height, width]`.
            device: Where the tensor path runs and where the result lies; by default each image's own.
            input_data_format: `channels_first` or `channels_last` of arrays and tensors. By default tensors have their
                channels first, and arrays where their shape shows them.

        Returns:
            `pixel_values`: `[B, C, height, width]`, float32.

        Raises:
            ArgumentError: an image, or a keyword, that cannot be used.
            ConfigError: an attribute has been set to what cannot be used.
        """
        if unknown:
            raise ArgumentError(
                f"{type(self).__name__}: unknown {', '.join(sorted(unknown))}. A call takes return_tensors, device and "
                "input_data_format; the steps are the tower's (size, interpolation, ...) and none is left out."
            )
        if return_tensors not in (None, "pt", "np"):
            raise ArgumentError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ArgumentError(f"input_data_format={input_data_format!r}: not 'channels_first' or 'channels_last'")
        prepared = _Call(self._facts(), device, input_data_format)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        done = [made for image in images for made in prepared(image)]
        if not done:
            raise ArgumentError("no images: expected one at least")
        if return_tensors is None:
            return BatchFeature({"pixel_values": done})
        batch = torch.stack(done)
        return BatchFeature({"pixel_values": batch if return_tensors == "pt" else batch.cpu().numpy()})

    def _facts(self) -> dict[str, Any]:
        """The attributes as they are now, checked again: they may have been set."""
        return facts_of(*block_of({name: getattr(self, name) for name in PROCESSOR_FACTS}))


class _Call:
    """One call of the processor: image -> its `[C, height, width]` tensors."""

    def __init__(self, facts: dict[str, Any], device: Any, data_format: str | None) -> None:
        self.block, self.size = block_of(facts)
        self.channels = len(self.block["mean"])
        self.transform = transform_of(self.block, self.size)
        self.device, self.data_format = device, data_format

    def __call__(self, image: Any) -> Iterator[torch.Tensor]:
        if isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        if isinstance(image, Image.Image):
            yield self._exact(image)
        elif isinstance(image, np.ndarray):
            for array in image if image.ndim == 4 else [image]:
                yield self._from_array(array)
        elif isinstance(image, torch.Tensor):
            yield from self._from_tensor(image, self.data_format or "channels_first")
        elif isinstance(image, (list, tuple)):
            raise ArgumentError("a list within the list of images: expected a flat list, one image after the other")
        else:
            raise ArgumentError(
                f"an image of type {type(image).__name__}: expected a PIL image, a numpy array, a torch tensor, a path "
                "or a URL"
            )

    def _exact(self, image: Image.Image) -> torch.Tensor:
        mode = _PIL_MODES.get(self.channels)
        if mode is None:
            raise ArgumentError(
                f"a PIL image (mode {image.mode}), but the tower takes {self.channels} channels: pass arrays or tensors"
            )
        if image.mode != mode:
            _warn_of_clipping(image)
            image = image.convert(mode)
        made: torch.Tensor = self.transform(image)
        return made if self.device is None else made.to(self.device)

    def _from_array(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """One image; uint8 of one, three or four channels through PIL, all else through torch."""
        if array.ndim == 2:
            array = array[:, :, None]
        elif array.ndim != 3:
            raise ArgumentError(f"an array of shape {array.shape}: expected [H, W], [H, W, C] or [C, H, W]")
        elif self._data_format(array.shape) == "channels_first":
            array = array.transpose(1, 2, 0)
        if array.dtype == np.uint8 and self.channels in _PIL_MODES and array.shape[-1] in (1, 3, 4):
            pixels = array[:, :, 0] if array.shape[-1] == 1 else array
            return self._exact(Image.fromarray(np.ascontiguousarray(pixels)))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ArgumentError(f"an array of {array.dtype}: expected uint8, or floating point in [0, 1]")
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        return next(self._from_tensor(tensor, "channels_first"))

    def _data_format(self, shape: tuple[int, ...]) -> str:
        if self.data_format is not None:
            return self.data_format
        counts = {1, 3, 4} if self.channels in _PIL_MODES else {1, self.channels}
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
        yield from transform_tensor(batch, self.block, self.size)


def _with_near_names(name: str) -> str:
    near = difflib.get_close_matches(name, PROCESSOR_FACTS, n=2)
    return f"{name} (did you mean {' or '.join(near)}?)" if near else name


def _warn_of_clipping(image: Image.Image) -> None:
    if not image.mode.startswith(("I", "F")):
        return
    extrema: Any = image.getextrema()
    least, most = extrema
    if least < 0 or most > 255 or (image.mode == "F" and most <= 1):
        warnings.warn(
            f"an image of mode {image.mode} with values from {least} to {most}: PIL's convert takes white for 255 and "
            "clips what is not from 0 to 255, and timm has the same. Scale it to 8 bits first.",
            stacklevel=2,
        )

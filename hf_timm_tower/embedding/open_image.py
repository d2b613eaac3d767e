"""One image, whatever it comes as -> the tower's pixels.

They are those that `tower.transform()` gives for the upright image in the tower's mode: every image, from a file or
not, is turned as its EXIF orientation says, as transformers, `datasets` and browsers do (timm's own readers do not).
"""

import io
import os
import stat
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError, shown
from ..reader.image_processing import in_channels, load_pixels
from ..training.transform import make_transform

# Pillow runs Ghostscript to read EPS, and Windows' own renderer for WMF.
_RUNS_PROGRAMS = ("EPS", "WMF")


class Preparer:
    """Image -> pixels for one tower. It can be sent to another process.

    Args:
        config: The tower's, completed.

    Raises:
        ConfigError: the config describes no preprocessing.
    """

    def __init__(self, config: TimmTowerConfig) -> None:
        self.channels = config.in_chans
        self.shape = (config.in_chans, *config.image_size)  # type: ignore[misc]
        self._config = config
        self._transform = make_transform(config)
        self._processor: Any = None
        Image.init()  # once, before processes are forked

    def __call__(self, image: Any) -> torch.Tensor:
        """One image -> float32 `[in_chans, height, width]`.

        Args:
            image: A path, the bytes of an image file, a PIL image, or an array or tensor as the tower's image
                processor takes it: `[H, W]`, `[H, W, C]` or `[C, H, W]`, uint8 or floats in [0, 1].

        Raises:
            ArgumentError: it cannot be read or used, and why.
            OSError: the file cannot be opened.
        """
        if isinstance(image, Exception):
            raise image  # what a source could not read
        if isinstance(image, (str, os.PathLike)):
            return self._of_pil(read_image(image))
        if isinstance(image, (bytes, bytearray, memoryview)):
            return self._of_pil(_opened(io.BytesIO(image)))
        if isinstance(image, Image.Image):
            load_pixels(image)
            return self._of_pil(image)
        if isinstance(image, (np.ndarray, torch.Tensor)):
            self.import_for(image)
            pixels: list[torch.Tensor] = self._processor.preprocess([image])["pixel_values"]
            if len(pixels) != 1:
                raise ArgumentError(f"{len(pixels)} images in one array or tensor: expected one")
            return pixels[0]
        raise _no_image(image)

    def import_for(self, image: Any) -> None:
        """Import what such an image needs, before processes are forked: transformers' processors take a second."""
        if self._processor is None and isinstance(image, (np.ndarray, torch.Tensor)):
            from ..reader.image_processor import TimmTowerImageProcessor

            self._processor = TimmTowerImageProcessor.from_tower_config(self._config)

    def _of_pil(self, image: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self._transform(in_channels(_upright(image), self.channels))
        return pixels


def portable(image: Any) -> Any:
    """The same image for another process, where it has the same pixels.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(image, Image.Image):
        load_pixels(image)
        image = _upright(image).copy()
        # An orientation that the caller has changed since is not sent; the one in here would be.
        image.info = {
            key: value for key, value in image.info.items() if "exif" not in str(key) and "xmp" not in str(key)
        }
        return image
    if isinstance(image, torch.Tensor):  # a view would take along what it is a view of
        return image.detach().cpu().clone()
    if isinstance(image, memoryview):
        return bytes(image)
    if isinstance(image, (str, os.PathLike, bytes, bytearray, np.ndarray, Exception)):
        return image
    raise _no_image(image)


def _no_image(image: Any) -> ArgumentError:
    return ArgumentError(f"a {type(image).__name__}: expected a path, bytes, a PIL image, an array or a tensor")


def _upright(image: Image.Image) -> Image.Image:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open and decode an image file.

    Raises:
        OSError: it cannot be opened.
        ArgumentError: it is not a regular file (a pipe would be waited for), or not an image that Pillow can read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArgumentError("not a regular file")
        if status.st_size == 0:
            raise ArgumentError("an empty file, of 0 bytes")
        return _opened(file)


def _opened(file: Any) -> Image.Image:
    """The decoded image of an open file; Pillow's own limit of pixels holds."""
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        raise ArgumentError("not an image file that Pillow knows") from error
    load_pixels(image)
    return image


def _formats() -> list[str]:
    Image.init()  # nothing, where it was done
    return [name for name in Image.ID if name not in _RUNS_PROGRAMS]


def reason_of(error: Exception) -> str:
    """Why an image was left out, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown(str(error) or type(error).__name__, 300)[1:-1]

"""Whatever holds images -> pairs (id, image), one after the other.

An image here is what `open_image.Preparer` takes; files are passed by path and read where they are decoded.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..reader.errors import ArgumentError, FolderError, shown
from .folders import files_of_folder, members_of_tar, printable

_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "path", "file_name")
_ID_KEYS = ("id", "__key__")


@dataclass(frozen=True)
class Source:
    """Images in a fixed order.

    Attributes:
        items: Makes an iterator over (id, image) from the start.
        length: How many, None where that is not known before the end.
        kind: For the manifest: what it is.
        place: For the manifest: its path, where it has one.
    """

    items: Callable[[], Iterator[tuple[str, Any]]]
    length: int | None
    kind: str
    place: str | None = None


def in_batches(
    items: Iterator[tuple[str, Any]], size: int, first: int = 0
) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """(position of the first, its items); all batches but the last have `size` items."""
    while batch := list(itertools.islice(items, size)):
        yield first, batch
        first += len(batch)


def open_source(images: Any, column: str | None = None) -> Source:
    """What the caller gave -> a source.

    Args:
        images: A folder, an image file, a `.tar` shard or a list of them; one PIL image, array, tensor or bytes; a
            batch `[N, ...]`; a `datasets` table; any iterable of images, paths, tuples that begin with one, or
            mappings.
        column: The image's key, in mappings and tables; None: the usual names are looked for.

    Raises:
        ArgumentError: it holds no images.
        FolderError: there is no such file or folder.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # a column of paths
        images = images.tolist()
    if isinstance(images, (str, os.PathLike)):
        return _source_of_path(os.fspath(images))
    if isinstance(images, (Image.Image, bytes, bytearray, memoryview)):
        return _listed([images])
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return _listed(images if images.ndim == 4 else [images])
    module = type(images).__module__
    decoded = type(images).__name__ in ("Column", "IterableColumn")
    if module.startswith("datasets.") and not decoded:
        from .hf_datasets import source_of_table

        kind, length, rows = source_of_table(images, column)
        return Source(lambda: _pairs(rows(), None), length, kind)  # it has renamed the column
    if isinstance(images, (list, tuple)) and images and all(map(_is_shard, images)):
        return Source(lambda: _members(list(map(os.fspath, images))), None, "webdataset shards")
    try:
        length = len(images) if isinstance(images, Sized) else None
    except TypeError:  # of a stream that inherits it, as torch's loader of an iterable dataset
        length = None
    if not isinstance(images, Iterable):
        if length is None or not hasattr(images, "__getitem__"):
            raise ArgumentError(f"images: a {type(images).__name__} is neither an image nor a set of images")
        rows_of = images
        return Source(lambda: _pairs((rows_of[row] for row in range(length)), column), length, type(images).__name__)
    return Source(lambda: _pairs(images, column), length, type(images).__name__)


def _listed(images: Any) -> Source:
    return Source(lambda: _pairs(images, None), len(images), "images")


def _source_of_path(path: str) -> Source:
    place = printable(os.path.abspath(path))  # it is looked for again from other folders
    if os.path.isdir(path):
        return Source(lambda: files_of_folder(path), None, "folder", place)
    if not os.path.lexists(path):
        raise FolderError(f"{shown(path)}: no such file or folder")
    if _is_shard(path):
        return Source(lambda: members_of_tar(path), None, "webdataset shard", place)
    return Source(lambda: _pairs([path], None), 1, "file", place)


def _members(shards: list[str]) -> Iterator[tuple[str, Any]]:
    for shard in shards:
        above = printable(os.path.join(os.path.dirname(shard), ""))  # two folders may have shards of one name
        yield from ((above + name, image) for name, image in members_of_tar(shard))


def _is_shard(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike)) and os.fspath(image).endswith(".tar")


def _pairs(rows: Iterable[Any], column: str | None) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield from _pairs_of(row, number, column)


def _pairs_of(row: Any, number: int, column: str | None) -> Iterator[tuple[str, Any]]:
    name = str(number)
    if isinstance(row, tuple) and row:
        row = row[0]
    if isinstance(row, Mapping):
        name = str(next((row[key] for key in _ID_KEYS if key in row), name))
        name = name.encode("utf-8", "backslashreplace").decode()
        found = [column] if column is not None else [key for key in _IMAGE_KEYS if key in row]
        if not found or found[0] not in row:
            raise ArgumentError(
                f"images[{number}] has no {column or 'image'}, it has {shown(list(row))}; name it: column=..."
            )
        row = row[found[0]]
    if isinstance(row, (str, os.PathLike)):
        path = os.fspath(row)
        yield (printable(path) if name == str(number) else name), path
        return
    yield name, row

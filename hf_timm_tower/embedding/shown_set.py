"""A folder of embeddings with its tower and its pictures: what the app shows."""

import os
from typing import Any

import torch
from PIL import Image

from ..reader.errors import ArgumentError, shown
from .explore import Method, near_duplicates, outliers, pixels_of, plane, plane_picture
from .neighbours import ExactIndex
from .search import plan_of, query_vector, tile
from .stored import StoredEmbeddings

_TILES = 300
Captioned = list[tuple[Image.Image, str]]


class ShownSet:
    """Embeddings, their images, and the tower that made them.

    Args:
        tower: A TimmModel.
        stored: What it has made.
        images: The folder of the images, where they have moved since; None: where they were.

    Attributes:
        images_are_named: Whether the caller said where the images are, and not the embeddings.

    Raises:
        FolderError: another tower has made the embeddings.
        ArgumentError: there are none.
    """

    def __init__(self, tower: Any, stored: StoredEmbeddings, images: str | os.PathLike[str] | None = None) -> None:
        self.tower, self.stored = tower, stored
        self._plan = plan_of(tower, stored)
        self.index = ExactIndex.of_folder(stored)
        source = stored.manifest["source"]
        self._place = os.fspath(images) if images is not None else source.get("place")
        self.images_are_named = images is not None
        self._below = images is not None or source.get("kind") == "folder"
        self._points: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index.ids)

    def path_of(self, row: int) -> str | None:
        """The file of a row; None where its id is no path, or leads out of the set's folder."""
        if not 0 <= row < len(self):
            raise ArgumentError(f"row {row}: there are {len(self)} images")
        name = self.index.ids[row]
        if not self._below or self._place is None:
            return name if os.path.isfile(name) else None
        path = os.path.normpath(os.path.join(self._place, name))
        inside = os.path.commonpath([os.path.abspath(self._place), os.path.abspath(path)])
        return path if inside == os.path.abspath(self._place) and os.path.isfile(path) else None

    def picture(self, row: int) -> Image.Image:
        """A small picture of a row; grey where its file cannot be opened."""
        return tile(self.path_of(row) or "")

    def neighbours(self, image: Image.Image, k: int) -> Captioned:
        """The images nearest to one that need not be in the set, each with its cosine and id."""
        return self._found(query_vector(self._plan, self.stored, image)[None], k)

    def neighbours_of(self, row: int, k: int) -> Captioned:
        """The images nearest to one of the set, itself first."""
        self.path_of(row)
        return self._found(self.index.rows[row][None], k)

    def map_picture(self, method: Method) -> Image.Image:
        """All images in a plane; small pictures of at most 300, evenly chosen."""
        step = max(1, -(-len(self) // _TILES))
        return plane_picture(self._plane(method), {row: self.picture(row) for row in range(0, len(self), step)})

    def row_at(self, method: Method, x: int, y: int, size: int = 900) -> int:
        """The image nearest to a pixel of the map."""
        pixels = pixels_of(self._plane(method), size).double()
        return int((pixels - torch.tensor([x, y])).square().sum(1).argmin())

    def duplicates(self, least: float) -> Captioned:
        """The most alike pairs, first and second of each in turn."""
        found: Captioned = []
        for one, other, cosine in near_duplicates(self.index.rows, least):
            found += [self._captioned(row, cosine) for row in (one, other)]
        return found

    def outliers(self) -> Captioned:
        """The images that are least like any other, with the mean cosine to their ten nearest."""
        return [self._captioned(row, mean) for row, mean in outliers(self.index.rows)]

    def _plane(self, method: Method) -> torch.Tensor:
        if method not in self._points:
            self._points[method] = plane(self.index.rows, method)
        return self._points[method]

    def _found(self, vectors: torch.Tensor, k: int) -> Captioned:
        cosines, rows = self.index.search(vectors, min(k, len(self)))
        return [self._captioned(row, cosine) for cosine, row in zip(cosines[0].tolist(), rows[0].tolist(), strict=True)]

    def _captioned(self, row: int, cosine: float) -> tuple[Image.Image, str]:
        return self.picture(row), f"{cosine:.4f} {shown(self.index.ids[row])[1:-1]}"

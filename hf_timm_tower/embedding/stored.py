"""A folder of embeddings, to read."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files.disk import folder_error
from ..reader.errors import ArgumentError, FolderError, FormatError, shown
from .embedder import Failure
from .manifest import MANIFEST_NAME, read_manifest
from .parquet import Shard, read_rows, read_shards

FAILURES_NAME = "failures.jsonl"


class StoredEmbeddings:
    """What `embed_to` has written, complete or not.

    Args:
        path: The folder.

    Attributes:
        manifest: The content of `manifest.json`.
        shards: The files, in order.

    Raises:
        FolderError: there are no embeddings.
        FormatError: a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise FolderError(f"{self.path}: no embeddings, {MANIFEST_NAME} is missing; tower.embed_to makes them")
        self.manifest: dict[str, Any] = manifest
        self.shards: list[Shard] = read_shards(self.path)
        covered = sum(shard.covered for shard in self.shards)
        images = manifest.get("images")
        if self.complete and not (type(images) is int and covered >= images):  # more: one that grows at this moment
            raise FormatError(
                f"{self.path}: its files are of {covered} images, and {MANIFEST_NAME} says that there are "
                f"{shown(images)}: a file is missing. Embed the same images into it again, which adds "
                "what is missing"
            )

    def __len__(self) -> int:
        """Number of embeddings."""
        return sum(shard.covered - len(shard.failures) for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return self.manifest.get("complete") is True

    @property
    def columns(self) -> list[str]:
        """Names of what is stored for each image; `embedding` for a tower that gives one tensor."""
        return list(self.manifest["columns"])

    @property
    def failures(self) -> list[Failure]:
        """Images that have no embedding."""
        return [failure for shard in self.shards for failure in shard.failures]

    def batches(self, column: str | None = None) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Shard by shard: ids and `[rows, ...]`; None is `first_column`."""
        name = self.first_column if column is None else self._checked(column)
        for shard in self.shards:
            ids, values = read_rows(shard, [name])
            yield ids, values[name]

    def load(self, column: str | None = None) -> tuple[list[str], torch.Tensor]:
        """All ids, and all rows as one tensor `[M, ...]`."""
        ids: list[str] = []
        parts: list[torch.Tensor] = []
        for names, values in self.batches(column):
            ids += names
            parts.append(values)
        return ids, torch.cat(parts) if parts else torch.zeros(0)

    def save_npy(self, path: str | os.PathLike[str], column: str | None = None) -> None:
        """One array `[M, ...]` for `numpy.load`, and beside it the ids, one JSON text a line, as `.ids.jsonl`.

        Raises:
            FolderError: it cannot be written.
        """
        name = self.first_column if column is None else self._checked(column)
        place, facts = Path(path), self.manifest["columns"][name]
        names = place.with_suffix(".ids.jsonl")
        beside = [each.with_name(f"{each.name}.partial") for each in (place, names)]
        header = {"descr": np.dtype(facts["dtype"]).str, "fortran_order": False}
        try:
            # written one after the other: a mapped file on a full disk would end the process
            with open(beside[0], "wb") as array, open(beside[1], "w", encoding="utf-8") as file:
                np.lib.format.write_array_header_1_0(array, {**header, "shape": (len(self), *facts["shape"])})
                for ids, values in self.batches(name):
                    array.write(values.numpy().tobytes())
                    file.writelines(f"{json.dumps(each)}\n" for each in ids)
            os.replace(beside[1], names)
            os.replace(beside[0], place)
        except OSError as error:
            raise folder_error(f"{place} cannot be written", error) from error
        finally:
            for each in beside:
                each.unlink(missing_ok=True)

    def save_lance(self, path: str | os.PathLike[str], column: str | None = None) -> None:
        """Ids and one column as a Lance dataset, by LanceDB's writer: `DIR/photos.lance` is table `photos` of `DIR`.

        A row of several dimensions is one list; its shape is in the manifest, which is in the schema's metadata as
        `hf_timm_tower`. The table gets its first or next version by one commit of Lance's: after a kill it is what it
        was before, and the same call writes it; no image runs again.

        Args:
            path: Ends in `.lance`.
            column: None is `first_column`.

        Raises:
            ArgumentError: the name ends otherwise, or nothing is stored yet.
            ImportError: lancedb is missing.
        """
        from .lance_table import write_table

        if not len(self):
            raise ArgumentError(f"{self.path} has no rows")
        column = self.first_column if column is None else self._checked(column)
        write_table(Path(path), column, lambda: self.batches(column), self.manifest)

    @property
    def first_column(self) -> str:
        """`embedding` where there is one, else the first."""
        names = self.columns
        return "embedding" if "embedding" in names else names[0]

    def image_path(self, name: str) -> str:
        """Where the image of this id is, if the source was a folder or a list of paths."""
        place = self.manifest["source"].get("place")
        return os.path.join(place, name) if place and self.manifest["source"]["kind"] == "folder" else name

    def _checked(self, column: str) -> str:
        if column not in self.columns:
            raise ArgumentError(f"{self.path}: no column {column!r}; there are {', '.join(self.columns)}")
        return column

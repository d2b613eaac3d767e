"""Images -> a folder of embeddings that a killed run goes on with.

    photos.emb/
      manifest.json               the tower, its preprocessing, the options, versions; whether all is there
      embeddings-00000.parquet    id, embedding; each covers the next `rows_per_shard` images of the source
      embeddings-00001.parquet
      failures.jsonl              images that have no embedding, once all is there
      README.md                   so that `datasets` opens the folder as it is

A shard is there as a whole or not at all. A run that starts again compares the images that the shards cover with those
of the source, one by one, and goes on behind them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..files.disk import folder_error, locked_folder, replaced_file, sync
from ..files.json import write_json
from ..reader.errors import ArgumentError, FolderError, shown
from .embed import check_errors, failed, with_progress
from .embedder import Block, Failure
from .engine import Plan, stream
from .manifest import MANIFEST_NAME, check_same, describe, read_manifest
from .parquet import Shard, ids_of, read_shards, write_shard
from .sources import Source
from .stored import FAILURES_NAME, StoredEmbeddings

ROWS_PER_SHARD = 4096
MAX_SHARD_BYTES = 2**26
SECONDS_FOR_LOCK = 10.0
_CARD = """---
configs:
- config_name: default
  data_files: "embeddings-*.parquet"
---
Embeddings made with hf_timm_tower; manifest.json says by which tower, and how.
"""
_END = object()


def embed_to_folder(
    plan: Plan,
    source: Source,
    folder: str | os.PathLike[str],
    *,
    rows_per_shard: int | None,
    errors: Literal["raise", "collect"],
    progress: bool,
) -> StoredEmbeddings:
    """Run over all images that the folder does not have yet.

    Args:
        plan: How to run; results in bfloat16 are stored as float32.
        source: The images.
        folder: It is made; one that was left in the middle is gone on with.
        rows_per_shard: Images of a shard, what a kill loses at most; None: 4096, fewer where rows are large.
        errors: What becomes of an image that cannot be used.
        progress: Show a bar.

    Raises:
        FolderError: the folder holds something else, another process writes into it, or the disk is full.
        ArgumentError: an image cannot be used and `errors="raise"`; the shards before it are kept.
    """
    check_errors(errors)
    place = Path(folder)
    with _opened_for_writing(place):
        manifest, shards = _begin(plan, source, place, rows_per_shard)
        items = source.items()
        done = _skip(items, shards, place)
        writer = _Writer(place, manifest, len(shards), done)
        for block in with_progress(stream(plan, source, items, done), source.length, progress, done):
            if errors == "raise" and block.failures:
                raise failed(block.failures[0])
            writer.add(block)
        writer.flush()
        if writer.first == 0:
            raise ArgumentError(f"images: there are none in this {source.kind} {source.place or ''}".rstrip())
        _finish(place, manifest)
    return StoredEmbeddings(place)


@contextmanager
def _opened_for_writing(folder: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_folder(folder, SECONDS_FOR_LOCK))
        except TimeoutError as error:
            raise FolderError(f"{folder}: another process is writing embeddings into it; wait for its end") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise FolderError(f"{folder} is a file: give a folder") from error
        except OSError as error:
            raise folder_error(f"{folder} cannot be written", error) from error
        yield


def _begin(plan: Plan, source: Source, folder: Path, rows_per_shard: int | None) -> tuple[dict[str, Any], list[Shard]]:
    """The manifest, written where there is none yet, and the shards that are there."""
    then = read_manifest(folder)
    if then is None and (others := sorted(name for name in os.listdir(folder) if not name.endswith(".part"))):
        raise FolderError(f"{folder} holds other files ({shown(others[:3])}): give a folder of its own")
    now = describe(plan.tower, plan.outputs, 0, {"kind": source.kind, "place": source.place, "images": source.length})
    if then is not None:
        check_same(folder, then, now)
        before, place = then["source"].get("place"), source.place
        # names alone would not tell; where the first is gone, it may have moved
        if before and place and os.path.exists(before) and os.path.realpath(before) != os.path.realpath(place):
            raise FolderError(
                f"{folder} holds embeddings of {shown(before)}, not of {shown(place)}: give another folder, or the "
                "images from where they were"
            )
        return then, read_shards(folder)
    now["rows_per_shard"] = _rows_per_shard(rows_per_shard, now["columns"], plan.outputs.batch_size)
    write_json(folder / MANIFEST_NAME, now)
    return now, []


def _rows_per_shard(given: int | None, columns: dict[str, Any], batch: int) -> int:
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ArgumentError(f"rows_per_shard={given!r}: expected a whole number from 1 on")
        return -(-given // batch) * batch
    row: int = sum(
        torch.Size(column["shape"]).numel() * getattr(torch, column["dtype"]).itemsize for column in columns.values()
    )
    return max(1, min(ROWS_PER_SHARD, MAX_SHARD_BYTES // max(row, 1)) // batch) * batch


def _skip(items: Iterator[tuple[str, Any]], shards: list[Shard], folder: Path) -> int:
    """Take the images that the shards cover off the source; how many they are.

    Raises:
        FolderError: the source has others now.
    """
    done = 0
    for shard in shards:
        for stored in ids_of(shard):
            name, _ = next(items, (_END, None))
            if name != stored:
                found = "the source ends there" if name is _END else f"now there is {shown(name)}"
                raise FolderError(
                    f"{folder}: image {done} was {shown(stored)} when it was embedded, {found}. The source has "
                    "changed; give another folder, or delete this one"
                )
            done += 1
    return done


class _Writer:
    """Blocks -> shards."""

    def __init__(self, folder: Path, manifest: dict[str, Any], number: int, first: int) -> None:
        self._folder, self._manifest, self._number, self.first = folder, manifest, number, first
        self._size: int = manifest["rows_per_shard"]
        self._columns: dict[str, Any] = manifest["columns"]
        self._blocks: list[Block] = []
        self._covered = 0

    def add(self, block: Block) -> None:
        self._blocks.append(block)
        self._covered += len(block.ids)
        if self._covered >= self._size:
            self.flush()

    def flush(self) -> None:
        if not self._blocks:
            return
        if self._manifest["complete"]:  # images were added to the source
            self._manifest["complete"] = False
            write_json(self._folder / MANIFEST_NAME, self._manifest)
        ids = [block.ids[place] for block in self._blocks for place in block.good]
        failures: list[Failure] = [failure for block in self._blocks for failure in block.failures]
        columns = {name: self._column(name, facts) for name, facts in self._columns.items()}
        write_shard(self._folder, self._number, self.first, self._covered, ids, columns, failures)
        self._number, self.first = self._number + 1, self.first + self._covered
        self._blocks, self._covered = [], 0

    def _column(self, name: str, facts: dict[str, Any]) -> torch.Tensor:
        dtype = getattr(torch, facts["dtype"])
        parts = [block.values[name if name in block.values else ""] for block in self._blocks if block.good]
        return torch.cat(parts).to(dtype) if parts else torch.zeros((0, *facts["shape"]), dtype=dtype)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    shards = read_shards(folder)
    failures = [failure for shard in shards for failure in shard.failures]
    lines = [
        json.dumps({"index": failure.index, "id": failure.id, "reason": failure.reason}) + "\n" for failure in failures
    ]
    texts = {}
    if lines or os.path.lexists(folder / FAILURES_NAME):  # those of an earlier run are mended
        texts[FAILURES_NAME] = "".join(lines)
    if not os.path.lexists(folder / "README.md"):  # what a person made of it stays
        texts["README.md"] = _CARD
    for name, text in texts.items():
        with replaced_file(folder / name) as file:
            file.write(text.encode())
    covered = sum(shard.covered for shard in shards)
    manifest |= {"complete": True, "images": covered, "failures": len(failures)}
    sync(folder)
    write_json(folder / MANIFEST_NAME, manifest)

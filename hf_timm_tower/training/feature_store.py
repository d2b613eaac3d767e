"""A folder of rows on disk: features and labels of one shape each, written once in order, mapped when read.

- `manifest.json`: what the rows are and what they were made of;
- `features.npy`, `labels.npy`: numpy's own format, in full size from the start;
- `progress.json`: how many rows are there. It is replaced only when the rows that it counts have reached the disk, so a
  process may be killed at any moment.

numpy has no bfloat16: such rows are stored as int16 of the same bits.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import Self

from ..files.disk import sync
from ..files.json import write_json
from ..files.open_folder import OpenFolder
from ..reader.errors import FolderError, FormatError, shown

STORE_VERSION = 2
MANIFEST, PROGRESS = "manifest.json", "progress.json"
COLUMNS = ("features", "labels")
# A killed run loses at most the rows of this many seconds.
SECONDS_BETWEEN_SYNCS = 1.0
MAX_MANIFEST_BYTES = 2**20  # it has a few KB
MAX_NUMBER = 2**48

DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One of the two tables.

    Attributes:
        shape: Of a row.
        dtype: That is stored.
        axes: The row's axes in the order in which they lie in memory, and on disk: kernels give other last bits for a
            map whose channels lie together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[int, ...]

    @classmethod
    def like(cls, rows: torch.Tensor, dtype: torch.dtype | None = None) -> Self:
        """For rows such as these, `[n, ...]`, with the first axis outermost."""
        axes = sorted(range(rows.ndim - 1), key=lambda axis: -rows.stride(axis + 1))
        return cls(tuple(rows.shape[1:]), dtype or rows.dtype, tuple(axes))

    @property
    def shape_on_disk(self) -> tuple[int, ...]:
        """Of a row in the file."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def dtype_on_disk(self) -> np.dtype[Any]:
        """numpy's dtype in the file."""
        return torch.empty(0, dtype=torch.int16 if self.dtype == torch.bfloat16 else self.dtype).numpy().dtype

    @property
    def nbytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_disk(self, rows: torch.Tensor) -> np.ndarray[Any, Any]:
        """Rows of `shape` on the CPU -> of `shape_on_disk`."""
        ordered = rows.permute(0, *(axis + 1 for axis in self.axes))
        return (ordered.view(torch.int16) if self.dtype == torch.bfloat16 else ordered).numpy()

    def from_disk(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse; a view."""
        if len(self.axes) < 2:  # a vector: each call counts beside a small head's step
            return rows
        return rows.permute(0, *(self.axes.index(axis) + 1 for axis in range(len(self.axes))))

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """From the manifest; KeyError, TypeError or ValueError where it is not one."""
        shape, axes = tuple(entry["shape"]), tuple(entry["axes"])
        if not all(_is_whole(size, 0) for size in shape) or sorted(axes) != list(range(len(shape))):
            raise ValueError("shape and axes")
        return cls(shape, DTYPES[entry["dtype"]], axes)


@dataclass(frozen=True)
class Plan:
    """What a folder holds when it is complete.

    Attributes:
        rows: Number of rows.
        features: Of a row.
        labels: Of a row.
        made_of: Names and values, JSON, of all that the rows depend on: where one differs, the rows are stale.
    """

    rows: int
    features: Column
    labels: Column
    made_of: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        columns = {
            name: {"shape": list(column.shape), "dtype": str(column.dtype), "axes": list(column.axes)}
            for name, column in (("features", self.features), ("labels", self.labels))
        }
        return {"rows": self.rows, **columns, "made_of": dict(self.made_of)}


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder, None where there is none yet.

    Raises:
        FormatError: the manifest is damaged or of another version.
    """
    place, found = folder / MANIFEST, _read_json(folder, MANIFEST)
    if found is None:
        return None
    try:
        if found["store_version"] != STORE_VERSION:
            raise FormatError(
                f"{place}: version {shown(found['store_version'])}, this package reads {STORE_VERSION}; "
                "delete the folder to cache anew"
            )
        features, labels = (Column.from_json(found[name]) for name in COLUMNS)
        rows, made_of = found["rows"], found["made_of"]
        repeats = made_of["repeats"]
        if not (_is_whole(rows, 1) and _is_whole(repeats, 1)) or rows % repeats:
            raise ValueError(f"{rows} rows, {repeats} versions of each image")
        if not features.dtype.is_floating_point or not DTYPES[made_of["features dtype"]].is_floating_point:
            raise ValueError("features that are not floating point")
        return Plan(rows, features, labels, made_of)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{place}: not the manifest of a feature cache ({shown(repr(error))})") from error


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_NUMBER


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    if not folder.is_dir():
        return None
    with OpenFolder(folder) as opened:
        return opened.read_json(name, MAX_MANIFEST_BYTES) if opened.has(name) else None


def prepare_folder(folder: Path, plan: Plan) -> None:
    """Make the folder what the plan says, or leave it as it is if it is that already.

    Raises:
        FolderError: it holds rows made of something else, or files that are not ours; the disk is too small.
        FormatError: its manifest or its tables are damaged.
    """
    then = read_plan(folder)
    if then is None:
        _refuse_other_files(folder)
        _check_space(folder, plan)
        write_json(folder / MANIFEST, {"store_version": STORE_VERSION, **plan.to_json()})
        sync(folder)
    else:
        _refuse_stale(folder, then.to_json(), plan.to_json())
    if rows_written(folder) is None:
        for name in COLUMNS:
            column: Column = getattr(plan, name)
            shape = (plan.rows, *column.shape_on_disk)
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=column.dtype_on_disk, shape=shape)
            sync(folder / f"{name}.npy")
        write_json(folder / PROGRESS, {"rows": 0})
        sync(folder)


def _refuse_stale(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = ({**plan, **plan.pop("made_of")} for plan in (then, now))
    changed = [
        f"  {key}: {shown(old.get(key), 120)} then, {shown(new.get(key), 120)} now"
        for key in {**new, **old}
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise FolderError(
            f"{folder}: this feature cache is stale, it was made of something else:\n" + "\n".join(changed) + "\n"
            "Give another folder, or delete this one to cache anew."
        )


def rows_written(folder: Path) -> int | None:
    """How many rows are there, from the first on; None where there are no tables yet.

    Raises:
        FormatError: the file of progress is damaged.
    """
    found = _read_json(folder, PROGRESS)
    if found is None:
        return None
    if not _is_whole(found.get("rows"), 0):
        raise FormatError(f"{folder / PROGRESS}: expected a number of rows, found {shown(found)}; delete the folder")
    return int(found["rows"])


def read_table(folder: Path, name: str, plan: Plan) -> torch.Tensor:
    """One table, mapped: `[rows, *shape_on_disk]` of the stored dtype. Writing into it does not reach the file.

    Raises:
        FormatError: the file is missing, too short, or not what the manifest says.
    """
    return torch.from_numpy(_mapped(folder, name, plan, "c")).view(getattr(plan, name).dtype)


def _mapped(folder: Path, name: str, plan: Plan, mode: Literal["c", "r+"]) -> np.memmap[Any, Any]:
    place, column = folder / f"{name}.npy", getattr(plan, name)
    try:
        if not place.is_file():
            raise FileNotFoundError("no regular file")
        array = np.lib.format.open_memmap(place, mode=mode)
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, OverflowError, TokenError) as error:
        reason = shown(str(error), 200)  # numpy parses the header as Python text and passes on what that raises
        raise FormatError(f"{place}: cannot be mapped ({reason}); delete the folder to cache anew") from error
    shape, dtype = (plan.rows, *column.shape_on_disk), column.dtype_on_disk
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise FormatError(
            f"{place}: {list(array.shape)} of {array.dtype}, but {MANIFEST} says {list(shape)} of {dtype}; delete the "
            "folder to cache anew"
        )
    return array


class RowWriter:
    """Appends rows behind those that are there, whose number the next `sync` notes.

    Args:
        folder: Made by `prepare_folder`.
        plan: The folder's.

    Attributes:
        rows: How many are there.

    Raises:
        FormatError: a table is damaged.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.rows = rows_written(folder) or 0
        self._folder, self._plan = folder, plan
        self._tables = {name: _mapped(folder, name, plan, "r+") for name in COLUMNS}
        self._synced = time.monotonic()

    def append(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Write rows: `[n, *shape]` on the CPU, of the plan's shapes and dtypes."""
        for name, values in (("features", features), ("labels", labels)):
            column: Column = getattr(self._plan, name)
            if values.shape[1:] != column.shape or values.dtype != column.dtype:
                raise FormatError(
                    f"{name} from row {self.rows} on: {list(values.shape[1:])} of {values.dtype}, but those of the "
                    f"first image are {list(column.shape)} of {column.dtype}; all must be alike"
                )
            self._tables[name][self.rows : self.rows + len(values)] = column.to_disk(values)
        self.rows += len(features)
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Make the rows so far reach the disk, and then their number."""
        for table in self._tables.values():
            table.flush()
        write_json(self._folder / PROGRESS, {"rows": self.rows})
        self._synced = time.monotonic()


def _refuse_other_files(folder: Path) -> None:
    # what a kill left of a manifest that was being written is ours
    others = sorted(name for name in os.listdir(folder) if not name.startswith(f".{MANIFEST}."))
    if others:
        raise FolderError(
            f"{folder}: no feature cache, but not empty either ({', '.join(others[:3])}, ...); give a folder of its own"
        )


def _check_space(folder: Path, plan: Plan) -> None:
    needed, free = plan.rows * (plan.features.nbytes + plan.labels.nbytes), shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"{folder}: the features need {needed / 2**30:.2f} GiB ({plan.rows} rows of {list(plan.features.shape)}, "
            f"{plan.features.dtype}), the disk has {free / 2**30:.2f} GiB. Another folder, dtype=torch.float16, fewer "
            "repeats, or a pool that leaves less need less."
        )

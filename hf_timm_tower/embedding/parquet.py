"""Shards of embeddings as Parquet files, and the only file here that imports pyarrow.

A shard has the column `id` and one fixed-size list for each tensor that the tower gives. Its metadata say which stretch
of the source it covers and which images of it have no embedding, so that one rename makes all of it true at once.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.disk import folder_error, sync
from ..reader.errors import FormatError, shown
from .embedder import Failure

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise ImportError('embeddings are stored as Parquet: pip install "hf_timm_tower[embed]"') from missing

_KEY = b"hf_timm_tower"
_NAME = "embeddings-{:05}.parquet"


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        path: Where it is.
        first: Position in the source of the first image that it covers.
        covered: How many it covers.
        failures: Those of them that have no row.
    """

    path: Path
    first: int
    covered: int
    failures: list[Failure]


def write_shard(
    folder: Path,
    number: int,
    first: int,
    covered: int,
    ids: Sequence[str],
    columns: dict[str, torch.Tensor],
    failures: Sequence[Failure],
) -> None:
    """Write a shard beside its place, make it reach the disk, and put it in place.

    Args:
        folder: Where.
        number: From 0.
        first: As in `Shard`.
        covered: As in `Shard`.
        ids: Of the rows.
        columns: Name -> `[rows, ...]`, on the CPU.
        failures: As in `Shard`.

    Raises:
        FolderError: the disk is full, or may not be written.
    """
    arrays = {"id": pa.array(ids, pa.string()), **{name: to_arrow(tensor) for name, tensor in columns.items()}}
    facts = {
        "first": first,
        "covered": covered,
        "failures": [[failure.index, failure.id, failure.reason] for failure in failures],
    }
    table = pa.table(arrays).replace_schema_metadata({_KEY: json.dumps(facts).encode()})
    place = folder / _NAME.format(number)
    partial = folder / f".{place.name}.partial"
    try:
        # random bits: neither smaller by compression nor of use as a dictionary
        with open(partial, "wb") as file:  # not by name: Arrow's are UTF-8
            pq.write_table(
                table,
                file,
                compression={"id": "zstd"} | dict.fromkeys(columns, "none"),
                use_dictionary=False,
                write_page_checksum=True,
            )
        sync(partial)
        os.replace(partial, place)
        sync(folder)
    except OSError as error:
        raise folder_error(f"{place} cannot be written", error) from error
    finally:
        partial.unlink(missing_ok=True)


def read_shards(folder: Path) -> list[Shard]:
    """The shards of a folder, in order; what a killed run left beside them is not looked at.

    Raises:
        FormatError: one is damaged or missing, or they do not follow each other.
    """
    shards: list[Shard] = []
    count = len(list(folder.glob(_NAME.replace("{:05}", "*"))))
    for number in range(count):
        path = folder / _NAME.format(number)
        try:
            with open(path, "rb") as file:
                facts = json.loads(pq.read_schema(file).metadata[_KEY])
            failures = [Failure(*failure) for failure in facts["failures"]]
            shard = Shard(path, facts["first"], facts["covered"], failures)
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        if shard.first != sum(each.covered for each in shards):
            raise FormatError(f"{path}: begins at image {shard.first}, but those before it end elsewhere")
        shards.append(shard)
    return shards


def _damaged(path: Path, error: object) -> FormatError:
    return FormatError(
        f"{path}: not a whole shard of embeddings: {shown(str(error))[1:-1]}. Delete it and those of higher numbers, "
        "and embed into the folder again, which makes them anew"
    )


def _read(shard: Shard, columns: Sequence[str]) -> pa.Table:
    try:
        with open(shard.path, "rb") as file:
            table = pq.read_table(file, columns=list(columns), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(shard.path, error) from error
    # checksums are of pages, not of the footer that says how many rows of what kind there are
    rows = shard.covered - len(shard.failures)
    if table.column_names != list(columns) or len(table) != rows:
        raise _damaged(shard.path, f"{len(table)} rows of {table.column_names}, expected {rows} of {list(columns)}")
    if odd := [name for name in columns if not _is_stored(name, table.schema.field(name).type)]:
        raise _damaged(shard.path, f"{odd[0]} holds {table.schema.field(odd[0]).type}")
    return table


def _is_stored(name: str, kind: pa.DataType) -> bool:
    while name != "id" and pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) if name == "id" else pa.types.is_primitive(kind))


def ids_of(shard: Shard) -> Iterator[str]:
    """The ids of all images that a shard covers, in the order of the source."""
    rows = iter(_read(shard, ["id"])["id"].to_pylist())
    failed = {failure.index: failure.id for failure in shard.failures}
    for index in range(shard.first, shard.first + shard.covered):
        yield failed[index] if index in failed else next(rows)


def read_rows(shard: Shard, names: Sequence[str]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The ids of a shard's rows, and columns of it: name -> `[rows, ...]`."""
    table = _read(shard, ["id", *names])
    return table["id"].to_pylist(), {name: _to_torch(table[name]) for name in names}


def to_arrow(tensor: torch.Tensor) -> pa.Array:
    """`[rows, a, b, ...]` -> lists of length a of lists of length b ..."""
    flat = tensor.contiguous().reshape(-1).numpy()
    array = pa.array(flat)
    for length in reversed(tensor.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def _to_torch(column: Any) -> torch.Tensor:
    array = column.combine_chunks()
    shape: list[int] = []
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.copy()).reshape(-1, *shape)

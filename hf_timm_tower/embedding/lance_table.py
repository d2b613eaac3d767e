"""Rows and their ids as a table of LanceDB."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..reader.errors import ArgumentError
from .parquet import to_arrow

try:
    import lancedb
    import pyarrow as pa
except ImportError as missing:
    raise ImportError(f'{missing}: pip install "hf_timm_tower[search]"') from missing

Batches = Iterator[tuple[list[str], torch.Tensor]]


def write_table(place: Path, column: str, batches: Callable[[], Batches], manifest: dict[str, Any]) -> None:
    """LanceDB's own writer over the shards of a folder; see `StoredEmbeddings.save_lance`."""
    if place.suffix != ".lance":
        raise ArgumentError(f"{place}: a table's name ends in .lance")
    name = column.replace(".", "_")  # Lance keeps the dot for itself, and fails at lists of lists

    def records() -> Iterator[pa.RecordBatch]:
        for ids, values in batches():
            rows = to_arrow(values if values.ndim == 1 else values.flatten(1))
            yield pa.record_batch({"id": pa.array(ids, pa.string()), name: rows})

    kind = next(records()).schema.field(name).type
    schema = pa.schema([("id", pa.string()), (name, kind)], metadata={b"hf_timm_tower": json.dumps(manifest).encode()})
    database, mode = lancedb.connect(place.parent), "overwrite" if place.exists() else "create"
    database.create_table(place.stem, records(), schema=schema, mode=mode)

"""Embeddings on a Ray cluster, and the only file here that imports ray.

Readers, actor pool, retries, checkpoints and writer are those of Ray Data; what is here is what one actor does with one
batch. `scripts/embed_ray.py` is the whole pipeline.
"""

import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import ray
import ray.data
import torch

from ..files.json import parse_object
from ..reader.errors import ArgumentError, shown
from .embed import check_errors, failed
from .embedder import Block, Embedder, Outputs
from .engine import BATCH_ON_ACCELERATOR, BATCH_ON_CPU
from .manifest import check_same, columns_of, describe, probe_values, stored_dtype
from .parquet import to_arrow
from .replicas import keep_freed_memory

_CLAIM_NAME = "_tower.json"  # readers of Parquet folders pass over names that begin so
_BATCHES_OF_A_CALL = 8
"""Ray hands over this many batches of the tower at once, so that its own work for a call is small beside ours."""


def embed_dataset(
    dataset: "ray.data.Dataset",
    tower: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    column: str = "path",
    id_column: str = "id",
    batch_size: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    return_tokens: bool = False,
    layers: Any = (),
    errors: Literal["raise", "collect"] = "raise",
    actors: int | tuple[int, int] = 1,
    num_cpus: int = 1,
    num_gpus: float = 0,
    **ray_remote_args: Any,
) -> "ray.data.Dataset":
    """The same dataset with embeddings: one `map_batches` on a pool of actors, each with a tower of its own.

    An embedding has the bits that `tower.embed` gives with the same `batch_size` on the same device, however Ray cuts
    the dataset into blocks. An actor that dies is started again by Ray, and its batches are run again.

    Args:
        dataset: Its images are paths of files that every node can open (they are decoded in the actor), the bytes of
            image files (`ray.data.read_binary_files`, or Ray's `download` for addresses of an object store), or
            arrays (`ray.data.read_images`).
        tower: Repository id, or a folder that every node can read.
        revision: Branch, tag or commit; a commit makes sure that all actors load the same tower.
        trust_remote_code: Run a head that is stored as code.
        column: Of the images; it stays in the result where it holds paths.
        id_column: Names an image in errors.
        batch_size: Images that run at once; None: 8 on a CPU, 32 on a GPU.
        normalize: Scale every embedding to length 1.
        dtype: Of the result; bfloat16 is given as float32, which Arrow has.
        return_tokens: Also a column `tokens`.
        layers: Also columns `layers.0`, ...: maps of these layers.
        errors: `"raise"` ends the job at an image that cannot be used; with `"collect"` it has null as embedding, and
            the reason in a further column, `error`.
        actors: How many, or the least and the most.
        num_cpus: Cores of an actor; each decodes images, one of them runs the tower where there is no GPU.
        num_gpus: GPUs of an actor.
        ray_remote_args: Further arguments of `map_batches`: `memory`, `accelerator_type`, ...

    Returns:
        Columns of the dataset but for images that are no paths, and `embedding` as a fixed-size list (or one column for
        each tensor of the head's output).

    Raises:
        ArgumentError: an argument cannot be used. What is wrong with tower or images is raised when the dataset runs.
    """
    check_errors(errors)
    if num_cpus < 1 or num_cpus != int(num_cpus):
        raise ArgumentError(f"num_cpus={num_cpus!r}: expected a whole number from 1 on")
    least, most = actors if isinstance(actors, tuple) else (actors, actors)
    outputs = Outputs(_batch(batch_size, num_gpus), normalize, dtype, return_tokens, tuple(layers))
    return dataset.map_batches(
        EmbeddingActor,
        fn_constructor_kwargs={
            "tower": tower,
            "load": {"revision": revision, "trust_remote_code": trust_remote_code},
            "outputs": outputs,
            "columns": (column, id_column),
            "errors": errors,
            "device": "cuda" if num_gpus else "cpu",
            "threads": int(num_cpus),
        },
        batch_size=outputs.batch_size * _BATCHES_OF_A_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        udf_modifying_row_count=False,
        **ray_remote_args,
    )


def claim_output(
    out: str,
    tower: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    num_gpus: float = 0,
) -> None:
    """Write beside embeddings what makes them, `_tower.json`; refuse where something else has made some there.

    Args:
        out: Folder, or address of an object store as pyarrow takes it.
        tower: As in `embed_dataset`, and so are the others.

    Raises:
        FolderError: the embeddings there are of another tower, preprocessing or options.
    """
    from ..timm_model import TimmModel

    loaded = TimmModel.from_pretrained(tower, revision=revision, trust_remote_code=trust_remote_code)
    outputs = Outputs(_batch(batch_size, num_gpus), normalize, dtype)
    now = describe(loaded, outputs, 0, {"kind": "ray", "place": None, "images": None})
    files, folder = pa.fs.FileSystem.from_uri(out if "://" in out else os.path.abspath(out))
    place = f"{folder}/{_CLAIM_NAME}"
    if files.get_file_info(place).type == pa.fs.FileType.NotFound:
        files.create_dir(folder)
        with files.open_output_stream(place) as stream:
            stream.write(json.dumps(now, indent=2, sort_keys=True).encode())
        return
    with files.open_input_stream(place) as stream:
        check_same(Path(out), parse_object(stream.read(), place), now)


def _batch(batch_size: int | None, num_gpus: float) -> int:
    return (BATCH_ON_ACCELERATOR if num_gpus else BATCH_ON_CPU) if batch_size is None else batch_size


class EmbeddingActor:
    """One actor of the pool: a tower, and table -> table.

    Args:
        tower: Repository id or folder.
        load: Arguments of `from_pretrained`.
        outputs: What is computed.
        columns: Of images and ids.
        errors: As in `embed_dataset`.
        device: Where to run.
        threads: That decode.
    """

    def __init__(
        self,
        tower: str,
        load: dict[str, Any],
        outputs: Outputs,
        columns: tuple[str, str],
        errors: Literal["raise", "collect"],
        device: str,
        threads: int,
    ) -> None:
        from ..timm_model import TimmModel

        loaded = TimmModel.from_pretrained(tower, **load).to(device)
        self._embedder = Embedder(loaded, outputs)
        self._image, self._id = columns
        self._errors = errors
        probed = probe_values(loaded, outputs)
        self._columns = {
            path: (tensor.shape[1:], getattr(torch, stored_dtype(tensor.dtype))) for path, tensor in probed.items()
        }
        self._names = [*columns_of(probed), *(["error"] if errors == "collect" else [])]
        self._decoders = ThreadPoolExecutor(threads) if threads > 1 else None
        keep_freed_memory()

    def __call__(self, table: pa.Table) -> pa.Table:
        """A few batches -> the same rows with embeddings."""
        for name in (self._image, self._id):
            if name not in table.column_names:
                raise ArgumentError(f"the dataset has no column {name!r}, it has {shown(table.column_names)}")
        ids = [str(each) for each in table[self._id].to_pylist()]
        images = [_no_image() if image is None else image for image in table[self._image].to_pylist()]
        size = self._embedder.outputs.batch_size
        items = list(zip(ids, images, strict=True))
        blocks = list(self._run((first, items[first : first + size]) for first in range(0, len(items), size)))
        failures = [failure for block in blocks for failure in block.failures]
        if failures and self._errors == "raise":
            raise failed(failures[0])
        kind = table.schema.field(self._image).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            table = table.drop_columns([self._image])
        if len({*self._names, *table.column_names}) < len(self._names) + table.num_columns:
            raise ArgumentError(
                f"the dataset has the columns {shown(table.column_names)}, the tower adds {shown(self._names)}: each "
                "may stand once; rename or drop those of the dataset"
            )
        good = [block.first + place for block in blocks for place in block.good]
        place_of = {row: place for place, row in enumerate(good)}
        places = pa.array([place_of.get(row) for row in range(len(ids))], pa.int64())
        for path, (shape, dtype) in self._columns.items():
            parts = [block.values[path].to(dtype) for block in blocks if block.good]
            values = to_arrow(torch.cat(parts) if parts else torch.zeros((0, *shape), dtype=dtype))
            table = table.append_column(path or "embedding", values.take(places))
        if self._errors == "collect":
            reasons = {failure.index: failure.reason for failure in failures}
            table = table.append_column("error", pa.array([reasons.get(row) for row in range(len(ids))], pa.string()))
        return table

    def _run(self, tasks: Iterator[tuple[int, list[tuple[str, Any]]]]) -> Iterator[Block]:
        prepare, run = self._embedder.prepare, self._embedder.run
        if self._decoders is None:
            return map(self._embedder, tasks)
        first = list(itertools.islice(tasks, 1))
        for _, batch in first:
            self._embedder.preparer.import_for(batch[0][1])  # once, before the threads do
        return map(run, self._decoders.map(prepare, itertools.chain(first, tasks)))


def _no_image() -> ArgumentError:
    return ArgumentError("the dataset has no image in this row; it could not be read or fetched")

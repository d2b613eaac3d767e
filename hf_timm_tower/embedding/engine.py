"""A source of images -> a stream of blocks, by the processes that suit this machine.

On CPUs replicas: processes of one thread each that decode, transform and run; a loader with workers in front of a model
with many threads is slower, they fight for the cores. On an accelerator, processes that decode and transform, in front
of the one model.
"""

import copy
import itertools
import multiprocessing
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..load import check_device
from ..reader.errors import ArgumentError, shown
from .embedder import Block, Embedder, Outputs
from .open_image import portable, reason_of
from .replicas import in_order, usable_cores
from .sources import Source, in_batches

BATCH_ON_CPU, BATCH_ON_ACCELERATOR = 8, 32
"""A single thread is no faster with larger batches, and one image alone costs a whole batch."""

Workers = int | Literal["auto"]


@dataclass(frozen=True)
class Plan:
    """Where and how a tower runs over images.

    Attributes:
        tower: A TimmModel, on its device.
        outputs: What is computed.
        workers: Processes beside this one; 0: none.
    """

    tower: Any
    outputs: Outputs
    workers: Workers

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        device: torch.device = next(self.tower.parameters()).device
        return device


def make_plan(
    tower: Any,
    *,
    batch_size: int | None = None,
    num_workers: Workers = "auto",
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    return_tokens: bool = False,
    layers: Any = (),
) -> Plan:
    """Check the arguments of `embed`; for another device than the tower's, a copy of the tower is taken there.

    Raises:
        ArgumentError: one cannot be used.
    """
    check_device(device)
    if num_workers != "auto" and (not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0):
        raise ArgumentError(f"num_workers={num_workers!r}: expected a whole number from 0 on, or 'auto'")
    here = next(tower.parameters()).device
    there = here if device is None else torch.empty(0, device=device).device
    if "meta" in (here.type, there.type):
        raise ArgumentError(
            "the meta device has no weights: embed with the tower that from_pretrained gives, elsewhere"
        )
    if there != here:
        tower = copy.deepcopy(tower).to(there)
    if batch_size is None:
        batch_size = BATCH_ON_CPU if there.type == "cpu" else BATCH_ON_ACCELERATOR
    try:
        numbers = tuple(map(operator.index, layers))
    except TypeError as error:
        raise ArgumentError(f"layers={shown(layers)}: expected a list of whole numbers") from error
    return Plan(tower, Outputs(batch_size, normalize, dtype, return_tokens, numbers), num_workers)


def stream(
    plan: Plan, source: Source, items: Iterator[tuple[str, Any]] | None = None, first: int = 0
) -> Iterator[Block]:
    """The blocks of a source in its order.

    Memory does not grow with the number of images: a few batches are on their way at a time.

    Args:
        plan: How to run.
        source: The source.
        items: Its iterator where some items were taken already; None: from the start.
        first: How many were taken.
    """
    embedder = Embedder(plan.tower, plan.outputs)
    batches = in_batches(source.items() if items is None else items, plan.outputs.batch_size, first)
    ahead = list(itertools.islice(batches, 2))
    for _, batch in ahead[:1]:
        embedder.preparer.import_for(batch[0][1])
    workers = _count(plan, several=len(ahead) > 1)
    tasks = itertools.chain(ahead, batches)
    if workers == 0:
        yield from map(embedder, tasks)
        return
    ready = map(_loaded, tasks)
    if plan.device.type == "cpu":
        yield from in_order(embedder, ready, workers, _ids)
    else:
        yield from map(embedder.run, in_order(embedder.prepare, ready, workers, _ids))


def _ids(task: tuple[int, list[tuple[str, Any]]]) -> str:
    return ", ".join(name for name, _ in task[1])


def _loaded(task: tuple[int, list[tuple[str, Any]]]) -> tuple[int, list[tuple[str, Any]]]:
    """The same batch, ready to be sent: a PIL image would read its file only then, and a broken one end the run."""
    first, items = task
    ready: list[tuple[str, Any]] = []
    for name, image in items:
        try:
            ready.append((name, portable(image)))
        except Exception as error:  # as in Embedder
            ready.append((name, ArgumentError(reason_of(error))))
    return first, ready


def _count(plan: Plan, *, several: bool) -> int:
    """Processes to start at most: none for a single batch, or where none may be started."""
    if multiprocessing.current_process().daemon:
        return 0  # a worker of somebody's pool may have no children
    if plan.workers != "auto":
        return plan.workers
    cores = usable_cores()
    return cores if several and cores > 1 else 0

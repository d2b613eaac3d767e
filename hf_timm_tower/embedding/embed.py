"""`tower.embed(images)`: everything in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from ..reader.errors import ArgumentError
from .embedder import Block, Failure, rebuilt
from .engine import Plan, stream
from .sources import Source


@dataclass(frozen=True)
class Embedded:
    """What `embed(..., errors="collect")` gives.

    Attributes:
        embeddings: `[M, embed_dim]`, or the head's tuple or dict of such tensors; None where no image could be used.
        ids: Paths, keys or numbers of the M images.
        rows: Their positions in what was given, ascending.
        failures: The images that could not be used, with position, id and reason.
    """

    embeddings: Any
    ids: list[str]
    rows: list[int]
    failures: list[Failure]


def embed(plan: Plan, source: Source, *, errors: Literal["raise", "collect"], progress: bool) -> Any:
    """Run over all images and keep the results in memory.

    Returns:
        The embeddings in the order of the images, or an `Embedded`.

    Raises:
        ArgumentError: there is no image, or one cannot be used and `errors="raise"`.
    """
    check_errors(errors)
    pieces: dict[str, list[torch.Tensor]] = {}
    ids: list[str] = []
    rows: list[int] = []
    failures: list[Failure] = []
    form: Any = None
    for block in with_progress(stream(plan, source), source.length, progress):
        if errors == "raise" and block.failures:
            raise failed(block.failures[0])
        failures += block.failures
        ids += [block.ids[place] for place in block.good]
        rows += [block.first + place for place in block.good]
        form = block.form if form is None else form
        for path, values in block.values.items():
            pieces.setdefault(path, []).append(values)
    if form is None and not failures:
        raise ArgumentError("images: there are none")
    whole = None if form is None else rebuilt(form, {path: torch.cat(parts) for path, parts in pieces.items()})
    return whole if errors == "raise" else Embedded(whole, ids, rows, failures)


def check_errors(errors: object) -> None:
    """Refuse another value than the two that there are."""
    if errors not in ("raise", "collect"):
        raise ArgumentError(f"errors={errors!r}: expected 'raise' or 'collect'")


def failed(failure: Failure) -> ArgumentError:
    """The error for an image that cannot be used."""
    name = "" if failure.id == str(failure.index) else f" ({failure.id})"
    return ArgumentError(
        f"images[{failure.index}]{name}: {failure.reason}; errors='collect' lists such images and goes on"
    )


def with_progress(blocks: Iterable[Block], total: int | None, progress: bool, done: int = 0) -> Iterator[Block]:
    """The same blocks, with a bar."""
    with tqdm(total=total, initial=done, desc="embed", unit="img", disable=not progress) as bar:  # type: ignore[no-untyped-call]
        for block in blocks:
            yield block
            bar.update(len(block.ids))

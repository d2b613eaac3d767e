"""The rows that are nearest to a vector by cosine, exactly: by torch, or by faiss."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..reader.errors import ArgumentError
from .stored import StoredEmbeddings

BLOCK = 2**25
"""Similarities that are in memory at once: 128 MiB of float32."""


def unit_rows(name: str, vectors: Any) -> torch.Tensor:
    """Vectors `[N, D]`, an array or tensor -> float32, each of length 1; a vector of zeros stays one.

    Raises:
        ArgumentError: they have another form, or a number in them is not finite.
    """
    try:
        rows = torch.as_tensor(vectors).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}: expected one vector of floats for each image: {error}") from error
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.shape[1]:
        raise ArgumentError(f"{name}: {list(rows.shape)} of {rows.dtype}, expected one vector of floats for each image")
    rows = rows.float()
    if not rows.isfinite().all():
        worst = int((~rows.isfinite()).any(dim=1).nonzero()[0])
        raise ArgumentError(f"{name}[{worst}] holds a number that is not finite")
    return F.normalize(rows, dim=1)


def nearest_rows(
    queries: torch.Tensor, rows: torch.Tensor, k: int, *, leave_out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query the k nearest rows, nearest first, equal ones in the order of the rows.

    Args:
        queries: `[Q, D]`, from `unit_rows`.
        rows: `[N, D]`, from `unit_rows`.
        k: How many; at most N, or N - 1 where one is left out.
        leave_out: `[Q]`, for each query a row that does not count: itself, where it is one of them.

    Returns:
        Cosines `[Q, k]` and row numbers `[Q, k]`.
    """
    check_k(k, len(rows) - (leave_out is not None))
    step = max(1, BLOCK // len(rows))
    found = []
    for first in range(0, len(queries), step):
        cosines = queries[first : first + step] @ rows.T
        if leave_out is not None:
            cosines.scatter_(1, leave_out[first : first + step, None], -torch.inf)
        found.append(_in_order(*cosines.topk(k)))
    if not found:
        return torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    return torch.cat([cosines for cosines, _ in found]), torch.cat([places for _, places in found])


def check_k(k: object, most: int) -> None:
    """Refuse a number of neighbours that there is not.

    Raises:
        ArgumentError: names it.
    """
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
        raise ArgumentError(f"k={k!r}: expected a whole number from 1 to {most}, the number of rows to choose from")


class ExactIndex:
    """Embeddings in memory, to be searched exactly.

    Args:
        ids: Of the rows.
        embeddings: `[N, D]`.
        engine: `"torch"`, or `"faiss"`: its `IndexFlatIP`, which has less overhead where there are many queries.

    Attributes:
        ids: As given.
        rows: `[N, D]`, float32, each of length 1.

    Raises:
        ArgumentError: the embeddings are none, or not as many as the ids.
        ImportError: faiss is not installed.
    """

    def __init__(self, ids: Sequence[str], embeddings: Any, engine: Literal["torch", "faiss"] = "torch") -> None:
        self.ids, self.rows = list(ids), unit_rows("embeddings", embeddings)
        if not self.ids or len(self.ids) != len(self.rows):
            raise ArgumentError(
                f"{len(self.ids)} ids for {len(self.rows)} embeddings: expected as many, and at least one"
            )
        if engine not in ("torch", "faiss"):
            raise ArgumentError(f"engine={engine!r}: expected 'torch' or 'faiss'")
        self._faiss: Any = None
        if engine == "faiss":
            from .faiss import flat_index

            self._faiss = flat_index(self.rows)

    @classmethod
    def of_folder(
        cls, stored: StoredEmbeddings, column: str | None = None, engine: Literal["torch", "faiss"] = "torch"
    ) -> "ExactIndex":
        """An index of what `embed_to` has stored; None is the folder's first column."""
        return cls(*stored.load(column), engine=engine)

    def search(self, queries: Any, k: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of each query, nearest first.

        Args:
            queries: `[Q, D]`, of any length.
            k: How many.

        Returns:
            Cosines `[Q, k]` and row numbers `[Q, k]`, with which `ids` and `rows` are indexed.

        Raises:
            ArgumentError: queries of another width, or more neighbours than rows.
        """
        vectors = unit_rows("queries", queries)
        if vectors.shape[1] != self.rows.shape[1]:
            raise ArgumentError(f"queries of width {vectors.shape[1]}, the rows have {self.rows.shape[1]}")
        if self._faiss is None:
            return nearest_rows(vectors, self.rows, k)
        check_k(k, len(self.rows))
        cosines, places = self._faiss.search(vectors.numpy(), k)
        return _in_order(torch.from_numpy(cosines), torch.from_numpy(places))


def _in_order(cosines: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    by_place = places.argsort(dim=1)
    cosines, places = cosines.gather(1, by_place), places.gather(1, by_place)
    by_cosine = cosines.argsort(dim=1, descending=True, stable=True)
    return cosines.gather(1, by_cosine), places.gather(1, by_cosine)

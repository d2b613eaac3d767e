"""Exact search: by torch and by faiss the same rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from hf_timm_tower import ArgumentError, TimmModel
from hf_timm_tower.embedding.neighbours import ExactIndex, nearest_rows, unit_rows

ENGINES = ("torch", "faiss")


def index_of(rows: torch.Tensor, engine: str) -> ExactIndex:
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra search)")
    return ExactIndex([f"{row}.png" for row in range(len(rows))], rows, engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_nearest_are_those_of_sklearn(engine: str) -> None:
    rows, queries = torch.randn(500, 24), torch.randn(40, 24)
    cosines, places = index_of(rows, engine).search(queries, 7)
    peer = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(rows.double().numpy())
    distances, expected = peer.kneighbors(queries.double().numpy())
    assert np.array_equal(places.numpy(), expected)
    assert np.allclose(1 - cosines.numpy(), distances, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_rows_come_in_their_order(engine: str) -> None:
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    cosines, places = index_of(rows, engine).search(torch.tensor([[3.0, 0.0]]), 4)
    assert places.tolist() == [[1, 2, 3, 4]]
    assert cosines[0, :3].tolist() == [1, 1, 1]


def test_a_row_can_be_left_out_of_its_own_search() -> None:
    rows = unit_rows("rows", torch.randn(30, 8))
    _, places = nearest_rows(rows, rows, 29, leave_out=torch.arange(30))
    assert all(sorted([*found, row]) == list(range(30)) for row, found in enumerate(places.tolist()))
    with pytest.raises(ArgumentError, match="from 1 to 29"):
        nearest_rows(rows, rows, 30, leave_out=torch.arange(30))


def test_a_stored_folder_is_searched_as_it_is(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=8, image_size=32)
    pictures = torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8)
    index = ExactIndex.of_folder(tower.embed_to(pictures, tmp_path / "e", num_workers=0, progress=False))
    assert index.ids == [str(row) for row in range(9)]
    queries = tower.embed(pictures[[4, 7]], num_workers=0, progress=False)
    cosines, places = index.search(queries, 2)
    assert places[:, 0].tolist() == [4, 7]
    assert torch.allclose(cosines[:, 0], torch.ones(2))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_searched_is_refused(engine: str) -> None:
    index = index_of(torch.randn(3, 4), engine)
    with pytest.raises(ArgumentError, match="width 5, the rows have 4"):
        index.search(torch.randn(1, 5), 1)
    with pytest.raises(ArgumentError, match="k=4: expected a whole number from 1 to 3"):
        index.search(torch.randn(1, 4), 4)
    with pytest.raises(ArgumentError, match="2 ids for 3 embeddings"):
        ExactIndex(["a", "b"], torch.randn(3, 4), engine=engine)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="engine='annoy'"):
        ExactIndex(["a"], torch.randn(1, 4), engine="annoy")  # type: ignore[arg-type]

"""Towers come back from where people train them: two steps in each way, saved, loaded anew, equal bits."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ..anger_calls import KINDS, WAYS, load_all, train_and_save
from ..hub_worker import HubWorker

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("used in anger")]

CELLS = list(product(WAYS, KINDS))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Cell -> (what the saved tower gave, what came back), or the errors; each cell trains in a process of its own."""
    root = tmp_path_factory.mktemp("anger")
    worker = HubWorker({"HF_HUB_OFFLINE": "1"})
    expected: dict[tuple[str, str], Any] = {}
    for number, (way, kind) in enumerate(CELLS):
        try:
            expected[way, kind] = worker.call(train_and_save, way, kind, str(root / str(number)))
        except Exception as error:
            expected[way, kind] = error
    saved = [cell for cell, given in expected.items() if isinstance(given, torch.Tensor)]
    found = worker.call(load_all, {cell: str(Path(root, str(CELLS.index(cell)))) for cell in saved})
    worker.close()
    return {cell: (given, found.get(cell)) for cell, given in expected.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_trained_tower_comes_back(way: str, kind: str, cells: dict[tuple[str, str], tuple[Any, Any]]) -> None:
    expected, found = cells[way, kind]
    if isinstance(expected, Exception):
        raise expected
    assert not isinstance(found, str), found
    output, verified = found
    assert torch.isfinite(expected).all()
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    assert verified in (("equal",) if kind != "classifier" else (None,)), "a classifier has no verify()"

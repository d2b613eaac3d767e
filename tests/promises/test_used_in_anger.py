"""Towers come back from where people train them: two steps in each way, saved, loaded anew, equal bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..anger_calls import KINDS, WAYS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Cell -> what the saved tower gave, and what came back in another process; or the errors, as text."""
    root = tmp_path_factory.mktemp("anger")
    found = []
    for act in ("train", "load"):
        subprocess.run(
            [sys.executable, "-m", "tests.anger_calls", act, str(root)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=900,
        )
        found.append(torch.load(root / f"{act}.pt", weights_only=True))
    return {cell: (given, found[1][cell]) for cell, given in found[0].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_trained_tower_comes_back(way: str, kind: str, cells: dict[str, tuple[Any, Any]]) -> None:
    expected, found = cells[f"{way}, {kind}"]
    assert isinstance(expected, torch.Tensor), expected
    assert not isinstance(found, str), found
    output, verified = found
    assert torch.isfinite(expected).all()
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    assert verified == (None if kind == "classifier" else "equal"), "a classifier has no verify()"

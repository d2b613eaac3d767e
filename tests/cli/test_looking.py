"""`hf-timm-tower eval` and `serve`."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_timm_tower import TimmModel
from hf_timm_tower.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images that are easy to tell apart, embedded by a tower that was loaded from a folder."""
    folder = tmp_path_factory.mktemp("looking")
    torch.manual_seed(0)
    TimmModel("test_resnet", embed_dim=8, image_size=32).save_pretrained(folder / "tower")
    random = np.random.default_rng(0)
    for number in range(16):
        colour = np.array([200, 60, 60] if number % 2 else [40, 90, 220])
        pixels = (colour + random.integers(-20, 20, (40, 50, 3))).astype(np.uint8)
        path = folder / "photos" / ("red" if number % 2 else "blue") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    tower = TimmModel.from_pretrained(folder / "tower")
    tower.embed_to(folder / "photos", folder / "photos.emb", num_workers=0, progress=False)
    return folder


def test_eval_takes_the_classes_from_the_folders(embedded: Path) -> None:
    folder = str(embedded / "photos.emb")
    done = CliRunner().invoke(app, ["eval", folder, "--train", folder, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["retrieval"]["metrics"]["retrieval_recall_at_1"] == 1
    assert found["knn"]["protocol"]["k"] == [10]
    assert found["linear_probe"]["metrics"] == {"linear_probe_accuracy": 1}
    done = CliRunner().invoke(app, ["eval", folder], catch_exceptions=False)
    assert re.search(r"retrieval_map\W+[01]\.\d{4}", done.stdout)
    assert "knn" not in done.stdout


@pytest.mark.slow
def test_serve_says_where_it_listens_and_ends_with_control_c(embedded: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (extra app)")
    command = [
        sys.executable,
        "-c",
        "from hf_timm_tower.cli import main; main()",
        "serve",
        str(embedded / "photos.emb"),
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        assert server.stdout is not None
        line = next(each for each in server.stdout if each.startswith("http"))
        address = line.split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"hf-timm-tower" in page.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)
    finally:
        server.kill()
        server.wait()

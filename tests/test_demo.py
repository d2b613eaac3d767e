"""The demo keeps its promises: it ends with 0 only if everything that the fresh process gives is equal to the bit."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from hf_timm_tower import TimmModel

from .timm_classes import chosen_turn

MAIN = Path(__file__).resolve().parents[1] / "scripts" / "_demo" / "main.py"


def run_demo(out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The demo's Python part, as `scripts/demo --quick --epochs 1 --out OUT` starts it; `before` is run first."""
    program = f"""
import runpy, sys
{before}
sys.path.insert(0, {str(MAIN.parent)!r})
sys.argv = ["demo", "--quick", "--epochs", "1", "--out", {str(out)!r}]
runpy.run_path({str(MAIN)!r}, run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(MAIN.parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def after_save(tamper: str) -> str:
    """Code that lets `save_pretrained` save as ever, and then does something to the folder, `folder`, it has saved."""
    return f"""
from pathlib import Path
from safetensors.torch import load_file, save_file
from hf_timm_tower import TimmModel

save = TimmModel.save_pretrained

def save_and_tamper(self, folder, **kwargs):
    save(self, folder, **kwargs)
{textwrap.indent(textwrap.dedent(tamper), "    ")}
TimmModel.save_pretrained = save_and_tamper
"""


# What is done to the saved folder, what the demo then says on stderr, and what on stdout.
TAMPERED = {
    "another tower": (
        """
    import torch
    other = TimmModel("test_resnet", embed_dim=64, image_size=64, custom_head=type(self.head))
    other.load_state_dict({**self.state_dict(), "head.out.bias": torch.zeros(64)})
    save(other, folder)
    """,
        "The demo FAILED: the fresh process gives other bits for digits.train",
        "tower.verify(): equal",
    ),
    "a changed weight": (
        """
    file = Path(folder) / "head.safetensors"
    weights = load_file(file)
    weights["head.out.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    """,
        "The demo FAILED: the fresh process could not use",
        "tower.verify(): different",
    ),
}


@pytest.mark.parametrize("saved", chosen_turn(TAMPERED, 2))
def test_demo_fails_if_what_it_saved_is_changed_and_ends_well_on_the_next_run(saved: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    tamper, stderr, stdout = TAMPERED[saved]
    failed = run_demo(out, after_save(tamper))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert stderr in failed.stderr
    assert stdout in failed.stdout
    assert "Every bit is equal" not in failed.stdout

    done = run_demo(out)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^  (\S+) +\d+ embeddings of 64 +(\S+)$", done.stdout, re.MULTILINE)
    assert dict(lines) == dict.fromkeys(("digits.train", "digits.test", "photos", "crops"), "equal")
    assert "tower.verify(): equal" in done.stdout
    assert TimmModel.from_pretrained(out / "tower").verify().status == "equal"
    with Image.open(out / "nearest.png") as sheet:
        assert min(sheet.size) > 500
        assert len(sheet.convert("RGB").getcolors(sheet.width * sheet.height) or ()) > 100, "the sheet is blank"

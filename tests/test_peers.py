"""The table of today's calls beside those of the peers: whole, and made by what is in scripts/."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rows() -> list[list[str]]:
    """The cells of docs/peers.md."""
    lines = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| |")]


def test_no_call_on_a_tower_is_a_raw_error_or_silently_different() -> None:
    found = rows()
    assert len(found) > 40
    assert [row[1] for row in found if row[2].startswith(("raw error", "silently different"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("topic", ["heads"])
def test_the_script_gives_what_the_table_says(topic: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "peers.py"), "--only", topic]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = {line.split(" | ")[1]: line.split(" | ")[2] for line in done.stdout.splitlines() if line.startswith("| ")}
    assert printed
    told = {row[1]: row[2] for row in rows()}
    assert {call: cell.partition(":")[0] for call, cell in printed.items()} == {
        call: told[call].partition(":")[0] for call in printed
    }

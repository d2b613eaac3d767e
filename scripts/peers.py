"""What today's calls come to on a tower and on its best peer, one row for each: writes docs/peers.md.

    python scripts/peers.py                  # all calls, into docs/peers.md
    python scripts/peers.py --only size      # the rows whose topic or call has this in it, on the terminal

Every call runs in a process of its own, on tiny random models, without a network. "Refused" is an error that its
library raises on purpose; "raw error" is any other; "silently different" is a result that is not what was asked for.
"""

import argparse
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

torch.set_num_threads(1)

from scripts._peers import encoders, files, models, run, sizes, training  # noqa: E402
from scripts._peers.run import DIFFERS, RAW  # noqa: E402

ROWS = [*sizes.ROWS, *encoders.ROWS, *training.ROWS, *files.ROWS]
# Calls that are refused on purpose where the peer goes on.
WHY = {
    encoders.AUTO_BACKBONE: "transformers takes every path for a repository's id, of any model: "
    "`TimmTowerBackbone.from_pretrained(a folder)`",
    "TimmTowerModel.from_pretrained(a timm repository)": "it says nothing of pool and head: `from_timm` asks",
    "torch.jit.script(model)": "torch deprecates it",
    "save_pretrained of an 8-bit model": "what is saved is proven, and packed weights of another library cannot be",
}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "peers.md"
_SHOWN = ("timm", "transformers", "open_clip_torch", "sentence-transformers", "peft", "bitsandbytes", "torch")
_HEAD = """# Beside its peers, call by call

Written by `python scripts/peers.py` ({versions}; Python {python}): every call in a process of its own, on tiny random
models, without a network. *Refused* is an error that a library raises on purpose, with its first words; *raw error* any
other one; *silently different* a result that is not what was asked for. The peer is the one that does the call best.

| | call | a tower | peer | | why it stays behind |
|---|---|---|---|---|---|
"""


def main() -> int:
    """Run, and write or print the table.

    Returns:
        1 where a row of ours is a raw error or silently different.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose topic or call has this in it; they are printed")
    arguments = parser.parse_args()
    wanted = [row for row in ROWS if not arguments.only or arguments.only.lower() in f"{row[0]} {row[1]}".lower()]
    lines, bad = [], []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        made = run.outcome_of(models.make_all, root)
        if made.status != run.WORKS:
            raise SystemExit(f"the models cannot be made: {made.text}")
        for topic, call, ours, peer, theirs in wanted:
            own, other = run.outcome_of(ours, root), run.outcome_of(theirs, root)
            if own.status in (RAW, DIFFERS):
                bad.append(call)
            why = WHY.get(call, "") if own.status != run.WORKS else ""
            lines.append(f"| {topic} | `{call}` | {own.cell()} | {other.cell()} | {peer} | {why} |")
            print(lines[-1], flush=True)
    if not arguments.only:
        found = [f"{name} {version(name)}" for name in _SHOWN if _is_installed(name)]
        TARGET.write_text(_HEAD.format(versions=", ".join(found), python=platform.python_version())
                          + "\n".join(lines) + "\n")  # fmt: skip
    print(f"{len(bad)} of {len(wanted)} rows of ours are raw errors or silently different: {bad}")
    return 1 if bad else 0


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

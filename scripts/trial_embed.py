"""Many small images through `hf-timm-tower embed`, killed again and again: is all there, in order, the same bits?

    python scripts/trial_embed.py [--images 100000] [--kills 5] [--folder /tmp/trial]

Makes small JPEG files and a tower, embeds them once without a disturbance, and once with `kill -9` of the whole process
group at random moments, by turns after `kill -9` of one replica, which the command has to survive; in the last run a
replica is killed, and the command comes to its end. Then both folders are compared. Twice a second the memory of all
processes of the command is added up (PSS: a page that several share counts once); a peak in between is not seen.
Linux only.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from hf_timm_tower import TimmModel
from hf_timm_tower.embedding.stored import StoredEmbeddings

PER_FOLDER = 5000
MEMORY_GIB = 1.5


def make_images(folder: Path, count: int) -> None:
    """Noise on gradients, 64 x 48."""
    noise = np.random.default_rng(0)
    base = np.linspace(0, 200, 64 * 48 * 3).reshape(48, 64, 3)
    for number in range(count):
        into = folder / f"{number // PER_FOLDER:03}"
        into.mkdir(parents=True, exist_ok=True)
        pixels = base + noise.integers(0, 55, 3) + noise.integers(0, 30, (48, 64, 1))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(into / f"{number:06}.jpg", quality=80)


def memory_of(pid: int) -> int:
    """PSS of a process and all below it, in bytes."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                total += process.memory_full_info().pss
    return total


def start(images: Path, out: Path, tower: Path, rows: int) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    call = "from hf_timm_tower.cli import main; main()"
    command = [sys.executable, "-c", call, "embed", str(images), "--to", str(out), "--tower", str(tower), "--json"]
    command += ["--rows-per-shard", str(rows)]
    return subprocess.Popen(command, start_new_session=True)


def watch(process: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> int:
    """Wait for the end of the process or for a moment; the most memory that was seen, in bytes."""
    most = 0
    while process.poll() is None and not until():
        most = max(most, memory_of(process.pid))
        time.sleep(0.5)
    return most


def shards_in(folder: Path) -> int:
    """How many are there."""
    return len(list(folder.glob("embeddings-*.parquet"))) if folder.exists() else 0


def kill_replica(process: subprocess.Popen[bytes]) -> None:
    """Kill one of the command's processes; it must go on, or be at its end already.

    Raises:
        SystemExit: it has failed.
    """
    os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)
    time.sleep(2)
    if process.poll():
        raise SystemExit(f"the command ended with {process.returncode} after one replica was killed")


def run_disturbed(images: Path, out: Path, tower: Path, rows: int, kills: int, shards: int) -> int:
    """Kill the command that many times, then let it end; the most memory that was seen."""
    draw, most = random.Random(0), 0
    for number in range(kills):
        process = start(images, out, tower, rows)
        goal = shards_in(out) + draw.randint(
            number % 2, max(1, shards // (2 * kills))
        )  # 0: before it has done anything
        most = max(most, watch(process, lambda goal=goal: shards_in(out) >= goal))
        time.sleep(draw.uniform(0, 2))
        if process.poll() is not None:
            raise SystemExit(f"kill {number + 1}: the command had ended already: more images, or fewer kills")
        if number % 2:
            kill_replica(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = " (a replica before)" if number % 2 else ""
        print(f"kill {number + 1}{before}: {shards_in(out)} of {shards} shards were there", flush=True)
    process, goal = start(images, out, tower, rows), shards_in(out) + 1
    most = max(most, watch(process, lambda: shards_in(out) >= goal))
    if process.poll() is None:
        kill_replica(process)
        print("one replica of the last run killed", flush=True)
    most = max(most, watch(process))
    if process.returncode:
        raise SystemExit(f"the command ended with {process.returncode}")
    return most


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rows-per-shard", type=int, default=4096)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        images, tower = folder / "images", folder / "tower"
        make_images(images, args.images)
        TimmModel(args.model, embed_dim=128).save_pretrained(tower)
        began = time.monotonic()
        process = start(images, folder / "whole", tower, args.rows_per_shard)
        most = watch(process)
        seconds = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"the command ended with {process.returncode}")
        print(f"undisturbed: {seconds:.0f} s, {args.images / seconds:.0f} images/s, {most / 2**30:.2f} GiB", flush=True)
        most = max(
            most,
            run_disturbed(
                images, folder / "killed", tower, args.rows_per_shard, args.kills, shards_in(folder / "whole")
            ),
        )
        whole, killed = StoredEmbeddings(folder / "whole"), StoredEmbeddings(folder / "killed")
        (ids, rows), (ids_again, rows_again) = whole.load(), killed.load()
        expected = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
        checks = {
            "complete": whole.complete and killed.complete,
            "each image once, in order": ids == ids_again == expected,
            "the same bits": torch.equal(rows, rows_again),
            f"within {MEMORY_GIB} GiB": most < MEMORY_GIB * 2**30,
        }
        for name, holds in checks.items():
            print(f"{name}: {'yes' if holds else 'NO'}")
        print(f"memory of all processes: at most {most / 2**30:.2f} GiB")
        sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()

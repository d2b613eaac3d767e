"""How fast images become embeddings, beside the peers and what the CPU can do at all.

Every measurement is a fresh process on the same JPEG files and the same weights; the clock starts when imports are done
and the model is loaded, and stops when all embeddings are there. Ways are interleaved; the table gives medians. The
embeddings of all ways are compared.

    python scripts/bench_embed.py [--models mobilenetv3_small_100 ...] [--images 512] [--repeat 3] [--ways ...]

The rows:

- `limit`: cores / (seconds to decode and prepare an image + seconds of the model for an image, on one thread): no
  program that does both on these cores is faster. By CPU time, so that it holds on a busy machine too;
- `ours`: `tower.embed(paths)`; `ours, one process`: with `num_workers=0`;
- `loop, N workers`: a `DataLoader` around a dataset of files, as open_clip's README has it, in batches of 32;
- `timm, N workers`: `timm.data.create_loader`, as timm's own `inference.py`;
- `pipeline, N`: transformers' `pipeline("image-feature-extraction")` with `batch_size=N`;
- `sentence-transformers` and `sentence-transformers, pool`: `encode`, in one process, and in one for each core.

`CPU ms` is the processor time of an image, of all processes; the wall clock of a busy machine says little.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from hf_timm_tower import TimmModel

MODELS = ("mobilenetv3_small_100", "resnet18", "vit_small_patch16_224")
WAYS = (
    "ours", "ours, one process", "loop, 0 workers", "loop, 1 worker", "loop, 2 workers", "timm, 2 workers",
    "pipeline, 1", "pipeline, 32", "sentence-transformers", "sentence-transformers, pool",
)  # fmt: skip
BATCH = 32
# Other kernels than timm's plain forward may give other last bits.
TOLERANCE = 1e-4


def photographs(folder: Path, count: int) -> None:
    """Crops of scikit-image's photographs, 500 x 400, as JPEG files."""
    from skimage import data

    sources = [
        Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "cat", "rocket")
    ]
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        image = sources[number % len(sources)]
        left, top = (int(random.integers(0, side // 4)) for side in image.size)
        crop = image.crop((left, top, left + image.width * 3 // 4, top + image.height * 3 // 4))
        crop.resize((500, 400), Image.Resampling.BICUBIC).save(folder / f"{number:05}.jpg", quality=90)


def prepare(name: str, folder: Path) -> None:
    """One set of random weights."""
    torch.manual_seed(0)
    TimmModel.from_trunk(timm.create_model(name, num_classes=0), pool="default", proj="none").save_pretrained(folder)


class Files(torch.utils.data.Dataset):
    """The dataset that everybody writes."""

    def __init__(self, paths: list[str], transform: Callable[[Any], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[row]).convert("RGB"))


def batches_through(tower: TimmModel, batches: Iterator[torch.Tensor]) -> torch.Tensor:
    """The loop that everybody writes."""
    with torch.no_grad():
        return torch.cat([tower(batch) for batch in batches])


def make_way(way: str, folder: Path, paths: list[str]) -> Callable[[], Any]:
    """Load what a way needs; what is timed is the call of the result."""
    name, _, detail = way.partition(", ")
    if name == "pipeline":
        from transformers import pipeline

        run = pipeline("image-feature-extraction", model=str(folder), device="cpu")
        return lambda: [row[0] for row in run(paths, batch_size=int(detail), pool=True)]
    if name == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device="cpu")
        if not detail:
            return lambda: model.encode(paths, batch_size=BATCH)
        pool = model.start_multi_process_pool(["cpu"] * len(os.sched_getaffinity(0)))
        model.encode(paths[:BATCH] * 2, pool=pool, batch_size=BATCH, chunk_size=BATCH)  # its processes have started
        return lambda: model.encode(paths, pool=pool, batch_size=BATCH, chunk_size=BATCH)
    tower = TimmModel.from_pretrained(folder)
    if name == "ours":
        return lambda: tower.embed(paths, progress=False, num_workers=0 if detail else "auto")
    workers = int(detail.split()[0])
    if name == "loop":
        loader = torch.utils.data.DataLoader(Files(paths, tower.transform()), BATCH, num_workers=workers)
        return lambda: batches_through(tower, iter(loader))
    facts = timm.data.resolve_model_data_config(tower)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(Path(paths[0]).parent)),
        batch_size=BATCH,
        use_prefetcher=False,
        num_workers=workers,
        **{key: facts[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    )
    return lambda: batches_through(tower, (images for images, _ in loader))


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(way: str, folder: Path, paths: list[str]) -> dict[str, Any]:
    """One way, in this process."""
    run = make_way(way, folder, paths)
    before, start = cpu_seconds(), time.perf_counter()
    made = torch.as_tensor(np.asarray(run()))
    seconds = time.perf_counter() - start
    # sentence-transformers' processes live on: their time is not known
    cpu = None if "pool" in way else cpu_seconds() - before
    return {
        "seconds": seconds,
        "cpu": cpu,
        "rows": made.shape[0],
        "head": made[:: max(1, len(made) // 8), :16].tolist(),
    }


def limit(folder: Path, paths: list[str]) -> tuple[float, float]:
    """CPU seconds to decode and prepare an image, and of the model for an image, on one thread; the least of three."""
    torch.set_num_threads(1)
    tower = TimmModel.from_pretrained(folder)
    files, few = Files(paths, tower.transform()), paths[:BATCH]
    batch = torch.stack([files[row] for row in range(len(few))])
    prepared, modelled = [], []
    for _ in range(3):
        start = time.process_time()
        for row in range(len(few)):
            files[row]
        prepared.append((time.process_time() - start) / len(few))
        start = time.process_time()
        with torch.no_grad():
            tower(batch)
        modelled.append((time.process_time() - start) / len(few))
    return min(prepared), min(modelled)


def child(way: str, folder: Path, images: Path) -> Any:
    """The same in a fresh process."""
    command = [sys.executable, __file__, f"--child={way}", "--folder", str(folder), "--photographs", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, images: Path, ways: list[str], repeat: int) -> None:
    """Measure all ways with one model and print its table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tower")
        prepare(name, folder)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        prepared, modelled = child("limit", folder, images)
        for _ in range(repeat):
            for way in ways:
                runs[way].append(child(way, folder, images))
                print(f"{name}, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0))
    most = cores / (prepared + modelled)
    print(f"\n{name}: {1e3 * prepared:.1f} ms to decode and prepare, {1e3 * modelled:.1f} ms of the model\n")
    print("| way | images/s (min - max) | of the limit | CPU ms |\n|---|---|---|---|")
    print(f"| limit | {most:.0f} | 1.00 | {1e3 * (prepared + modelled):.1f} |")
    expected = torch.tensor(runs[ways[0]][0]["head"])
    for way in ways:
        found = torch.tensor(runs[way][0]["head"])
        if found.shape != expected.shape or (found - expected).abs().max() > TOLERANCE * expected.abs().max():
            print(f"({way} gives other embeddings: {(found - expected).abs().max():.2g})")
        rates = [run["rows"] / run["seconds"] for run in runs[way]]
        costs = [1e3 * run["cpu"] / run["rows"] for run in runs[way] if run["cpu"] is not None]
        cpu = f"{statistics.median(costs):.1f}" if costs else ""
        middle = statistics.median(rates)
        print(
            f"| {way} | {middle:.0f} ({min(rates):.0f} - {max(rates):.0f}) | {middle / most:.2f} | {cpu} |", flush=True
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--child", choices=(*WAYS, "limit"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--photographs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        paths = sorted(str(path) for path in args.photographs.iterdir())
        act = limit if args.child == "limit" else lambda *rest: measure(args.child, *rest)
        print(json.dumps(act(args.folder, paths)))
        return
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"torch {torch.__version__}, timm {timm.__version__}; {cores} cores, load {load:.1f}; {args.images} images")
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "photographs")
        photographs(images, args.images)
        for name in args.models:
            compare(name, images, args.ways, args.repeat)


if __name__ == "__main__":
    main()

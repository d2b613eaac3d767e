"""How fast images become embeddings, beside the peers and what the CPU can do at all.

Every measurement is a fresh process on the same JPEG files and the same weights; the clock starts when imports are done
and the model is loaded, and stops when all embeddings are there. Ways are interleaved. The embeddings of all ways are
compared. On stdout comes one table in Markdown: medians, from the least to the most, and the part of the limit.

    python scripts/bench_embed.py [--models mobilenetv3_small_100 ...] [--seconds 5] [--repeat 2] [--ways ...]

The rows:

- `limit`: cores / (seconds to decode and prepare an image + seconds of the model for an image, on one thread, in
  batches of 8 or of 32, whichever is faster): no program that does both on these cores is faster. By CPU time, so that
  it holds on a busy machine too, and by turns with the ways;
- `limit, all cores`: the same measured on all cores at once, which share caches and memory;
- `ours`: `tower.embed(paths)`; `ours, one process`: with `num_workers=0`, which has one thread;
- `loop, N workers`: a `DataLoader` around a dataset of files, as open_clip's README has it, in batches of 32;
- `timm, N workers`: `timm.data.create_loader`, as timm's own `inference.py`;
- `pipeline, N`: transformers' `pipeline("image-feature-extraction")` with `batch_size=N`;
- `sentence-transformers` and `sentence-transformers, pool`: `encode`, in one process, and in one for each core, there
  with one thread each (`OMP_NUM_THREADS=1`, without which they fight for the cores);
- `Ray`: `embedding.ray.embed_dataset` with an actor for each core, in a cluster on this machine. Its actors start
  within the call, so the same images are given three times, and the clock starts with the second third.

There are as many images as the limit does in `--seconds`, so that a slow model takes no longer than a fast one; with
the defaults a quarter of an hour in all. `CPU ms` is the processor time of an image, of all processes; the wall clock
of a busy machine says little.
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
from concurrent.futures import ThreadPoolExecutor
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
    "pipeline, 1", "pipeline, 32", "sentence-transformers", "sentence-transformers, pool", "Ray",
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


def through_ray(folder: Path, paths: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The embeddings of the images, three times, in parts with their numbers."""
    import ray

    from hf_timm_tower.embedding.ray import embed_dataset

    actors = len(os.sched_getaffinity(0))
    # Ray counts cores, it does not bind to them: three beside the actors for what feeds them
    ray.init(num_cpus=actors + 3, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    images = ray.data.from_items([{"id": row, "path": path} for row, path in enumerate(3 * paths)])
    images = images.repartition(3 * len(paths) // BATCH)  # small parts, so that a third is soon known to be done
    for batch in embed_dataset(images, str(folder), actors=actors).iter_batches(batch_size=None, prefetch_batches=0):
        yield batch["id"].tolist(), torch.from_numpy(np.stack(batch["embedding"]))


def make_way(way: str, folder: Path, paths: list[str]) -> Callable[[], Any]:
    """Load what a way needs; what is timed is the call of the result."""
    name, _, detail = way.partition(", ")
    if name == "Ray":
        return lambda: through_ray(folder, paths)
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
    made, skipped = run(), 0
    if isinstance(made, Iterator):
        rows, parts = [], []
        for numbers, part in made:
            rows += numbers
            parts.append(part)
            if not skipped and len(rows) >= len(paths):
                skipped, start = len(rows), time.perf_counter()
        made = torch.cat(parts)[torch.tensor(rows).argsort()]
    made = torch.as_tensor(np.asarray(made))
    seconds = time.perf_counter() - start
    # the processes of these live on: their time is not known
    cpu = None if way == "Ray" or "pool" in way else cpu_seconds() - before
    first = made[: len(paths)]
    return {
        "rate": (len(made) - skipped) / seconds,
        "cpu": None if cpu is None else cpu / len(made),
        "head": first[:: max(1, len(first) // 8), :16].tolist(),
    }


def limit(folder: Path, paths: list[str]) -> tuple[float, float]:
    """CPU seconds to decode and prepare an image, and of the model for an image, on one thread.

    Medians of rounds, as what is measured beside it takes its usual time and not its least; the model at the better of
    two batch sizes.
    """
    torch.set_num_threads(1)
    tower = TimmModel.from_pretrained(folder)
    files, few = Files(paths, tower.transform()), paths[:BATCH]
    batch = torch.stack([files[row] for row in range(len(few))])
    prepared: list[float] = []
    modelled: dict[int, list[float]] = {8: [], BATCH: []}
    began = time.monotonic()
    while len(prepared) < 3 or time.monotonic() - began < 5:
        start = time.process_time()
        for row in range(len(few)):
            files[row]
        prepared.append((time.process_time() - start) / len(few))
        for size, costs in modelled.items():
            start = time.process_time()
            with torch.no_grad():
                for part in batch.split(size):
                    tower(part)
            costs.append((time.process_time() - start) / len(few))
    return statistics.median(prepared), min(map(statistics.median, modelled.values()))


def child(way: str, folder: Path, images: Path) -> Any:
    """The same in a fresh process."""
    command = [sys.executable, __file__, f"--child={way}", "--folder", str(folder), "--photographs", str(images)]
    threads = {"OMP_NUM_THREADS": "1"} if "pool" in way else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, ways: list[str], repeat: int, seconds: float) -> dict[str, Any]:
    """Measure all ways with one model: way -> its runs, and both limits -> seconds to prepare and of the model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, few, images = (Path(scratch, part) for part in ("tower", "few", "images"))
        prepare(name, folder)
        photographs(few, BATCH)
        cores = len(os.sched_getaffinity(0))
        count = round(seconds * cores / sum(child("limit", folder, few)) / BATCH) * BATCH
        photographs(images, max(count, 2 * BATCH))
        limits, on_all, found = [], [], {way: [] for way in ways}
        for _ in range(repeat):
            limits.append(child("limit", folder, few))
            with ThreadPoolExecutor(cores) as at_once:
                on_all += at_once.map(lambda _: child("limit", folder, few), range(cores))
            for way in ways:
                found[way].append(child(way, folder, images))
                print(f"{name}, {way}: {found[way][-1]['rate']:.1f} images/s", file=sys.stderr, flush=True)
    expected = torch.tensor(found[ways[0]][0]["head"])
    for way in ways:
        head = torch.tensor(found[way][0]["head"])
        if head.shape != expected.shape or (head - expected).abs().max() > TOLERANCE * expected.abs().max():
            print(f"{name}: {way} gives other embeddings: {(head - expected).abs().max():.2g}", file=sys.stderr)
    middles = {"limit": limits, "limit, all cores": on_all}
    return {name: list(map(statistics.median, zip(*costs, strict=True))) for name, costs in middles.items()} | found


def table(found: dict[str, dict[str, Any]], ways: list[str]) -> str:
    """Model -> what `compare` gives, as one table in Markdown."""
    cores = len(os.sched_getaffinity(0))
    lines = ["| | " + " | | | ".join(found) + " | | |", "|---" * (1 + 3 * len(found)) + "|"]
    lines.append("| **way** |" + " **images/s** | **of the limit** | **CPU ms** |" * len(found))
    limits = {name: cores / sum(runs["limit"]) for name, runs in found.items()}
    for row in ("limit", "limit, all cores"):
        costs = {name: sum(runs[row]) for name, runs in found.items()}
        cells = [
            f"{cores / cost:.1f} | {cores / cost / limits[name]:.2f} | {1e3 * cost:.1f}" for name, cost in costs.items()
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    for way in ways:
        cells = []
        for name, runs in found.items():
            rates = [run["rate"] for run in runs[way]]
            costs = [1e3 * run["cpu"] for run in runs[way] if run["cpu"] is not None]
            middle = statistics.median(rates)
            cells.append(f"{middle:.1f} ({min(rates):.1f} - {max(rates):.1f}) | {middle / limits[name]:.2f} | ")
            cells[-1] += f"{statistics.median(costs):.1f}" if costs else ""
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for name, runs in found.items():
        prepared, modelled = (1e3 * cost for cost in runs["limit"])
        lines.append(f"\n{name}: {prepared:.1f} ms to decode and prepare an image, {modelled:.1f} ms of the model.")
        if "ours" in runs:
            hours = 1e9 * cores / statistics.median(run["rate"] for run in runs["ours"]) / 3600
            lines[-1] += f" A billion images take {hours:,.0f} hours of a core."
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=5, help="of the limit, which says how many images there are")
    parser.add_argument("--repeat", type=int, default=2)
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
    began, load = time.monotonic(), os.getloadavg()[0]
    found = {name: compare(name, args.ways, args.repeat, args.seconds) for name in args.models}
    print(table(found, args.ways))
    cores, minutes = len(os.sched_getaffinity(0)), (time.monotonic() - began) / 60
    print(f"\n{cores} cores, torch {torch.__version__}, timm {timm.__version__}; {args.repeat} runs, {minutes:.0f} min")
    print(f"Load of the machine: {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()

"""What freezing saves: time and memory of a training step, and of an epoch with the feature cache.

Every measurement is a process of its own with the imports done; ways are interleaved, the tables give medians. All ways
start from the same weights and see the same batches; their losses are compared afterwards.

    python scripts/bench_finetune.py [--models vit_tiny_patch16_224 ...] [--size 128] [--batch 16] [--repeat 3]

Steps (forward, loss, backward, SGD with momentum; trunk in train mode):

- `by hand`: the trunk under `torch.no_grad()`, then the head: what a frozen tower cannot beat. All ratios are to it;
- `trunk only`: the trunk's forward under `torch.no_grad()`, no head, no step;
- `frozen`, `partly`, `full`: `lock()`, `lock(n)` and no lock, by this package and by open_clip's `TimmModel`. These
  pairs are also run in one process, step about (ours, theirs, theirs, ours): the ratio of their times is taken there,
  because two processes differ by more than the two packages do.

Epochs, over all images, the head's batches four times as large:

- `head only`: head, loss and step on batches that lie ready in memory: what the cache cannot beat;
- `cached`: an epoch after the first with the feature cache, in random order;
- `first`: `cache_features`, which takes the place of the trunk in the first epoch;
- `uncached`: an epoch of a frozen tower.

Seconds are the process's CPU time: with one thread the same as the clock on an idle machine, and on a busy one what the
neighbours do not change. `kept` counts the bytes that autograd keeps for the backward pass, each storage once and
parameters left out; it does not vary. `peak` is what the process holds at most during the steps over what it held
before (VmHWM, Linux with glibc only); it varies with the allocator.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip.timm_model
import timm
import torch
import torch.nn as nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from hf_timm_tower.timm_model import TimmModel
from hf_timm_tower.training.feature_cache import CachedFeatures, cache_features, forward_from_cache

MODELS = ("vit_tiny_patch16_224", "resnet18")
ALIKE = (("by hand", "frozen", "frozen, open_clip"), ("partly", "partly, open_clip"), ("full", "full, open_clip"))
STEPS = ("by hand", "trunk only", *ALIKE[0][1:], *ALIKE[1], *ALIKE[2])
PAIRED = ", paired"
EPOCHS = ("head only", "cached", "first", "uncached")
EMBED_DIM = 512
PRELOADED = ["__main__", "open_clip.timm_model", "hf_timm_tower.training.feature_cache", "hf_timm_tower.timm_model"]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def make_tower(way: str, args: argparse.Namespace, name: str, folder: Path) -> nn.Module:
    """The tower of a way, with the run's weights, locked, in train mode."""
    if way.endswith("open_clip"):
        tower: Any = open_clip.timm_model.TimmModel(name, EMBED_DIM, image_size=args.size, pretrained=False)
        if hasattr(tower.trunk, "set_input_size"):
            tower.trunk.set_input_size(img_size=args.size)  # it only notes the size
    else:
        tower = TimmModel(name, EMBED_DIM, image_size=args.size)
    tower.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    if way.startswith("partly"):
        tower.lock(args.unlocked)
    elif not way.startswith("full"):
        tower.lock(freeze_bn_stats=way in EPOCHS)
    return tower.train()


def images(args: argparse.Namespace, count: int) -> TensorDataset:
    """Noise for images, and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, args.size, args.size, generator=generator)
    return TensorDataset(pixels, torch.randint(EMBED_DIM, (count,), generator=generator))


def forward_of(way: str, tower: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Batch -> embedding."""
    if way in ("head only", "cached"):
        return lambda features: forward_from_cache(tower, features)
    if way != "by hand":
        return tower

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = tower.trunk(x)
        return tower.head(features)

    return by_hand


def make_step(way: str, tower: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One training step: batch and labels -> loss."""
    if way == "trunk only":

        def run_trunk(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tower.trunk(x).sum()

        return run_trunk
    forward = forward_of(way, tower)
    open_parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(open_parameters, lr=0.01, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def kept_bytes(tower: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps while `run` runs, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tower.parameters(), *tower.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and seconds of the clock."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - clock


def measure_step(way: str, args: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """Some steps on one batch."""
    tower = make_tower(way, args, name, folder)
    step = make_step(way, tower)
    x, y = images(args, args.batch)[:]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building left free would otherwise serve the first step
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    losses = [step(x, y).item()]  # warm
    times = [timed(lambda: losses.append(step(x, y).item())) for _ in range(args.steps)]
    found = {
        "cpu": statistics.median(cpu for cpu, _ in times),
        "clock": statistics.median(clock for _, clock in times),
        "peak": status("VmHWM") - before,
        "loss": sum(losses),
    }
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    found["flop"] = counter.get_total_flops()
    forward = tower.trunk if way == "trunk only" else forward_of(way, tower)
    found["kept"] = 0 if way == "trunk only" else kept_bytes(tower, lambda: forward(x))
    return found


def measure_epoch(way: str, args: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """One epoch, or for the fast ways the median of many."""
    tower = make_tower(way, args, name, folder)
    step, size = make_step(way, tower), args.batch * 4
    if way == "first":
        dataset = images(args, args.images)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            cpu, clock = timed(lambda: cache_features(tower, dataset, scratch, batch_size=args.batch, progress=False))
        return {"cpu": cpu, "clock": clock}
    if way == "uncached":
        x, y = images(args, args.images)[:]
        step(x[: args.batch], y[: args.batch])
        batches: Batches = list(zip(x.split(args.batch), y.split(args.batch), strict=True))
        cpu, clock = timed(lambda: [step(*batch) for batch in batches])
        return {"cpu": cpu, "clock": clock}
    cached = CachedFeatures(folder / "cache")
    ready = list(cached.batches(size, shuffle=True, generator=torch.Generator().manual_seed(0)))

    def epoch() -> None:
        for batch in ready if way == "head only" else cached.batches(size, shuffle=True):
            step(*batch)

    epoch()
    times = [timed(epoch) for _ in range(args.epochs)]
    with FlopCounterMode(display=False) as counter:
        epoch()
    return {
        "cpu": statistics.median(cpu for cpu, _ in times),
        "clock": statistics.median(clock for _, clock in times),
        "flop": counter.get_total_flops(),
    }


def measure_pair(way: str, args: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """CPU time of this package's steps over that of open_clip's, in turns; median and quartiles."""
    steps = [make_step(each, make_tower(each, args, name, folder)) for each in (way, f"{way}, open_clip")]
    batch = images(args, args.batch)[:]
    for step in steps:
        step(*batch)
    ratios = []
    for _ in range(args.pairs):
        ours, theirs, theirs_again, ours_again = (timed(lambda who=who: steps[who](*batch))[0] for who in (0, 1, 1, 0))
        ratios.append((ours + ours_again) / (theirs + theirs_again))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"low": low, "median": middle, "high": high}


def child(way: str, args: argparse.Namespace, name: str, folder: Path, answer: Path) -> None:
    """One measurement, in its own process."""
    torch.set_num_threads(1)
    measure = measure_epoch if way in EPOCHS else measure_pair if way.endswith(PAIRED) else measure_step
    answer.write_text(json.dumps(measure(way.removesuffix(PAIRED), args, name, folder)))


def run_child(way: str, args: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """The same from outside."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=child, args=(way, args, name, folder, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{way} failed on {name} (exit status {process.exitcode})")
    return json.loads(answer.read_text())


def median(runs: list[dict[str, float]], key: str) -> float:
    """Over the repeats."""
    return statistics.median(run[key] for run in runs)


def span(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def compare(name: str, args: argparse.Namespace) -> None:
    """Measure all ways on one model and print its tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        tower = TimmModel(name, EMBED_DIM, image_size=args.size)
        torch.save(tower.state_dict(), folder / "weights.pt")
        tower.lock(freeze_bn_stats=True)
        cache_features(tower, images(args, args.images), folder / "cache", batch_size=args.batch, progress=False)
        ways = (*STEPS, *EPOCHS)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(args.repeat):
            for way in ways:
                runs[way].append(run_child(way, args, name, folder))
        for way in ("frozen", "partly", "full"):
            runs[f"{way}{PAIRED}"] = [run_child(f"{way}{PAIRED}", args, name, folder)]
    check_losses(name, runs)
    print(f"\n{name}, {args.size} px, batches of {args.batch}, partly: {args.unlocked} groups of the trunk open\n")
    print("| step | CPU time / by hand (min - max) | clock / by hand | GFLOP | kept, MiB | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for way in STEPS:
        # of one repeat to the same repeat's: what slows the machine down for a while slows both
        cpu, clock = (
            [run[key] / base[key] for run, base in zip(runs[way], runs["by hand"], strict=True)]
            for key in ("cpu", "clock")
        )
        print(
            f"| {way} | {span(cpu)} | {statistics.median(clock):.2f} | {median(runs[way], 'flop') / 1e9:.2f} | "
            f"{median(runs[way], 'kept') / 2**20:.2f} | {median(runs[way], 'peak') / 2**20:.0f} |"
        )
    print(f"\nThis package / open_clip: CPU time of {args.pairs} pairs (quartiles), kept, peak (min - max)\n")
    for way in ("frozen", "partly", "full"):
        paired = runs[f"{way}{PAIRED}"][0]
        pairs = list(zip(runs[way], runs[f"{way}, open_clip"], strict=True))
        peak = [ours["peak"] / theirs["peak"] for ours, theirs in pairs]
        kept = median(runs[way], "kept") / median(runs[f"{way}, open_clip"], "kept")
        print(f"- {way}: {paired['median']:.3f} ({paired['low']:.3f} - {paired['high']:.3f}), {kept:.4f}, {span(peak)}")
    print(f"\n{name}, epochs of {args.images} images; cached and head only in batches of {args.batch * 4}\n")
    print("| epoch | CPU seconds | head only / it (min - max) | uncached / it |")
    print("|---|---|---|---|")
    for way in EPOCHS:
        share = [base["cpu"] / run["cpu"] for run, base in zip(runs[way], runs["head only"], strict=True)]
        faster = median(runs["uncached"], "cpu") / median(runs[way], "cpu")
        cell = span(share) if way in ("head only", "cached") else f"{statistics.median(share):.5f}"
        print(f"| {way} | {median(runs[way], 'cpu'):.4f} | {cell} | {faster:.2f} |")
    rate = median(runs["trunk only"], "flop") / median(runs["trunk only"], "cpu")
    head = median(runs["head only"], "flop")
    print(
        f"\nThe trunk alone runs at {rate / 1e9:.1f} GFLOP/s; at this rate the head's {head / 1e9:.3f} GFLOP of an "
        f"epoch take {head / rate:.4f} s, and an uncached epoch is "
        f"{median(runs['trunk only'], 'flop') * args.images / args.batch / head + 1:.0f} times as many."
    )


def check_losses(name: str, runs: dict[str, list[dict[str, float]]]) -> None:
    """Ways that train the same part must have learned the same."""
    for ways in ALIKE:
        losses = [run["loss"] for way in ways for run in runs[way]]
        if max(losses) - min(losses) > 1e-4 * abs(max(losses)):
            raise SystemExit(f"{name}: {', '.join(ways)} did not compute the same: {losses}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--unlocked", type=int, default=2, help="groups of the trunk that `partly` leaves open")
    parser.add_argument("--images", type=int, default=128, help="of an epoch")
    parser.add_argument("--steps", type=int, default=4, help="steps of one measurement")
    parser.add_argument("--epochs", type=int, default=400, help="epochs of one measurement of the fast ways")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of steps of this package and open_clip")
    args = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, timm {timm.__version__}, open_clip {open_clip.__version__}"
    load = os.getloadavg()[0]
    print(f"{versions}; 1 thread of {os.cpu_count()} cores, load {load:.1f} at the start; {args.repeat} runs of each")
    for name in args.models:
        compare(name, args)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

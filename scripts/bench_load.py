"""How long loading a tower takes, and how much memory, beside the peers and the physical limit.

Every measurement is a fresh process on warm files: the clock starts when all imports are done and stops when a first
forward is possible, with every page of the weights in memory. A walk over all tensors sees to the latter; what the walk
itself takes, which a second one tells, is taken off. Ways are interleaved; the table gives medians.

    python scripts/bench_load.py [--models vit_base_patch16_224 ...] [--repeat 5]

The rows:

- `floor`: the weight files mapped with every page touched, and the trunk constructed without initialising: no loader
  that keeps whole files can do less;
- `bytes`: `safetensors.torch.load_file` and every page touched, no model at all;
- `ours`: `TimmModel.from_pretrained`;
- `auto`: `AutoModel.from_pretrained` with this package imported;
- `remote, cold` and `remote, warm`: the same by the code in the folder (`trust_remote_code=True`), where the package is
  never imported; cold is with an empty cache of transformers' copies of remote code;
- `transformers`: `TimmWrapperModel.from_pretrained`;
- `mixin`: `from_pretrained` of a module that is a plain `PyTorchModelHubMixin`;
- `timm`: `timm.create_model(checkpoint_path=...)`.

Peak memory is what the process holds at most while it loads, over what it held before (mapped files included), as
a multiple of the bytes of the weights. Linux only.

Two small tables follow: a save, a second save after the weights changed, and the first two checkpoints of a `Trainer`
(which writes AdamW's state too), beside `TimmWrapperModel` with the same; and `import hf_timm_tower` as a multiple of
`import timm`.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# A child that loads by the code in the folder must not have the package: its Auto classes would take over.
WITHOUT_PACKAGE = any(f"--child={way}" in sys.argv for way in ("remote, cold", "remote, warm"))
if not WITHOUT_PACKAGE:
    from hf_timm_tower import TimmTowerForImageClassification, TimmTowerModel  # noqa: F401  # `auto` needs the imports
    from hf_timm_tower.reader.skip_init import skip_init
    from hf_timm_tower.timm_model import TimmModel

MODELS = ("vit_base_patch16_224", "convnext_base", "resnet50")
WAYS = ("floor", "bytes", "ours", "auto", "remote, cold", "remote, warm", "transformers", "mixin", "timm")
REMOTE = ("remote, cold", "remote, warm")
SAVES = ("ours", "transformers")
PAGE = 4096


class MixinTower(nn.Module, PyTorchModelHubMixin):
    """What people write around a trunk today."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.trunk = timm.create_model(name, num_classes=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` -> features `[B, C]`."""
        return self.trunk(x)


def prepare(name: str, folder: Path) -> int:
    """Write one set of random weights in every way's own form; returns their bytes."""
    torch.manual_seed(0)
    trunk = timm.create_model(name, num_classes=0)
    state = trunk.state_dict()
    save_file(state, folder / "timm.safetensors")
    TimmModel.from_trunk(trunk, pool="default", proj="none").save_pretrained(folder / "ours")
    wrapper = TimmWrapperModel(TimmWrapperConfig(architecture=name))
    wrapper.timm_model.load_state_dict(state)
    wrapper.save_pretrained(folder / "transformers")
    mixin = MixinTower(name)
    mixin.trunk.load_state_dict(state)
    mixin.save_pretrained(folder / "mixin")
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def load_floor(name: str, folder: Path) -> nn.Module:
    """Map and touch the bytes, construct the trunk; the two are not joined, so no loader can be faster."""
    with open(folder / "ours" / "trunk.safetensors", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    with skip_init():
        model = timm.create_model(name, num_classes=0)
    model._mapped = mapped
    return model


def load_bytes(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The reference reader, no model."""
    return load_file(folder / "timm.safetensors")


def load_ours(name: str, folder: Path) -> nn.Module:
    """This package."""
    return TimmModel.from_pretrained(folder / "ours")


def load_auto(name: str, folder: Path) -> nn.Module:
    """transformers' own way to a tower, by this package or, where it is not imported, by the code in the folder."""
    return AutoModel.from_pretrained(folder / "ours", trust_remote_code=WITHOUT_PACKAGE)


def load_transformers(name: str, folder: Path) -> nn.Module:
    """transformers' own wrapper of timm."""
    return TimmWrapperModel.from_pretrained(folder / "transformers")


def load_mixin(name: str, folder: Path) -> nn.Module:
    """The plain mixin of huggingface_hub."""
    return MixinTower.from_pretrained(folder / "mixin")


def load_timm(name: str, folder: Path) -> nn.Module:
    """timm's own loader."""
    return timm.create_model(name, num_classes=0, checkpoint_path=folder / "timm.safetensors")


LOADERS: dict[str, Callable[[str, Path], object]] = {
    "floor": load_floor,
    "bytes": load_bytes,
    "ours": load_ours,
    "auto": load_auto,
    "remote, cold": load_auto,
    "remote, warm": load_auto,
    "transformers": load_transformers,
    "mixin": load_mixin,
    "timm": load_timm,
}


def touch(loaded: object) -> None:
    """Read one byte of every page, so that no way may leave its work for the first forward."""
    if isinstance(loaded, nn.Module) and hasattr(loaded, "_mapped"):
        sum(loaded._mapped[::PAGE])
        return
    tensors = loaded.values() if isinstance(loaded, dict) else loaded.state_dict().values()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        flat[:: max(1, PAGE // flat.element_size())].sum()


def checksum(loaded: object) -> float:
    """One number over the values of all weights, the same for every way that loaded them right."""
    tensors = loaded.values() if isinstance(loaded, dict) else loaded.state_dict().values()
    return sum(tensor.double().abs().sum().item() for tensor in tensors)


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure(way: str, name: str, folder: Path) -> dict[str, float]:
    """Load once, in this process."""
    load = LOADERS[way]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    start = time.perf_counter()
    loaded = load(name, folder)
    touch(loaded)
    done = time.perf_counter()
    touch(loaded)  # finds every page in memory
    seconds = done - start - (time.perf_counter() - done)
    peak = status("VmHWM") - before
    return {"seconds": seconds, "peak": peak, "checksum": 0.0 if way == "floor" else checksum(loaded)}


def run_child(way: str, name: str, folder: Path) -> dict[str, float]:
    """Load once, in a fresh process."""
    command = [sys.executable, __file__, f"--child={way}", "--models", name, "--folder", str(folder)]
    environment = dict(os.environ)
    if way in REMOTE:
        cache = folder / "modules"
        if way == "remote, cold":
            shutil.rmtree(cache, ignore_errors=True)
        environment["HF_MODULES_CACHE"] = str(cache)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{way} failed to load {name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, repeat: int) -> None:
    """Measure all ways on one model and print its table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = prepare(name, folder)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repeat):  # the files were just written: they are in the page cache
            for way in WAYS:
                runs[way].append(run_child(way, name, folder))
    sums = {way: runs[way][0]["checksum"] for way in WAYS if way != "floor"}
    if max(sums.values()) - min(sums.values()) > 1e-9 * max(sums.values()):
        raise SystemExit(f"{name}: not all ways loaded the same weights: {sums}")
    floor = statistics.median(run["seconds"] for run in runs["floor"])
    print(f"\n{name}: {size / 2**20:.0f} MiB of weights\n")
    print("| way | seconds (min - max) | times the floor | peak memory / weights |")
    print("|---|---|---|---|")
    for way in WAYS:
        seconds = [run["seconds"] for run in runs[way]]
        peak = statistics.median(run["peak"] for run in runs[way])
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"| {way} | {middle:.3f} ({least:.3f} - {most:.3f}) | {middle / floor:.2f} | {peak / size:.2f} |")


def measure_saves(name: str, folder: Path) -> dict[str, float]:
    """`way, first save` -> seconds of a save and of a second one after the weights changed, in this process."""
    models = {"ours": load_ours(name, folder), "transformers": load_transformers(name, folder)}
    seconds = {}
    for turn in ("first", "second"):
        for way, model in models.items():
            start = time.perf_counter()
            model.save_pretrained(folder / "saved" / way)
            seconds[f"{way}, {turn} save"] = time.perf_counter() - start
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001)
    return seconds


class StopWatch(TrainerCallback):
    """Seconds between the end of a step and the checkpoint after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.start = time.perf_counter()

    def on_save(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def measure_checkpoints(name: str, folder: Path) -> dict[str, float]:
    """`way, first checkpoint` -> seconds of the first two checkpoints while a `Trainer` trains a classifier."""
    config = TimmWrapperConfig(architecture=name, num_labels=10, do_pooling=True)
    models = {
        "ours": TimmTowerForImageClassification.from_pretrained(folder / "ours", num_labels=10),
        "transformers": TimmWrapperForImageClassification(config),
    }
    rows = [{"pixel_values": torch.randn(3, 224, 224), "labels": row} for row in range(2)]
    seconds = {}
    for way, model in models.items():
        watch, place = StopWatch(), str(folder / "saved" / f"trainer-{way}")
        arguments = TrainingArguments(
            place, max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to="none", disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[watch]).train()
        for turn, spent in zip(("first", "second"), watch.seconds, strict=True):
            seconds[f"{way}, {turn} checkpoint"] = spent
    return seconds


def compare_saves(name: str, repeat: int) -> None:
    """Measure saves in fresh processes and print their table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(name, folder)
        runs = []
        for _ in range(repeat):
            command = [sys.executable, __file__, "--child=save", "--models", name, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "saved")
    print(f"\n{name}: saving\n\n| way | seconds | times transformers |\n|---|---|---|")
    for act in ("first save", "second save", "first checkpoint", "second checkpoint"):
        middle = {way: statistics.median(run[f"{way}, {act}"] for run in runs) for way in SAVES}
        for way in SAVES:
            print(f"| {way}, {act} | {middle[way]:.3f} | {middle[way] / middle['transformers']:.2f} |")


def compare_imports(repeat: int) -> None:
    """Time imports in fresh processes and print their table."""
    code = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    ours = ("import hf_timm_tower", "from hf_timm_tower import TimmModel")  # names of the package load late
    runs: dict[str, list[float]] = {name: [] for name in ("import timm", *ours)}
    for _ in range(repeat):
        for name, seconds in runs.items():
            done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
    timm_alone = statistics.median(runs["import timm"])
    print("\n| import | seconds | times timm |\n|---|---|---|")
    for name, seconds in runs.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {statistics.median(seconds) / timm_alone:.2f} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--child", choices=(*WAYS, "save"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "save":
        print(json.dumps(measure_saves(args.models[0], args.folder) | measure_checkpoints(args.models[0], args.folder)))
        return
    if args.child:
        print(json.dumps(measure(args.child, args.models[0], args.folder)))
        return
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{versions}; {os.cpu_count()} cores, {torch.get_num_threads()} threads; {args.repeat} runs of each")
    for name in args.models:
        compare(name, args.repeat)
        compare_saves(name, args.repeat)
    compare_imports(args.repeat)


if __name__ == "__main__":
    main()

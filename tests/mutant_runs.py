"""Load mutated towers one after the other in one process, and count what each costs and does; see test_many_mutants."""

import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from hf_timm_tower import TimmModel, TimmTowerModel, TowerError

from .hub_calls import TestHead, Watcher, _memory, numbers
from .mutants import folder_mutant

# Of the mutants of these kinds every second one is saved over: what a save reads of the folder is their matter.
SAVED_OVER = ("in_card", "put_stray")
# Every so many-th mutant is loaded by transformers too.
OTHER_FACE = 4
MOST_SECONDS = 20


class FolderWatcher(Watcher):
    """Notes sockets too, and what is written: anywhere while loading, outside of `may_write` while saving.

    Attributes:
        may_write: Where a save may write, None while loading.
        never: A folder in it where nothing may be written.
    """

    may_write: str | None = None
    never = ""
    _follows = True

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        self._follows = event == "open"  # what is renamed or removed is the link itself
        if event.startswith("socket."):
            self.harm.append(f"socket: {event}")
        super()._see(event, args)

    def _is_inside(self, path: object) -> bool:
        if self.may_write is None or not isinstance(path, str):
            return False
        folder, name = os.path.split(path.rstrip(os.sep))
        real = os.path.realpath(path) if self._follows else os.path.join(os.path.realpath(folder), name)
        real += os.sep
        # where staging folders are recorded while a save is under way
        records = os.path.join(os.path.realpath(constants.HF_HOME), "hf_timm_tower") + os.sep
        if real.startswith(records):
            return True
        return real.startswith(self.may_write + os.sep) and not real.startswith(self.never + os.sep)


@dataclass(frozen=True)
class Run:
    """What one mutant did.

    Attributes:
        seed: Of the mutant.
        kind: Which mutator made it.
        act: `load`, `load by transformers` or `save over`.
        outcome: `equal`, `refused`, `warned` (it loaded, and a warning said that a file was edited), `told` (it loaded,
            and `verify()` says that it is another one) or what else came.
        harm: Files written, code of the folder that ran, processes, sockets.
        seconds: Of this process's CPU.
        bytes_more: Memory at its peak, less that before.
    """

    seed: int
    kind: str
    act: str
    outcome: str
    harm: tuple[str, ...]
    seconds: float
    bytes_more: int


def small_tower() -> TimmModel:
    """A tower of which a load takes milliseconds, with a head that is stored as a graph."""
    torch.manual_seed(1)
    small = {"channels": (8, 8, 16, 16), "stem_width": 8}
    return TimmModel("test_resnet", 24, 64, custom_head=TestHead, model_kwargs=small).eval()


def _result(load: Callable[[], torch.nn.Module], good: str) -> str:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tower = load()
    if any("is not what the weights were saved with" in str(each.message) for each in said):
        return "warned"
    if numbers(tower) == good:
        return "equal"
    if isinstance(tower, TimmModel) and tower._fingerprint is not None and tower.verify().status != "equal":
        return "told"
    return "OTHER: loaded as another tower without a word"


class _AsTensor(torch.nn.Module):
    """The transformers face with the output and the keys of `TimmModel`."""

    def __init__(self, model: TimmTowerModel) -> None:
        super().__init__()
        self.trunk, self.head, self._model = model.trunk, model.head, [model]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._model[0](image).pooler_output


def _timed(act: Any) -> tuple[str, float, int]:
    """What an act came to, with its CPU seconds and the memory that it needed at its peak."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = _memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 3 * MOST_SECONDS)
    try:
        outcome = act()
    except TowerError:
        outcome = "refused"
    except OSError as error:
        # transformers refuses a folder that lacks files in its own words
        outcome = "refused" if _by_transformers(error) else f"OTHER: {type(error).__name__}: {error}"[:300]
    except Exception as error:
        outcome = f"OTHER: {type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, time.process_time() - started, _memory("VmHWM") - before


def _by_transformers(error: OSError) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and "/transformers/" in frame.tb_frame.f_code.co_filename


def run_mutants(root: str, seeds: Iterable[int]) -> list[Run]:
    """Make and load the mutants of these seeds.

    Args:
        root: An empty folder to work in.
        seeds: Whole numbers; the same ones give the same mutants.
    """
    torch.set_num_threads(1)
    work, outside, folder = Path(root), Path(root, "outside"), Path(root, "tower")
    outside.mkdir()
    (outside / "secret").write_text("secret")
    tower = small_tower()
    tower.save_pretrained(work / "good", include_code=False)
    good = {
        path.relative_to(work / "good").as_posix(): path.read_bytes()
        for path in (work / "good").rglob("*")
        if path.is_file()
    }
    right = numbers(tower)
    assert "head.safetensors" in good
    assert json.loads(good["config.json"])["head"]["form"] == "graph"
    watcher = FolderWatcher(folder)
    watcher.never = os.path.realpath(outside)
    runs = []

    def run(seed: int, kind: str, name: str, act: Any) -> None:
        watcher.harm.clear()
        os.environ.pop("TOWER_TEST_EVIL", None)
        outcome, seconds, memory = _timed(act)
        harm = [line for line in watcher.harm if "/proc/self/clear_refs" not in line]
        if "TOWER_TEST_EVIL" in os.environ:
            harm.append(os.environ["TOWER_TEST_EVIL"])
        if (outside / "secret").read_text() != "secret" or len(list(outside.iterdir())) != 1:
            harm.append("the folder outside was changed")
        runs.append(Run(seed, kind, name, outcome, tuple(harm), seconds, memory))

    def load() -> str:
        return _result(lambda: TimmModel.from_pretrained(folder), right)

    def load_by_transformers() -> str:
        return _result(lambda: _AsTensor(TimmTowerModel.from_pretrained(folder)), right)

    def save_over() -> str:
        tower.save_pretrained(folder, include_code=False)
        return _result(lambda: TimmModel.from_pretrained(folder), right)

    for seed in seeds:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = folder_mutant(good, seed, folder, outside)
        watcher.may_write = None
        run(seed, kind, "load", load)
        if seed % OTHER_FACE == 0:
            run(seed, kind, "load by transformers", load_by_transformers)
        if kind in SAVED_OVER and seed % 2:
            watcher.may_write = os.path.realpath(work)
            run(seed, kind, "save over", save_over)
    return runs

"""What every test shares: one thread, no hub, caches of its own, a seed, and processes that know only the package."""

import os
import tempfile

# Read by huggingface_hub and transformers when they are imported, so set before anything else. The caches of whoever
# runs the tests are neither used nor touched. xdist's workers inherit the folder from their controller, which takes it
# away at the end; each has a cache of its own in it, for transformers' copies of remote code.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "TOWER_TEST_HF_HOME" not in os.environ:
    _hf_home = tempfile.TemporaryDirectory(prefix="hf_timm_tower_tests_")
    os.environ["TOWER_TEST_HF_HOME"] = _hf_home.name
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["HF_HOME"] = os.path.join(os.environ["TOWER_TEST_HF_HOME"], _worker)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import gc
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

_CLASS_SWEEP = "test_every_class.py"

# What takes half a minute and more of a core, longest first: one worker has all of a file, and a long one that begins
# last is what everybody waits for.
_LONG_FILES = """
promises/test_every_class.py
training/test_finetune_script.py
training/test_train_clip.py
hub/test_hub.py
embedding/test_ray.py
training/test_unfreeze_schedule.py
test_demo.py
interop/test_open_clip.py
hub/test_faces_on_the_hub.py
hub/test_hub_faults.py
training/test_param_groups.py
promises/test_at_home_table.py
embedding/test_to_folder.py
interop/test_at_home_open_clip.py
hub/test_card_snippets.py
promises/test_many_mutants.py
promises/test_used_in_anger.py
promises/test_old_towers.py
interop/test_export.py
""".split()


def pytest_report_header() -> str:
    """Which classes of timm the sweeps of this run take."""
    from .timm_classes import describe_choice

    return describe_choice()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is another run's, put together what looks at one class of timm, and long files first."""
    from .timm_classes import chosen_classes, chosen_turn, smallest_of_each_class

    left_out = smallest_of_each_class().keys() - chosen_classes()
    # slow sweeps name a class or its smallest architecture; others name architectures for reasons of their own
    smallest = {smallest_of_each_class()[name] for name in left_out}
    class_of = {item: set(getattr(getattr(item, "callspec", None), "id", "").split("-")) for item in items}
    dropped = {
        item
        for item in items
        if class_of[item] & left_out or (class_of[item] & smallest and item.get_closest_marker("slow"))
    }
    turns = chosen_turn([0, 1], 2)
    dropped |= {item for item in items for mark in item.iter_markers("turn") if mark.args[0] not in turns}
    kept = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    order = {name: number for number, name in enumerate(smallest_of_each_class())}
    places = [place for place, item in enumerate(kept) if item.path.name == _CLASS_SWEEP]
    sweep = sorted(
        (kept[place] for place in places),
        key=lambda item: min((order[name] for name in class_of[item] & order.keys()), default=-1),
    )
    for place, item in zip(places, sweep, strict=True):
        kept[place] = item
    place_of = {ROOT / "tests" / name: place for place, name in enumerate(_LONG_FILES)}
    items[:] = sorted(kept, key=lambda item: place_of.get(item.path, len(place_of)))


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage again and again costs one second in twenty."""
    gc.freeze()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def seeds() -> Callable[[int], None]:
    """`seeds(n)` seeds Python, numpy and torch, for code that is compared with itself under one seed."""
    return _seed_everything


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread and one random state for the fixtures of a module too, whatever ran before on this worker."""
    torch.set_num_threads(1)
    _seed_everything(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever fixtures were made before it."""
    _seed_everything(0)


@pytest.fixture(scope="session")
def _package_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path of a process that shall find the package, but neither tests/ nor the checkout."""
    folder = tmp_path_factory.mktemp("package_only")
    (folder / "hf_timm_tower").symlink_to(ROOT / "hf_timm_tower", target_is_directory=True)
    # An editable install puts the whole checkout on the path, and with it `tests.anything`.
    hide = f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    (folder / "sitecustomize.py").write_text(hide)
    return folder


@pytest.fixture(scope="session")
def fresh_process(_package_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`fresh_process(code_or_script, *args, env=None, timeout=300)` runs a new Python and returns what it printed.

    The first argument is source code (str, dedented) or a script (Path); `args` become `sys.argv[1:]`. The process
    runs in a new empty folder, can import `hf_timm_tower` and what is installed, and nothing from tests/. If it ends
    non-zero, AssertionError carries its output. `env` adds to the environment; a value of None takes a name out.
    """

    def run(code: str | Path, *args: object, env: Mapping[str, str | None] | None = None, timeout: float = 300) -> str:
        program = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
        # Neither the current folder nor the script's own comes onto the path (from Python 3.11 on).
        places = {"PYTHONPATH": str(_package_only), "PYTHONSAFEPATH": "1"}
        environment: dict[str, str | None] = {**os.environ, **places, **(env or {})}
        done = subprocess.run(
            [sys.executable, *program, *map(str, args)],
            cwd=tmp_path_factory.mktemp("cwd"),
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            raise AssertionError(
                f"the fresh process ended with {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
            )
        return done.stdout

    return run

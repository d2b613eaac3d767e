"""How far one has to walk to follow a tower through the package, how much of it travels, and who may import whom.

The bounds are what the code needs today: whoever shortens a way lowers its bound, whoever lengthens one says why.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

import hf_timm_tower
from hf_timm_tower.hub.reader_file import READER_NAME

from .home_processes import make_environment
from .hub_worker import HubWorker
from .local_hub import LocalHub

PACKAGE = Path(hf_timm_tower.__file__).parent
NEWEST = Version(transformers.__version__) >= Version("5.24")

# --- the journeys

# Journey -> (files, functions) of this package that run in it.
JOURNEYS = {
    "load a built-in head": (24, 125),
    "load a graph head": (31, 163),
    "load with dtype": (24, 125),
    "save a custom head": (59, 412),
    "save again after training": (47, 320),
    "build with a custom head": (15, 58),
}

# How often the same file of a tower's folder is opened while it is loaded.
OPENED = dict.fromkeys(
    "config.json fingerprint.json head.safetensors model.safetensors.index.json preprocessor_config.json "
    "trunk.safetensors".split(),
    1,
)

# Each journey in a process of its own, which has imported everything and run nothing; what it needs is made in another.
WALK = """
import importlib, json, os, pkgutil, sys
from collections import Counter
import torch, torch.nn as nn
torch.set_num_threads(1)
import hf_timm_tower
from hf_timm_tower import TimmModel, TimmTowerModel

class Head(nn.Module):
    def __init__(self, in_features, embed_dim):
        super().__init__()
        self.hidden, self.out = nn.Linear(in_features, 32), nn.Linear(32, embed_dim)
    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))

package = os.path.dirname(hf_timm_tower.__file__) + os.sep
for found in pkgutil.walk_packages([package], "hf_timm_tower."):
    rooms_of_peers = ("hf_timm_tower.interop.", "hf_timm_tower.embedding.", "hf_timm_tower.cli")
    if not found.name.startswith(rooms_of_peers) and not found.name.endswith("modeling_timm_tower"):
        importlib.import_module(found.name)

def forked(act):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(act()).encode())
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(data)

def walked(prepare, act):
    def measure():
        given, functions, opened, watching = prepare(), set(), Counter(), [False]
        def see(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                code = frame.f_code
                if not code.co_name.startswith("<"):
                    functions.add((code.co_filename, code.co_qualname))
        def audit(event, args):
            if watching[0] and event == "open" and isinstance(args[0], (str, bytes)):
                opened[os.path.basename(os.fsdecode(args[0]))] += 1
        sys.addaudithook(audit)
        watching[0] = True
        sys.setprofile(see)
        act(given)
        sys.setprofile(None)
        watching[0] = False
        files = sorted({name.removeprefix(package) for name, _ in functions})
        return {"files": files, "functions": len(functions), "opened": dict(opened)}
    return forked(measure)

def build(head=None):
    return TimmModel("test_resnet", 16, custom_head=head)

def saved_once():
    tower = build(Head)
    tower.save_pretrained("twice")
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01)
    return tower

def prepare_folders():
    build().save_pretrained("builtin")
    build(Head).save_pretrained("graph")

forked(prepare_folders)
nothing = lambda: None
print("WALKED", json.dumps({
    "load a built-in head": walked(nothing, lambda _: TimmModel.from_pretrained("builtin")),
    "load a graph head": walked(nothing, lambda _: TimmModel.from_pretrained("graph")),
    "load with dtype": walked(nothing, lambda _: TimmModel.from_pretrained("builtin", dtype=torch.bfloat16)),
    "save a custom head": walked(lambda: build(Head), lambda tower: tower.save_pretrained("once")),
    "save again after training": walked(saved_once, lambda tower: tower.save_pretrained("twice")),
    "build with a custom head": walked(nothing, lambda _: build(Head)),
}))
"""


@pytest.fixture(scope="module")
def walked(fresh_process: Callable[..., str]) -> dict[str, dict[str, Any]]:
    printed = fresh_process(WALK)
    line = next(line for line in printed.splitlines() if line.startswith("WALKED "))
    found: dict[str, dict[str, Any]] = json.loads(line.removeprefix("WALKED "))
    return found


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_journey_is_no_longer_than_it_was(journey: str, walked: dict[str, dict[str, Any]]) -> None:
    files, functions = walked[journey]["files"], walked[journey]["functions"]
    assert len(files) > 3, "the profiler sees the package"
    most_files, most_functions = JOURNEYS[journey]
    if not NEWEST and "auto.py" in files:  # it watches imports, and older libraries import something within a save
        files, functions = [name for name in files if name != "auto.py"], functions - 1
    assert len(files) <= most_files, files
    assert functions <= most_functions


@pytest.mark.parametrize("journey", ["load a built-in head", "load a graph head", "load with dtype"])
def test_loading_opens_a_file_of_the_tower_no_more_often_than_it_did(
    journey: str, walked: dict[str, dict[str, Any]]
) -> None:
    opened = walked[journey]["opened"]
    for name, most in OPENED.items():
        assert 1 <= opened[name] <= most, opened


# --- what travels

TRAVELLING_LINES = 4591
# Requests of a cold `AutoModel.from_pretrained(..., trust_remote_code=True)`: for code, and in all. transformers 5.4
# asks once more whether the code is still the same.
CODE_REQUESTS, REQUESTS = (2, 14) if NEWEST else (3, 15)

LOAD = """
import sys
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
"""


def push_builtin(repo_id: str) -> None:
    """In a process that talks to the loopback Hub."""
    hf_timm_tower.TimmModel("test_resnet", 16).push_to_hub(repo_id)


def test_what_travels_is_no_longer_than_it_was() -> None:
    assert len((PACKAGE / "hub" / READER_NAME).read_text().splitlines()) <= TRAVELLING_LINES


def test_a_cold_load_where_the_package_is_absent_makes_no_more_requests_than_it_did(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "venv")
    with LocalHub(tmp_path / "hub") as hub:
        worker = HubWorker(hub.env(tmp_path / "pushing"))
        worker.call(push_builtin, "ann/tower")
        worker.close()
        hub.forget()
        environment.run(LOAD, "ann/tower", env=hub.env(tmp_path / "cold"))
        paths = [f"{entry['method']} {entry['path']}" for entry in hub.log()]
    code = [path for path in paths if re.search(r"\.py(\?|$)", path)]
    assert code, "the code comes from the Hub"
    assert len(code) <= CODE_REQUESTS, code
    assert len(paths) <= REQUESTS, paths


# --- who may import whom

# Floors, lowest first: a module imports from lower floors and from its own room, `TYPE_CHECKING` included.
FLOORS = (
    ("reader",),
    ("files",),
    ("heads", "hub", "trunk_changes"),
    ("training", "subclassing", "trunk_facts"),
    ("build",),
    ("load", "encoder_config", "input_size"),
    ("proof",),
    ("save", "interop", "embedding"),
    ("hub_mixin",),
    ("timm_model", "pretrained", "patches"),
    ("modeling", "backbone"),
    ("encoder",),
    ("auto",),
    ("core", "feature_cache", "unfreezing"),  # old import paths
    ("__init__",),
    ("cli",),
)

# Imports that go up or across today. Only ever shorter: one that is gone must be taken out here.
UPWARD = {
    ("embedding/lancedb.py", "timm_model"),
    ("embedding/ray.py", "timm_model"),
}


def room(parts: list[str]) -> str:
    return parts[0] if parts else "__init__"


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms, or modules at the top, that a file of the package imports, wherever and for whatever."""
    package = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                target = package[: len(package) + 1 - node.level] + module
            elif module[:1] == ["hf_timm_tower"]:
                target = module[1:]
            else:
                continue
            yield from {room([*target, alias.name]) for alias in node.names} if not target else {room(target)}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from {room(parts[1:]) for parts in names if parts[0] == "hf_timm_tower"}


def test_rooms_import_each_other_in_one_direction() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward, seen = set(), set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == READER_NAME:
            continue  # generated of reader/, nothing imports it
        own = room(list(path.relative_to(PACKAGE).with_suffix("").parts))
        assert own in floor, f"{own} is on no floor"
        for target in imported_rooms(path):
            target = target if target in floor else "__init__"  # a name of the public face
            seen.add((own, target))
            if target != own and floor[target] >= floor[own]:
                upward.add((str(path.relative_to(PACKAGE)), target))
    assert ("files", "reader") in seen, "the walk sees a known import"
    assert ("hub_mixin", "reader") in seen
    assert upward - UPWARD == set(), "imports that go up or across"
    assert UPWARD - upward == set(), "these are gone: take them out of the list"

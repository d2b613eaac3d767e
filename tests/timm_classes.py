"""The smallest architecture of every model class of timm, and those that a run of the tests takes.

Finding them means building all 1,371 architectures, a minute and a half of work, so the list for one version of timm is
kept beside this file. `python -m tests.timm_classes` writes it anew.

A run takes a sixth of the classes, which one by the hash of the commit: a person waits for minutes, and every class has
its turn within a few commits. TOWER_CLASSES says otherwise: `all`, or a number as the first lines of a run name it. The
quick six are always taken. Other sweeps go by the same number: `chosen_part` of their members, or `chosen_turn`.
"""

import json
import os
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import timm

from hf_timm_tower.reader.skip_init import skip_init

LIST = Path(__file__).with_name("timm_classes.json")

# One of each kind of trunk: maps in both orders, tokens, attention pool, non-persistent buffers, wide heads.
QUICK = ("test_resnet", "test_vit", "test_mambaout", "test_coatnet", "mobilenetv3_small_050", "efficientvim_m1")

PARTS = 6
TURNS = 12


def class_and_size(architecture: str) -> tuple[str, int]:
    """The class (`module.Class`) of an architecture, and its number of parameters."""
    with skip_init():  # several times quicker than the meta device
        model = timm.create_model(architecture)
    key = f"{type(model).__module__.removeprefix('timm.models.')}.{type(model).__name__}"
    return key, sum(parameter.numel() for parameter in model.parameters())


def find_smallest() -> dict[str, str]:
    """Class (`module.Class`) -> architecture with the fewest parameters, smallest first."""
    found: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        key, size = class_and_size(name)
        found[key] = min(found.get(key, (size, name)), (size, name))
    return {key: name for key, (_, name) in sorted(found.items(), key=lambda item: item[1])}


@lru_cache(maxsize=1)
def smallest_of_each_class() -> dict[str, str]:
    """The list for this timm: the kept one where the version is the same, else found now."""
    kept = json.loads(LIST.read_text())
    return dict(kept["smallest"]) if kept["timm"] == timm.__version__ else find_smallest()


Member = TypeVar("Member")


@lru_cache(maxsize=1)
def _number() -> tuple[int | None, str]:
    """The number by which this run takes its part of the sweeps, None for all of them, and why."""
    wanted = os.environ.get("TOWER_CLASSES", "")
    if wanted == "all":
        return None, "TOWER_CLASSES"
    if wanted:
        if not wanted.isdecimal():
            raise ValueError(f"TOWER_CLASSES={wanted!r}: expected 'all' or a number")
        return int(wanted) % (PARTS * TURNS), "TOWER_CLASSES"
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=LIST.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 0, "no commit, as none is known here"
    return int(head, 16) % (PARTS * TURNS), f"commit {head[:12]}"


@lru_cache(maxsize=1)
def chosen_classes() -> frozenset[str]:
    """The classes of `smallest_of_each_class` that this run takes: of every six neighbours in size one, and QUICK."""
    taken = set(chosen_part(smallest_of_each_class()))
    return frozenset(key for key, smallest in smallest_of_each_class().items() if key in taken or smallest in QUICK)


def chosen_part(members: Iterable[Member]) -> list[Member]:
    """Every sixth member of a sweep, or all of them."""
    number, _ = _number()
    return list(members) if number is None else list(members)[number % PARTS :: PARTS]


def chosen_turn(members: Iterable[Member], turns: int) -> list[Member]:
    """One in `turns` of the ways to look at a member, by the same number and not by the member's part; or all of them.

    Args:
        members: The ways.
        turns: A divisor of TURNS.
    """
    number, _ = _number()
    return list(members) if number is None else list(members)[number // PARTS % turns :: turns]


def describe_choice() -> str:
    """One line for the header of a run."""
    number, why = _number()
    which = "all" if number is None else f"TOWER_CLASSES={number}"
    return f"timm classes: {len(chosen_classes())} of {len(smallest_of_each_class())} ({which}, by {why})"


if __name__ == "__main__":
    LIST.write_text(json.dumps({"timm": timm.__version__, "smallest": find_smallest()}, indent=1) + "\n")

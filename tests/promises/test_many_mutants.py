"""Two thousand mutated folders, loaded one after the other: the tower that was saved or a refusal, at a bounded cost.

A run takes a sixth of them, as it takes a sixth of timm's classes.

`tests/mutants.py` makes them from a good tower by seeds: config, graph, index, headers, fingerprint, processor, card,
and files, links, pipes and folders that have no business there.
"""

from collections import Counter
from pathlib import Path

import pytest

from ..hub_worker import HubWorker
from ..mutant_runs import Run, run_mutants
from ..timm_classes import chosen_part

# A good load of this tower takes 0.05 s and 10 MB.
MOST_SECONDS = 5.0
MOST_BYTES = 2**29
# Whose weights stand in a file that no other file describes to the byte; `verify()` tells them apart.
MAY_BE_TOLD = ("in_header",)


def check(runs: list[Run], least_refused: int) -> None:
    """Every run is equal or refused, and did no harm; the figures are printed."""
    counts = Counter(f"{run.kind}, {run.act}: {run.outcome.partition(':')[0]}" for run in runs)
    for line, count in sorted(counts.items()):
        print(f"{count:5} {line}")
    print(f"most: {max(run.seconds for run in runs):.2f} s, {max(run.bytes_more for run in runs) / 2**20:.0f} MiB")
    bad = [
        run
        for run in runs
        if not (run.outcome in ("equal", "refused", "warned") or (run.outcome == "told" and run.kind in MAY_BE_TOLD))
        or run.harm
        or run.seconds > MOST_SECONDS
        or run.bytes_more > MOST_BYTES
    ]
    assert bad == [], f"{len(bad)} of {len(runs)}"
    assert sum(run.outcome == "refused" for run in runs) >= least_refused, "the mutants are no longer bad"


@pytest.mark.slow
def test_two_thousand_mutated_folders_load_equal_are_warned_of_or_refused(tmp_path: Path) -> None:
    # twenty together, so that every kind and every way to load it is among them
    seeds = [seed for first in chosen_part(range(0, 2000, 20)) for seed in range(first, first + 20)]
    worker = HubWorker({"HF_HUB_OFFLINE": "1"})
    runs = worker.start(run_mutants, str(tmp_path), seeds).result(timeout=900)
    worker.close()
    assert len({run.seed for run in runs}) == len(seeds) >= 320
    check(runs, len(seeds) * 9 // 20)


def test_a_few_mutated_folders_load_equal_are_warned_of_or_refused(tmp_path: Path) -> None:
    worker = HubWorker({"HF_HUB_OFFLINE": "1"})
    runs = worker.call(run_mutants, str(tmp_path), range(40))
    worker.close()
    check(runs, 15)

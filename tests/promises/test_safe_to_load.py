"""Loading a stranger's repository: the tower that it describes or a clear error, no code, no harm, in bounded time.

Ninety mutated repositories lie on the loopback Hub and are loaded through the real client, each in a process of
its own that watches what it does (`hub_calls.load_watched`).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_timm_tower import TowerError

from .. import hub_calls as calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub
from ..mutants import mutant
from ..timm_classes import chosen_turn

MOST_SECONDS = 5.0
MOST_BYTES = 2**30


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        cache = tmp_path_factory.mktemp("cache")
        worker = HubWorker(hub.env(cache))
        yield worker
        worker.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, client: HubWorker) -> tuple[dict[str, bytes], str]:
    folder = tmp_path_factory.mktemp("good") / "tower"
    numbers = client.call(calls.save, 1, str(folder))
    return calls.files_of(str(folder)), numbers


def check(client: HubWorker, good: tuple[dict[str, bytes], str], seeds: range, cache: Path) -> None:
    files, numbers = good
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        kind, bad = mutant(files, seed)
        repo = f"ann/mutant-{seed}"
        client.call(calls.push_files, repo, bad)
        seen = client.call(calls.load_watched, repo, str(cache))
        where = f"mutant {seed} ({kind}): {seen.outcome}"
        assert seen.harm == [], where
        assert seen.seconds < MOST_SECONDS, where
        assert seen.bytes_more < MOST_BYTES, where
        if isinstance(seen.outcome, TowerError):
            outcomes[f"{kind}: refused"] += 1
            continue
        assert isinstance(seen.outcome, str), f"{where!r} is no TowerError"
        # It loaded: as the tower that it was, or as another one that the fingerprint tells from it.
        assert seen.outcome == numbers or seen.verified != "equal", where
        outcomes[f"{kind}: loaded, {'equal' if seen.outcome == numbers else seen.verified}"] += 1
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:4} {outcome}")
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("refused")) > len(seeds) // 2


def test_the_watcher_sees_harm(client: HubWorker, good: tuple[dict[str, bytes], str], tmp_path: Path) -> None:
    harm = client.call(calls.watch_harm, str(tmp_path / "cache"), str(tmp_path / "outside"))
    assert {line.split(":")[0] for line in harm} == {"code of the cache", "written outside", "process"}


def test_mutated_repositories_load_or_are_refused(
    client: HubWorker, good: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    check(client, good, range(30), tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", chosen_turn([range(first, first + 15) for first in range(1000, 1060, 15)], 4), ids=str
)
def test_sixty_more_mutated_repositories_load_or_are_refused(
    seeds: range, client: HubWorker, good: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    check(client, good, seeds, tmp_path / "cache")

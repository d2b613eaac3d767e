"""What goes wrong on a network: a push or load succeeds or says so, and the last good tower stays whole."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_timm_tower import HubError

from .. import hub_calls as calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub
from ..timm_classes import chosen_turn

REPO = "ann/tower"
KILLS = chosen_turn(range(20), 2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    cache = tmp_path_factory.mktemp("cache")
    worker = HubWorker(hub.env(cache))
    worker.call(calls.push, REPO, 0)
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _no_faults(hub: LocalHub) -> Iterator[None]:
    hub.forget()
    yield
    hub.faults()


def requests_of(hub: LocalHub, do: object) -> int:
    """How many requests an undisturbed call makes."""
    hub.forget()
    assert callable(do)
    do()
    return len(hub.log())


# Requests are refused by turns with the one and the other; a run of everything also has it the other way round.
STATUSES = chosen_turn([(503, 429), (429, 503)], 2)


@pytest.mark.parametrize("statuses", STATUSES, ids=str)
def test_push_with_any_single_request_refused(hub: LocalHub, client: HubWorker, statuses: tuple[int, int]) -> None:
    known = {client.call(calls.load, REPO)}
    count = requests_of(hub, lambda: known.add(client.call(calls.push, REPO, 100 + statuses[0])[1]))
    assert count >= 5
    succeeded = 0
    for number in range(1, count + 1):
        status = statuses[number % 2]
        hub.faults({"nth": number, "status": status, "retry_after": 0})
        try:
            # a new seed each time, or there would be nothing to upload
            _, numbers = client.call(calls.push, REPO, 1000 * statuses[0] + number)
        except HubError as error:
            assert REPO in str(error)
            # older clients (1.5) give what the cache has for the whole, without the status
            assert str(status) in str(error) or "could not be reached" in str(error)
            numbers = client.call(calls.load, REPO)
            assert numbers in known, "a push that failed changed the tower"
        else:
            succeeded += 1
        hub.faults()
        assert client.call(calls.load, REPO) == numbers
        known.add(numbers)
    print(f"{succeeded} of {count} pushes succeeded by retrying, the others said so")


@pytest.mark.parametrize("statuses", STATUSES, ids=str)
def test_load_with_any_single_request_refused(
    hub: LocalHub, client: HubWorker, tmp_path: Path, statuses: tuple[int, int]
) -> None:
    _, numbers = client.call(calls.push, REPO, statuses[0])
    count = requests_of(hub, lambda: client.call(calls.load, REPO, cache_dir=str(tmp_path / "count")))
    assert count >= 5
    succeeded = 0
    for number in range(1, count + 1):
        cache = str(tmp_path / str(number))
        hub.faults({"nth": number, "status": statuses[number % 2], "retry_after": 0})
        try:
            assert client.call(calls.load, REPO, cache_dir=cache) == numbers
            succeeded += 1
        except HubError as error:
            assert REPO in str(error)
        hub.faults()
        assert client.call(calls.load, REPO, cache_dir=cache) == numbers
    print(f"{succeeded} of {count} loads succeeded by retrying, the others said so")


@pytest.mark.parametrize("after", [0, 1000, 100_000])
def test_connection_cut_once_during_a_download_is_taken_up_again(
    hub: LocalHub, client: HubWorker, tmp_path: Path, after: int
) -> None:
    numbers = client.call(calls.load, REPO)
    rule = {"method": "GET", "path": "/_storage/", "cut": "down", "after": after, "times": 1}
    hub.faults(rule)
    try:
        assert client.call(calls.load, REPO, cache_dir=str(tmp_path / "c")) == numbers
    except HubError as error:
        assert REPO in str(error)
    assert hub.rules()[0]["met"] == 1
    hub.faults()
    assert client.call(calls.load, REPO, cache_dir=str(tmp_path / "c")) == numbers


def test_connection_cut_for_good_leaves_the_earlier_commit_in_the_cache(
    hub: LocalHub, client: HubWorker, tmp_path: Path
) -> None:
    cache = str(tmp_path / "c")
    url, old = client.call(calls.push, REPO, 31)
    client.call(calls.load, REPO, cache_dir=cache)
    _, new = client.call(calls.push, REPO, 32)
    hub.faults({"method": "GET", "path": "/_storage/", "cut": "down", "after": 5000})
    with pytest.raises(HubError, match=REPO):
        client.call(calls.load, REPO, cache_dir=cache)
    hub.faults()
    commit = url.rpartition("/")[2]
    assert client.call(calls.load, REPO, cache_dir=cache, revision=commit, local_files_only=True) == old
    assert client.call(calls.load, REPO, cache_dir=cache) == new


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "PUT", "cut": "up", "after": 1000},
        {"method": "PUT", "cut": "answer"},
        {"method": "POST", "path": "/commit/", "cut": "up", "after": 10},
        {"method": "POST", "path": "/commit/", "cut": "answer"},
        {"method": "POST", "path": "/preupload/", "cut": "answer"},
    ],
    ids=["upload", "upload answered by nothing", "commit", "commit answered by nothing", "preupload"],
)
def test_connection_cut_during_a_push(hub: LocalHub, client: HubWorker, rule: dict[str, object]) -> None:
    old = client.call(calls.load, REPO)
    seed = random.Random(str(rule)).randrange(10**6)
    numbers = client.call(calls.numbers_of, seed)
    hub.faults({**rule, "times": 1})
    try:
        client.call(calls.push, REPO, seed)
        expected = {numbers}
    except HubError as error:
        assert REPO in str(error)
        # a commit whose answer was lost is made all the same: the new tower, whole
        expected = {old, numbers} if rule["cut"] == "answer" and "commit" in str(rule.get("path")) else {old}
    assert hub.rules()[0]["met"] == 1
    hub.faults()
    assert client.call(calls.load, REPO) in expected
    client.call(calls.push, REPO, seed)
    assert client.call(calls.load, REPO) == numbers


@pytest.mark.parametrize("place", [0, 8, 5000, -1])
def test_object_that_arrives_damaged_is_refused_and_does_not_stay_in_the_cache(
    hub: LocalHub, client: HubWorker, tmp_path: Path, place: int
) -> None:
    cache = str(tmp_path / "c")
    numbers = client.call(calls.load, REPO)
    hub.faults({"method": "GET", "path": "/_storage/", "corrupt": place})
    for _ in range(2):
        with pytest.raises(HubError, match=rf"{REPO}.*safetensors arrived damaged"):
            client.call(calls.load, REPO, cache_dir=cache)
    hub.faults()
    assert client.call(calls.load, REPO, cache_dir=cache) == numbers


def test_json_that_arrives_damaged_is_refused_and_does_not_stay_in_the_cache(
    hub: LocalHub, client: HubWorker, tmp_path: Path
) -> None:
    cache = str(tmp_path / "c")
    numbers = client.call(calls.load, REPO)
    hub.faults({"method": "GET", "path": "/resolve/.*config.json", "corrupt": 200})
    with pytest.raises(HubError, match=rf"{REPO}.*config\.json arrived damaged"):
        client.call(calls.load, REPO, cache_dir=cache)
    hub.faults()
    assert client.call(calls.load, REPO, cache_dir=cache) == numbers


def test_killed_push_leaves_the_old_or_the_new_tower(hub: LocalHub, client: HubWorker) -> None:
    known = {client.call(calls.load, REPO)}
    started = time.monotonic()
    known.add(client.call(calls.push, REPO, 500)[1])
    usual = time.monotonic() - started
    finished = 0
    for number in KILLS:
        seed = 501 + number
        known.add(client.call(calls.numbers_of, seed))
        job = client.start(calls.push, REPO, seed)
        time.sleep(random.Random(number).uniform(0.02, 1.1) * usual)
        finished += job.is_done()
        job.kill()
        assert client.call(calls.load, REPO) in known, f"kill {number}"
    assert finished < len(KILLS), "no push was killed"
    _, last = client.call(calls.push, REPO, 999)
    assert client.call(calls.load, REPO) == last
    print(f"{len(KILLS) - finished} of {len(KILLS)} pushes were killed before their end")


def test_hub_that_is_down_is_named_and_the_cache_still_serves(hub: LocalHub, client: HubWorker, tmp_path: Path) -> None:
    cache = str(tmp_path / "c")
    numbers = client.call(calls.load, REPO, cache_dir=cache)
    hub.stop()
    try:
        assert client.call(calls.load, REPO, cache_dir=cache) == numbers, "as huggingface_hub: what is in the cache"
        with pytest.raises(HubError, match=r"ann/other cannot be loaded.*out of reach"):
            client.call(calls.load, "ann/other", cache_dir=cache)
        with pytest.raises(HubError, match=rf"{REPO} cannot be pushed to.*connection"):
            client.call(calls.push, REPO, 1)
    finally:
        hub.start()
    assert client.call(calls.load, REPO) == numbers

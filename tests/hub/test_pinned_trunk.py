"""A trunk that is stored in another repository is published by nobody who does not ask for it, told by the bytes."""

import re
from collections.abc import Iterator

import pytest

from .. import pinned_calls as calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

BASE, HEAD = "ann/base", "ann/head"
Found = dict[str, tuple[str, list[str]]]


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
        yield worker
        worker.close()


@pytest.fixture(scope="module")
def found(ann: HubWorker) -> Found:
    published: Found = ann.call(calls.publish_all, BASE, HEAD)
    return published


def test_the_search_finds_the_trunk_where_it_is(found: Found) -> None:
    assert found["base"] == ("", ["trunk.safetensors"])
    assert found["head"] == ("", [])


@pytest.mark.parametrize("way", calls.STAYS)
def test_what_is_pushed_of_a_head_holds_no_byte_of_its_trunk(found: Found, way: str) -> None:
    assert found[way] == ("", [])


@pytest.mark.parametrize("way", calls.REFUSED)
def test_where_it_cannot_stay_nothing_is_pushed_and_the_remedy_is_named(found: Found, way: str) -> None:
    refusal, files = found[way]
    assert files == []
    assert re.search(r"(?s)ann/base.*trunk=False.*config\.trunk_source = None", refusal)


@pytest.mark.parametrize("way", calls.NAMED)
def test_who_names_it_gives_it_away(found: Found, way: str) -> None:
    refusal, files = found[way]
    assert refusal == ""
    assert files


def test_a_trunk_that_will_move_is_told_before_it_trains(ann: HubWorker, found: Found) -> None:
    frozen, trains, *face = ann.call(calls.said_before_training, HEAD)
    assert frozen == ""
    assert re.search(r"(?s)ann/base.*saves will be refused.*trunk=False", trains)
    assert face == [frozen, trains]

"""Repositories that open_clip wrote, read by their id: the same bits, no more files than needed, no text tower."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_timm_tower import FolderError, HubError

from .. import open_clip_calls as calls
from ..hub_calls import api, list_files
from ..hub_worker import HubWorker
from ..local_hub import LocalHub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def ann(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def pushed(ann: HubWorker, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two commits of ann/tower, the older first."""
    return [ann.call(calls.push, "ann/tower", str(tmp_path_factory.mktemp("scratch")), seed) for seed in range(2)]


def assert_loads(ann: HubWorker, expected: Any, source: str, **kwargs: Any) -> None:
    _, weights, output = expected
    found, ours, preprocess = ann.call(calls.load, source, **kwargs)
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in found.items())
    assert torch.equal(ours, output)
    assert {key: preprocess[key] for key in ("mean", "std", "interpolation", "crop_mode")} == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_mode": "squash",
    }


def test_a_repository_of_open_clip_is_read_by_its_id_at_any_revision(ann: HubWorker, pushed: list[Any]) -> None:
    older, newer = pushed
    assert not torch.equal(older[2], newer[2])
    ann.call(api, "create_tag", "ann/tower", tag="v1", revision=older[0])
    for source in ("ann/tower", "hf-hub:ann/tower"):
        assert_loads(ann, newer, source)
        for revision, expected in {older[0]: older, "v1": older, newer[0]: newer, "main": newer}.items():
            assert_loads(ann, expected, source, revision=revision)
    assert_loads(ann, older, "ann/tower", revision=older[0], local_files_only=True)
    with pytest.raises(HubError, match=r"ann/tower cannot be loaded at revision 'v9'.*no revision 'v9'"):
        ann.call(calls.load, "ann/tower", revision="v9")


def test_only_config_and_weights_are_downloaded(
    hub: LocalHub, ann: HubWorker, pushed: list[Any], tmp_path: Path
) -> None:
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "README.md"} <= set(
        ann.call(list_files, "ann/tower")
    )
    hub.forget()
    assert_loads(ann, pushed[1], "ann/tower", cache_dir=str(tmp_path / "cache"))
    named = {entry["path"].rpartition("/")[2] for entry in hub.log() if "/resolve/" in entry["path"]}
    assert named == {"open_clip_config.json", "open_clip_model.safetensors"}
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*"))
    assert snapshot.name == pushed[1][0]
    sizes = {path.name: path.stat().st_size for path in snapshot.iterdir()}
    assert sizes.keys() == named
    assert sorted(hub.downloaded().values()) == sorted(sizes.values()), "each once"


def test_a_pickle_of_a_repository_is_not_even_fetched_unless_asked_for(
    hub: LocalHub, ann: HubWorker, tmp_path: Path
) -> None:
    expected = ann.call(calls.push, "ann/pickled", str(tmp_path), safe=False)
    assert "open_clip_pytorch_model.bin" in ann.call(list_files, "ann/pickled")
    hub.forget()
    with pytest.raises(FolderError, match=r"ann/pickled has no weights that are read here.*allow_pickle=True"):
        ann.call(calls.load, "ann/pickled")
    assert not [entry["path"] for entry in hub.log() if entry["path"].endswith(".bin")]
    assert_loads(ann, expected, "ann/pickled", allow_pickle=True)


def test_a_repository_of_another_kind_is_named(ann: HubWorker) -> None:
    ann.call(api, "create_repo", "ann/empty")
    with pytest.raises(HubError, match=r"ann/empty at commit [0-9a-f]{40}: open_clip_config\.json is missing"):
        ann.call(calls.load, "ann/empty")


def test_loading_by_id_takes_no_more_memory_than_the_vision_tower(
    ann: HubWorker, pushed: list[Any], tmp_path: Path
) -> None:
    ann.call(calls.push, "ann/large", str(tmp_path), config=calls.LARGE)
    peak, vision = ann.call(calls.memory_of_load, "ann/tower", "ann/large", str(tmp_path / "cache"))
    whole = next((tmp_path / "cache").glob("models--ann--large/snapshots/*/*.safetensors")).stat().st_size
    print(f"vision {vision}, whole {whole}, peak {peak}, ratio {peak / vision:.3f}")
    assert whole > 1.5 * vision  # reading it all would show
    assert vision < peak < 1.2 * vision

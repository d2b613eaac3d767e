"""Tokens and other secrets stay out of messages; pinned files are known by their bytes; a source is checked."""

import os
from pathlib import Path
from typing import Any

import pytest

from hf_timm_tower import ArgumentError, ConfigError, FormatError, HubError, TimmModel
from hf_timm_tower.hub.download import Access, hub_errors
from hf_timm_tower.hub.push import PushOptions
from hf_timm_tower.hub.trunk_source import _digest
from hf_timm_tower.reader.weights import parse_trunk_source

SECRET = "hf_SECRETSECRET"


@pytest.mark.parametrize("token", [f"{SECRET}\n", f"\r{SECRET}", f" {SECRET}", f"{SECRET}\0", f"{SECRET}\u00e9", ""])
def test_a_token_that_no_header_can_hold_is_refused_without_being_shown(token: str) -> None:
    tower = TimmModel("test_resnet", 8)
    for call in (
        lambda: TimmModel.from_pretrained("me/x", token=token),
        lambda: tower.push_to_hub("me/x", token=token),
        lambda: Access(token),
        lambda: PushOptions(token=token),
    ):
        with pytest.raises(ArgumentError, match="token") as told:
            call()
        assert "SECRET" not in str(told.value)


def test_no_record_shows_its_token() -> None:
    assert SECRET not in f"{Access(SECRET)} {PushOptions(token=SECRET)}"


@pytest.mark.parametrize(
    "said",
    [
        f"Illegal header value b'Bearer {SECRET}'",
        "Illegal header value b'Bearer some-other-token'",
        f"https://me:{SECRET}@hub.example/api refused",
        "https://me:other@hub.example/api refused",
        f"401 for token={SECRET}",
    ],
)
def test_what_the_client_says_is_quoted_without_secrets(said: str) -> None:
    with pytest.raises(HubError) as told, hub_errors("cannot be loaded", "me/x"):
        raise OSError(said)
    assert not any(secret in str(told.value) for secret in (SECRET, "some-other-token", "me:other"))


def test_what_the_hub_says_is_printable_short_and_on_one_line() -> None:
    with pytest.raises(HubError) as told, hub_errors("cannot be loaded", "me/x", "\x1b[2J"):
        raise OSError("\x1b]0;owned\x07 line\nfeed \u202e" + "x" * 10_000)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 700


def test_a_pinned_file_is_known_by_its_bytes_and_read_again_when_touched(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"one")
    link = tmp_path / "trunk.safetensors"
    link.symlink_to(blob)
    first = _digest(link)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256sum of "one"
    status = blob.stat()
    blob.write_bytes(b"two")
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk that fails would leave it
    assert _digest(link) != first


SOURCE = {"repo_id": "me/x", "commit": "a" * 40, "layout": "tower", "files": {"t.safetensors": "0" * 64}, "unused": []}


@pytest.mark.parametrize(
    "change",
    [
        {"repo_id": "me/x\x1b[2J"},
        {"repo_id": "../../etc"},
        {"repo_id": "a/b/c"},
        {"repo_id": 5},
        {"commit": "main"},
        {"layout": "\x1b[2J"},
        {"files": {}},
        {"files": {f"{i}.safetensors": "0" * 64 for i in range(1001)}},
        {"files": {"\x1b[2J.bin": "0" * 64}},
        {"files": {"../t.safetensors": "0" * 64}},
        {"files": {"t.safetensors": "main"}},
        {"unused": "x"},
        {"more": 1},
    ],
)
def test_a_source_of_a_foreign_config_is_checked_before_anything_is_fetched(change: dict[str, Any]) -> None:
    assert parse_trunk_source(SOURCE).repo_id == "me/x"
    with pytest.raises((ConfigError, FormatError)) as told:
        parse_trunk_source({**SOURCE, **change})
    assert str(told.value).isprintable()


def test_metrics_do_not_outlive_the_weights_they_were_measured_with(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.save_pretrained(tmp_path, metrics={"accuracy": 0.5})
    tower.save_pretrained(tmp_path)
    assert "accuracy" in (tmp_path / "README.md").read_text()
    tower.head.get_parameter("proj.weight").data.add_(1)
    with pytest.warns(UserWarning, match="other weights"):
        tower.save_pretrained(tmp_path)
    assert "accuracy" not in (tmp_path / "README.md").read_text()
    tower.save_pretrained(tmp_path, metrics={"accuracy": 0.75})
    with pytest.warns(UserWarning, match="other weights"):
        TimmModel("test_vit", 8, pool="token").save_pretrained(tmp_path)
    assert "accuracy" not in (tmp_path / "README.md").read_text()

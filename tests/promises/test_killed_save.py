"""`kill -9` at random moments of a save: the folder holds the old tower or the new one, whole, every time."""

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_timm_tower import FolderError, TimmModel
from hf_timm_tower.files.json import write_json
from hf_timm_tower.files.names import CONFIG_NAME
from hf_timm_tower.files.open_folder import OpenFolder
from hf_timm_tower.files.staging import read_folder, staged_folder
from hf_timm_tower.files.weights import read_weights, write_weights
from hf_timm_tower.reader.weights import assign_weights

from ..odd_places import mounted, refuse_exchange

PLACES = {"exchanged": 30, "committed": 30, "current folder": 10, "mount point": 10, "link": 10, "no exchange": 10}
"""Where it is saved -> how often it is killed there."""


class Tower(nn.Module):
    """About 2 MB in several tensors, odd sizes among them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(256, 256) for _ in range(7)), nn.BatchNorm1d(7))
        self.head = nn.Linear(256, 3)


def save(folder: Path, version: int) -> None:
    tower = Tower()
    with torch.no_grad():
        for tensor in tower.state_dict().values():
            tensor.fill_(version)
    with staged_folder(folder) as new:
        write_json(new / CONFIG_NAME, {"version": version})
        write_weights(new, tower, "500KB")


def load(folder: Path) -> int:
    """The version that config and all weights agree on, loaded into a module as a user would."""

    def read(opened: OpenFolder) -> tuple[int, dict[str, torch.Tensor]]:
        return opened.read_json(CONFIG_NAME)["version"], read_weights(opened)

    version, weights = read_folder(folder, read)
    tower = Tower().to("meta")
    assign_weights(tower, weights, source=str(folder))
    values = {int(value) for tensor in tower.state_dict().values() for value in tensor.unique()}
    assert values == {version}
    return version


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_save_leaves_the_old_or_the_new_tower(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tower"
    target.mkdir()
    with contextlib.ExitStack() as stack:
        if place == "mount point":
            stack.enter_context(mounted(target, "-t", "tmpfs", "tmpfs"))
        if place == "current folder":
            monkeypatch.chdir(target)
        refused = refuse_exchange(monkeypatch) if place == "no exchange" else None
        save(target, 0)
        (target / "optimizer.pt").write_text("mine")
        if place == "committed":
            (target / "runs").mkdir()  # a folder of the user's keeps folders from being exchanged
        if place == "link":
            (tmp_path / "link").symlink_to("tower")
            target = tmp_path / "link"
        kill_and_look(target, PLACES[place])
        assert refused is None or refused, "it was asked to exchange the folders"
        left = {name for name in [*os.listdir(target), *os.listdir(tmp_path)] if "tower-" in name}
        assert left == set()
        assert (tmp_path / "link").is_symlink() == (place == "link")
        monkeypatch.undo()


def kill_and_look(target: Path, kills: int) -> None:
    """Kill savers to a folder again and again, and load what is there each time; at the end a save goes through."""
    began = time.monotonic()
    for version in (1, 2, 3):
        save(target, version)
    one_save = (time.monotonic() - began) / 3
    version, killed_early, killed_late = 3, 0, 0
    moments = random.Random(20)
    saves, said = os.pipe()
    for kill in range(kills):
        child = os.fork()
        if not child:
            try:
                for next_version in range(version + 1, version + 1000):  # always in the middle of some save
                    save(target, next_version)
                    os.write(said, b".")
            finally:
                os._exit(1)
        if kill % 2:
            os.read(saves, 1)  # not before its first save is done, however busy the machine is
        time.sleep(moments.uniform(0, 2 * one_save))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.set_blocking(saves, False)
        with contextlib.suppress(BlockingIOError):
            os.read(saves, 1000)
        os.set_blocking(saves, True)
        found = load(target)
        assert found >= version
        killed_early += found == version
        killed_late += found > version
        version = found
        assert (target / "optimizer.pt").read_text() == "mine"
    assert killed_early, "no kill came before its first save was done"
    assert killed_late, "no kill came after one"
    save(target, 10_000)
    assert load(target) == 10_000


def test_a_disk_that_is_full_at_any_write_leaves_the_old_tower_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"channels": (8, 8, 16, 16), "stem_width": 8}
    old, new = (TimmModel("test_resnet", 8, 64, model_kwargs=small).eval() for _ in range(2))
    disk, image = tmp_path / "disk", torch.rand(1, 3, 64, 64)
    disk.mkdir()
    old.save_pretrained(tmp_path / "measured")
    size = sum(file.stat().st_size for file in (tmp_path / "measured").iterdir())
    with mounted(disk, "-t", "tmpfs", "-o", f"size={3 * size + 2**18}", "tmpfs"):
        target = disk / "tower"
        old.save_pretrained(target)
        names, fails = sorted(os.listdir(target)), 0
        for left in range(0, 2 * size, 2**14):
            ballast = max(shutil.disk_usage(disk).free - left, 0)
            (disk / "ballast").write_bytes(bytes(ballast))
            try:
                new.save_pretrained(target)
            except FolderError as error:
                assert error.errno == errno.ENOSPC, error  # noqa: PT017
                fails += 1
            else:
                break
            (disk / "ballast").unlink()
            assert sorted(os.listdir(target)) == names
            assert os.listdir(disk) == ["tower"]
            assert torch.equal(TimmModel.from_pretrained(target)(image), old(image))
        assert fails > 10
        assert torch.equal(TimmModel.from_pretrained(target)(image), new(image))

"""A save is swapped in whole, at every moment, wherever the folder lies; what is not ours stays."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hf_timm_tower.files import disk, staging
from hf_timm_tower.files import names as names_module
from hf_timm_tower.files import records as records_module
from hf_timm_tower.files.json import write_json
from hf_timm_tower.files.names import (
    CARD_NAME,
    CONFIG_NAME,
    FINGERPRINT_NAME,
    HEAD_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    TRUNK_NAME,
    digest_of,
)
from hf_timm_tower.files.open_folder import OpenFolder, read_json
from hf_timm_tower.files.staging import read_folder, staged_folder
from hf_timm_tower.files.weights import read_weights, write_weights
from hf_timm_tower.reader.errors import FolderError

from ..odd_places import mounted

WEIGHTS = {CONFIG_NAME, INDEX_NAME, TRUNK_NAME, HEAD_NAME}

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged on Linux only")


def save(folder: Path, version: int, size: int = 100) -> None:
    """A save whose every file says which one it is."""
    state = {key: torch.full((size,), version, dtype=torch.int32) for key in ("trunk.a", "trunk.b", "head.a")}
    with staged_folder(folder) as new:
        write_json(new / CONFIG_NAME, {"version": version})
        write_weights(new, torch.nn.Module(), state=state)


def version_of(folder: Path) -> int:
    """Which save the folder holds for our reader; fails on a mix."""

    def read(opened: OpenFolder) -> set[int]:
        weights = read_weights(opened)
        assert weights.keys() == {"trunk.a", "trunk.b", "head.a"}
        return {opened.read_json(CONFIG_NAME)["version"], *(int(v) for t in weights.values() for v in t.unique())}

    (version,) = read_folder(folder, read)
    return version


def version_for_others(folder: Path) -> int | None:
    """Which save readers see that know the ecosystem's files only; None where they find no weights."""
    if (folder / SINGLE_NAME).exists():
        names = {SINGLE_NAME}
    elif (folder / INDEX_NAME).exists():
        names = set(read_json(folder / INDEX_NAME)["weight_map"].values())
    else:
        return None
    values = {int(value) for name in names for tensor in load_file(folder / name).values() for value in tensor.unique()}
    (version,) = values | {read_json(folder / CONFIG_NAME)["version"]}
    return version


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# Where the folder lies


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "tower"
    save(target, 1)
    assert version_of(target) == version_for_others(target) == 1
    assert names(target) == WEIGHTS
    assert names(target.parent) == {"tower"}


@linux_only
def test_a_save_replaces_the_folder_at_once(tmp_path: Path) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    before = os.open(target, os.O_RDONLY)
    save(target, 2)
    assert not os.path.samestat(os.fstat(before), os.stat(target))
    os.close(before)
    assert version_of(target) == version_for_others(target) == 2
    assert names(tmp_path) == {"tower"}


def test_the_current_directory_stays_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    save(Path("."), 2)
    assert version_of(Path(".")) == version_of(tmp_path) == 2
    assert names(tmp_path) == WEIGHTS


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    save(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "real") == 2
    (tmp_path / "dangling").symlink_to("elsewhere")
    save(tmp_path / "dangling", 3)
    assert version_of(tmp_path / "elsewhere") == 3


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    for target in (tmp_path / ("x" * 255), tmp_path / ("ü" * 127)):
        save(target, 1)
        save(target, 2)
        assert version_of(target) == 2
    assert len(names(tmp_path)) == 2


@linux_only
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_saved_into(tmp_path: Path, kind: str) -> None:
    target, source = tmp_path / "a tower", tmp_path / "source"
    target.mkdir()
    source.mkdir()
    with mounted(target, *(["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(source)])):
        save(target, 1)
        save(target, 2)
        assert version_of(target) == version_for_others(target) == 2
        assert names(target) == WEIGHTS
        # Placed beside it for want of knowing better, then found to lie on another mount.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(staging, "is_mount", lambda folder: False)
            save(target, 3)
        assert version_of(target) == version_for_others(target) == 3
        assert names(target) == WEIGHTS
    assert names(tmp_path) == {"a tower", "source"}


@contextmanager
def not_root(*owned: Path) -> Iterator[None]:
    """The block runs as a user whom modes bind, who owns `owned`."""
    if os.geteuid():
        yield
        return
    for path in owned:
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary folder that other users may enter; pytest's are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_parent_that_cannot_be_written_is_no_obstacle(open_path: Path) -> None:
    parent = open_path / "parent"
    target = parent / "tower"
    target.mkdir(parents=True)
    os.chmod(parent, 0o555)
    try:
        with not_root(target):
            save(target, 1)
            save(target, 2)
            assert version_of(target) == 2
            assert names(target) == WEIGHTS
    finally:
        os.chmod(parent, 0o755)


def test_a_folder_of_another_owner_keeps_its_owner(open_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make folders of other users")
    target = open_path / "tower"
    target.mkdir()
    os.chown(target, 65534, 65534)
    os.chmod(target, 0o2775)
    save(target, 1)
    save(target, 2)
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (65534, 65534, 0o2775)


# What is not ours, and what is


@pytest.mark.parametrize("with_folder", [False, True])
def test_other_files_survive_and_an_earlier_saves_own_do_not(tmp_path: Path, with_folder: bool) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    kept = {"optimizer.pt", "notes.txt", ".hidden", CARD_NAME, "adapter_model.safetensors"}
    for name in kept:
        (target / name).write_text(f"content of {name}")
    (target / "link").symlink_to("notes.txt")
    (target / "dangling").symlink_to("nowhere")
    stale = {SINGLE_NAME, FINGERPRINT_NAME, "trunk-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"}
    for name in stale:
        (target / name).write_bytes(b"stale")
    index = json.loads((target / INDEX_NAME).read_text())
    index["weight_map"].update({name: name for name in stale if name.endswith(".safetensors")})
    (target / INDEX_NAME).write_text(json.dumps(index))
    for name in ("classifier.safetensors", "trunk-00007-of-00009.safetensors"):  # no save here wrote these
        (target / name).write_bytes(b"mine")
        kept.add(name)
    if with_folder:
        (target / ".git").mkdir()
        (target / ".git" / "HEAD").write_text("ref")
    inode = (target / "optimizer.pt").stat().st_ino
    save(target, 2)
    assert names(target) == WEIGHTS | kept | {"link", "dangling"} | ({".git"} if with_folder else set())
    assert version_of(target) == version_for_others(target) == 2
    for name in kept:
        assert (target / name).read_text() in (f"content of {name}", "mine")
    assert (target / "optimizer.pt").stat().st_ino == inode
    assert (target / "link").is_symlink()
    if with_folder:
        assert (target / ".git" / "HEAD").read_text() == "ref"


@pytest.mark.parametrize("inside", [False, True])
def test_a_core_folder_of_an_earlier_version_goes_and_any_other_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Every byte of it must be one that this package wrote."""
    released = {"__init__.py": b"", "checkpoint.py": b"a = 1", "modeling.py": b"b = 2"}
    monkeypatch.setattr(names_module, "_RELEASED_CODE", frozenset({digest_of(released)}))

    def changed(code: Path, case: str) -> None:
        if case == "one byte":
            (code / "modeling.py").write_bytes(b"b = 3")
        elif case == "one more":
            (code / "mine.py").write_bytes(b"")
        elif case == "one less":
            (code / "modeling.py").unlink()
        elif case == "a folder":
            (code / "sub").mkdir()
        elif case == "a link":
            (code / "modeling.py").rename(tmp_path / f"modeling-{inside}.py")
            (code / "modeling.py").symlink_to(tmp_path / f"modeling-{inside}.py")
        elif case == "a pipe":
            os.mkfifo(code / "pipe")

    for case in ("ours", "one byte", "one more", "one less", "a folder", "a link", "a pipe"):
        target = tmp_path / case
        save(target, 1)
        if inside:
            (target / "runs").mkdir()
        (target / "core").mkdir()
        for name, content in released.items():
            (target / "core" / name).write_bytes(content)
        changed(target / "core", case)
        before = names(target / "core")
        save(target, 2)
        assert version_of(target) == 2
        assert (target / "core").exists() == (case != "ours"), case
        if case != "ours":
            assert names(target / "core") == before


def test_the_digest_of_the_released_core_is_that_of_its_files(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "cat-file", "-e", "f18fbe0"], cwd=root, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a clone without the history that has it")
    script = [sys.executable, str(root / "scripts" / "core_digest.py"), "f18fbe0"]
    found = subprocess.run(script, cwd=root, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert found in names_module._RELEASED_CODE


def tree(folder: Path, but: set[str] = frozenset()) -> dict[str, object]:  # type: ignore[assignment]
    """What is in a folder: kind, mode, size or goal and content of everything, links not followed."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] in but:
            continue
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_ino, content)
    return found


def strange_neighbours(target: Path) -> None:
    """Things that no save wrote, many under names that look as if one had."""
    for name in ("Trunk.safetensors", "CONFIG.JSON", "readme.md", "trunk.safetensors.bak", "head_code.py", "-r", "a\n"):
        (target / name).write_text("mine")
    os.chmod(target / "CONFIG.JSON", 0o400)
    (target / "adapter_model.safetensors").write_bytes(b"mine")
    (target / "link").symlink_to("nowhere")
    (target / "out").symlink_to("..")
    os.mkfifo(target / "pipe")
    place = socket.socket(socket.AF_UNIX)
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(target)  # the name of a socket has at most 107 bytes
        place.bind("socket")
    finally:
        os.fchdir(here)
        os.close(here)
        place.close()


def strange_folders(target: Path) -> None:
    new = {"config.json": "{}", "trunk.safetensors": "x", INDEX_NAME: "{}"}
    plan = {"names": ["x"], "stale": ["../victim", "optimizer.pt"], "linked": {}, "inode": 1, "move": True}
    for box in (".tower-commit", ".tower-save-1-abcd", ".tower-save-0123456789abcdef", "Core", "core", ".git"):
        for inner in ("", "new"):
            (target / box / inner).mkdir(exist_ok=True)
            for name, content in new.items():
                (target / box / inner / name).write_text(content)
        (target / box / "lock").touch()
        (target / box / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize("with_folders", [False, True])
def test_a_save_touches_no_name_that_it_did_not_write(tmp_path: Path, with_folders: bool) -> None:
    parent = tmp_path / "parent"
    target = parent / "tower"
    save(target, 1)
    strange_neighbours(target)
    (parent / "victim").write_text("mine")
    strange_folders(parent)
    for name in (".tower.tower-save-1-abcd", ".tower.tower-save-0123456789abcdef"):
        shutil.copytree(parent / ".tower-save-1-abcd", parent / name)
    if with_folders:
        strange_folders(target)
    inside, outside = tree(target, WEIGHTS), tree(parent, {"tower"})
    for version in (2, 3):
        save(target, version)
        assert version_of(target) == version_for_others(target) == version
        assert tree(target, WEIGHTS) == inside
        assert tree(parent, {"tower"}) == outside


@pytest.mark.parametrize("name", [CONFIG_NAME, TRUNK_NAME, INDEX_NAME])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_name_that_is_taken_by_something_else_than_a_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    target = tmp_path / "tower"
    target.mkdir()
    if kind == "folder":
        (target / name).mkdir()
        (target / name / "mine").write_text("mine")
    else:
        os.mkfifo(target / name)
    before = tree(target)
    with pytest.raises(FolderError, match=f"{name} is .*move it"):
        save(target, 1)
    assert tree(tmp_path, {"tower"}) == {}
    assert tree(target) == before


def test_a_link_under_a_name_of_ours_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    target = tmp_path / "tower"
    target.mkdir()
    for name in (CONFIG_NAME, TRUNK_NAME, FINGERPRINT_NAME):
        (target / name).symlink_to("../precious")
    save(target, 1)
    assert (tmp_path / "precious").read_text() == "mine"
    assert names(target) == WEIGHTS
    assert not (target / CONFIG_NAME).is_symlink()


def test_nothing_hidden_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    for box in (".tower-commit", ".tower-save-0123456789abcdef"):
        shutil.copytree(tmp_path / "b", tmp_path / "a" / box / "new")
        shutil.copytree(tmp_path / "b", tmp_path / "a" / box, dirs_exist_ok=True)
    assert version_of(tmp_path / "a") == 1
    (tmp_path / "a" / INDEX_NAME).unlink()
    with pytest.raises(FolderError, match="no weights"):
        version_of(tmp_path / "a")


def test_records_in_a_folder_that_others_can_write_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    records = tmp_path / "home" / "hf_timm_tower" / f"saves-{os.geteuid()}"
    box = tmp_path / ".tower.tower-save-0123456789abcdef"
    box.mkdir()
    (box / "mine").write_text("mine")
    record = {"path": str(box), "new": disk.identity(box)}
    prefix = records_module._name_of(Path(os.path.realpath(target)))
    for mode, kept in ((0o777, True), (0o700, False)):  # the second shows that the first was no matter of its text
        records.mkdir(parents=True, exist_ok=True)
        os.chmod(records, mode)
        (records / f"{prefix}-0").write_text(json.dumps(record) + "\n")
        save(target, 2)
        assert box.exists() == kept


@pytest.mark.parametrize("torn", [b"", b"{", b'{"path": 3}\n', b"\xff\n", b"[]\n", b'{"path": "/etc"}\n'])
def test_a_damaged_record_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    target = tmp_path / "tower"
    save(target, 1)
    folder = tmp_path / "home" / "hf_timm_tower" / f"saves-{os.geteuid()}"
    (folder / f"{records_module._name_of(Path(os.path.realpath(target)))}-0").write_bytes(torn)
    save(target, 2)
    assert version_of(target) == 2
    assert names(folder) == set()


@pytest.mark.parametrize("home", ["read-only", "a file"])
def test_without_a_cache_to_keep_records_in_saving_works(
    open_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    place = open_path / "home"
    if home == "a file":
        place.write_text("")
    else:
        place.mkdir(mode=0o555)
    monkeypatch.setattr(constants, "HF_HOME", str(place))
    with not_root(open_path):
        for version in (1, 2):
            save(open_path / "tower", version)
            assert version_of(open_path / "tower") == version
    assert names(open_path) == {"tower", "home"}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("when", ["the block raised", "the save was done"])
def test_an_interrupt_while_cleaning_up_leaves_no_staging_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, times: int
) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    (target / "optimizer.pt").write_text("mine")
    real, interrupts = shutil.rmtree, iter(range(times))

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        if next(interrupts, None) is not None:
            raise KeyboardInterrupt
        real(*arguments, **keywords)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as new:  # noqa: PT012
        write_json(new / CONFIG_NAME, {"version": 2})
        state = {key: torch.full((9,), 2, dtype=torch.int32) for key in ("trunk.a", "trunk.b", "head.a")}
        write_weights(new, torch.nn.Module(), state=state)
        if when == "the block raised":
            raise KeyError
    assert version_of(target) == (1 if when == "the block raised" else 2)
    if times == 1:
        assert names(tmp_path) == {"tower"}
    save(target, 3)  # of an interrupt of the second attempt too, the next save in the same process leaves nothing
    assert version_of(target) == 3
    assert names(tmp_path) == {"tower"}
    assert (target / "optimizer.pt").read_text() == "mine"


def test_an_interrupt_while_a_scratch_folder_goes_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, interrupts = os.unlink, iter([KeyboardInterrupt])

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        for interrupt in interrupts:
            raise interrupt
        real(*arguments, **keywords)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt), disk.scratch_folder("push_", tmp_path) as scratch:
        (scratch / "trunk.safetensors").write_bytes(b"large")
    assert not names(tmp_path)


@linux_only
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_that_appears_or_changes_during_the_swap_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    (target / "optimizer.pt").write_text("old")
    (target / "gone.txt").write_text("gone")

    def exchange(a: Path, b: Path) -> bool:
        if moment == "before":
            (target / "replacement").write_text("new")
            os.replace(target / "replacement", target / "optimizer.pt")
            (target / "late.txt").write_text("late")
        done = disk.exchange_folders(a, b)
        if moment == "after":
            (target / "optimizer.pt").write_text("new")
            (target / "late.txt").write_text("late")
            (target / "gone.txt").unlink()
        return done

    monkeypatch.setattr(staging, "exchange_folders", exchange)
    save(target, 2)
    assert version_of(target) == 2
    assert (target / "optimizer.pt").read_text() == "new"
    assert (target / "late.txt").read_text() == "late"
    assert (target / "gone.txt").exists() == (moment == "before")


# What goes wrong


def test_an_error_in_the_block_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a" / "tower"
    for version in (None, 1):
        with pytest.raises(KeyError), staged_folder(target) as new:  # noqa: PT012
            (new / CONFIG_NAME).write_text("{}")
            raise KeyError
        if version is None:
            assert names(tmp_path) == set()
            save(target, 1)
    assert version_of(target) == 1
    assert names(target.parent) == {"tower"}


def test_saving_over_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    for target in (tmp_path / "file", tmp_path / "link", tmp_path / "file" / "below" / "tower"):
        with pytest.raises(FolderError, match=r"file is not a folder"):
            save(target, 1)
    assert names(tmp_path) == {"file", "link"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_refused_and_its_save_still_loads(open_path: Path) -> None:
    target = open_path / "tower"
    save(target, 1)
    with not_root(open_path, target):
        os.chmod(target, 0o555)
        with pytest.raises(FolderError, match=r"tower.*cannot be written"):
            save(target, 2)
        assert version_of(target) == 1
        os.chmod(target, 0o755)
        os.chmod(open_path, 0o555)
        with pytest.raises(FolderError, match="cannot be written"):
            save(open_path / "new", 2)
        os.chmod(open_path, 0o755)
    assert names(open_path) == {"tower"}


@linux_only
def test_a_read_only_file_system_is_refused_and_its_save_still_loads(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "tmpfs"):
        save(tmp_path / "tower", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for target in (tmp_path / "tower", tmp_path / "new"):
            with pytest.raises(FolderError, match=str(tmp_path)):
                save(target, 2)
        assert version_of(tmp_path / "tower") == 1
        assert names(tmp_path) == {"tower"}


@linux_only
@pytest.mark.parametrize("inside", [False, True])
def test_a_full_disk_leaves_the_earlier_save_and_nothing_else(tmp_path: Path, inside: bool) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        target = tmp_path / "tower"
        save(target, 1)
        if inside:
            (target / "folder").mkdir()
        before = names(target)
        for _ in range(2):
            with pytest.raises(FolderError, match=rf"{tmp_path}.*No space left") as caught:
                save(target, 2, size=200_000)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(FolderError, match=r"tower.*No space left"), staged_folder(target) as new:
                (new / "other.bin").write_bytes(bytes(2_000_000))
            with pytest.raises(FolderError, match="No space left"):
                save(tmp_path / "x" / "new", 2, size=200_000)
        assert version_of(target) == version_for_others(target) == 1
        assert names(target) == before
        assert names(tmp_path) == {"tower"}
        save(target, 3)
        assert version_of(target) == 3


# Killed and concurrent saves


KILL_POINTS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "chown", "chmod")


def save_and_die(folder: Path, version: int, call: int, prepare: Callable[[], None]) -> bool:
    """Save in a process that is killed right before its `call`-th change to a folder.

    Returns:
        Whether it was killed: False if it made fewer changes.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        return status != 0
    made = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **keywords: object) -> object:
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return step

    try:
        prepare()
        staging.exchange_folders = counted(staging.exchange_folders)  # type: ignore[assignment]
        for name in KILL_POINTS:
            setattr(os, name, counted(getattr(os, name)))
        save(folder, version)
    except BaseException as error:
        print("save failed:", repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def not_exchangeable() -> None:
    staging.exchange_folders = lambda a, b: False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("case", ["new", "plain", "other files", "other folder", "no exchange", "old single file"])
def test_killed_before_any_of_its_steps_a_save_leaves_the_old_or_the_new_one(tmp_path: Path, case: str) -> None:
    call, outcomes = 0, []
    while True:
        call += 1
        parent = tmp_path / str(call)
        target = parent / "tower"
        parent.mkdir()
        if case != "new":
            save(target, 1)
        kept = {"optimizer.pt"} if case in ("other files", "no exchange", "other folder") else set()
        for name in kept:
            (target / name).write_text("mine")
        if case == "other folder":
            (target / ".git").mkdir()
            (target / ".git" / "HEAD").write_text("mine")
            kept = kept | {".git"}
        if case == "old single file":
            for name in (INDEX_NAME, HEAD_NAME):
                (target / name).unlink()
            os.rename(target / TRUNK_NAME, target / SINGLE_NAME)
            state = {key: torch.full((9,), 1, dtype=torch.int32) for key in ("trunk.a", "trunk.b", "head.a")}
            save_file(state, target / SINGLE_NAME, {"format": "pt"})
            (target / "notes").mkdir()
            kept = {"notes"}

        died = save_and_die(target, 2, call, not_exchangeable if case == "no exchange" else lambda: None)

        if case == "new" and not target.exists():
            outcomes.append(0)
        else:
            outcomes.append(version_of(target))
            assert outcomes[-1] in (1, 2)
            others = version_for_others(target)  # may still see the old one, whole, when ours is decided
            assert others is None or others <= outcomes[-1]
            assert kept <= names(target)
            assert all((target / name).read_text() == "mine" for name in kept if (target / name).is_file())
        save(target, 3)  # completes or forgets what was begun, and leaves no trace of it
        assert version_of(target) == version_for_others(target) == 3
        assert names(target) == WEIGHTS | kept
        assert names(parent) == {"tower"}
        if not died:
            break
    assert outcomes[-1] == 2
    assert outcomes == sorted(outcomes)  # once decided, a save is not taken back
    assert len(set(outcomes)) == 2


@linux_only
def test_a_file_written_just_before_a_save_is_killed_right_after_the_exchange_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "tower"
    save(target, 1)
    (target / "optimizer.pt").write_text("mine")
    child = os.fork()
    if not child:

        def exchange(a: Path, b: Path) -> bool:
            (target / "late.txt").write_text("late")
            disk.exchange_folders(a, b)
            os.kill(os.getpid(), signal.SIGKILL)
            return True

        staging.exchange_folders = exchange
        save(target, 2)
    os.waitpid(child, 0)
    assert version_of(target) == 2
    (target / "optimizer.pt").unlink()  # what the user removes meanwhile does not come back
    save(target, 3)
    assert names(target) == WEIGHTS | {"late.txt"}
    assert names(tmp_path) == {"tower"}


def test_a_living_writers_staging_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "tower"
    for _ in range(2):
        with staged_folder(target) as slow:
            write_json(slow / CONFIG_NAME, {"version": 1})
            for version in (2, 3):
                save(target, version)
                assert version_of(target) == version
            state = {key: torch.full((9,), 9, dtype=torch.int32) for key in ("trunk.a", "trunk.b", "head.a")}
            write_json(slow / CONFIG_NAME, {"version": 9})
            write_weights(slow, torch.nn.Module(), state=state)
        assert version_of(target) == version_for_others(target) == 9  # the last one wins
        assert names(tmp_path) == {"tower"}
        (target / "folder").mkdir(exist_ok=True)  # then the same inside of the target


def test_a_save_that_begins_between_two_files_of_a_load_is_waited_for(tmp_path: Path) -> None:
    """One file after the other: the index goes first, then comes the new config; the weights read are the old ones."""
    target = tmp_path / "tower"
    save(target, 1)
    calls = []

    def read(opened: OpenFolder) -> tuple[int, int]:
        calls.append(opened)
        if len(calls) == 2:
            save(target, 2)
        weights = read_weights(opened)
        if len(calls) == 1:
            (target / INDEX_NAME).unlink()
            (target / "new").write_text('{"version": 2}')
            os.replace(target / "new", target / CONFIG_NAME)
        return int(weights["head.a"][0]), opened.read_json(CONFIG_NAME)["version"]

    assert read_folder(target, read) == (2, 2)
    assert len(calls) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("folder_inside", [False, True])
def test_several_processes_save_and_read_one_folder_without_ever_a_mix(tmp_path: Path, folder_inside: bool) -> None:
    target = tmp_path / "tower"
    save(target, 0)
    if folder_inside:
        (target / "folder").mkdir()
    children = []
    for number in range(1, 4):
        child = os.fork()
        if not child:
            try:
                for step in range(15):
                    save(target, number * 100 + step)
                os._exit(0)
            except BaseException as error:
                print("save failed:", repr(error), flush=True)
                os._exit(1)
        children.append(child)
    running, seen = set(children), set()
    deadline = time.monotonic() + 120
    while running and time.monotonic() < deadline:
        seen.add(version_of(target))
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.remove(child)
                assert status == 0
    assert not running
    assert version_of(target) == version_for_others(target)
    assert version_of(target) % 100 == 14
    assert len(seen) > 1
    assert names(target) == WEIGHTS | ({"folder"} if folder_inside else set())
    assert names(tmp_path) == {"tower"}

"""What a killed save leaves behind: completed where it was decided, removed where it was not.

A staging folder ("box") holds `new/` with the new files, `lock`, and before a swap `plan.json`. `staging` says how a
save goes; every step here may itself be cut off and called again.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..reader.errors import FormatError
from .checkpoint import INDEX_NAME, SINGLE_NAME, is_replaced, read_json, write_json
from .disk import sync, try_lock
from .open_folder import COMMIT_NAME, NEW_NAME, PLAN_NAME, STALE_KEY

LOCK_NAME = "lock"
_SAVE_MARK = ".tower-save-"


@dataclass(frozen=True)
class Plan:
    """What a staging folder was about to do, for whoever finds it after a kill; kept in its `plan.json`.

    Attributes:
        names: all entries of the new save.
        stale: entries of the target that the new save drops: to `OpenFolder` they are gone once it is committed.
        linked: entry of the target that is not ours -> inode of the file, which lies in the new folder too.
        inode: the new folder's; another one under its name is the old folder, after an exchange.
    """

    names: frozenset[str]
    stale: frozenset[str]
    linked: Mapping[str, int]
    inode: int

    def write(self, box: Path) -> None:
        content = {
            "names": sorted(self.names),
            STALE_KEY: sorted(self.stale),
            "linked": dict(self.linked),
            "inode": self.inode,
        }
        write_json(box / PLAN_NAME, content)
        sync(box)

    @classmethod
    def read(cls, box: Path) -> "Plan":
        found = read_json(box / PLAN_NAME)
        names, stale, linked, inode = (found.get(key) for key in ("names", STALE_KEY, "linked", "inode"))
        if not (
            isinstance(names, list) and isinstance(stale, list) and isinstance(linked, dict) and isinstance(inode, int)
        ):
            raise FormatError(f"{box / PLAN_NAME}: not the plan of a save; remove {box}")
        return cls(frozenset(map(str, names)), frozenset(map(str, stale)), linked, inode)


def kept_entries(folder: Path, new_names: frozenset[str]) -> list[str]:
    """Entries of the folder that outlive a save of `new_names`."""
    return [
        name
        for name in os.listdir(folder)
        if name not in new_names and name != COMMIT_NAME and not is_save(name) and not is_replaced(folder / name)
    ]


def bring_over(old: Path, target: Path, plan: Plan) -> None:
    """After an exchange: what others wrote into the old folder since it was looked at goes into the new one."""
    for name in kept_entries(old, plan.names):
        linked = plan.linked.get(name)
        if os.lstat(old / name).st_ino == linked:
            continue  # lies in the target already, or was removed there since
        there = os.lstat(target / name).st_ino if os.path.lexists(target / name) else None
        if there == linked:  # not there and never was, or still the version that was replaced
            if there is not None and is_real_folder(old / name):
                os.unlink(target / name)
            os.rename(old / name, target / name)


def roll_forward(target: Path) -> None:
    """Move the files of a committed save into place. May be cut off and called again."""
    box = target / COMMIT_NAME
    new = box / NEW_NAME
    waiting = sorted(os.listdir(new)) if new.exists() else []
    if waiting:
        plan = Plan.read(box)
        # For readers that do not know of the commit: no weights before everything else is in place.
        first = [name for name in (INDEX_NAME, SINGLE_NAME) if name in plan.stale or name in waiting]
        for name in [*first, *sorted(plan.stale - {*first})]:
            if os.path.lexists(target / name):
                _put_aside(target / name, box)
        for name in sorted(waiting, key=lambda name: (name == INDEX_NAME, name)):
            place = target / name
            if os.path.lexists(place) and (is_real_folder(place) or is_real_folder(new / name)):
                _put_aside(place, box)
            os.replace(new / name, place)
        sync(target)
    remove_box(box)


def _put_aside(path: Path, box: Path) -> None:
    """A rename: at once, where removing a folder with its files takes many steps."""
    os.rename(path, box / f"old-{_token()}")


# Cleaning up after the dead


def clean(target: Path) -> None:
    """Complete a save that was decided and cut off, remove what dead writers left. The caller holds the lock."""
    if is_real_folder(target / COMMIT_NAME):
        roll_forward(target)
    for place in (place_beside(target), place_inside(target)):
        prefix = place.name.removesuffix(_token_of(place.name))
        try:
            names = os.listdir(place.parent)
        except (FileNotFoundError, PermissionError):
            continue  # no such target yet; or a parent that cannot be listed, where nothing was staged
        for name in names:
            if name.startswith(prefix) and is_real_folder(place.parent / name):
                _remove_if_dead(place.parent / name, target)


def _remove_if_dead(box: Path, target: Path) -> None:
    try:
        lock = os.open(box / LOCK_NAME, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        # Boxes are made under the lock that we hold: this one was cut off in that, or while it was removed.
        shutil.rmtree(box, ignore_errors=True)
        return
    except PermissionError:
        return  # another user's
    try:
        if try_lock(lock):
            if target.exists() and (box / PLAN_NAME).exists() and (box / NEW_NAME).exists():
                plan = Plan.read(box)
                if os.stat(box / NEW_NAME).st_ino != plan.inode:
                    bring_over(box / NEW_NAME, target, plan)  # cut off right after the exchange
            remove_box(box)
    finally:
        os.close(lock)


def remove_box(box: Path) -> None:
    """Remove a staging folder: the files first, the plan after them, the lock last."""
    if not box.exists():
        return
    shutil.rmtree(box / NEW_NAME, ignore_errors=True)
    for name in os.listdir(box):
        if name == LOCK_NAME:
            continue
        if is_real_folder(box / name):
            shutil.rmtree(box / name, ignore_errors=True)
        else:
            (box / name).unlink(missing_ok=True)
    shutil.rmtree(box, ignore_errors=True)


# Names


def place_beside(target: Path) -> Path:
    # The target's own name so that a person understands it, cut where the mark would make it too long for a name.
    name = target.name
    if len(os.fsencode(name)) > 120:
        name = f"{name[:24]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.parent / f".{name}{_SAVE_MARK}{_token()}"


def place_inside(target: Path) -> Path:
    return target / f"{_SAVE_MARK}{_token()}"


def is_save(name: str) -> bool:
    return name.startswith(_SAVE_MARK)


def is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _token() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def _token_of(name: str) -> str:
    return name.rpartition(_SAVE_MARK)[2]

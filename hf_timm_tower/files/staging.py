"""Saving a folder so that a kill at any moment leaves the old save or the new one, never a mix; reading it likewise.

The new files are written into a staging folder and fsynced. Then, under a lock, one of two ways:

*Exchange*: the staging folder is a neighbour of the target, and one system call swaps the two. Files of the target
that are not ours were hard-linked into the staging folder before, so both are complete at that moment.

*Move*: where folders cannot be exchanged (mount points, the current directory, a parent that cannot be written,
sub-folders that are not ours, other systems than Linux), the staging folder is inside the target, and its files are
moved into place one by one: the index is removed first and comes last, so that readers find no weights rather than a
mix. If that is cut off, the next save or load by the same user on the same machine completes it.

What is in a folder says nothing about saves: a hidden file is never read, and the only staging folders that are ever
completed or removed are those that this user's own `records` name.
"""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from ..reader.errors import FolderError, TowerError
from .disk import (
    CAN_EXCHANGE,
    copy_ownership,
    exchange_folders,
    folder_error,
    identity,
    is_current,
    is_mount,
    is_real_folder,
    locked_folder,
    make_parents,
    remove_folder,
    sync,
    sync_tree,
)
from .names import CODE_NAME, INDEX_NAME, SINGLE_NAME, code_digest, is_replaced
from .open_folder import OpenFolder
from .records import Record, abandoned

_T = TypeVar("_T")
_MARK = ".tower-save-"
_ATTEMPTS = 20
# Saves hold the lock while files are renamed and old ones removed: much less than this.
_WRITER_SECONDS, _READER_SECONDS = 300, 10


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to write a save into; it becomes `target` when the block ends, or never.

    Entries of the target that the new save does not write are kept (a trainer's files, notes, `.git`, the card),
    except an earlier save's own weights, index, fingerprint and code. Missing parents are made. A symbolic link to a
    folder stays a link. If the block raises, the target is as it was and nothing is left behind. Of two saves at
    once, the one whose block ends last wins.

    Raises:
        FolderError: `target` is a file, cannot be written, has something else than a file under a name that the save
            writes, or the disk is full.
    """
    if not os.fspath(target):
        raise FolderError("the folder to save into has an empty name; say '.' for the current one")
    try:
        real = Path(os.path.realpath(target))
    except ValueError as error:
        raise FolderError(f"{os.fspath(target)!r} cannot be the name of a folder: {error}") from error
    made: list[Path] = []
    try:
        _require_writable(real)
        made = make_parents(real)
        with _lock_for(real, _WRITER_SECONDS):
            _settle_abandoned(real)
            save = _Save.begin(real)
        try:
            yield save.path
            sync_tree(save.path)
            with _lock_for(real, _WRITER_SECONDS):
                save.put_in_place()
        finally:
            save.close()
    except BaseException as error:
        for parent in reversed(made):
            try:
                parent.rmdir()
            except OSError:
                break  # something else is in it by now: it stays
        if isinstance(error, OSError) and not isinstance(error, TowerError):
            raise folder_error(f"{os.fspath(target)}: cannot be saved", error) from error
        raise


def read_folder(folder: str | os.PathLike[str], read: Callable[[OpenFolder], _T]) -> _T:
    """Call `read` with the opened folder and return its result, which then comes from one save only.

    If another process saves into the folder meanwhile, `read` is called again; it must do nothing but read.

    Raises:
        FolderError: no such folder, or it kept changing.
        TowerError: what `read` raises.
    """
    for attempt in range(_ATTEMPTS):
        with OpenFolder(folder) as opened:
            try:
                result = read(opened)
            except (TowerError, OSError):
                _wait_for_saves(Path(os.path.realpath(folder)))
                if not opened.has_changed(also_swapped=True):
                    raise
            else:
                if not opened.has_changed(also_swapped=False):
                    return result
        time.sleep(0.01 * attempt)
    raise FolderError(f"{os.fspath(folder)}: changed {_ATTEMPTS} times while it was read; wait for the saves to end")


class _Save:
    """A staging folder and the record that says it is ours."""

    def __init__(self, target: Path, path: Path, record: Record) -> None:
        self.target, self.path, self._record = target, path, record

    @classmethod
    def begin(cls, target: Path) -> "_Save":
        """Beside the target where it is new or can be exchanged, else inside. The caller has the target locked."""
        if not target.exists():
            return cls._at(target, _beside(target))
        if _may_be_exchanged(target, frozenset()):
            try:
                save = cls._at(target, _beside(target))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
            else:
                try:
                    copy_ownership(target, save.path)
                    return save
                except PermissionError:
                    save.close()  # not ours to give away: write into the folder that is there
                except BaseException:
                    save.close()
                    raise
        return cls._at(target, _inside(target))

    @classmethod
    def _at(cls, target: Path, path: Path) -> "_Save":
        save = cls(target, path, Record.create(target, path=os.fspath(path)))
        try:
            os.mkdir(path)
            save._record.note(new=identity(path))
        except BaseException:
            save.close()
            raise
        return save

    def put_in_place(self) -> None:
        """Make the staging folder's files the target's. The caller has the target locked."""
        names = sorted(os.listdir(self.path))
        if not self.target.exists():
            os.rename(self.path, self.target)
            sync(self.target.parent)
            return
        _refuse_taken(self.target, self.path, names)
        if self.path.parent != self.target:
            if self._exchange(names):
                _settle(self.target, self._record)
                return
            self._move_inside()
        stale = [name for name in os.listdir(self.target) if name not in names and is_replaced(self.target / name)]
        self._record.note(move=True, names=names, stale=stale)
        try:
            _settle(self.target, self._record)
        except OSError as error:
            raise folder_error(
                f"{self.target}: the save is complete in {self.path.name} but could not be moved into place; the next "
                "save or load of this folder on this machine does that",
                error,
            ) from error

    def _exchange(self, names: list[str]) -> bool:
        """Swap the staging folder and the target; False, with nothing changed, where that cannot be done."""
        if not _may_be_exchanged(self.target, frozenset(names)):
            return False
        linked = self._link_kept(frozenset(names))
        if linked is None:
            return False
        self._record.note(old=identity(self.target), names=names, linked=linked)
        sync(self.path)
        if not exchange_folders(self.path, self.target):
            for name in linked:
                os.unlink(self.path / name)
            return False
        sync(self.target.parent)
        return True

    def _link_kept(self, names: frozenset[str]) -> dict[str, int] | None:
        """Link what the target keeps into the staging folder; entry -> inode, or None where that cannot be done."""
        linked: dict[str, int] = {}
        try:
            for name in _kept(self.target, names):
                os.link(self.target / name, self.path / name, follow_symlinks=False)
                linked[name] = os.lstat(self.path / name).st_ino
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            # A file system without hard links, or a file that may not be linked.
            for name in linked:
                os.unlink(self.path / name)
            return None
        return linked

    def _move_inside(self) -> None:
        """Move the staging folder from beside the target into it; a copy where that crosses file systems."""
        path = _inside(self.target)
        inside = _Save(self.target, path, Record.create(self.target, path=os.fspath(path), new=identity(self.path)))
        try:
            try:
                os.rename(self.path, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                inside._record.note(new=None)
                os.mkdir(path)
                inside._record.note(new=identity(path))
                shutil.copytree(self.path, path, symlinks=True, dirs_exist_ok=True)
                sync_tree(path)
        except BaseException:
            inside.close()
            raise
        self.close()
        self.path, self._record = inside.path, inside._record

    def close(self) -> None:
        """Remove the staging folder; what is left of it after an error or interrupt is left to the next save."""
        try:
            with suppress(OSError):
                _settle(self.target, self._record)
        finally:
            self._record.release()


# Ending a save: by its writer, or after a kill by the next save or load


def _settle_abandoned(target: Path) -> None:
    """Complete or remove what dead writers left. The caller has the target locked."""
    for record in abandoned(target):
        try:
            with suppress(OSError):
                _settle(target, record)
        finally:
            record.release()


def _wait_for_saves(target: Path) -> None:
    """Let a save that is being put in place end, and complete one that was cut off in that."""
    with suppress(OSError), _lock_for(target, _READER_SECONDS):
        _settle_abandoned(target)


def _settle(target: Path, record: Record) -> None:
    """Complete a save that was decided, remove its staging folder. May be cut off anywhere and called again."""
    notes = record.notes
    path = Path(str(notes.get("path")))
    old, new = notes.get("old"), notes.get("new")
    if _MARK not in path.name or path.parent not in (target, target.parent):
        record.forget()
        return
    found = identity(path)
    if found is not None and found == old:  # the exchange is done
        if target.is_dir():
            _bring_over(path, target, notes)
            remove_folder(path)
    elif found is not None and found == new:
        if notes.get("move"):
            _move(path, target, notes)
        remove_folder(path)
    elif found is not None and new is None:  # cut off when it was just made, and empty
        path.rmdir()
    found = identity(path)
    if found is None or found not in (old, new):  # gone, or not what the record speaks of
        record.forget()


def _bring_over(old: Path, target: Path, notes: dict[str, Any]) -> None:
    """After an exchange: what others wrote into the old folder since it was looked at goes into the new one."""
    linked = notes["linked"]
    for name in _kept(old, frozenset(notes["names"])):
        seen = linked.get(name)
        if os.lstat(old / name).st_ino == seen:
            continue  # is in the target already, or was removed there since
        there = os.lstat(target / name).st_ino if os.path.lexists(target / name) else None
        if there == seen:  # not there and never was, or still the version that was replaced
            if there is not None and is_real_folder(old / name):
                os.unlink(target / name)
            os.rename(old / name, target / name)


def _move(path: Path, target: Path, notes: dict[str, Any]) -> None:
    """Move the files of a staging folder inside the target into place."""
    names, stale = notes["names"], notes["stale"]
    waiting = [name for name in names if os.path.lexists(path / name)]
    if not waiting:
        return
    # No weights for any reader before everything else is in place.
    last = INDEX_NAME if INDEX_NAME in names else SINGLE_NAME
    first = [name for name in (INDEX_NAME, SINGLE_NAME) if name in waiting or name in stale]
    for name in [*first, *(name for name in stale if name not in first)]:
        _put_aside(target / name, path)
    sync(target)
    for name in sorted(waiting, key=lambda name: (name == last, name)):
        if is_real_folder(target / name):
            _put_aside(target / name, path)
        if name == last:
            sync(target)
        os.replace(path / name, target / name)
    sync(target)


def _put_aside(entry: Path, staging: Path) -> None:
    if is_real_folder(entry):
        os.rename(entry, staging / f".old-{os.urandom(4).hex()}")  # at once, where removing it takes many steps
    else:
        entry.unlink(missing_ok=True)


# Before


def _require_writable(target: Path) -> None:
    for path in (target, *target.parents):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue  # its nearest existing parent decides
        if not stat.S_ISDIR(mode):
            raise FolderError(f"{path} is not a folder; a tower is saved as a folder: choose another path or remove it")
        if not _is_allowed(path, os.W_OK | os.X_OK):
            raise FolderError(f"{path}: cannot be written; check its permissions, or choose another folder")
        return


def _refuse_taken(target: Path, staging: Path, names: list[str]) -> None:
    """A save replaces files, and links to files; nothing else, under whatever name."""
    for name in names:
        entry = target / name
        if not os.path.lexists(entry) or entry.is_symlink() or entry.is_file() or is_replaced(entry):
            continue
        if name == CODE_NAME and is_real_folder(entry) and code_digest(entry) == code_digest(staging / name):
            continue
        what = "a folder" if entry.is_dir() else "not a regular file"
        raise FolderError(f"{entry} is {what}, and a save writes a file of that name; move it, or save elsewhere")


def _is_allowed(folder: Path, how: int) -> bool:
    return os.access(folder, how, effective_ids=os.access in os.supports_effective_ids)


def _lock_for(target: Path, seconds: float) -> AbstractContextManager[None]:
    """The lock that saves to `target` take turns by. It is its parent's: the target itself is replaced."""
    return locked_folder(target.parent if _is_allowed(target.parent, os.R_OK) else target, seconds)


def _kept(folder: Path, new_names: frozenset[str]) -> list[str]:
    """Entries of the folder that outlive a save of `new_names`."""
    return [name for name in os.listdir(folder) if name not in new_names and not is_replaced(folder / name)]


def _may_be_exchanged(target: Path, new_names: frozenset[str]) -> bool:
    """Whether swapping the folder for another one disturbs nobody that we know of."""
    if not CAN_EXCHANGE or is_mount(target) or is_current(target):
        return False
    # Folders in it cannot be hard-linked, and moved after the exchange they would be missing if that is cut off; one
    # may be the staging folder of another save.
    return not any(is_real_folder(target / name) for name in _kept(target, new_names))


def _beside(target: Path) -> Path:
    # The target's own name so that a person understands it, cut where the mark would make it too long for a name.
    name = target.name
    if len(os.fsencode(name)) > 120:
        name = f"{name[:24]}-{sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.parent / f".{name}{_MARK}{os.urandom(8).hex()}"


def _inside(target: Path) -> Path:
    return target / f"{_MARK}{os.urandom(8).hex()}"

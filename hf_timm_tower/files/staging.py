"""Saving a folder so that a kill at any moment leaves the old save or the new one, never a mix.

The new files are written into a staging folder and fsynced. Then, under a lock, one of two ways:

*Exchange*: the staging folder lies beside the target, and one system call swaps the two. Files of the target that are
not ours were hard-linked into the staging folder before, so both are complete at that moment.

*Commit*: where folders cannot be exchanged (mount points, the current directory, a parent that cannot be written,
sub-folders that are not ours, other systems than Linux), the staging folder lies inside the target, and renaming it to
`.tower-commit` decides the save: from then on its files are the folder's true ones for `OpenFolder`. Then they are
moved into place one by one, the index first removed and last brought back, so that readers who do not know of
`.tower-commit` find no weights rather than a mix. If that is cut off, the next save completes it.

A staging folder is locked while its writer lives. Those of dead writers are removed by the next save.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..reader.errors import FolderError, TowerError
from .aligned import folder_error
from .checkpoint import is_replaced
from .disk import CAN_EXCHANGE, exchange_folders, is_current, is_mount, locked_folder, sync, sync_tree, try_lock
from .open_folder import COMMIT_NAME, NEW_NAME
from .recovery import (
    LOCK_NAME,
    Plan,
    bring_over,
    clean,
    is_real_folder,
    is_save,
    kept_entries,
    place_beside,
    place_inside,
    remove_box,
    roll_forward,
)


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to write a save into; it becomes `target` when the block ends, or never.

    Entries of the target that the new save does not write are kept (a trainer's files, notes, `.git`, the card),
    except an earlier save's own weights, index, fingerprint and code. Missing parents are made. A symbolic link to a
    folder stays a link. If the block raises, the target is as it was and nothing is left behind. Of two saves at
    once, the one whose block ends last wins.

    Raises:
        FolderError: `target` is a file, cannot be written, or the disk is full.
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
        made = _make_parents(real)
        with _lock_for(real):
            clean(real)
            box = _Box.create(real)
        try:
            yield box.new
            sync_tree(box.new)
            with _lock_for(real):
                clean(real)
                box.commit(real)
        finally:
            box.close()
    except BaseException as error:
        for parent in reversed(made):
            try:
                parent.rmdir()
            except OSError:
                break  # something else is in it by now: it stays
        if isinstance(error, OSError) and not isinstance(error, TowerError):
            raise folder_error(f"{os.fspath(target)}: cannot be saved", error) from error
        raise


class _Box:
    """A staging folder: `new/` with the new files, `lock` held while its writer lives, `plan.json` before a swap."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.new = path / NEW_NAME
        self._lock = lock
        self._committed = False

    @classmethod
    def create(cls, target: Path) -> "_Box":
        """Beside the target where it is new or can be exchanged, else inside. The caller holds the target's lock."""
        if not target.exists():
            return cls._create_at(place_beside(target))
        if _may_be_exchanged(target):
            try:
                box = cls._create_at(place_beside(target))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
            else:
                try:
                    _copy_ownership(target, box.new)
                    return box
                except PermissionError:
                    box.close()  # not ours to give away: write into the folder that is there
                except BaseException:
                    box.close()
                    raise
        return cls._create_at(place_inside(target))

    @classmethod
    def _create_at(cls, path: Path) -> "_Box":
        os.mkdir(path)
        lock = -1
        try:
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            if not try_lock(lock):
                os.close(lock)  # no locks here; and Windows could not rename a folder with an open file in it
                lock = -1
            os.mkdir(path / NEW_NAME)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path, lock)

    def commit(self, target: Path) -> None:
        """Make `new` the target. The caller holds the target's lock."""
        if self.path.parent != target:
            if not target.exists():
                os.rename(self.new, target)
                sync(target.parent)
                return
            if self._exchange(target):
                return
            self._move_inside(target)
        names = frozenset(os.listdir(self.new))
        stale = frozenset(name for name in os.listdir(target) if name not in names and is_replaced(target / name))
        Plan(names, stale, {}, os.stat(self.new).st_ino).write(self.path)
        os.rename(self.path, target / COMMIT_NAME)
        self._committed = True
        try:
            sync(target)
            roll_forward(target)
        except OSError as error:
            raise folder_error(
                f"{target}: the save is complete in {COMMIT_NAME} but could not be moved into place; this package "
                "reads it, other libraries will after the next save",
                error,
            ) from error

    def _exchange(self, target: Path) -> bool:
        """Swap `new` and the target; False, with nothing changed, where that cannot be done."""
        if not _may_be_exchanged(target):
            return False
        names = frozenset(os.listdir(self.new))
        linked = self._link_kept(target, names)
        if linked is None:
            return False
        plan = Plan(names, frozenset(), linked, os.stat(self.new).st_ino)
        plan.write(self.path)
        sync(self.new)
        if not exchange_folders(self.new, target):
            for name in linked:
                os.unlink(self.new / name)
            return False
        sync(target.parent)
        sync(self.path)
        bring_over(self.new, target, plan)
        return True

    def _link_kept(self, target: Path, names: frozenset[str]) -> dict[str, int] | None:
        """Link what the target keeps into `new`; entry -> inode, or None where that cannot be done."""
        linked: dict[str, int] = {}
        try:
            for name in kept_entries(target, names):
                os.link(target / name, self.new / name, follow_symlinks=False)
                linked[name] = os.lstat(self.new / name).st_ino
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            # A file system without hard links, or a file that may not be linked.
            for name in linked:
                os.unlink(self.new / name)
            return None
        return linked

    def _move_inside(self, target: Path) -> None:
        """Move the staging folder from beside the target into it; a copy where that crosses file systems."""
        inside = type(self)._create_at(place_inside(target))
        try:
            inside.new.rmdir()
            shutil.move(self.new, inside.new)
            sync_tree(inside.new)
        except BaseException:
            inside.close()
            raise
        self.close()
        self.path, self.new, self._lock = inside.path, inside.new, inside._lock

    def close(self) -> None:
        """Remove the staging folder, unless it was committed and has moved."""
        if not self._committed:
            remove_box(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


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


def _is_allowed(folder: Path, how: int) -> bool:
    return os.access(folder, how, effective_ids=os.access in os.supports_effective_ids)


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above the target; those that were missing, outermost first."""
    made: list[Path] = []
    for parent in reversed([parent for parent in target.parents if not parent.exists()]):
        try:
            parent.mkdir()
        except FileExistsError:
            continue  # another save made it meanwhile
        made.append(parent)
    return made


def _lock_for(target: Path) -> AbstractContextManager[None]:
    """The lock that saves to `target` take turns by. It is its parent's: the target itself is replaced."""
    return locked_folder(target.parent if _is_allowed(target.parent, os.R_OK) else target)


def _may_be_exchanged(target: Path) -> bool:
    """Whether swapping the folder for another one disturbs nobody that we know of."""
    if not CAN_EXCHANGE or is_mount(target) or is_current(target):
        return False
    # Somebody is saving from inside of it, or its folders are not ours: those cannot be hard-linked, and moved after
    # the exchange they would be missing if that is cut off.
    return not any(is_save(name) for name in os.listdir(target)) and not any(
        is_real_folder(target / name) for name in kept_entries(target, frozenset())
    )


def _copy_ownership(target: Path, new: Path) -> None:
    """Give the new folder the old one's mode, attributes (access lists) and owner."""
    wanted, found = os.stat(target), os.stat(new)
    if hasattr(os, "chown") and (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        os.chown(new, wanted.st_uid, wanted.st_gid)
    shutil.copystat(target, new)

"""Saving a folder so that a kill at any moment leaves the old save or the new one, never a mix.

The new files are written into a staging folder and fsynced. Then, under a lock, one of two ways:

*Exchange*: the staging folder lies beside the target, and one system call swaps the two (Linux `renameat2`). Files of
the target that are not ours were hard-linked into the staging folder before, so both are complete at that moment.

*Commit*: where folders cannot be exchanged (mount points, the current directory, a parent that cannot be written, sub-
folders that are not ours, other systems), the staging folder lies inside the target, and renaming it to
`.tower-commit` decides the save: from then on its files are the folder's true ones for `OpenFolder`. Then they are
moved into place one by one, the index first removed and last brought back, so that readers who do not know of
`.tower-commit` find no weights rather than a mix. If that is cut off, the next save completes it.

A staging folder is locked while its writer lives. Those of dead writers are removed by the next save.
"""

import ctypes
import errno
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .aligned import folder_error
from .checkpoint import INDEX_NAME, SINGLE_NAME, is_replaced
from .errors import FolderError, TowerError
from .open_folder import COMMIT_NAME, NEW_NAME

try:
    import fcntl
except ImportError:  # Windows: no locks; leftovers of killed saves stay, and two saves at once are not kept apart.
    fcntl = None  # type: ignore[assignment]

_SAVE_MARK = ".tower-save-"
_LOCK_NAME = "lock"
_PLAN_NAME = "plan.json"
_ABANDONED_SECONDS = 3600.0
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to write a save into; it becomes `target` when the block ends, or never.

    Entries of the target that the new save does not write are kept (a trainer's files, notes, `.git`, the card),
    except an earlier save's own weights, index, fingerprint and code. Missing parents are made. A symbolic link to a
    folder stays a link. If the block raises, the target is as it was and nothing is left behind.

    Raises:
        FolderError: `target` is a file, cannot be written, or the disk is full.
    """
    real = Path(os.path.realpath(target))
    made: list[Path] = []
    box: _Box | None = None
    try:
        _require_folder_or_nothing(real)
        made = _make_parents(real)
        box = _Box.create(real)
        try:
            yield box.new
            _sync_tree(box.new)
            with _locked(real):
                _recover(real)
                _sweep_leftovers(real)
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
    """A staging folder: `new/` with the new files, `lock` held while the writer lives, `plan.json` for whoever
    finds it after a kill."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.new = path / NEW_NAME
        self._lock = lock
        self.committed = False

    @classmethod
    def create(cls, target: Path) -> "_Box":
        """Beside the target where it can be exchanged, else inside."""
        if not target.exists() or _may_be_exchanged(target):
            try:
                return cls._create_at(target.parent / f".{target.name}{_SAVE_MARK}{_token()}", target)
            except OSError as error:
                if not target.exists() or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
        return cls._create_at(target / f"{_SAVE_MARK}{_token()}", target)

    @classmethod
    def _create_at(cls, path: Path, target: Path) -> "_Box":
        # Locked under another name first, so that nobody finds it unlocked while its writer lives.
        early = path.with_name(path.name + ".early")
        os.mkdir(early)
        lock = -1
        try:
            lock = os.open(early / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            _try_lock(lock)
            os.mkdir(early / NEW_NAME)
            os.rename(early, path)
            box = cls(path, lock)
            if target.exists():
                _copy_ownership(target, box.new)
            return box
        except BaseException:
            if lock >= 0:
                os.close(lock)
            for leftover in (early, path):
                shutil.rmtree(leftover, ignore_errors=True)
            raise

    def commit(self, target: Path) -> None:
        """Make `new` the target. The caller holds the lock."""
        if self.path.parent != target:
            if not target.exists():
                os.rename(self.new, target)
                _sync(target.parent)
                return
            if self._exchange(target):
                return
            self._move_inside(target)
        names = sorted(os.listdir(self.new))
        _write_plan(self.path, {"names": names})
        _sync(self.path)
        os.rename(self.path, target / COMMIT_NAME)
        self.committed = True
        _sync(target)
        try:
            _roll_forward(target)
        except OSError as error:
            raise folder_error(
                f"{target}: the save is complete in {COMMIT_NAME} but could not be moved into place; this package "
                "reads it, other libraries will after the next save",
                error,
            ) from error

    def _exchange(self, target: Path) -> bool:
        """Swap `new` and the target; False, with nothing changed, where that cannot be done."""
        linked: dict[str, int] = {}
        if not _may_be_exchanged(target):
            return False
        names = set(os.listdir(self.new))
        try:
            for name in _kept(target, names):
                os.link(target / name, self.new / name, follow_symlinks=False)
                linked[name] = os.lstat(self.new / name).st_ino
            plan = {"names": sorted(names), "linked": linked, "inode": os.stat(self.new).st_ino}
            _write_plan(self.path, plan)
            _sync(self.new)
            _sync(self.path)
            exchanged = _exchange_folders(self.new, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            exchanged = False
        if not exchanged:
            for name in linked:
                os.unlink(self.new / name)
            return False
        _sync(target.parent)
        _sync(self.path)
        _bring_over(self.path, target, plan)
        return True

    def _move_inside(self, target: Path) -> None:
        """Move the staging folder from beside the target into it; a copy where that crosses file systems."""
        inside = type(self)._create_at(target / f"{_SAVE_MARK}{_token()}", target)
        try:
            inside.new.rmdir()
            shutil.move(self.new, inside.new)
            _sync_tree(inside.new)
        except BaseException:
            inside.close()
            raise
        self.close()
        self.path, self.new, self._lock = inside.path, inside.new, inside._lock

    def close(self) -> None:
        """Remove the staging folder, unless it was committed and has moved."""
        if not self.committed:
            _remove_box(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


# Finding out


def _require_folder_or_nothing(target: Path) -> None:
    for path in (target, *target.parents):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            continue  # one of its parents is the file: found next
        if not stat.S_ISDIR(mode):
            raise FolderError(f"{path} is not a folder; a tower is saved as a folder: choose another path or remove it")
        return


def _make_parents(target: Path) -> list[Path]:
    made: list[Path] = []
    missing = [parent for parent in target.parents if not parent.exists()]
    for parent in reversed(missing):
        try:
            parent.mkdir()
        except FileExistsError:
            continue  # somebody else's save made it meanwhile
        made.append(parent)
    return made


def _may_be_exchanged(target: Path) -> bool:
    """Whether swapping the folder for another one disturbs nobody and has a chance. The system call says the rest."""
    if not sys.platform.startswith("linux") or _is_mount(target):
        return False
    try:
        if os.path.samefile(os.curdir, target):
            return False  # this process would stand in the folder that is removed
    except FileNotFoundError:
        pass
    if (target / COMMIT_NAME).exists():
        return False
    # Folders cannot be hard-linked: moved after the exchange, they would be missing if that is cut off.
    return not any((target / name).is_dir() and not (target / name).is_symlink() for name in _kept(target, set()))


def _is_mount(target: Path) -> bool:
    if os.path.ismount(target):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # Bind mounts on one file system show only here. Spaces and the like stand as \040.
    points = (line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in lines)
    return os.fsencode(target) in points


def _kept(target: Path, new_names: set[str]) -> list[str]:
    """Entries of the target that outlive the save."""
    return [
        name
        for name in os.listdir(target)
        if name not in new_names and name != COMMIT_NAME and not _is_save(name) and not is_replaced(target / name)
    ]


def _is_save(name: str) -> bool:
    return name.startswith(_SAVE_MARK)


# Moving


def _exchange_folders(a: Path, b: Path) -> bool:
    """Swap two folders at once; False where the system cannot. Linux 3.15, renameat2(2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _bring_over(box: Path, target: Path, plan: dict[str, Any]) -> None:
    """After an exchange: what others wrote into the old folder since it was looked at goes into the new one."""
    old, linked = box / NEW_NAME, plan["linked"]
    for name in _kept(old, set(plan["names"])):
        if linked.get(name) == os.lstat(old / name).st_ino:
            continue
        if (target / name).is_dir() and not (target / name).is_symlink():
            continue
        os.rename(old / name, target / name)


def _roll_forward(target: Path) -> None:
    """Move the files of a committed save into place. May be cut off and called again."""
    box = target / COMMIT_NAME
    new = box / NEW_NAME
    waiting = sorted(os.listdir(new)) if new.exists() else []
    if waiting:
        names = set(json.loads((box / _PLAN_NAME).read_bytes())["names"])
        # For readers that do not know of the commit: no weights before everything else is in place.
        if INDEX_NAME in waiting:
            (target / INDEX_NAME).unlink(missing_ok=True)
            (target / SINGLE_NAME).unlink(missing_ok=True)
        for name in os.listdir(target):
            if name not in names and is_replaced(target / name):
                _put_aside(target / name, box)
        for name in sorted(waiting, key=lambda name: (name == INDEX_NAME, name)):
            place = target / name
            if os.path.lexists(place) and (_is_real_folder(place) or _is_real_folder(new / name)):
                _put_aside(place, box)
            os.replace(new / name, place)
        _sync(target)
    _remove_box(box)


def _put_aside(path: Path, box: Path) -> None:
    """A rename: at once, where removing a folder with its files would take many steps."""
    os.rename(path, box / f"old-{_token()}")


def _recover(target: Path) -> None:
    """Complete a save that was decided and then cut off. The caller holds the lock, so its writer is dead."""
    if (target / COMMIT_NAME).exists():
        _roll_forward(target)


def _sweep_leftovers(target: Path) -> None:
    """Remove the staging folders of dead writers."""
    places = [(target.parent, f".{target.name}{_SAVE_MARK}")]
    if target.exists():
        places.append((target, _SAVE_MARK))
    for folder, prefix in places:
        try:
            names = os.listdir(folder)
        except PermissionError:
            continue  # a parent that cannot be listed cannot hold staging folders of ours either
        for name in names:
            if name.startswith(prefix):
                _sweep(folder / name, target)


def _sweep(box: Path, target: Path) -> None:
    try:
        lock = os.open(box / _LOCK_NAME, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        # Being made or removed at this moment, or cut off in that.
        try:
            if time.time() - box.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(box, ignore_errors=True)
        except FileNotFoundError:
            pass
        return
    except OSError:
        return  # not ours to touch
    try:
        if _try_lock(lock):
            plan_path = box / _PLAN_NAME
            if plan_path.exists() and (box / NEW_NAME).exists() and target.exists():
                plan = json.loads(plan_path.read_bytes())
                if "inode" in plan and os.stat(box / NEW_NAME).st_ino != plan["inode"]:
                    _bring_over(box, target, plan)  # cut off between the exchange and this step
            _remove_box(box)
    finally:
        os.close(lock)


def _remove_box(box: Path) -> None:
    """Remove a staging folder, its lock last: one that is half removed can still be told from a live one."""
    if not box.exists():
        return
    shutil.rmtree(box / NEW_NAME, ignore_errors=True)
    for name in os.listdir(box):
        if name == _LOCK_NAME:
            continue
        path = box / name
        if _is_real_folder(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(box, ignore_errors=True)


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# Locks, modes, disk


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One save into a folder at a time, for the moments of swapping. The parent is locked: the target is replaced."""
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # Network file systems without locks: saves there are safe against kills but not against each other.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take the lock if nobody has it; False also where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _copy_ownership(target: Path, new: Path) -> None:
    """The new folder gets the old one's mode, attributes (access lists) and owner."""
    shutil.copystat(target, new)
    wanted, found = os.stat(target), os.stat(new)
    if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid) and hasattr(os, "chown"):
        os.chown(new, wanted.st_uid, wanted.st_gid)
        os.chmod(new, stat.S_IMODE(wanted.st_mode))


def _write_plan(box: Path, plan: dict[str, Any]) -> None:
    partial = box / f"{_PLAN_NAME}.part"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(plan, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, box / _PLAN_NAME)


def _sync_tree(folder: Path) -> None:
    """Make everything below `folder` reach the disk: a rename must not come before the data it names."""
    for path, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(os.path.join(path, name)):
                _sync(Path(path, name))
        _sync(Path(path))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _token() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"

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
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .aligned import folder_error
from .checkpoint import INDEX_NAME, SINGLE_NAME, is_replaced, read_json, write_json
from .disk import CAN_EXCHANGE, exchange_folders, is_current, is_mount, locked_folder, sync, sync_tree, try_lock
from .errors import FolderError, FormatError, TowerError
from .open_folder import COMMIT_NAME, NEW_NAME, PLAN_NAME, STALE_KEY

_SAVE_MARK = ".tower-save-"
_LOCK_NAME = "lock"


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
    real = Path(os.path.realpath(target))
    made: list[Path] = []
    try:
        _require_writable(real)
        made = _make_parents(real)
        with _lock_for(real):
            _clean(real)
            box = _Box.create(real)
        try:
            yield box.new
            sync_tree(box.new)
            with _lock_for(real):
                _clean(real)
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


@dataclass(frozen=True)
class _Plan:
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
    def read(cls, box: Path) -> "_Plan":
        found = read_json(box / PLAN_NAME)
        names, stale, linked, inode = (found.get(key) for key in ("names", STALE_KEY, "linked", "inode"))
        if not (
            isinstance(names, list) and isinstance(stale, list) and isinstance(linked, dict) and isinstance(inode, int)
        ):
            raise FormatError(f"{box / PLAN_NAME}: not the plan of a save; remove {box}")
        return cls(frozenset(map(str, names)), frozenset(map(str, stale)), linked, inode)


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
            return cls._create_at(_beside(target))
        if _may_be_exchanged(target):
            try:
                box = cls._create_at(_beside(target))
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
        return cls._create_at(_inside(target))

    @classmethod
    def _create_at(cls, path: Path) -> "_Box":
        os.mkdir(path)
        lock = -1
        try:
            lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
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
        _Plan(names, stale, {}, os.stat(self.new).st_ino).write(self.path)
        os.rename(self.path, target / COMMIT_NAME)
        self._committed = True
        try:
            sync(target)
            _roll_forward(target)
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
        plan = _Plan(names, frozenset(), linked, os.stat(self.new).st_ino)
        plan.write(self.path)
        sync(self.new)
        if not exchange_folders(self.new, target):
            for name in linked:
                os.unlink(self.new / name)
            return False
        sync(target.parent)
        sync(self.path)
        _bring_over(self.new, target, plan)
        return True

    def _link_kept(self, target: Path, names: frozenset[str]) -> dict[str, int] | None:
        """Link what the target keeps into `new`; entry -> inode, or None where that cannot be done."""
        linked: dict[str, int] = {}
        try:
            for name in _kept(target, names):
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
        inside = type(self)._create_at(_inside(target))
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
            _remove_box(self.path)
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
    return not any(_is_save(name) for name in os.listdir(target)) and not any(
        _is_real_folder(target / name) for name in _kept(target, frozenset())
    )


def _kept(folder: Path, new_names: frozenset[str]) -> list[str]:
    """Entries of the folder that outlive a save of `new_names`."""
    return [
        name
        for name in os.listdir(folder)
        if name not in new_names and name != COMMIT_NAME and not _is_save(name) and not is_replaced(folder / name)
    ]


def _copy_ownership(target: Path, new: Path) -> None:
    """Give the new folder the old one's mode, attributes (access lists) and owner."""
    wanted, found = os.stat(target), os.stat(new)
    if hasattr(os, "chown") and (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        os.chown(new, wanted.st_uid, wanted.st_gid)
    shutil.copystat(target, new)


# Swapping


def _bring_over(old: Path, target: Path, plan: _Plan) -> None:
    """After an exchange: what others wrote into the old folder since it was looked at goes into the new one."""
    for name in _kept(old, plan.names):
        linked = plan.linked.get(name)
        if os.lstat(old / name).st_ino == linked:
            continue  # lies in the target already, or was removed there since
        there = os.lstat(target / name).st_ino if os.path.lexists(target / name) else None
        if there == linked:  # not there and never was, or still the version that was replaced
            if there is not None and _is_real_folder(old / name):
                os.unlink(target / name)
            os.rename(old / name, target / name)


def _roll_forward(target: Path) -> None:
    """Move the files of a committed save into place. May be cut off and called again."""
    box = target / COMMIT_NAME
    new = box / NEW_NAME
    waiting = sorted(os.listdir(new)) if new.exists() else []
    if waiting:
        plan = _Plan.read(box)
        # For readers that do not know of the commit: no weights before everything else is in place.
        first = [name for name in (INDEX_NAME, SINGLE_NAME) if name in plan.stale or name in waiting]
        for name in [*first, *sorted(plan.stale - {*first})]:
            if os.path.lexists(target / name):
                _put_aside(target / name, box)
        for name in sorted(waiting, key=lambda name: (name == INDEX_NAME, name)):
            place = target / name
            if os.path.lexists(place) and (_is_real_folder(place) or _is_real_folder(new / name)):
                _put_aside(place, box)
            os.replace(new / name, place)
        sync(target)
    _remove_box(box)


def _put_aside(path: Path, box: Path) -> None:
    """A rename: at once, where removing a folder with its files takes many steps."""
    os.rename(path, box / f"old-{_token()}")


# Cleaning up after the dead


def _clean(target: Path) -> None:
    """Complete a save that was decided and cut off, remove what dead writers left. The caller holds the lock."""
    if _is_real_folder(target / COMMIT_NAME):
        _roll_forward(target)
    for place in (_beside(target), _inside(target)):
        prefix = place.name.removesuffix(_token_of(place.name))
        try:
            names = os.listdir(place.parent)
        except (FileNotFoundError, PermissionError):
            continue  # no such target yet; or a parent that cannot be listed, where nothing was staged
        for name in names:
            if name.startswith(prefix) and _is_real_folder(place.parent / name):
                _remove_if_dead(place.parent / name, target)


def _remove_if_dead(box: Path, target: Path) -> None:
    try:
        lock = os.open(box / _LOCK_NAME, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        # Boxes are made under the lock that we hold: this one was cut off in that, or while it was removed.
        shutil.rmtree(box, ignore_errors=True)
        return
    except PermissionError:
        return  # another user's
    try:
        if try_lock(lock):
            if target.exists() and (box / PLAN_NAME).exists() and (box / NEW_NAME).exists():
                plan = _Plan.read(box)
                if os.stat(box / NEW_NAME).st_ino != plan.inode:
                    _bring_over(box / NEW_NAME, target, plan)  # cut off right after the exchange
            _remove_box(box)
    finally:
        os.close(lock)


def _remove_box(box: Path) -> None:
    """Remove a staging folder: the files first, the plan after them, the lock last."""
    if not box.exists():
        return
    shutil.rmtree(box / NEW_NAME, ignore_errors=True)
    for name in os.listdir(box):
        if name == _LOCK_NAME:
            continue
        if _is_real_folder(box / name):
            shutil.rmtree(box / name, ignore_errors=True)
        else:
            (box / name).unlink(missing_ok=True)
    shutil.rmtree(box, ignore_errors=True)


# Names


def _beside(target: Path) -> Path:
    # The target's own name so that a person understands it, cut where the mark would make it too long for a name.
    name = target.name
    if len(os.fsencode(name)) > 120:
        name = f"{name[:24]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.parent / f".{name}{_SAVE_MARK}{_token()}"


def _inside(target: Path) -> Path:
    return target / f"{_SAVE_MARK}{_token()}"


def _is_save(name: str) -> bool:
    return name.startswith(_SAVE_MARK)


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _token() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def _token_of(name: str) -> str:
    return name.rpartition(_SAVE_MARK)[2]

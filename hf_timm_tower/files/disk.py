"""What saving needs of the operating system: locks, syncing, swapping two folders at once, finding mount points."""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..reader.errors import FolderError

try:
    import fcntl
except ImportError:  # Windows: two saves at once are not kept apart, and what a killed one left is not removed.
    fcntl = None  # type: ignore[assignment]

CAN_EXCHANGE = sys.platform.startswith("linux")
"""Whether this system has a call that swaps two folders; the file system may still refuse it."""

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL, errno.ENOSYS)
_POLL_SECONDS = 0.005


def folder_error(message: str, cause: OSError) -> FolderError:
    """A `FolderError` that says what the system said, and keeps its `errno`."""
    remedy = {
        errno.ENOSPC: "; free some space and save again",
        errno.EDQUOT: "; the disk quota is used up",
        errno.EACCES: "; check the permissions",
        errno.EROFS: "; choose a folder that can be written",
    }.get(cause.errno or 0, "")
    error = FolderError(f"{message}: {cause.strerror or cause}{remedy}")
    error.errno = cause.errno
    return error


@contextmanager
def locked_folder(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold an exclusive advisory lock on a folder, waiting for it; nothing where the file system has no locks.

    Args:
        folder: The folder, which this process may read.
        seconds: How long to wait; None for as long as it takes.

    Raises:
        TimeoutError: another process held it all the time.
    """
    if fcntl is None:
        yield  # type: ignore[unreachable]
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    locked = False
    try:
        try:
            _lock(descriptor, seconds, folder)
            locked = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        if locked:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a process forked meanwhile has the descriptor too
        os.close(descriptor)


def _lock(descriptor: int, seconds: float | None, folder: Path) -> None:
    if seconds is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"another process has {folder} locked") from error
        time.sleep(_POLL_SECONDS)


def try_lock(descriptor: int) -> bool:
    """Lock an open file if nobody has it locked; False also where there are no locks. Ends when it is closed."""
    if fcntl is None:
        return False  # type: ignore[unreachable]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def exchange_folders(a: Path, b: Path) -> bool:
    """Swap two folders at once; False, with nothing changed, where the system cannot (Linux 3.15, renameat2(2))."""
    if not CAN_EXCHANGE:
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def is_mount(folder: Path) -> bool:
    """Whether a resolved path is a mount point, bind mounts on one file system (which `os.path.ismount` misses) too."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False  # not Linux; where it is one after all, exchanging it fails
    # Spaces, tabs, line ends and backslashes are written as \040 and so on.
    points = (line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in lines)
    return os.fsencode(folder) in points


def is_current(folder: Path) -> bool:
    """Whether it is this process's current directory."""
    try:
        return os.path.samefile(os.curdir, folder)
    except FileNotFoundError:
        return False  # the current one was removed


def is_real_folder(path: Path) -> bool:
    """Whether it is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def identity(path: Path) -> list[int] | None:
    """Device and inode, by which a folder is known again after a rename; None where there is nothing."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_dev, status.st_ino]


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder for as long as the block runs; it may grow as large as a tower, so that an interrupt removes it too.

    Args:
        prefix: Of its name.
        parent: Where it is made; None for the system's folder of temporary files.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it, as far as that can be done, also where an interrupt comes meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Make everything below `folder` reach the disk: a rename must not get there before the data it names."""
    for path, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(os.path.join(path, name)):
                sync(Path(path, name))
        sync(Path(path))


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, reach the disk."""
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


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of `path` at once when the block ends, fsynced.

    Its mode follows the umask. Nothing is left of it if the block raises. Who has the earlier file mapped keeps that; a
    link is replaced and not followed.

    Raises:
        FolderError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise folder_error(f"{path}: cannot be written", error) from error


def make_parents(target: Path) -> list[Path]:
    """Make the folders above the target; those that were missing, outermost first."""
    made: list[Path] = []
    for parent in reversed([parent for parent in target.parents if not parent.exists()]):
        try:
            parent.mkdir()
        except FileExistsError:
            continue  # another save made it meanwhile
        made.append(parent)
    return made


def copy_ownership(target: Path, new: Path) -> None:
    """Give the new folder the old one's mode, attributes (access lists) and owner."""
    wanted, found = os.stat(target), os.stat(new)
    if hasattr(os, "chown") and (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        os.chown(new, wanted.st_uid, wanted.st_gid)
    shutil.copystat(target, new)

"""Reading a tower's folder so that one save is seen, never a mix of two.

A save swaps a whole folder in (see `staging`): a reader that has the directory open keeps reading the one it began
with. Where folders cannot be exchanged, a save moves a finished sub-folder to `.tower-commit` and then its files one
by one into place: until that is done the files there are the folder's true ones. What a reader saw is checked again
at the end, and read again if it changed meanwhile.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from ..reader.errors import FolderError, FormatError, TowerError
from .aligned import folder_error, read_aligned_descriptor
from .strict_json import MAX_JSON_BYTES, MAX_JSON_DEPTH, parse_json, shorten

COMMIT_NAME = ".tower-commit"
"""Folder inside a tower's folder: a save that is decided and not yet all in place."""

NEW_NAME = "new"
"""Folder inside `COMMIT_NAME` (and inside every staging folder): the new files."""

PLAN_NAME = "plan.json"
"""File inside `COMMIT_NAME`: what the save is about to do."""

STALE_KEY = "stale"
"""Its entry that lists the names which the save drops."""

_T = TypeVar("_T")
_ATTEMPTS = 20
_USES_HANDLES = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# O_PATH (Linux): a folder that may be entered but not listed can still be read from.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True)
class _Identity:
    """Two equal identities: the same file with the same contents."""

    device: int
    inode: int
    size: int
    modified_ns: int


class OpenFolder:
    """A tower's folder, opened once; all files are read from that one directory. A context manager.

    Names are plain file names. A symbolic link is followed only inside the folder, or from a snapshot of the Hub's
    cache to the blobs of the same repository.

    Raises:
        FolderError: no such folder, not a folder, not readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle: int | None = None
        self._seen: dict[str, _Identity | None] = {}
        try:
            status = os.stat(self.path)
            if not stat.S_ISDIR(status.st_mode):
                raise FolderError(f"{self.path}: not a folder; a tower is a folder with config.json and weights")
            if _USES_HANDLES:
                self._handle = os.open(self.path, _FOLDER)
                status = os.fstat(self._handle)
        except FileNotFoundError as error:
            raise FolderError(f"{self.path}: no such folder") from error
        except OSError as error:
            if isinstance(error, FolderError):
                raise
            raise folder_error(f"{self.path}: cannot be opened", error) from error
        self._folder = (status.st_dev, status.st_ino)

    def __enter__(self) -> "OpenFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory. Tensors that were read stay valid."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def has(self, name: str) -> bool:
        """Whether the folder holds `name`."""
        descriptor = self._open(name)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def read_bytes(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """The whole file; refused by its size, before reading, where it is larger than `max_bytes`.

        Raises:
            FolderError: it is missing or cannot be read.
            FormatError: too large, or not a regular file.
        """
        descriptor = self._open_present(name)
        try:
            return read_bounded(descriptor, f"{self.path / name}", max_bytes)
        finally:
            os.close(descriptor)

    def read_json(self, name: str, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
        """The JSON object in `name`; see `checkpoint.read_json` for limits and errors."""
        where = f"{self.path / name}"
        return parse_object(self.read_bytes(name, max_bytes), where, max_depth)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the safetensors file `name`; see `aligned.read_aligned`."""
        descriptor = self._open_present(name)
        try:
            return read_aligned_descriptor(descriptor, f"{self.path / name}")
        finally:
            os.close(descriptor)

    def has_changed(self, *, also_vanished: bool) -> bool:
        """Whether a file that was asked for is now another one.

        Args:
            also_vanished: count files that are gone and a folder that was swapped for another. Needless after
                everything was read: what is gone was read, and a folder that was swapped out was read whole.
        """
        if also_vanished:
            try:
                status = os.stat(self.path)
            except OSError:
                return True
            if (status.st_dev, status.st_ino) != self._folder:
                return True
        for name, before in self._seen.items():
            try:
                descriptor = self._find(name)
            except OSError:
                return True  # it could be looked up before
            now = None
            if descriptor is not None:
                now = _identity(descriptor)
                os.close(descriptor)
            if now != before and (now is not None or also_vanished):
                return True
        return False

    def _open_present(self, name: str) -> int:
        descriptor = self._open(name)
        if descriptor is None:
            raise FolderError(
                f"{self.path / name} is missing; the folder is incomplete or not a tower: download or save it again"
            )
        return descriptor

    def _open(self, name: str) -> int | None:
        """Open `name` and remember which file it was; None where there is none."""
        require_plain_name(name, f"{self.path}")
        try:
            descriptor = self._find(name)
        except OSError as error:
            if isinstance(error, FolderError):
                raise
            raise folder_error(f"{self.path / name}: cannot be opened", error) from error
        self._seen[name] = None if descriptor is None else _identity(descriptor)
        return descriptor

    def _find(self, name: str) -> int | None:
        # The committed save first: a file leaves it only for its place in the folder, so none is missed in between.
        found = self._find_committed(NEW_NAME, name)
        if found is not None:
            return found
        plan = self._find_committed(PLAN_NAME)
        if plan is not None:
            try:
                where = f"{self.path / COMMIT_NAME / PLAN_NAME}"
                stale = parse_object(read_bounded(plan, where, MAX_JSON_BYTES), where).get(STALE_KEY)
            finally:
                os.close(plan)
            if isinstance(stale, list) and name in stale:
                return None
        try:
            if self._handle is None:
                return self._open_link(name) if (self.path / name).is_symlink() else os.open(self.path / name, _READ)
            return os.open(name, _READ | _NOFOLLOW, dir_fd=self._handle)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return self._open_link(name)
            raise

    def _find_committed(self, *steps: str) -> int | None:
        """Open a file of the committed save by its folders and name; links are none of our making: not followed."""
        if self._handle is None:
            path = self.path.joinpath(COMMIT_NAME, *steps)
            return os.open(path, _READ) if path.exists() and not path.is_symlink() else None
        opened: list[int] = []
        parent = self._handle
        try:
            for step in (COMMIT_NAME, *steps[:-1]):
                parent = os.open(step, _FOLDER | _NOFOLLOW, dir_fd=parent)
                opened.append(parent)
            return os.open(steps[-1], _READ | _NOFOLLOW, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file or a link of that name
            return None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _open_link(self, name: str) -> int:
        here = Path(os.path.realpath(self.path))
        goal = Path(os.path.realpath(self.path / name))
        # models--org--name/snapshots/<commit>[/subfolder]/file -> models--org--name/blobs/<hash>
        blobs = [parent.parent / "blobs" for parent in here.parents if parent.name == "snapshots"]
        allowed = [here, *blobs]
        if not any(goal.is_relative_to(root) for root in allowed):
            raise FolderError(
                f"{self.path / name} is a link to {goal}, outside of the tower's folder; copy the file into the folder"
            )
        if not goal.exists():
            raise FolderError(f"{self.path / name} is a link to {goal}, which is missing; download the tower again")
        return os.open(goal, _READ | _NOFOLLOW)


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
                if not opened.has_changed(also_vanished=True):
                    raise
            else:
                if not opened.has_changed(also_vanished=False):
                    return result
        time.sleep(0.01 * attempt)
    raise FolderError(f"{os.fspath(folder)}: changed {_ATTEMPTS} times while it was read; wait for the saves to end")


def read_bounded(descriptor: int, where: str, max_bytes: int) -> bytes:
    """All bytes of an open regular file of at most `max_bytes`; see `OpenFolder.read_bytes`."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{where}: not a regular file")
        if status.st_size > max_bytes:
            raise FormatError(f"{where}: {status.st_size} bytes, at most {max_bytes} are read; is it the right file?")
        data = bytearray()
        while chunk := os.read(descriptor, max_bytes + 1 - len(data)):
            data += chunk
    except OSError as error:
        raise folder_error(f"{where}: cannot be read", error) from error
    if len(data) > max_bytes:
        raise FormatError(f"{where}: over {max_bytes} bytes; it grew while it was read")
    return bytes(data)


def parse_object(data: bytes, where: str, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
    """`parse_json` of a document that must be an object."""
    parsed = parse_json(data, where, max_depth=max_depth)
    if not isinstance(parsed, dict):
        kind = {list: "an array", str: "a text", type(None): "null"}.get(type(parsed), "a number or truth value")
        raise FormatError(f"{where}: holds {kind}, expected a JSON object")
    return parsed


def require_plain_name(name: str, where: str) -> None:
    """Refuse what is not the bare name of a file inside the folder.

    Raises:
        FormatError: empty, `.` or `..`, or with a separator, a drive or a NUL in it.
    """
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise FormatError(f"{where}: {shorten(name)} is not a plain file name; files of a tower lie in its own folder")


def _identity(descriptor: int) -> _Identity:
    status = os.fstat(descriptor)
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

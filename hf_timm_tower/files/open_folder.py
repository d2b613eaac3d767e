"""Reading a tower's folder: the one way to files that somebody else may have made.

Every file is opened through a handle on the one directory, must be a regular file, and is bounded in size. What was
opened is remembered, so that `staging.read_folder` sees whether another save came in between.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..reader.errors import FolderError, FormatError, shown
from .disk import folder_error
from .json import MAX_JSON_BYTES, MAX_JSON_DEPTH, parse_object
from .safetensors_read import file_digest, read_aligned_descriptor

MAX_TEXT_BYTES = 2**20
"""Of a card, or the source of a head."""

_USES_HANDLES = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd
# O_NONBLOCK: a pipe without a writer would hang the opening itself.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# O_PATH (Linux): a folder that may be entered but not listed can still be read from.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


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
        self._seen: dict[str, tuple[int, ...] | None] = {}
        self._json: dict[str, bytes] = {}
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
        """Whether there is something called `name` in the folder; it is not opened."""
        require_plain_name(name, f"{self.path}")
        try:
            status = self._status(name)
        except FolderError:
            raise
        except OSError as error:
            raise folder_error(f"{self.path / name}: cannot be looked up", error) from error
        self._seen[name] = None if status is None else _identity(status)
        return status is not None

    def read_bytes(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """The whole file; refused by its size, before reading, where it is larger than `max_bytes`.

        Raises:
            FolderError: it is missing or cannot be read.
            FormatError: too large, or not a regular file.
        """
        with self._present(name) as descriptor:
            return read_bounded(descriptor, f"{self.path / name}", max_bytes)

    def read_text(self, name: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """The whole file as text; see `read_bytes`.

        Raises:
            FolderError: it is missing or cannot be read.
            FormatError: too large, not a regular file, or not UTF-8.
        """
        try:
            return self.read_bytes(name, max_bytes).decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{self.path / name}"
            raise FormatError(f"{where}: not UTF-8 text ({error}); save it as UTF-8, or move it away") from error

    def read_json(self, name: str, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
        """The JSON object in `name`, a new one at each call; the file is read once.

        Raises:
            FolderError: missing or unreadable.
            FormatError: too large or deep, not UTF-8, not JSON (NaN and Infinity are not), a key twice, not an object.
        """
        if name not in self._json:
            self._json[name] = self.read_bytes(name, max_bytes)
        return parse_object(self._json[name], f"{self.path / name}", max_depth)

    def read_tensors(self, name: str, mmap: bool = True, digests: dict[str, str] | None = None) -> dict[str, Tensor]:
        """The tensors of the safetensors file `name`; see `safetensors_read.read_aligned`.

        Args:
            name: The file.
            mmap: False reads into memory of its own.
            digests: Takes the `file_digest` of the file under its name.
        """
        where = f"{self.path / name}"
        with self._present(name) as descriptor:
            if digests is not None:
                digests[name] = file_digest(descriptor, where)
            return read_aligned_descriptor(descriptor, where, mmap)

    def digest(self, name: str) -> str:
        """The `safetensors_read.file_digest` of a file."""
        with self._present(name) as descriptor:
            return file_digest(descriptor, f"{self.path / name}")

    def has_changed(self, *, also_swapped: bool) -> bool:
        """Whether a file that was asked for is now another one.

        Args:
            also_swapped: Count it where another folder is in the place of this one. Needless after everything was read:
                a folder that was swapped out was read whole, and may be taken away meanwhile.
        """
        try:
            here = os.stat(self.path)
        except OSError:
            in_place = False
        else:
            in_place = (here.st_dev, here.st_ino) == self._folder
        if also_swapped and not in_place:
            return True
        for name, before in self._seen.items():
            try:
                status = self._status(name)
            except OSError:
                return True  # it could be looked up before
            now = None if status is None else _identity(status)
            # What is gone of a folder in its place: the index, while a save replaces one file after the other.
            if now != before and (now is not None or in_place):
                return True
        return False

    @contextmanager
    def _present(self, name: str) -> Iterator[int]:
        descriptor = self._open(name)
        if descriptor is None:
            raise FolderError(
                f"{self.path / name} is missing; the folder is incomplete or not a tower: download or save it again"
            )
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int | None:
        """Open `name` and remember which file it was; None where there is none."""
        require_plain_name(name, f"{self.path}")
        try:
            descriptor = self._find(name)
        except FolderError:
            raise
        except OSError as error:
            raise folder_error(f"{self.path / name}: cannot be opened", error) from error
        self._seen[name] = None if descriptor is None else _identity(os.fstat(descriptor))
        return descriptor

    def _find(self, name: str) -> int | None:
        try:
            if self._handle is not None:
                return os.open(name, _READ | _NOFOLLOW, dir_fd=self._handle)
            if not (self.path / name).is_symlink():
                return os.open(self.path / name, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return os.open(self._goal(name), _READ | _NOFOLLOW)

    def _status(self, name: str) -> os.stat_result | None:
        place = self.path / name if self._handle is None else name
        try:
            status = os.stat(place, dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return os.stat(self._goal(name), follow_symlinks=False) if stat.S_ISLNK(status.st_mode) else status

    def _goal(self, name: str) -> Path:
        """Where a link of this name leads, which must be inside the folder or the repository's part of the cache."""
        here = Path(os.path.realpath(self.path))
        goal = Path(os.path.realpath(self.path / name))
        # models--org--name/snapshots/<commit>[/subfolder]/file -> models--org--name/blobs/<hash>
        blobs = [parent.parent / "blobs" for parent in here.parents if parent.name == "snapshots"]
        allowed = [here, *blobs]
        if not any(goal.is_relative_to(root) for root in allowed):
            raise FolderError(
                f"{self.path / name} is a link to {shown(str(goal))}, outside of the tower's folder; copy the file "
                "into the folder"
            )
        if not goal.exists():
            raise FolderError(
                f"{self.path / name} is a link to {shown(str(goal))}, which is missing; download the tower again"
            )
        return goal


def read_json(
    path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH
) -> dict[str, Any]:
    """`OpenFolder.read_json` of one file by its path."""
    path = Path(path)
    with OpenFolder(path.parent) as folder:
        return folder.read_json(path.name, max_bytes, max_depth)


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str | None:
    """`OpenFolder.read_text` of one file by its path; None where there is no such file or folder."""
    path = Path(path)
    if not path.parent.is_dir():
        return None
    with OpenFolder(path.parent) as folder:
        return folder.read_text(path.name, max_bytes) if folder.has(path.name) else None


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


def require_plain_name(name: str, where: str) -> None:
    """Refuse what is not the bare name of a file inside the folder.

    Raises:
        FormatError: empty, `.` or `..`, not printable, or with a separator or a drive in it.
    """
    if name in ("", ".", "..") or not name.isprintable() or any(character in name for character in "/\\:"):
        raise FormatError(f"{where}: {shown(name)} is not a plain file name; files of a tower are in its own folder")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Two equal ones: the same file with the same contents."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

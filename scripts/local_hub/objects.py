"""File contents, each stored once under its hash: sha256 for LFS files, git's blob id for regular ones."""

import hashlib
import os
from pathlib import Path
from types import TracebackType

from .disk import move_into_place, new_temporary, write_whole
from .errors import bad_request
from .git_ids import blob_id


class Objects:
    """The contents below `root`. Nothing here is ever changed or taken away.

    Args:
        root: the store's folder.
        scratch: where unfinished files lie, on the same disk.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root = root
        self._scratch = scratch

    def lfs_path(self, sha256: str) -> Path:
        """Where the LFS file with this (checked) sha256 lies, or would."""
        return self._root / "lfs" / sha256[:2] / sha256

    def blob_path(self, oid: str) -> Path:
        """Where the regular file with this git id lies."""
        return self._root / "blobs" / oid[:2] / oid

    def add_blob(self, content: bytes) -> str:
        """Store a regular file; returns git's id of it."""
        oid = blob_id(content)
        path = self.blob_path(oid)
        if not path.exists():
            write_whole(path, content, self._scratch)
        return oid

    def receive(self, sha256: str, size: int) -> "Incoming":
        """A file to write an announced upload into; see Incoming."""
        return Incoming(new_temporary(self._scratch), self.lfs_path(sha256), sha256, size)


class Incoming:
    """An LFS upload on its way in: `write` chunks, then `finish`. Left unfinished, it leaves nothing behind.

    Args:
        temporary: the file to write.
        target: its place once it is complete and right.
        sha256: announced hash.
        size: announced size, bytes.
    """

    def __init__(self, temporary: Path, target: Path, sha256: str, size: int) -> None:
        self._temporary, self._target = temporary, target
        self._sha256, self._size = sha256, size
        self._hash, self._written = hashlib.sha256(), 0

    def __enter__(self) -> "Incoming":
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Raises HubError 400 as soon as there is more than was announced."""
        self._written += len(chunk)
        if self._written > self._size:
            raise bad_request(f"upload of {self._sha256} is longer than the announced {self._size} bytes")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Check and keep the file. Raises HubError 400 if size or hash differ from what was announced."""
        if self._written != self._size:
            raise bad_request(f"upload of {self._sha256}: announced {self._size} bytes, received {self._written}")
        if self._hash.hexdigest() != self._sha256:
            raise bad_request(f"upload announced as {self._sha256} has the sha256 {self._hash.hexdigest()}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        move_into_place(self._temporary, self._target)

"""Which staging folders are ours: kept in this user's own cache, where nobody can put a record by way of a tower.

A save that is killed leaves its staging folder. Nothing in a tower's folder or beside it says whose that is, for such
a mark could be planted: by another user in `/tmp`, in a clone, in an archive. So every save keeps a file in
`$HF_HOME/hf_timm_tower/saves-<uid>`, a folder that only this user can write: the staging folder's path and inode, and
before anything is put in place, what is about to be done. The file is locked while the save lives and removed when it
is done. A later save or load of the same target that finds one unlocked completes or removes what it describes.

Where such a file cannot be kept (no locks, no writable cache) saving works the same, and what a kill leaves stays.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..reader.errors import FormatError
from .disk import try_lock
from .json import parse_json

_MAX_BYTES = 2**24
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


class Record:
    """What one save notes, as lines of JSON. One without a file keeps its notes for the process only.

    Attributes:
        notes: All that was noted; a later value of a key counts.
    """

    def __init__(self, path: Path | None, descriptor: int, notes: dict[str, Any]) -> None:
        self.notes = notes
        self._path, self._descriptor = path, descriptor

    @classmethod
    def create(cls, target: Path, **notes: Any) -> "Record":
        """Begin one for a save to `target`. The caller has the target locked."""
        record = cls(None, -1, {})
        folder = _records_folder(make=True)
        if folder is not None:
            path = folder / f"{_name_of(target)}-{os.urandom(8).hex()}"
            try:
                descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                descriptor = -1
            if descriptor >= 0:
                record = cls(path, descriptor, {})
                if not try_lock(descriptor):
                    record.forget()
        record.note(**notes)
        return record

    def note(self, **notes: Any) -> None:
        """Add to the notes; they have reached the disk when this returns."""
        self.notes.update(notes)
        if self._descriptor < 0:
            return
        line = memoryview(json.dumps(notes).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                raise
            self.forget()  # the cache is full: the save goes on without

    def forget(self) -> None:
        """The save is done, or nothing of it is left."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        self.release()

    def release(self) -> None:
        """Leave the file for a later save to find."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def abandoned(target: Path) -> Iterator[Record]:
    """Records of saves to `target` whose writers are dead. The caller has the target locked, and ends each of them."""
    folder = _records_folder(make=False)
    if folder is None:
        return
    for path in sorted(folder.glob(f"{_name_of(target)}-*")):
        try:
            descriptor = os.open(path, _FLAGS)
        except OSError:
            continue  # its writer has just ended
        if try_lock(descriptor):
            yield Record(path, descriptor, _read(descriptor))
        else:
            os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    """The notes, up to the last line that was written whole: what follows a note is begun after it is on the disk."""
    notes: dict[str, Any] = {}
    with open(os.dup(descriptor), "rb") as file:
        for line in file.read(_MAX_BYTES).splitlines(keepends=True):
            try:
                found = parse_json(line, "") if line.endswith(b"\n") else None
            except FormatError:
                found = None  # torn by a power failure
            if not isinstance(found, dict):
                break
            notes.update(found)
    return notes


def _name_of(target: Path) -> str:
    return hashlib.sha256(os.fsencode(target)).hexdigest()[:32]


def _records_folder(*, make: bool) -> Path | None:
    """This user's own folder of records; None where there is none that only this user can write."""
    if not hasattr(os, "geteuid"):
        return None
    folder = Path(constants.HF_HOME, "hf_timm_tower", f"saves-{os.geteuid()}")
    try:
        if make:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    is_ours = folder.is_dir() and not folder.is_symlink() and status.st_uid == os.geteuid()
    return folder if is_ours and not status.st_mode & 0o022 else None

"""Places where a folder cannot be exchanged for another one: mount points, and file systems without that call."""

import ctypes
import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_timm_tower.files import disk


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """A mount for the time of the block; the test is skipped where this user may not mount."""
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refuse_exchange(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the system call answer as it does on a file system that cannot; the list grows with every call."""
    calls: list[int] = []

    class Library:
        """The C library, as far as it is asked."""

        def __init__(self, *_: Any, **__: Any) -> None:
            def renameat2(*_: Any) -> int:
                calls.append(1)
                ctypes.set_errno(errno.EINVAL)
                return -1

            self.renameat2 = renameat2

    monkeypatch.setattr(disk.ctypes, "CDLL", Library)
    return calls

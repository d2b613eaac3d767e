"""The record of every request: JSON lines in a file, and the same in memory for `/_local/log`."""

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Entry:
    """One request.

    Args:
        time: when it began, ISO 8601, UTC.
        method: of the request.
        path: raw, without its query, which can carry permissions.
        status: of the answer; None if none was sent.
        bytes_in: of the request's body, as far as it was read.
        bytes_out: of the answer's body, as far as it was sent.
        user: whose token came with it, or None.
        fault: what was done to it on demand, or None.
        complete: whether the answer was sent to its end.
        agent: the client's name for itself.
    """

    time: str
    method: str
    path: str
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    user: str | None = None
    fault: str | None = None
    complete: bool = False
    agent: str = ""


class Log:
    """Appends to `file`, one line for each request, in the order in which they ended.

    Args:
        file: where the lines go; what is there already stays, and is not in `since`.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a", buffering=1, encoding="utf-8")
        self._entries: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        line = asdict(entry)
        with self._lock:
            self._entries.append(line)
            self._file.write(json.dumps(line) + "\n")

    def since(self, start: int) -> list[dict[str, Any]]:
        """The entries of this process from number `start`, counted from 0."""
        with self._lock:
            return self._entries[start:]

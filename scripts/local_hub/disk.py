"""Files that are there whole or not at all, whenever the process is killed."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a loss of power, where the system can."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_temporary(folder: Path) -> Path:
    return folder / secrets.token_hex(12)


def move_into_place(temporary: Path, target: Path) -> None:
    """Give a written and synced file its name; what was there under the name is replaced at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync_folder(target.parent)


def write_whole(target: Path, content: bytes, scratch: Path) -> None:
    """Write `target` by way of a file in `scratch`, a folder on the same disk."""
    temporary = new_temporary(scratch)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move_into_place(temporary, target)


def write_json(target: Path, value: Any, scratch: Path) -> None:
    write_whole(target, json.dumps(value, indent=1, sort_keys=True).encode(), scratch)


def read_json(path: Path) -> Any:
    """The value in `path`, or None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None

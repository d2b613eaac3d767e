"""The names of a tower's files, and which of them a save replaces."""

import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ..reader.errors import FolderError, FormatError
from .open_folder import OpenFolder

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
"""Of transformers: processors of several inputs. A tower has none; one that is there has an image processor inside."""
INDEX_NAME = "model.safetensors.index.json"
TRUNK_NAME = "trunk.safetensors"
HEAD_NAME = "head.safetensors"
CLASSIFIER_NAME = "classifier.safetensors"
SINGLE_NAME = "model.safetensors"
FINGERPRINT_NAME = "fingerprint.json"
CARD_NAME = "README.md"
HEAD_CODE_NAME = "head_code.py"
CODE_NAME = "core"
"""Folder with this package's code in towers of versions before 0.2; nothing reads it here."""

_WEIGHT_FILE = re.compile(r"(trunk|head|classifier|model)(-\d{5,}-of-\d{5,})?\.safetensors")

# Of the core/ folders that this package ever wrote, by `scripts/core_digest.py COMMIT` for each of their versions.
_RELEASED_CODE = frozenset({"f6f59c07490dbb1d5900d634a93ca9190bf7e8e6fc36e4b5ba2491f94dd78ce0"})
_MAX_CODE_FILES, _MAX_CODE_BYTES = 100, 2**20


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights: of a part, or of one shard of it, or of a whole model."""
    return _WEIGHT_FILE.fullmatch(name) is not None


def is_replaced(entry: Path) -> bool:
    """Whether a new save drops this entry of the folder where it does not write one of that name itself.

    Weights, index and fingerprint of an earlier save would be taken for the new one's (a stale `model.safetensors`
    beats the index in transformers); its code is no longer asked for. Everything else is the user's, or a card; so is
    a folder, pipe, socket or device whatever its name, and a `core/` or `head_code.py` that no save wrote, or weights
    that the index beside them does not name.
    """
    if entry.name == CODE_NAME:
        return not entry.is_symlink() and entry.is_dir() and code_digest(entry) in _RELEASED_CODE
    if not (entry.is_symlink() or entry.is_file()):
        return False
    if entry.name == HEAD_CODE_NAME:
        return _is_head_code(entry)
    if is_weight_file(entry.name) and entry.name != SINGLE_NAME:
        index = entry.with_name(INDEX_NAME)
        status = os.lstat(index) if os.path.lexists(index) else None
        return status is not None and entry.name in _indexed(index, status.st_ino, status.st_size, status.st_mtime_ns)
    return entry.name in (INDEX_NAME, FINGERPRINT_NAME, SINGLE_NAME)


def is_own_file(name: str) -> bool:
    """The same for a file of a repository, whose weights the Hub's history keeps. Of code, `is_replaced` knows."""
    return name in (INDEX_NAME, FINGERPRINT_NAME) or is_weight_file(name)


@lru_cache(maxsize=4)
def _indexed(index: Path, *identity: int) -> frozenset[str]:
    """The weight files that an index names; of one that cannot be read, none."""
    try:
        with OpenFolder(index.parent) as folder:
            found = folder.read_json(INDEX_NAME).get("weight_map")
    except (FolderError, FormatError):
        return frozenset()
    return frozenset(map(str, found.values())) if isinstance(found, dict) else frozenset()


def _is_head_code(entry: Path) -> bool:
    """Whether the tower in the folder has its head in this file, as it was saved."""
    try:
        with OpenFolder(entry.parent) as folder:
            head = folder.read_json(CONFIG_NAME).get("head")
            content = folder.read_bytes(entry.name)
    except (FolderError, FormatError):
        return False
    return isinstance(head, dict) and head.get("sha256") == hashlib.sha256(content).hexdigest()


def code_digest(folder: Path) -> str | None:
    """`digest_of` a folder of code; None where it holds anything but a few regular files."""
    entries = list(islice(folder.iterdir(), _MAX_CODE_FILES + 1))
    if len(entries) > _MAX_CODE_FILES:
        return None
    try:
        with OpenFolder(folder) as opened:
            return digest_of({entry.name: opened.read_bytes(entry.name, _MAX_CODE_BYTES) for entry in entries})
    except (FolderError, FormatError):
        return None


def digest_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names, sizes and bytes of files, in the order of their names."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name!r} {len(content)}\n".encode() + content)
    return digest.hexdigest()

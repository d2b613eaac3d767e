"""That the files of a folder come from one save: the index's metadata has digests of the others.

A half-finished copy, an rsync or a checkout of some files gives the head of one save beside the trunk of another, and
a config that was edited to another activation has the same shapes as before. Neither shows in keys and shapes. Against
somebody who wants to deceive this is no help: they can write the index too.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..reader.errors import ConfigError, FormatError, shown
from .names import CONFIG_NAME, INDEX_NAME

_KEY = "digests"
# What decides which outputs the weights give. Labels, names, versions, what is frozen and how images are prepared may
# be edited; of the trunk's files in another repository trunk_source has digests of its own.
_FIELDS = (
    "architecture",
    "model_args",
    "image_size",
    "in_chans",
    "pool",
    "proj",
    "proj_bias",
    "embed_dim",
    "head",
    "classifier",
    "num_features",
    "layout",
    "feat_size",
    "tower_class",
    "tower_kwargs",
)


def tie_digests(config: Mapping[str, Any] | None, files: Mapping[str, str]) -> dict[str, Any]:
    """What the index's metadata says of the other files.

    Args:
        config: The JSON of `config.json`; None where there is none.
        files: Weight file -> its `file_digest`.
    """
    return {_KEY: {"files": dict(files), **({} if config is None else {"config": _of_config(config)})}}


def file_digests(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """Weight file -> digest, of an index's metadata; empty where it was written without.

    Raises:
        FormatError: it is not what `tie_digests` writes.
    """
    return _table(metadata, "files", where)


def check_files(metadata: Mapping[str, Any], found: Mapping[str, str], where: str) -> None:
    """Compare weight files with those that were saved.

    Args:
        metadata: Of the index.
        found: Weight file -> digest.
        where: The folder, for the error.

    Raises:
        FormatError: a file of another save, or one that was changed.
    """
    saved = file_digests(metadata, f"{where}/{INDEX_NAME}")
    other = sorted(name for name, digest in found.items() if name in saved and saved[name] != digest)
    if other:
        raise FormatError(
            f"{where}: {', '.join(other[:5])} is not of the save that {INDEX_NAME} is of: files of two saves are "
            "mixed, or one was changed. Copy the folder again, whole; where a file was replaced on purpose, "
            f"remove 'metadata': {{'{_KEY}': ...}} from the index."
        )


def check_config(config: Mapping[str, Any], index: Mapping[str, Any] | None, where: str) -> None:
    """Compare a config with the one that the weights were saved with, in what changes the outputs.

    Args:
        config: The JSON of `config.json`.
        index: The JSON of the index; None where there is none.
        where: The folder, for the error.

    Raises:
        ConfigError: it was edited, or is of another save; names the fields.
        FormatError: the index has something else in place of the digests.
    """
    metadata = (index or {}).get("metadata")
    saved = _table(metadata, "config", f"{where}/{INDEX_NAME}") if isinstance(metadata, dict) else {}
    if not saved:
        return
    now = _of_config(config)
    changed = [field for field in _FIELDS if saved.get(field) != now.get(field)]
    if changed:
        values = ", ".join(f"{field}={shown(config.get(field), 40)}" for field in changed[:4])
        raise ConfigError(
            f"{where}/{CONFIG_NAME}: {values} is not what the weights were saved with: the file was edited or is of "
            "another save, and the tower would give other outputs. Undo it, or copy the folder again, whole. To change "
            "the tower on purpose, load it as it was saved, build one with the other value, and save that."
        )


def _of_config(config: Mapping[str, Any]) -> dict[str, str]:
    return {field: _digest(config[field]) for field in _FIELDS if config.get(field) is not None}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(metadata: Mapping[str, Any], part: str, where: str) -> dict[str, str]:
    digests = metadata.get(_KEY, {})
    found = digests.get(part, {}) if isinstance(digests, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{where}: metadata.{_KEY} must map config and files to digests, found {shown(digests)}")
    return found

"""That the files of a folder come from one save: `fingerprint.json` has digests of the others, and
`preprocessor_config.json` says what `config.json` says.

(Not the index, which stays as it is when only a head was trained.)

A half-finished copy, an rsync or a checkout of some files gives the head of one save beside the trunk of another, and
a config that was edited to another activation has the same shapes as before. Neither shows in keys and shapes. Against
somebody who wants to deceive this is no help: they can write the index too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, FormatError, did_you_mean, shown
from ..reader.image_processing import (
    PROCESSOR_AUTO_MAP,
    PROCESSOR_FACTS,
    PROCESSOR_KEYS,
    PROCESSOR_TYPE,
    STANDARD_KEYS,
    completed_preprocess,
    facts_of,
    standard_keys,
)
from .names import CONFIG_NAME, FINGERPRINT_NAME, INDEX_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME
from .open_folder import OpenFolder

_KEY = "digests"
# What decides which outputs the weights give. Labels, names, versions, what is frozen and how images are prepared may
# be edited; of the trunk's files in another repository trunk_source has digests of its own.
_FIELDS = tuple(
    "architecture model_args image_size in_chans pool proj proj_bias embed_dim head classifier num_features layout "
    "feat_size tower_class tower_kwargs".split()
)


def tie_digests(folder: Path) -> dict[str, Any]:
    """What `fingerprint.json` says of the other files of a save, which are written already."""
    with OpenFolder(folder) as opened:
        names = sorted(set(opened.read_json(INDEX_NAME)["weight_map"].values()))
        files = {name: opened.digest(name) for name in names}
        return {_KEY: {"config": _of_config(opened.read_json(CONFIG_NAME)), "files": files}}


def mismatch(
    fingerprint: Mapping[str, Any] | None, config: Mapping[str, Any], files: Mapping[str, str], where: str
) -> str | None:
    """Whether config and weight files are those that a fingerprint was saved with.

    Args:
        fingerprint: The JSON of `fingerprint.json`; None where there is none.
        config: The JSON of `config.json`, compared in what changes the outputs.
        files: Weight file -> its `file_digest`.
        where: The folder, for the message.

    Returns:
        What is not, and what to do; None where all is as it was saved, or nothing tells.

    Raises:
        FormatError: the fingerprint has something else in place of the digests.
    """
    digests = (fingerprint or {}).get(_KEY, {})
    saved = digests.get("files", {}) if isinstance(digests, dict) else None
    fields = digests.get("config", {}) if isinstance(digests, dict) else None
    if not isinstance(saved, dict) or not isinstance(fields, dict):
        raise FormatError(f"{where}/{FINGERPRINT_NAME}: {_KEY} must map config and files, found {shown(digests)}")
    other = sorted(name for name, digest in files.items() if saved.get(name, digest) != digest)
    if other:
        return (
            f"{where}: {', '.join(other[:5])} is not of the save that {FINGERPRINT_NAME} is of: files of two saves are "
            "mixed, or one was changed, and the tower may give other outputs. Copy or download the folder again, "
            "whole; where it was changed on purpose, save the tower again."
        )
    now = _of_config(config)
    changed = [field for field in _FIELDS if fields and fields.get(field) != now.get(field)]
    if changed:
        values = ", ".join(f"{field}={shown(config.get(field), 40)}" for field in changed[:4])
        return (
            f"{where}/{CONFIG_NAME}: {values} is not what the weights were saved with: the file was edited or is of "
            "another save, and the tower gives other outputs. Undo it, or copy the folder again, whole; where it was "
            "changed on purpose, save the tower again."
        )
    return None


def form_digest(config: TimmTowerConfig) -> str:
    """Digest of what decides, beside the weights, which figures a tower gets: its form, and how images are prepared."""
    fields = config.to_dict()
    return _digest({**_of_config(fields), "preprocess": fields["preprocess"]})


def _of_config(config: Mapping[str, Any]) -> dict[str, str]:
    return {field: _digest(config[field]) for field in _FIELDS if config.get(field) is not None}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- preprocessor_config.json, which says again what config.json says of preprocessing


def processor_dict(config: TimmTowerConfig) -> dict[str, Any]:
    """What the file holds where the processor's code is beside it, or the processor is stored alone.

    Written with `json.dumps(..., indent=2, sort_keys=True)` and a newline it is, byte for byte, what
    `TimmTowerImageProcessor.save_pretrained` writes. That it names the class makes transformers, where this package is
    absent, ask for `trust_remote_code=True` instead of not recognising it; where the class is registered, it is taken.

    Raises:
        ConfigError: the config is not completed, or its preprocess block cannot be used.
    """
    return {**facts_in_tower(config), "image_processor_type": PROCESSOR_TYPE, "auto_map": dict(PROCESSOR_AUTO_MAP)}


def facts_in_tower(config: TimmTowerConfig) -> dict[str, Any]:
    """What it holds beside a tower's `config.json` where there is no code.

    Raises:
        ConfigError: the config is not completed, or its preprocess block cannot be used.
    """
    block, size = completed_preprocess(config)
    return {**facts_of(block, size), **standard_keys(block)}


def check_processor(found: Mapping[str, Any], config: TimmTowerConfig) -> None:
    """Refuse a `preprocessor_config.json` that would prepare other pixels than the tower's config says.

    Args:
        found: The parsed file; towers saved by earlier versions have none of `STANDARD_KEYS`.
        config: The completed config of the same folder, before any override.

    Raises:
        ConfigError: names every fact that differs, with both values.
    """
    if differ := _differences(found, config):
        raise ConfigError(
            f"{PREPROCESSOR_NAME} and {CONFIG_NAME} disagree: {'; '.join(differ)}. One of them was edited or is of "
            "another model; save the tower again to write both."
        )


def other_processor(found: Any, config: TimmTowerConfig) -> str | None:
    """What to say of a `processor_config.json`, which no save of a tower writes and transformers prefers.

    Args:
        found: Its `image_processor`.
        config: As in `check_processor`.
    """
    differ = _differences(found, config) if isinstance(found, dict) else []
    if not differ:
        return None
    return (
        f"{PROCESSOR_NAME} has an image processor of another model, which AutoImageProcessor and pipelines take in "
        f"place of this tower's: {'; '.join(differ)}. Remove the file, or save the processor again"
    )


def _differences(found: Mapping[str, Any], config: TimmTowerConfig) -> list[str]:
    """How the entries of an image processor differ from those of a tower's, in words; ours must be there."""
    kind = found.get("image_processor_type")  # not beside a tower, but whoever saved the processor alone wrote it
    if kind not in (None, PROCESSOR_TYPE):
        return [f"image_processor_type is {shown(kind)}, not {PROCESSOR_TYPE!r}"]
    expected = facts_in_tower(config)
    named = [*PROCESSOR_FACTS, *(name for name in STANDARD_KEYS if name in found)]
    differ = [
        f"{name} is {shown(found.get(name, 'missing'))} there and should be {shown(expected.get(name, 'left out'))}"
        for name in named
        if name not in found or name not in expected or found[name] != expected[name]
    ]
    unknown = sorted(set(found) - set(expected) - set(STANDARD_KEYS) - PROCESSOR_KEYS, key=str)
    return differ + [f"unknown {shown(name)}{did_you_mean(name, PROCESSOR_FACTS)}" for name in unknown[:4]]

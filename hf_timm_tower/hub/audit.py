"""A folder or repository, looked at before transformers reads it, which acts on files and keys that no tower has."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from ..files.names import CONFIG_NAME, PROCESSOR_NAME
from ..files.open_folder import read_json
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, FolderError, FormatError, HubError, TowerError, one_line, shown
from ..reader.pretrained import DOWNLOAD
from .identify import identify

ADAPTER_NAME = "adapter_config.json"
# Of a checkpoint of distributed training: transformers takes such a file for the whole model, whatever is beside it.
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def config_of(place: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of any model; empty where there is none. Arguments and errors as of `audited_config`."""
    found = _find(place, CONFIG_NAME, {key: options[key] for key in DOWNLOAD if options.get(key)})
    return {} if found is None else read_json(found)


def audited_config(
    place: str | os.PathLike[str], options: Mapping[str, Any], adapter_place: str | None = None
) -> dict[str, Any] | None:
    """The `config.json` of a tower, beside which nothing makes transformers load another model than `TimmModel`.

    Args:
        place: A folder, or a repository's id.
        options: Of `from_pretrained`; those that say how files are found are taken (`revision`, `token`, ...).
        adapter_place: Where an adapter comes from that transformers has found already, and this tower for it.

    Returns:
        Its JSON; None where there is none, but an adapter that names its tower.

    Raises:
        FolderError: there is no such place, or no config (a HubError where it is a repository).
        FormatError: the config is damaged, or there are weights that a tower does not have.
        ConfigError: it is no tower's, or there is an adapter too.
    """
    download = {key: options[key] for key in DOWNLOAD if options.get(key)}
    if adapter_place is not None and adapter_place != place and (found := _find(adapter_place, CONFIG_NAME, {})):
        _refuse_adapter(adapter_place, read_json(found))
    config, adapter = (_find(place, name, download) for name in (CONFIG_NAME, ADAPTER_NAME))
    if config is None:
        if adapter is not None:
            return None
        names = os.listdir(place) if os.path.isdir(place) else ()
        raise FolderError(f"{place}: {CONFIG_NAME} is missing. {identify(names, None, str(place))}".rstrip())
    _find(place, PROCESSOR_NAME, download)  # so that it is beside the other files, where it is read
    described = read_json(config)
    kind, code = described.get("model_type"), described.get("auto_map", {})
    if kind != TimmTowerConfig.model_type:
        raise ConfigError(
            f"{place}: model_type of {CONFIG_NAME} is {shown(kind)}, not {TimmTowerConfig.model_type!r}: this is not a "
            f"tower saved by hf_timm_tower. {identify((), described, str(place))}".rstrip()
        )
    if not isinstance(code, dict) or not all(isinstance(name, str) for name in code.values()):
        raise FormatError(f"{place}: auto_map of {CONFIG_NAME} must map classes to names, found {shown(code)}")
    TimmTowerConfig.from_dict({key: value for key, value in described.items() if key != "auto_map"})
    if adapter is not None:
        _refuse_adapter(place, described)
    _refuse_files(config.parent)
    return described


def _refuse_files(folder: Path) -> None:
    """Weights that transformers would wait for, or take for the model's."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".safetensors") and not os.path.isfile(entry.path):
            raise FormatError(f"{folder / entry.name}: not a regular file; copy or download the folder again")
        if _SHARD.fullmatch(entry.name):
            raise FormatError(
                f"{folder / entry.name} is of a checkpoint of distributed training; transformers would load that in "
                "place of the tower. Move it out of the folder"
            )


@contextmanager
def folder_errors(place: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn what the system and transformers say of missing and damaged files into `FolderError` and `FormatError`."""
    try:
        yield
    except SafetensorError as error:
        raise FormatError(f"{place}: a weight file is damaged: {one_line(error)}") from error
    except OSError as error:
        if isinstance(error, TowerError):
            raise
        raise FolderError(f"{place}: a file is missing or cannot be read: {one_line(error)}") from error


def _refuse_adapter(place: str | os.PathLike[str], described: Mapping[str, Any]) -> None:
    """Where there is a tower, transformers loads the adapter beside it too, and `TimmModel` the tower."""
    if described.get("model_type") == TimmTowerConfig.model_type:
        raise ConfigError(
            f"{place}: holds a tower, and an adapter in {ADAPTER_NAME} that transformers would put onto it (or onto "
            "another model that it names). Keep the adapter in a place of its own; interop.peft.load_lora and "
            "load_adapter take it from there"
        )


def _find(place: str | os.PathLike[str], name: str, download: Mapping[str, Any]) -> Path | None:
    try:
        found = cached_file(
            place,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=name == CONFIG_NAME,  # offline: others need not be in the cache
            **download,
        )
    except OSError as error:
        raise HubError(f"{place}: {name} cannot be read: {one_line(error)}") from error
    return None if found is None else Path(found)

"""What a tower is, from its JSON files alone."""

import os
from typing import Any

from huggingface_hub import HfApi

from ..files.names import CONFIG_NAME, FINGERPRINT_NAME, INDEX_NAME
from ..files.open_folder import read_json
from ..hub.download import Access, hub_errors
from ..hub.fetch import fetch_tower
from ..reader.config import TimmTowerConfig, check_size
from ..reader.errors import ConfigError
from ..reader.head import code_file
from ..reader.weights import check_index


def inspect_tower(place: str, revision: str | None, access: Access) -> dict[str, Any]:
    """Facts of a tower in a folder or repository; no weights are fetched or read.

    Raises:
        TowerError: there is no tower.
    """
    folder = fetch_tower(place, revision=revision, access=access, with_weights=False)
    described = read_json(folder / CONFIG_NAME)
    described.pop("auto_map", None)
    config = TimmTowerConfig(**described)
    if config.image_size is None:
        raise ConfigError(f"{folder / CONFIG_NAME}: image_size is missing; it is not of a tower that was saved")
    height, width = check_size("image_size", config.image_size)
    code = code_file(described)
    total = None
    if (folder / INDEX_NAME).exists():
        total = check_index(read_json(folder / INDEX_NAME), str(folder / INDEX_NAME))[1].get("total_size")
    fingerprint = read_json(folder / FINGERPRINT_NAME) if (folder / FINGERPRINT_NAME).exists() else {}
    is_folder = os.path.isdir(place)
    return {
        "tower": place,
        "commit": None if is_folder else folder.name,
        "trunk": config.architecture,
        "image": f"{config.in_chans} x {height} x {width}",
        "pool": config.pool,
        "projection": config.proj,
        "head": None if config.head is None else config.head.get("class") or config.head.get("form"),
        "embedding": config.embed_dim,
        "weights_bytes": total,
        "frozen": config.frozen,
        "trunk_stored_in": (config.trunk_source or {}).get("repo_id"),
        "made_with": fingerprint.get("made_with"),
        "runs_code": f"{code}, only with trust_remote_code=True: read it first" if code else "no",
        "files": _files_of_folder(str(folder)) if is_folder else _files_of_repository(place, folder.name, access),
    }


def _files_of_folder(folder: str) -> dict[str, int]:
    return {
        entry.name: entry.stat().st_size
        for entry in sorted(os.scandir(folder), key=lambda e: e.name)
        if entry.is_file()
    }


def _files_of_repository(repo_id: str, commit: str, access: Access) -> dict[str, int]:
    with hub_errors("cannot be listed", repo_id, commit):
        info = HfApi(token=access.token).model_info(repo_id, revision=commit, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}

"""A folder's path or a repository's id -> one folder with a tower's files, at one commit.

Past this file there is no network. Only what loading reads is downloaded: JSON first, then the weight files that the
index names; never code (unless the caller trusts a head's), never a pickle.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from ..files.names import CONFIG_NAME, FINGERPRINT_NAME, INDEX_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME, SINGLE_NAME
from ..files.open_folder import read_json
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, FolderError, FormatError, HubError, shown
from ..reader.head import code_file
from ..reader.weights import check_index
from .download import MAX_WEIGHT_FILES, Access, download_files, hub_errors
from .identify import identify

_JSON = (CONFIG_NAME, INDEX_NAME, FINGERPRINT_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME)


def fetch_tower(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    access: Access | None = None,
    subfolder: str | None = None,
    trust_remote_code: bool = False,
    with_weights: bool = True,
) -> Path:
    """Where a tower's files are on this machine.

    Args:
        name_or_path: A folder, or the id of a repository, whose files are then downloaded at one commit.
        revision: Branch, tag, commit or `refs/pr/N`.
        access: Token, cache and so on.
        subfolder: Folder inside the folder or repository.
        trust_remote_code: Also fetch the source of a head that is stored as code.
        with_weights: False fetches the JSON files only.

    Raises:
        FolderError: there is no such folder, or it holds no tower (a HubError where it is a repository).
        ConfigError: its config is that of something else, which is named.
    """
    access = access or Access()
    parts = Path(subfolder or "").parts
    if any(part == ".." or part.startswith(("/", "\\")) for part in parts):
        raise FolderError(f"subfolder={subfolder!r} leads out of {name_or_path}")
    if Path(name_or_path).is_dir():
        folder = Path(name_or_path, *parts)
        if folder.is_dir() and not (folder / CONFIG_NAME).exists():
            seems = identify(os.listdir(folder), None, str(folder))
            raise FolderError(
                f"{folder / CONFIG_NAME} is missing; the folder is incomplete or not a tower. {seems}".rstrip()
            )
        return folder
    if Path(name_or_path).exists():
        raise FolderError(f"{name_or_path} is a file; a tower is a folder with config.json and safetensors files")
    repo_id = str(name_or_path)
    prefix = "".join(f"{part}/" for part in parts)
    root = download_files(repo_id, [prefix + name for name in _JSON], revision, access)
    folder, commit = root.joinpath(*parts), root.name
    if not (folder / CONFIG_NAME).exists():
        raise HubError(_no_tower(repo_id, prefix, revision, commit, access))
    config = read_json(folder / CONFIG_NAME)
    if config.get("model_type") != TimmTowerConfig.model_type:
        names = _names(repo_id, prefix, commit, access)
        raise ConfigError(
            f"{repo_id} at commit {commit} holds no tower of hf_timm_tower: model_type of {prefix}{CONFIG_NAME} is "
            f"{shown(config.get('model_type'))}. {identify(names, config, repo_id)}".rstrip()
        )
    if not with_weights:
        return folder
    needed = _weight_files(folder, config)
    if trust_remote_code and (code := code_file(config)):
        needed.append(code)
    whole = (folder / INDEX_NAME).exists()  # else reading says what may be there in place of the one file
    download_files(repo_id, [prefix + name for name in needed], commit, access, whole=whole)
    return folder


def commit_of(folder: Path) -> str:
    """The commit of a folder that `fetch_tower` gave for a repository: the Hub's cache has one folder for each."""
    return next(child.name for child in (folder, *folder.parents) if child.parent.name == "snapshots")


def _weight_files(folder: Path, config: dict[str, Any]) -> list[str]:
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    where = folder / INDEX_NAME
    weight_map, _ = check_index(read_json(where), f"{where}")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_WEIGHT_FILES:
        raise FormatError(f"{where}: names {len(names)} weight files, at most {MAX_WEIGHT_FILES} are read")
    return names


def _no_tower(repo_id: str, prefix: str, revision: str | None, commit: str, access: Access) -> str:
    names = _names(repo_id, prefix, commit, access)
    asked = "" if revision is None else f" (revision {shown(revision)})"
    seems = identify(names, None, repo_id)
    inner = sorted({name.split("/")[0] for name in names if name.endswith(f"/{CONFIG_NAME}")})
    if not seems and inner:
        seems = f"There is a {CONFIG_NAME} in {shown(', '.join(inner[:5]))}: pass subfolder=..."
    return f"{repo_id} at commit {commit}{asked} holds no tower: {prefix}{CONFIG_NAME} is missing. {seems}".rstrip()


def _names(repo_id: str, prefix: str, commit: str, access: Access) -> list[str]:
    """Files of the repository, for a hint; none where the network is off."""
    if access.local_files_only or constants.HF_HUB_OFFLINE:
        return []
    with hub_errors("cannot be listed", repo_id, commit):
        listed = HfApi(token=access.token).list_repo_files(repo_id, revision=commit)
    return [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]

"""A repository's id or a folder -> one folder, at one commit. Past this file there is no network."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .core.errors import FolderError

# All that loading reads: JSON and safetensors, never a pickle.
_READ = ("config.json", "fingerprint.json", "*.safetensors", "*.safetensors.index.json")


def fetch_tower(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path:
    """Where a tower's files are on this machine.

    Args:
        name_or_path: A folder, or the id of a repository, whose files are then downloaded at one commit.
        revision: Branch, tag or commit.
        token: For private and gated repositories.
        cache_dir: Where downloads are kept.
        force_download: Download again.
        local_files_only: Do not go to the network.
        subfolder: Folder inside the folder or repository.

    Raises:
        FolderError: there is neither such a folder nor such a repository or revision.
    """
    parts = Path(subfolder or "").parts
    if any(part == ".." or part.startswith(("/", "\\")) for part in parts):
        raise FolderError(f"subfolder={subfolder!r} leads out of {name_or_path}")
    if Path(name_or_path).is_dir():
        return Path(name_or_path, *parts)
    if Path(name_or_path).exists():
        raise FolderError(f"{name_or_path} is a file; a tower is a folder with config.json and safetensors files")
    prefix = "".join(f"{part}/" for part in parts)
    try:
        root = snapshot_download(
            str(name_or_path),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in _READ],
        )
    except HFValidationError as error:
        raise FolderError(f"{name_or_path}: no such folder, and not the id of a repository ({error})") from error
    except RevisionNotFoundError as error:
        raise FolderError(f"{name_or_path} has no revision {revision!r}: {error}") from error
    except RepositoryNotFoundError as error:
        raise FolderError(
            f"{name_or_path}: no such folder, and no such repository (or it is private: pass token=...): {error}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FolderError(
            f"{name_or_path}: no such folder, and the repository is not in the cache while the network is off or "
            f"out of reach: {error}"
        ) from error
    return Path(root, *parts)

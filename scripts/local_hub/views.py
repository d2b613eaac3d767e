"""What clients read: the JSON forms of repositories, trees, commits and users."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from . import cards
from .accounts import User
from .git_ids import lfs_pointer, tree_ids
from .objects import Objects
from .repos import Commit, File, Repo


def _internal_id(*names: str) -> str:
    return hashlib.sha256("/".join(names).encode()).hexdigest()[:24]


def whoami(user: User) -> dict[str, Any]:
    """The answer to `whoami-v2`."""
    return {
        "type": "user",
        "id": _internal_id("user", user.name),
        "name": user.name,
        "fullname": user.name,
        "email": f"{user.name}@localhost",
        "emailVerified": True,
        "canPay": False,
        "isPro": False,
        "periodEnd": None,
        "avatarUrl": "",
        "orgs": [
            {
                "type": "org",
                "id": _internal_id("org", org),
                "name": org,
                "fullname": org,
                "email": None,
                "canPay": False,
                "periodEnd": None,
                "avatarUrl": "",
                "roleInOrg": "write",
                "isEnterprise": False,
            }
            for org in user.orgs
        ],
        "auth": {
            "type": "access_token",
            "accessToken": {
                "displayName": "local",
                "role": user.role,
                "createdAt": "2024-01-01T00:00:00.000Z",
            },
        },
    }


def _text(objects: Objects, commit: Commit, path: str) -> str:
    file = commit.files.get(path)
    if file is None or file.lfs is not None:
        return ""
    return objects.blob_path(file.oid).read_text(errors="replace")


def _card(objects: Objects, commit: Commit) -> dict[str, Any]:
    try:
        return cards.parse(_text(objects, commit, "README.md"))
    except ValueError:  # the Hub, too, shows a repository whose card it cannot read
        return {}


def _config(objects: Objects, commit: Commit) -> dict[str, Any]:
    try:
        found = json.loads(_text(objects, commit, "config.json") or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _many(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _tags(card: dict[str, Any], library: str | None, commit: Commit) -> list[str]:
    tags = [library] if library else []
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
    tags += _many(card.get("tags")) + _many(card.get("pipeline_tag")) + _many(card.get("language"))
    for key in ("license", "base_model"):
        tags += [f"{key}:{value}" for value in _many(card.get(key))]
    tags += [f"dataset:{value}" for value in _many(card.get("datasets"))]
    return list(dict.fromkeys([*tags, "region:us"]))


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.lfs is not None:
            pointer = len(lfs_pointer(file.lfs, file.size))
            sibling["lfs"] = {"sha256": file.lfs, "size": file.size, "pointerSize": pointer}
    return sibling


def repo_info(objects: Objects, repo: Repo, commit: Commit, blobs: bool, expand: Iterable[str]) -> dict[str, Any]:
    """A repository at a commit.

    Args:
        objects: the store's contents.
        repo: the repository.
        commit: the state to describe.
        blobs: add sizes and hashes of the files.
        expand: if not empty, answer these keys only.
    """
    settings, card, config = repo.settings(), _card(objects, commit), _config(objects, commit)
    library = card.get("library_name") or ("transformers" if "architectures" in config else None)
    info: dict[str, Any] = {
        "_id": _internal_id(repo.kind, repo.id),
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "createdAt": settings.created,
        "lastModified": commit.date,
        "private": settings.private,
        "gated": settings.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card, library, commit),
        "siblings": [_sibling(path, commit.files[path], blobs) for path in sorted(commit.files)],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }
    if card:
        info["cardData"] = card
    if repo.kind == "model":
        info["modelId"] = repo.id
        info["config"] = {key: config[key] for key in ("architectures", "auto_map", "model_type") if key in config}
        if library:
            info["library_name"] = library
        if card.get("pipeline_tag"):
            info["pipeline_tag"] = card["pipeline_tag"]
        if card.get("model-index"):
            info["model-index"] = card["model-index"]
    wanted = set(expand)
    return {key: value for key, value in info.items() if not wanted or key in wanted | {"_id", "id"}}


def _last_change(repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    def state(at: Commit) -> list[tuple[str, str]]:
        return [(name, file.oid) for name, file in at.files.items() if name == path or name.startswith(path + "/")]

    wanted, found = sorted(state(commit)), commit
    for earlier in repo.history(commit):
        if sorted(state(earlier)) != wanted:
            break
        found = earlier
    return {"id": found.id, "title": found.title, "date": found.date}


def entries(repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit: path -> its form in trees and path infos."""
    files = commit.files
    folders = tree_ids({path: file.oid for path, file in files.items()})
    found: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in folders.items() if path
    }
    for path, file in files.items():
        found[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs is not None:
            pointer = len(lfs_pointer(file.lfs, file.size))
            found[path]["lfs"] = {"oid": file.lfs, "size": file.size, "pointerSize": pointer}
    if expand:
        for path, entry in found.items():
            entry["lastCommit"] = _last_change(repo, commit, path)
    return found


def commit_entry(commit: Commit) -> dict[str, Any]:
    """A commit in a list of commits."""
    return {
        "id": commit.id,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": commit.date,
        "formatted": {"title": commit.title, "message": commit.message},
    }


def ref_entries(repo: Repo, kind: str) -> list[dict[str, str]]:
    """The branches ("heads"), tags or pull requests ("pr") of a repository."""
    return [
        {"name": f"refs/pr/{name}" if kind == "pr" else name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
        for name, commit in repo.refs(kind).items()
    ]

"""A saved tower's folder -> one commit of a repository. (The way back is in `fetch.py`.)

The commit is made on top of the very commit that was looked at (`parent_commit`). Without that, huggingface_hub leaves
out files that were unchanged a moment ago, and a push of somebody else in between gives a mix of two towers.
"""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from ..files.names import CARD_NAME, is_own_file
from ..files.sentence_transformers import MODULES_NAME, SENTENCE_NAME, are_edited
from ..reader.errors import HubError
from .download import Access, download_files, hub_errors

COMMIT_MESSAGE = "Push a tower with hf_timm_tower"

# Pushes that meet on one branch take turns; each attempt makes its commit on top of the newest one.
_ATTEMPTS = 8
_CONFLICT = 412


def push_folder(
    folder: Path,
    repo_id: str,
    make_card: Callable[[str, str | None], str],
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    allow_patterns: list[str] | str | None = None,
    ignore_patterns: list[str] | str | None = None,
    delete_patterns: list[str] | str | None = None,
) -> str:
    """Push a tower's folder in one commit; files that an earlier tower left and this one lacks go in the same commit.

    Args:
        folder: What to push; its card is written here.
        repo_id: From `create_repository`.
        make_card: The repository's full id, the card as it is there (None where there is none) -> the card to push.
        commit_message: The commit's first line.
        commit_description: What stands under it.
        private: Of the repository, where it is made by this call.
        token: With the right to write.
        branch: Made where it does not exist; None for the main one.
        create_pr: Open a pull request instead of committing.
        allow_patterns: Push only files that match.
        ignore_patterns: Do not push files that match.
        delete_patterns: Delete further files of the repository that match.

    Returns:
        The commit's address.

    Raises:
        HubError: the repository cannot be written; nothing was committed.
    """
    api = HfApi(token=token)
    with hub_errors("cannot be pushed to", repo_id, branch):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    for _ in range(_ATTEMPTS):
        with hub_errors("cannot be pushed to", repo_id, branch):
            parent, remote = _state(api, repo_id, branch)
        card = make_card(repo_id, _card(repo_id, parent, remote, token))
        (folder / CARD_NAME).write_bytes(card.encode("utf-8"))
        local = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        pushed = list(filter_repo_objects(local, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        kept = _kept(repo_id, parent, remote, token)
        pushed = [name for name in pushed if name not in kept]
        stale = _stale(remote, pushed, delete_patterns)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in pushed),
            *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
        ]
        with hub_errors("cannot be pushed to", repo_id, branch):
            try:
                done = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != _CONFLICT:
                    raise
                continue
        return str(done.pr_url if create_pr and done.pr_url else done.commit_url)
    raise HubError(
        f"{repo_id} cannot be pushed to: in each of {_ATTEMPTS} attempts somebody else pushed first; try again"
    )


def _state(api: HfApi, repo_id: str, branch: str | None) -> tuple[str | None, list[str]]:
    """Newest commit of the branch, which is made where it is missing, and the files at that commit."""
    try:
        info = api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        if branch is None or branch.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        info = api.model_info(repo_id, revision=branch)
    return info.sha, [sibling.rfilename for sibling in info.siblings or ()]


def _card(repo_id: str, commit: str | None, remote: list[str], token: str | bool | None) -> str | None:
    if CARD_NAME not in remote:
        return None
    root = download_files(repo_id, [CARD_NAME], commit, Access(token=token), whole=True)
    try:
        return (root / CARD_NAME).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise HubError(
            f"{repo_id} cannot be pushed to: its {CARD_NAME} is not UTF-8 text ({error}); mend it on the Hub first"
        ) from error


def _kept(repo_id: str, commit: str | None, remote: list[str], token: str | bool | None) -> frozenset[str]:
    """The files for sentence-transformers, if somebody edited them on the Hub."""
    names = frozenset({MODULES_NAME, SENTENCE_NAME})
    present = sorted(names.intersection(remote))
    if not present:
        return frozenset()
    root = download_files(repo_id, present, commit, Access(token=token), whole=True)
    return names if are_edited({name: (root / name).read_bytes() for name in present}) else frozenset()


def _stale(remote: list[str], pushed: list[str], delete_patterns: list[str] | str | None) -> list[str]:
    """What an earlier tower left in the repository, and what the caller wants deleted."""
    gone = [name for name in remote if is_own_file(name, remote)]
    if delete_patterns is not None:
        gone += list(filter_repo_objects(remote, allow_patterns=delete_patterns))
    return sorted(set(gone) - set(pushed) - {".gitattributes"})


def default_repo_id(folder: str | os.PathLike[str]) -> str:
    """The name of a folder, as transformers and the mixin take it for a repository's."""
    return Path(folder).resolve().name

"""A saved tower's folder -> one commit of a repository. (The way back is in `fetch.py`.)

The commit is made on top of the very commit that was looked at (`parent_commit`). Without that, huggingface_hub leaves
out files that were unchanged a moment ago, and a push of somebody else in between gives a mix of two towers.
"""

import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from ..files.names import CARD_NAME, CODE_NAME, CONFIG_NAME, HEAD_CODE_NAME, is_own_file, is_replaced
from ..files.open_folder import read_text
from ..files.sentence_transformers import MODULES_NAME, SENTENCE_NAME, are_edited
from ..reader.errors import FormatError, HubError
from .card_merge import MAX_CARD_BYTES
from .download import Access, check_token, download_files, hub_errors
from .reader_file import READER_NAME

COMMIT_MESSAGE = "Push a tower with hf_timm_tower"

# Pushes that meet on one branch take turns; each attempt makes its commit on top of the newest one.
_ATTEMPTS = 8
_CONFLICT = 412
_MOST_CODE = 200  # files of code that are looked at; what this package wrote are some 30


@dataclass(frozen=True)
class PushOptions:
    """How a tower is pushed, passed along from the caller of a face.

    Attributes:
        commit_message: The commit's first line.
        commit_description: What stands under it.
        private: Of the repository, where it is made by this call.
        token: With the right to write.
        branch: Made where it does not exist; None for the main one.
        create_pr: Open a pull request instead of committing.
        allow_patterns: Push only files that match.
        ignore_patterns: Do not push files that match.
        delete_patterns: Delete further files of the repository that match.
    """

    commit_message: str = COMMIT_MESSAGE
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = field(default=None, repr=False)
    branch: str | None = None
    create_pr: bool | None = None
    allow_patterns: list[str] | str | None = None
    ignore_patterns: list[str] | str | None = None
    delete_patterns: list[str] | str | None = None

    def __post_init__(self) -> None:
        check_token(self.token)


def push_folder(
    folder: Path,
    repo_id: str,
    make_card: Callable[[str, str | None], str],
    names: Collection[str],
    options: PushOptions,
) -> str:
    """Push a saved tower in one commit; files that an earlier tower left and this one lacks go in the same commit.

    Args:
        folder: Where the tower was saved; nothing is written into it.
        repo_id: `name` or `org/name`; made where it does not exist.
        make_card: The repository's full id, the card as it is there (None where there is none) -> the card to push.
        names: The files that the save wrote, by their path in the folder; no other file of the folder is pushed.
        options: How.

    Returns:
        The commit's address.

    Raises:
        HubError: the repository cannot be written, or a file is gone; nothing was committed.
    """
    for name in names:
        if not (folder / name).exists() or not stat.S_ISREG(os.lstat(folder / name).st_mode):
            raise HubError(f"{folder / name} is not the file that was saved; save again, nothing was pushed")
    branch, token = options.branch, options.token
    api = HfApi(token=token)
    with hub_errors("cannot be pushed to", repo_id, branch):
        repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
    for _ in range(_ATTEMPTS):
        with hub_errors("cannot be pushed to", repo_id, branch):
            parent, remote = _state(api, repo_id, branch)
        card = make_card(repo_id, _card(repo_id, parent, remote, token))
        local = sorted({*names, CARD_NAME})
        pushed = list(
            filter_repo_objects(local, allow_patterns=options.allow_patterns, ignore_patterns=options.ignore_patterns)
        )
        kept = _kept(repo_id, parent, remote, token)
        pushed = [name for name in pushed if name not in kept]
        gone = [*_own_code(repo_id, parent, remote, token), *filter(is_own_file, remote)]
        stale = _stale(remote, gone, pushed, options.delete_patterns)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, card.encode() if name == CARD_NAME else folder / name) for name in pushed),
            *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
        ]
        with hub_errors("cannot be pushed to", repo_id, branch):
            try:
                done = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=options.commit_message,
                    commit_description=options.commit_description,
                    revision=branch,
                    create_pr=options.create_pr,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != _CONFLICT:
                    raise
                continue
        return str(done.pr_url if options.create_pr and done.pr_url else done.commit_url)
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
        return read_text(root / CARD_NAME, MAX_CARD_BYTES)
    except FormatError as error:
        raise HubError(f"{repo_id} cannot be pushed to: {error}. Mend it on the Hub first") from error


def _kept(repo_id: str, commit: str | None, remote: list[str], token: str | bool | None) -> frozenset[str]:
    """The files for sentence-transformers, if somebody edited them on the Hub."""
    names = frozenset({MODULES_NAME, SENTENCE_NAME})
    present = sorted(names.intersection(remote))
    if not present:
        return frozenset()
    root = download_files(repo_id, present, commit, Access(token=token), whole=True)
    return names if are_edited({name: (root / name).read_bytes() for name in present}) else frozenset()


def _own_code(repo_id: str, commit: str | None, remote: list[str], token: str | bool | None) -> list[str]:
    """Code in the repository that an earlier save wrote: byte for byte, as for a folder."""
    reader = [name for name in remote if name == READER_NAME]
    code = [name for name in remote if name == HEAD_CODE_NAME or name.startswith(f"{CODE_NAME}/")]
    if not 0 < len(code) <= _MOST_CODE:
        return reader
    beside = [name for name in (CONFIG_NAME,) if name in remote]
    root = download_files(repo_id, [*code, *beside], commit, Access(token=token), whole=True)
    return reader + [name for name in code if is_replaced(root / name.partition("/")[0])]


def _stale(remote: list[str], gone: list[str], pushed: list[str], delete_patterns: list[str] | str | None) -> list[str]:
    """What an earlier tower left in the repository, and what the caller wants deleted."""
    if delete_patterns is not None:
        gone += list(filter_repo_objects(remote, allow_patterns=delete_patterns))
    return sorted(set(gone) - set(pushed) - {".gitattributes"})


def default_repo_id(folder: str | os.PathLike[str]) -> str:
    """The name of a folder, as transformers and the mixin take it for a repository's."""
    return Path(folder).resolve().name

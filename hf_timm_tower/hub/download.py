"""Files of a repository of the Hub, all from one commit, checked against the Hub's own digests.

The transport, the cache, the retries and the progress bars are huggingface_hub's. What is added: every error of it
becomes one of ours that names repository and revision and says what to do, and a file that arrives damaged does not
stay in the cache (the client compares sizes only).
"""

import glob
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..reader.errors import ArgumentError, HubError, TowerError, shown

# The base of the client's HTTP library, whichever its version uses: connection refused, cut, timed out.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")

# What must not stand in a message: a token, as such or in a header, and the user of an address.
_SECRET = re.compile(r"hf_\w+|(?<=Bearer )[^\s'\"]+|(?<=//)[^/\s@]+(?=@)")

MAX_WEIGHT_FILES = 1000
"""Weight files of a tower that are asked for. The largest public models have about 200, of 5 GB each."""


def check_token(token: object) -> None:
    """Refuse a token that no header can hold, which the HTTP library would quote in its error.

    Raises:
        ArgumentError: does not show the token.
    """
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ArgumentError("token=...: holds a blank, a line feed or another letter that no token has; strip it")


@dataclass(frozen=True)
class Access:
    """How a repository is reached.

    Attributes:
        token: A token, True for the one that is logged in, False for none, None for whichever there is.
        cache_dir: Where downloads are kept; None for the Hub's own cache.
        force_download: Download again what is in the cache.
        local_files_only: Do not go to the network.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        check_token(self.token)


def download_files(
    repo_id: str, names: Collection[str], revision: str | None, access: Access, *, whole: bool = False
) -> Path:
    """Those of the named files that the repository has at a revision, in the cache.

    Args:
        repo_id: `org/name`.
        names: Paths inside the repository.
        revision: Branch, tag, commit or `refs/pr/N`, resolved once; None for the main branch.
        access: Token, cache and so on.
        whole: All of the files must be there.

    Returns:
        The snapshot's folder; its name is the commit.

    Raises:
        HubError: there is no such repository or revision, it may not be read, the network fails, a file arrived
            damaged, or not all are there that must be.
    """
    cache = Path(access.cache_dir or constants.HF_HUB_CACHE).expanduser()
    with hub_errors(f"cannot be loaded{_at(revision)}", repo_id, revision):
        storage = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
        before = frozenset() if access.force_download else _blobs(storage)
        try:
            root = snapshot_download(
                repo_id,
                revision=revision,
                token=access.token,
                cache_dir=cache,
                force_download=access.force_download,
                local_files_only=access.local_files_only,
                allow_patterns=[glob.escape(name) for name in names],
            )
        finally:
            damaged = _remove_damaged(storage, before)
        if damaged:
            raise HubError(
                f"{repo_id}: {shown(', '.join(damaged))[1:-1]} arrived damaged (not of the Hub's digest) and was "
                "removed from the cache. Try again; if it stays so, the file on the Hub is damaged: push the tower "
                "again."
            )
    # Where the Hub does not answer, older clients (1.5) give the cached part of a snapshot for the whole of it.
    if whole and (lacking := [name for name in names if not Path(root, name).exists()]):
        raise HubError(
            f"{repo_id} cannot be loaded at commit {Path(root).name}: {shown(', '.join(lacking))[1:-1]} is missing. "
            "Either the Hub could not be reached, and the cache has only a part: try again; or the repository is "
            "incomplete: push the tower again."
        )
    return Path(root)


def _blobs(storage: Path) -> frozenset[str]:
    blobs = storage / "blobs"
    return frozenset(os.listdir(blobs)) if blobs.is_dir() else frozenset()


def _remove_damaged(storage: Path, before: frozenset[str]) -> list[str]:
    """Compare what is new in the cache with its name there, the Hub's digest of it; say which files were damaged."""
    bad = {name for name in _blobs(storage) - before if _is_damaged(storage / "blobs" / name)}
    if not bad:
        return []
    damaged = []
    for link in sorted((storage / "snapshots").rglob("*")):
        if link.is_symlink() and os.path.basename(os.readlink(link)) in bad:
            link.unlink()
            damaged.append(link.name)
    for name in bad:
        (storage / "blobs" / name).unlink(missing_ok=True)
    return sorted(set(damaged)) or sorted(bad)


def _is_damaged(blob: Path) -> bool:
    if _SHA256.fullmatch(blob.name):
        return file_sha256(blob) != blob.name
    if _GIT_SHA1.fullmatch(blob.name):
        return git_hash(blob.read_bytes()) != blob.name
    return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {shown(revision)}"


@contextmanager
def hub_errors(what: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into ours.

    Args:
        what: What did not work, after the repository's name: "cannot be loaded".
        repo_id: For the message.
        revision: For the message.

    Raises:
        HubError: names the repository, the revision, what the Hub said and what to do.
    """
    where = f"{repo_id} {what}"
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{shown(repo_id)}: no such folder, and not the id of a repository: {_said(error)}") from error
    except GatedRepoError as error:
        raise HubError(
            f"{where}: the repository is gated. Ask for access on its page {constants.ENDPOINT}/{repo_id}, and pass "
            f"token=... of the account that was granted it (or `hf auth login`): {_said(error)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{where}: no such folder, and no such repository on {constants.ENDPOINT}, or it is private and the token "
            f"may not read it: check the name, pass token=... or `hf auth login`: {_said(error)}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{where}: the repository has no revision {shown(revision)}; its branches and tags are listed on "
            f"{constants.ENDPOINT}/{repo_id}/tree/main: {_said(error)}"
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{where}: token=True, but nobody is logged in: `hf auth login`, or pass a token") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{where}: no such folder, and the repository is not in the cache in full while the network is off or out "
            f"of reach (local_files_only, HF_HUB_OFFLINE, or no connection): {_said(error)}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid: pass another token=... or `hf auth login`",
            403: "the token may not do this: it needs the right to write to this repository",
            429: "the Hub asks for fewer requests: wait, then try again",
        }.get(status, "try again later" if status >= 500 else "see what the Hub said")
        raise HubError(f"{where}: the Hub answered {status}; {remedy}: {_said(error)}") from error
    except _HTTPError as error:
        raise HubError(f"{where}: the connection to {constants.ENDPOINT} failed; try again: {_said(error)}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: an upload of the client's ended before its time
        if isinstance(error, TowerError):
            raise
        raise HubError(f"{where}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What the Hub or the client said, on one line, printable, without secrets."""
    return shown(_SECRET.sub("...", " ".join(str(error).split())) or type(error).__name__, 500)

"""Repositories on disk: settings, refs and history. The name of a ref moves last, so a kill leaves old or new state.

repos/<kind>s/<namespace>/<name>/
    settings.json           private, gated, who has been granted access
    commits/<id>.json       one Commit each, with all its files; never changed
    refs/heads/<name>.ref   the commit's id; likewise refs/tags and refs/pr
    lfs/<sha256>            empty: this repository may use that object of the store
"""

import datetime
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .disk import new_temporary, read_json, sync_folder, write_json, write_whole
from .errors import HubError, bad_request, revision_not_found
from .git_ids import commit_id, tree_ids
from .git_patterns import DEFAULT_ATTRIBUTES
from .names import KINDS, check_ref_name, check_repo_part, file_to_ref, is_commit_id, ref_to_file
from .objects import Objects

MAIN = "main"
_SHORTEST_ID = 7


@dataclass(frozen=True)
class File:
    """A file of a commit: git's id (of the pointer, for LFS), size in bytes, and the sha256 if it is LFS."""

    oid: str
    size: int
    lfs: str | None = None


@dataclass(frozen=True)
class Commit:
    """A state of a repository and how it came about; `date` is ISO 8601, UTC."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class Settings:
    """What the owner decides. `gated` is False, "auto" or "manual"; `granted` are users let through the gate."""

    created: str
    private: bool = False
    gated: bool | str = False
    granted: tuple[str, ...] = ()


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Repo:
    """One repository. Writers hold `lock`; readers need none.

    Args:
        folder: where it lies.
        kind: "model", "dataset" or "space".
        namespace: a user or organisation.
        name: the part after the slash.
        scratch: where unfinished files lie, on the same disk.
        lock: shared by all writers of the store.
    """

    def __init__(
        self, folder: Path, kind: str, namespace: str, name: str, scratch: Path, lock: threading.RLock
    ) -> None:
        self.kind, self.namespace, self.name, self.lock = kind, namespace, name, lock
        self._folder, self._scratch = folder, scratch

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def url_path(self) -> str:
        """Where people and clients find it on the site, with its leading slash."""
        return f"/{self.id}" if self.kind == "model" else f"/{self.kind}s/{self.id}"

    # Settings

    def settings(self) -> Settings:
        found = read_json(self._folder / "settings.json")
        if found is None:  # deleted meanwhile
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Settings(**{**found, "granted": tuple(found["granted"])})

    def change_settings(self, **changes: object) -> None:
        with self.lock:
            changed = replace(self.settings(), **changes)  # type: ignore[arg-type]
            write_json(self._folder / "settings.json", asdict(changed), self._scratch)

    # Objects of the store that this repository may use. Knowing a hash alone opens nobody else's file.

    def has_lfs(self, sha256: str) -> bool:
        return (self._folder / "lfs" / sha256).exists()

    def allow_lfs(self, sha256: str) -> None:
        if not self.has_lfs(sha256):
            write_whole(self._folder / "lfs" / sha256, b"", self._scratch)

    # Commits

    def commit(self, commit: str) -> Commit:
        found = read_json(self._folder / "commits" / f"{commit}.json")
        if found is None:
            raise revision_not_found(commit)
        return Commit(**{**found, "files": {path: File(**file) for path, file in found["files"].items()}})

    def add_commit(
        self, files: Mapping[str, File], parent: str | None, author: str, title: str, message: str
    ) -> Commit:
        """Write a commit that no ref points to yet."""
        date = now()
        seconds = int(
            datetime.datetime.fromisoformat(date.replace("Z", "+00:00")).timestamp()
        )  # Z: from Python 3.11 on
        text = f"{title}\n\n{message}" if message else title
        root = tree_ids({path: file.oid for path, file in files.items()})[""]
        commit = Commit(commit_id(root, parent, author, seconds, text), parent, title, message, author, date, files)
        write_json(self._folder / "commits" / f"{commit.id}.json", asdict(commit), self._scratch)
        return commit

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and those before it, newest first."""
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self.commit(commit.parent)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, `refs/...` name, full or shortened commit id. HubError 404 if there is none."""
        kind, _, name = revision.removeprefix("refs/").partition("/")
        if revision.startswith("refs/"):
            found = self.ref(kind, name) if kind in ("heads", "tags", "pr") else None
        else:
            found = self.ref("heads", revision) or self.ref("tags", revision)
        if found is None and is_commit_id(revision):
            found = revision
        if found is None and len(revision) >= _SHORTEST_ID and is_commit_id(revision.ljust(40, "0")):
            matches = [path.stem for path in (self._folder / "commits").glob(f"{revision}*.json")]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            raise revision_not_found(revision)
        return self.commit(found)

    # Refs: kind is "heads", "tags" or "pr"

    def ref(self, kind: str, name: str) -> str | None:
        """The id of the commit that a ref points to, or None."""
        try:
            name = check_ref_name(name)
        except HubError:
            return None
        try:
            return (self._folder / "refs" / kind / ref_to_file(name)).read_text().strip()
        except FileNotFoundError:
            return None

    def refs(self, kind: str) -> dict[str, str]:
        """Name -> commit id."""
        found = {}
        for path in sorted((self._folder / "refs" / kind).glob("*.ref")):
            found[file_to_ref(path.name)] = path.read_text().strip()
        return found

    def set_ref(self, kind: str, name: str, commit: str) -> None:
        """The moment at which a commit becomes visible."""
        target = self._folder / "refs" / kind / ref_to_file(check_ref_name(name))
        write_whole(target, commit.encode(), self._scratch)

    def create_ref(self, kind: str, name: str, commit: str) -> None:
        """Raises HubError 409 if it is there."""
        with self.lock:
            if self.ref(kind, check_ref_name(name)) is not None:
                raise HubError(409, f"Reference already exists: refs/{kind}/{name}")
            self.set_ref(kind, name, commit)

    def delete_ref(self, kind: str, name: str) -> None:
        """Raises HubError 404 if it is not there, 403 for the main branch."""
        if (kind, name) == ("heads", MAIN):
            raise HubError(403, "The main branch cannot be deleted")
        with self.lock:
            if self.ref(kind, name) is None:
                raise revision_not_found(name)
            (self._folder / "refs" / kind / ref_to_file(name)).unlink()

    def add_pull_request(self, commit: str) -> int:
        """Give a commit the next `refs/pr/<number>`; returns the number."""
        with self.lock:
            number = max((int(name) for name in self.refs("pr")), default=0) + 1
            self.set_ref("pr", str(number), commit)
            return number


class Repos:
    """All repositories of a store.

    Args:
        root: the store's folder.
        scratch: where unfinished things lie, on the same disk.
        objects: the store's file contents.
    """

    def __init__(self, root: Path, scratch: Path, objects: Objects) -> None:
        self._root, self._scratch, self._objects = root / "repos", scratch, objects
        self._lock = threading.RLock()

    def _at(self, kind: str, namespace: str, name: str) -> Path:
        if kind not in KINDS:
            raise bad_request(f"unknown repository type {kind!r:.50}")
        return self._root / f"{kind}s" / check_repo_part(namespace) / check_repo_part(name)

    def get(self, kind: str, namespace: str, name: str) -> Repo | None:
        """The repository, or None; None too for names that no repository can have."""
        try:
            folder = self._at(kind, namespace, name)
        except HubError:
            return None
        if not (folder / "settings.json").is_file():
            return None
        return Repo(folder, kind, namespace, name, self._scratch, self._lock)

    def all(self, kind: str) -> list[Repo]:
        found: list[Repo] = []
        if kind not in KINDS:
            return found
        for path in sorted((self._root / f"{kind}s").glob("*/*/settings.json")):
            repo = self.get(kind, path.parent.parent.name, path.parent.name)
            if repo is not None:
                found.append(repo)
        return found

    def create(self, kind: str, namespace: str, name: str, author: str, private: bool) -> Repo:
        """A new repository with the Hub's first commit. Raises HubError 409 if there is one of that name."""
        folder = self._at(kind, namespace, name)
        with self._lock:
            if folder.exists():
                raise HubError(409, f"You already created this {kind} repo")
            # Built aside and renamed: a repository without its first commit is never seen.
            draft = new_temporary(self._scratch)
            draft.mkdir()
            repo = Repo(draft, kind, namespace, name, self._scratch, self._lock)
            write_json(draft / "settings.json", asdict(Settings(created=now(), private=private)), self._scratch)
            attributes = DEFAULT_ATTRIBUTES.encode()
            files = {".gitattributes": File(self._objects.add_blob(attributes), len(attributes))}
            repo.set_ref("heads", MAIN, repo.add_commit(files, None, author, "initial commit", "").id)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(draft, folder)
            sync_folder(folder.parent)
        return Repo(folder, kind, namespace, name, self._scratch, self._lock)

    def delete(self, repo: Repo) -> None:
        """Take a repository away; contents that it alone used stay in the store."""
        with self._lock:
            aside = new_temporary(self._scratch)
            os.rename(self._at(repo.kind, repo.namespace, repo.name), aside)
            shutil.rmtree(aside)

"""A client's commit request (lines of JSON) made into one commit, and where files go: regular or LFS."""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import HubError, bad_request, entry_not_found
from .git_ids import blob_id, lfs_pointer
from .git_patterns import is_ignored, is_lfs
from .names import check_path, check_sha256
from .objects import Objects
from .repos import Commit, File, Repo

# As on the Hub: past this, a regular file must be LFS.
LARGEST_REGULAR = 10 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """A parsed commit request: the header's words, and (key, value) operations in their order."""

    title: str
    message: str
    parent: str | None
    operations: tuple[tuple[str, dict[str, Any]], ...]


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(body.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"line {number} of the commit is not JSON") from error
        if not isinstance(item, dict) or not isinstance(item.get("value"), dict) or not isinstance(item["key"], str):
            raise bad_request(f'line {number} of the commit is not {{"key": ..., "value": {{...}}}}')
        yield item["key"], item["value"]


def parse(body: bytes) -> Request:
    """Raises HubError 400 for what is not a commit."""
    lines = tuple(_lines(body))
    if not lines or lines[0][0] != "header":
        raise bad_request("the commit's first line is not its header")
    header = lines[0][1]
    title, message = header.get("summary"), header.get("description") or ""
    parent = header.get("parentCommit")
    if not isinstance(title, str) or not title or not isinstance(message, str):
        raise bad_request("the commit's header has no summary")
    if parent is not None and not isinstance(parent, str):
        raise bad_request("parentCommit is not a commit id")
    return Request(title, message, parent, lines[1:])


def _text(value: dict[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str):
        raise bad_request(f"an operation of the commit has no text under {key!r}")
    return str(value[key])


def _regular(objects: Objects, value: dict[str, Any]) -> File:
    text, encoding = _text(value, "content"), value.get("encoding", "utf-8")
    if encoding not in ("base64", "utf-8"):
        raise bad_request(f"unknown encoding {encoding!r:.50}")
    try:
        content = base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    except (binascii.Error, UnicodeEncodeError) as error:
        raise bad_request(f"{value.get('path')!r:.120} is not {encoding}") from error
    if len(content) > LARGEST_REGULAR:
        raise bad_request(f"{value.get('path')!r:.120} has {len(content)} bytes and must be uploaded as LFS")
    return File(objects.add_blob(content), len(content))


def _lfs(objects: Objects, repo: Repo, value: dict[str, Any]) -> File:
    sha256 = check_sha256(value.get("oid"))
    if not repo.has_lfs(sha256):
        raise bad_request(f"LFS object {sha256} of {value.get('path')!r:.120} was not uploaded to {repo.id}")
    size = objects.lfs_path(sha256).stat().st_size
    if value.get("size", size) != size:
        raise bad_request(f"LFS object {sha256} has {size} bytes, the commit says {value['size']!r:.50}")
    return File(blob_id(lfs_pointer(sha256, size)), size, sha256)


def _apply(objects: Objects, repo: Repo, base: Commit, request: Request) -> dict[str, File]:
    files = dict(base.files)
    for key, value in request.operations:
        path = check_path(_text(value, "path").rstrip("/") if key == "deletedFolder" else value.get("path"))
        if key == "file":
            files[path] = _regular(objects, value)
        elif key == "lfsFile":
            files[path] = _lfs(objects, repo, value)
        elif key == "copyFile":
            source = check_path(value.get("srcPath"))
            origin = repo.resolve(_text(value, "srcRevision")) if value.get("srcRevision") else base
            if source not in origin.files:
                raise entry_not_found(source, origin.id)
            files[path] = origin.files[source]
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise entry_not_found(path, base.id, f"A file with this name doesn't exist: {path}")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path + "/")]
            if not inside:
                raise entry_not_found(path, base.id, f"A folder with this name doesn't exist: {path}")
            for name in inside:
                del files[name]
        else:
            raise bad_request(f"unknown operation {key!r:.50}")
    for path in files:
        parts = path.split("/")
        for count in range(1, len(parts)):
            if "/".join(parts[:count]) in files:
                raise bad_request(f"{'/'.join(parts[:count])!r} would be both a file and a folder")
    return files


def commit(
    objects: Objects, repo: Repo, revision: str, request: Request, author: str, create_pr: bool
) -> tuple[Commit, int | None]:
    """Make one commit on a branch or pull request, or open a pull request with it. All or nothing.

    Args:
        objects: the store's contents.
        repo: the repository.
        revision: a branch or `refs/pr/<n>`.
        request: what to do.
        author: the user's name.
        create_pr: leave the branch alone and open a pull request.

    Returns:
        The commit, and the number of the pull request that it opened.

    Raises:
        HubError: 412 if the branch is no longer at the request's parent; 400 and 404 for what cannot be done.
    """
    # One writer at a time: who comes second builds on what the first one wrote.
    with repo.lock:
        kind, name = ("heads", revision.removeprefix("refs/heads/"))
        if revision.startswith("refs/pr/"):
            kind, name = "pr", revision.removeprefix("refs/pr/")
        head = repo.ref(kind, name)
        if head is None:
            base = repo.resolve(revision)  # 404 if there is no such thing at all
            raise bad_request(f"{revision!r:.100} is not a branch: nothing can be committed to {base.id}")
        if request.parent is not None and not (len(request.parent) >= 5 and head.startswith(request.parent)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        base = repo.commit(head)
        made = repo.add_commit(_apply(objects, repo, base, request), head, author, request.title, request.message)
        if create_pr:
            return made, repo.add_pull_request(made.id)
        repo.set_ref(kind, name, made.id)
        return made, None


def upload_plan(
    objects: Objects, base: Commit, files: list[dict[str, Any]], ignore: str | None
) -> list[dict[str, Any]]:
    """How each file is to be sent, what is there already, and what a `.gitignore` leaves out.

    Args:
        objects: the store's contents.
        base: the commit to build on.
        files: `path`, `size` (bytes) and `sample` (base64 of the first bytes) of each.
        ignore: text of a `.gitignore` that is sent along, in place of the repository's own.
    """

    def text_of(name: str) -> str:
        file = base.files.get(name)
        if file is None or file.lfs is not None:
            return ""
        return objects.blob_path(file.oid).read_text(errors="replace")

    attributes = text_of(".gitattributes")
    ignore = text_of(".gitignore") if ignore is None else ignore
    plan = []
    for item in files:
        path, size = check_path(item.get("path")), item.get("size")
        if not isinstance(size, int):
            raise bad_request(f"{path!r} has no size")
        try:
            sample = base64.b64decode(item.get("sample") or "")
        except (binascii.Error, TypeError, ValueError) as error:
            raise bad_request(f"the sample of {path!r} is not base64") from error
        # As on the Hub, binary files are LFS whatever .gitattributes says.
        try:
            by_attributes, ignored = is_lfs(path, attributes), is_ignored(path, ignore)
        except ValueError as error:
            raise bad_request(f"{path!r}: {error}") from error
        lfs = by_attributes or size > LARGEST_REGULAR or b"\0" in sample
        answer: dict[str, Any] = {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": ignored,
        }
        present = base.files.get(path)
        if present is not None:
            answer["oid"] = present.lfs or present.oid
        plan.append(answer)
    return plan

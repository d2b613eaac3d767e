"""The ids that git gives to files, folders and commits, so that clients may compute and compare them."""

import hashlib
from collections.abc import Mapping


def _object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def blob_id(content: bytes) -> str:
    """git's id of a regular file."""
    return _object_id("blob", content)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The small text file that git keeps in place of an LFS file of `size` bytes."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(files: Mapping[str, str]) -> dict[str, str]:
    """git's ids of all folders.

    Args:
        files: path -> id of the file.

    Returns:
        Folder -> id; `""` is the root, which is there even without files.
    """
    children: dict[str, dict[str, str | None]] = {"": {}}
    for path, oid in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, {})[name] = oid
        while folder:
            parent, _, name = folder.rpartition("/")
            children.setdefault(parent, {})[name] = None
            folder = parent
    ids: dict[str, str] = {}
    # Deepest first: a folder's id needs those of its folders.
    for folder in sorted(children, key=lambda name: (name != "", name.count("/"), name), reverse=True):
        entries = []
        for name, file in children[folder].items():
            mode, order = ("40000", name + "/") if file is None else ("100644", name)
            oid = ids[f"{folder}/{name}" if folder else name] if file is None else file
            entries.append((order.encode(), f"{mode} {name}\0".encode() + bytes.fromhex(oid)))
        ids[folder] = _object_id("tree", b"".join(entry for _, entry in sorted(entries)))
    return ids


def commit_id(tree: str, parent: str | None, author: str, seconds: int, message: str) -> str:
    """git's id of a commit by `author` at `seconds` since 1970, UTC."""
    who = f"{author} <{author}@localhost> {seconds} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
    return _object_id("commit", ("\n".join(lines) + "\n\n" + message + "\n").encode())

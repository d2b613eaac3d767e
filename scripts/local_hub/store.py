"""The folder that holds everything the hub knows.

local_hub.json    says what this folder is
lfs/, blobs/      file contents by hash (objects.py)
repos/            repositories (repos.py)
log.jsonl         every request (log.py)
secret            the key of signed links
tmp/              unfinished files; emptied at start
"""

import json
import os
import shutil
from pathlib import Path

from .disk import read_json, write_json, write_whole
from .objects import Objects
from .repos import Repos

_VERSION = {"version": 1}
_MARK = "local_hub.json"


def check_folder(root: Path) -> None:
    """Raises ValueError if `root` holds something that is not a hub's, or is of another version. Changes nothing."""
    found = read_json(root / _MARK)
    if found is None and root.exists() and any(path.name not in (".lock", "tmp") for path in root.iterdir()):
        raise ValueError(f"{root} is neither empty nor a local hub's folder (it has no {_MARK})")
    if found is not None and found != _VERSION:
        raise ValueError(f"{root / _MARK} says {json.dumps(found)}; this hub reads {json.dumps(_VERSION)}")


class Store:
    """A folder that holds everything; one process at a time uses it.

    Args:
        root: the folder, which passed `check_folder`; made if missing.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        scratch = root / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left unfinished
        scratch.mkdir()
        if not (root / _MARK).exists():
            write_json(root / _MARK, _VERSION, scratch)
        self.scratch = scratch
        self.objects = Objects(root, scratch)
        self.repos = Repos(root, scratch, self.objects)

    def secret(self) -> bytes:
        """A key that is the store's own, for links that must outlive a restart."""
        path = self.root / "secret"
        if not path.exists():
            write_whole(path, os.urandom(32), self.scratch)
            path.chmod(0o600)
        return path.read_bytes()

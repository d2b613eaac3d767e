#!/usr/bin/env python
"""The digest of the `core/` folder that towers carried at a commit, for `_RELEASED_CODE` in `files/names.py`.

    python scripts/core_digest.py f18fbe0

A save removes a `core/` folder from a tower only where it is, byte for byte, one of these.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_timm_tower.files.names import digest_of

CORE = "hf_timm_tower/core"


def main() -> None:
    archive = subprocess.run(["git", "archive", sys.argv[1], CORE], check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        # What a save of that commit wrote: the file that `auto_map` names, and all that it imports from beside it.
        door = Path(folder, CORE, "doors.py")
        code = {door, *map(Path, get_relative_import_files(door))}
        print(len(code), digest_of({file.name: file.read_bytes() for file in code}))


if __name__ == "__main__":
    main()

"""The code that travels with a tower: this package's own core, byte for byte.

transformers and timm alone then load the tower, under `trust_remote_code=True`. The copy is made from the files that
run: where they run as a tower's own code, out of transformers' cache, they copy themselves.
"""

import re
from pathlib import Path

from ..files.names import CODE_NAME
from ..reader.errors import FolderError

DOOR = "doors"
"""The file (`doors.py`) that `auto_map` names; it imports all that travels."""

AUTO_MAP = {
    "AutoConfig": f"{CODE_NAME}/{DOOR}.TimmTowerConfig",
    "AutoImageProcessor": f"{CODE_NAME}/{DOOR}.TimmTowerImageProcessor",
    "AutoModel": f"{CODE_NAME}/{DOOR}.TimmTowerModel",
    "AutoModelForImageClassification": f"{CODE_NAME}/{DOOR}.TimmTowerForImageClassification",
}
"""`auto_map` of `config.json`: which class of the travelling code transformers takes for what."""


# TEMPORARY: the rooms flattened into the one folder that travels, until the reader is one generated file.
_ROOMS = ("reader", "files", "heads", "hub", "training")
_RELATIVE = re.compile(r"^from \.+(?:\w+\.)*(\w+) import", re.MULTILINE)


def code_files() -> dict[str, bytes]:
    """Name -> bytes of the files that travel, found as transformers finds them."""
    here = Path(__file__).parent
    if here.name != "hub":
        return {file.name: file.read_bytes() for file in sorted(here.glob("*.py"))}
    files = {file.stem: file for room in _ROOMS for file in (here.parent / room).glob("*.py")}
    found: dict[str, bytes] = {}
    waiting = [DOOR]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" in found:
            continue
        text = files[name].read_text(encoding="utf-8")
        waiting += _RELATIVE.findall(text)
        found[f"{name}.py"] = _RELATIVE.sub(r"from .\1 import", text).encode()
    return dict(sorted(found.items()))


def write_code(folder: Path) -> None:
    """Write the code into `folder/core/`, the same bytes every time; files of another version there go.

    Args:
        folder: A tower's folder.

    Raises:
        FolderError: it cannot be written.
    """
    target = folder / CODE_NAME
    try:
        files = code_files()
        target.mkdir(exist_ok=True)
        for stale in target.glob("*.py"):
            if stale.name not in files:
                stale.unlink()
        for name, content in files.items():
            (target / name).write_bytes(content)
    except OSError as error:
        raise FolderError(f"{target}: the code of the tower cannot be written: {error}") from error

"""The code that travels with a tower: all of it, nothing else, byte for byte, the same every time."""

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import hf_timm_tower.hub.code_files
import hf_timm_tower.reader.doors
from hf_timm_tower import FolderError
from hf_timm_tower.hub.code_files import AUTO_MAP, DOOR, write_code

CORE = Path(hf_timm_tower.hub.code_files.__file__).parent


def test_the_copy_is_closed_and_byte_for_byte(tmp_path: Path) -> None:
    write_code(tmp_path)
    copied = {file.name: file for file in (tmp_path / "core").iterdir()}
    for name, file in copied.items():
        assert file.read_bytes() == (CORE / name).read_bytes()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in copied, f"{name} imports {node.module}, which does not travel"
    assert "__init__.py" not in copied, "transformers makes its own"
    before = {name: file.read_bytes() for name, file in copied.items()}
    write_code(tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "core").iterdir()} == before


def test_every_class_of_the_auto_map_is_behind_the_door() -> None:
    for entry in AUTO_MAP.values():
        file, name = entry.split(".")
        assert file == f"core/{DOOR}"
        assert isinstance(getattr(hf_timm_tower.reader.doors, name), type)


def test_the_door_imports_every_file_that_travels() -> None:
    # Some versions of transformers copy of a folder's code only what this file imports itself.
    reached = {Path(name).stem for name in get_relative_import_files(CORE / f"{DOOR}.py")}
    missing = reached - set(get_relative_imports(CORE / f"{DOOR}.py"))
    assert missing == set(), f"add to core/{DOOR}.py: {sorted(missing)}"


def test_files_of_another_version_go_and_other_peoples_stay(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "old.py").write_text("raise SystemExit")
    (tmp_path / "core" / "notes.txt").write_text("mine")
    write_code(tmp_path)
    assert not (tmp_path / "core" / "old.py").exists()
    assert (tmp_path / "core" / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "core").write_text("a file")
    with pytest.raises(FolderError, match="core"):
        write_code(tmp_path)

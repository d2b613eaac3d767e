"""The one file that travels with a tower: that it is the sources, whole, closed, and readable in one go."""

import ast
import builtins
import sys
from pathlib import Path

import pytest

from hf_timm_tower import FolderError, TimmModel
from hf_timm_tower.hub import reader_file
from hf_timm_tower.hub.reader_file import AUTO_MAP, PAIR_MODULES, READER_NAME, reader_source, write_reader

READER = Path(reader_file.__file__).parents[1] / "reader"
COPY = Path(reader_file.__file__).with_name(READER_NAME)
TRAVEL_WITH = {"torch", "timm", "huggingface_hub", "safetensors", "transformers", "numpy", "PIL", "torchvision"}
TRAVEL_WITH |= {"typing_extensions"}  # torch brings it


def test_the_file_in_the_package_is_the_one_that_the_sources_give() -> None:
    assert COPY.read_text(encoding="utf-8") == reader_source(), "run: python -m hf_timm_tower.hub.reader_file"


def test_every_module_of_the_reader_is_in_it_after_those_that_it_imports() -> None:
    assert {path.stem for path in READER.glob("*.py")} - {"__init__"} == set(PAIR_MODULES)
    for place, name in enumerate(PAIR_MODULES):
        tree = ast.parse((READER / f"{name}.py").read_text(encoding="utf-8"))
        ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        for node in ours:
            assert node in tree.body, f"{name}: an import of ours below the top"
            assert node.level == 1, f"{name}: imports from outside of the reader"
            assert all(alias.asname is None for alias in node.names), f"{name}: renames on import"
            assert node.module in PAIR_MODULES[:place], f"{name} comes before {node.module}"


def test_no_name_stands_twice_and_every_import_is_of_what_is_there_anyway() -> None:
    owners: dict[str, str] = {}
    for name in PAIR_MODULES:
        for node in ast.parse((READER / f"{name}.py").read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                named = [node.name]
            for each in named:
                assert owners.setdefault(each, name) == name, f"{each} stands in {owners[each]} and {name}"
                assert not hasattr(builtins, each), f"{each} hides a builtin"
    for node in ast.walk(ast.parse(reader_source(PAIR_MODULES))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import of a file beside it"
            modules = [node.module or ""]
        for module in modules:
            assert module.partition(".")[0] in TRAVEL_WITH | sys.stdlib_module_names, module


def test_auto_map_names_classes_of_the_file() -> None:
    classes = {node.name for node in ast.parse(COPY.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)}
    for place in AUTO_MAP.values():
        file, _, name = place.partition(".")
        assert f"{file}.py" == READER_NAME
        assert name in classes


def test_a_save_writes_it_unless_code_is_not_wanted(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.save_pretrained(tmp_path / "with")
    assert (tmp_path / "with" / READER_NAME).read_bytes() == COPY.read_bytes()
    tower.save_pretrained(tmp_path / "without", include_code=False)
    assert not (tmp_path / "without" / READER_NAME).exists()


def test_a_folder_of_that_name_is_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / READER_NAME).mkdir()
    with pytest.raises(FolderError, match=READER_NAME):
        write_reader(tmp_path)
    assert (tmp_path / READER_NAME).is_dir()


def test_writing_it_over_a_link_leaves_what_the_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("mine")
    (tmp_path / READER_NAME).symlink_to(tmp_path / "mine.py")
    write_reader(tmp_path)
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert (tmp_path / READER_NAME).read_bytes() == COPY.read_bytes()

"""Who may import whom."""

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

import hf_timm_tower

PACKAGE = Path(__file__).resolve().parents[1] / "hf_timm_tower"
READER = PACKAGE / "reader"
TRAVEL_WITH = {"torch", "timm", "huggingface_hub", "safetensors", "transformers"}
TRAVEL_WITH |= {"numpy", "PIL", "torchvision", "typing_extensions"}  # which come with these

# The public face, apart from the errors, which are read off reader/errors.py.
PUBLIC = {
    "TimmModel",
    "TimmTowerBackbone",
    "TimmTowerConfig",
    "TimmTowerEncoder",
    "TimmTowerEncoderConfig",
    "TimmTowerForImageClassification",
    "TimmTowerImageProcessor",
    "TimmTowerModel",
    "Verification",
    "__version__",
    "align_weights",
    "make_self_contained",
    "register_head",
}

# Files and rooms that are named after their job, and the peers that they import.
PEERS = {
    "embedding/evaluation.py": {"sklearn"},
    "embedding/hf_datasets.py": {"datasets"},
    "embedding/lance_table.py": {"lancedb", "pyarrow"},
    "embedding/lancedb.py": {"lancedb", "pyarrow"},
    "embedding/parquet.py": {"pyarrow"},
    "embedding/ray.py": {"pyarrow", "ray"},
    "cli": {"typer", "rich"},
}


@dataclass(frozen=True)
class Import:
    """One imported module as written: `from ..a.b import c` has level 2, module "a.b", names ("c",)."""

    line: int
    level: int
    module: str
    names: tuple[str, ...]
    top: bool  # a statement of the module itself, not inside a function, class, if or try
    typing_only: bool  # under `if TYPE_CHECKING:`

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: Path) -> list[Import]:
    """Every import statement of a file, wherever it stands."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), top=True, typing_only=False))


def _walk(parent: ast.AST, *, top: bool, typing_only: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, 0, alias.name, (), top, typing_only)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(node.lineno, node.level, node.module or "", names, top, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for child in node.body:
                yield from _walk(ast.Module([child], []), top=False, typing_only=True)
            for child in node.orelse:
                yield from _walk(ast.Module([child], []), top=False, typing_only=typing_only)
        else:
            yield from _walk(node, top=False, typing_only=typing_only)


def test_an_optional_peer_is_imported_only_by_its_own_file() -> None:
    faults = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = PEERS.get(path.relative_to(PACKAGE).as_posix(), PEERS.get(path.parent.name, {path.stem}))
        own = own if path.parent.name in {"interop", "embedding", "cli"} else set()
        faults += [
            f"{path.relative_to(PACKAGE)}:{found.line}: {found.module}"
            for found in imports_of(path)
            if found.level == 0
            and found.root not in {*TRAVEL_WITH, *own, "hf_timm_tower"}
            and found.root not in sys.stdlib_module_names
        ]
    assert faults == [], "only interop/<peer>.py, embedding/<peer>.py and PEERS import a peer"


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports when it runs, in functions too."""
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for found in imports_of(path):
            if found.typing_only:
                continue
            module = found.module
            if found.level:
                above = package.split(".")[: len(package.split(".")) - found.level + 1]
                module = ".".join([*above, *([module] if module else [])])
            # `from package import module` imports the module, `from module import name` the module before the name.
            submodules = [f"{module}.{target}" for target in found.names if f"{module}.{target}" in files]
            graph[name].update(submodules or ([module] if module in files else []))
    return graph


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some chain of imports that comes back to its start, or an empty list."""
    finished: set[str] = set()

    def search(name: str, chain: list[str]) -> list[str]:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name not in finished:
            for target in sorted(graph[name]):
                if cycle := search(target, [*chain, name]):
                    return cycle
            finished.add(name)
        return []

    return next((cycle for name in graph if (cycle := search(name, []))), [])


def test_imports_never_run_in_a_circle() -> None:
    graph = import_graph()
    assert "hf_timm_tower.reader.errors" in graph["hf_timm_tower.reader.config"], "the walk sees a known import"
    assert cycle_in(graph) == []
    graph["hf_timm_tower.reader.errors"].add("hf_timm_tower.reader.config")
    assert cycle_in(graph) != [], "the search sees a circle where there is one"


def error_names() -> set[str]:
    tree = ast.parse((READER / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_public_face_is_exact() -> None:
    expected = PUBLIC | error_names()
    assert len(hf_timm_tower.__all__) == len(set(hf_timm_tower.__all__))
    assert set(hf_timm_tower.__all__) == expected
    assert expected <= set(dir(hf_timm_tower))
    values = {name: getattr(hf_timm_tower, name) for name in dir(hf_timm_tower) if not name.startswith("_")}
    assert {name for name, value in values.items() if not isinstance(value, ModuleType)} == expected - {"__version__"}
    # The names load late; this is what a type checker or an editor sees instead.
    declared = [name for found in imports_of(PACKAGE / "__init__.py") if found.typing_only for name in found.names]
    assert sorted(declared) == sorted(expected - {"__version__"})
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_timm_tower.no_such_name


@pytest.mark.parametrize("name", sorted(error_names()))
def test_every_error_is_ours_and_the_same_class_from_both_doors(name: str) -> None:
    error = getattr(hf_timm_tower, name)
    assert issubclass(error, hf_timm_tower.TowerError)
    assert error is getattr(importlib.import_module("hf_timm_tower.reader.errors"), name)


def test_the_version_stands_in_one_place() -> None:
    # The build reads this very line (hatch's default pattern), so the distribution cannot differ from the package.
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.findall(r"""(?m)^__version__\s*(?::\s*str\s*)?=\s*["'](.+?)["']""", source)
    assert found == [hf_timm_tower.__version__]
    assert str(Version(found[0])) == found[0]
    assert not re.search(r"(?m)^version\s*=", (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))


HEAVY = "transformers.modeling_utils"


def test_importing_the_package_leaves_transformers_modeling_alone(fresh_process: Callable[..., str]) -> None:
    report = f"import sys; print({HEAVY!r} in sys.modules)"
    assert fresh_process(f"import hf_timm_tower; {report}") == "False\n"
    # The probe would see it: a name of transformers that is served lazily by just that module.
    load = "import transformers; transformers.PreTrainedModel"
    assert fresh_process(f"import hf_timm_tower; {load}; {report}") == "True\n"


def test_a_fresh_process_knows_the_package_and_not_the_tests(fresh_process: Callable[..., str]) -> None:
    printed = fresh_process(
        """
        import importlib.util, os, sys
        import hf_timm_tower
        for name in ("tests", "heads_in_the_wild", "conftest"):
            print(name, importlib.util.find_spec(name) is not None)
        print(os.listdir(), sys.argv[1:])
        """,
        "one",
    )
    assert printed.splitlines() == ["tests False", "heads_in_the_wild False", "conftest False", "[] ['one']"]
    with pytest.raises(AssertionError, match="NameError"):
        fresh_process("undefined_name")

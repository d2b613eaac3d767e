"""What docs/architecture.md names is there."""

import ast
import re
from pathlib import Path

import hf_timm_tower

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_timm_tower"
# Words of others, the name of a pool, the generated file.
OTHERS = {"AutoModel", "FLOORS", "map", "token_avg", "modeling_timm_tower.py"}


def defined_in(path: Path) -> set[str]:
    """Names at the top of a file, and those of its methods, alone and as `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            methods = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{name}" for name in methods}
    return found


def is_there(name: str, files: dict[str, set[str]]) -> bool:
    """Whether a word of the document is a path, a public class or what it has, a module, or a name in a file."""
    if re.fullmatch(r"[\w./]+(\.py|\.md|/)", name):
        return (PACKAGE / name).exists() or (ROOT / name).exists()
    first, _, rest = name.partition(".")
    if first in hf_timm_tower.__all__:
        return not rest or hasattr(getattr(hf_timm_tower, first), rest)
    parts = name.split(".")
    for cut in range(len(parts) + 1):
        module, inner = ".".join(parts[:cut]), ".".join(parts[cut:])
        asked = [names for file, names in files.items() if not module or f".{file}".endswith(f".{module}")]
        if any(inner in names if inner else module for names in asked):
            return True
    return (PACKAGE / first).is_dir() and not rest


def test_every_name_in_the_map_is_there() -> None:
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): defined_in(path) for path in PACKAGE.rglob("*.py")
    }
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    words = set(re.findall(r"`([A-Za-z_][\w./]*)`", text)) - OTHERS
    assert "build.head_fields" in words, "the walk sees a known name"
    assert [word for word in sorted(words) if not is_there(word, files)] == []
    rooms = {f"{path.name}{'/' if path.is_dir() else ''}" for path in PACKAGE.iterdir() if path.name[0] not in "._"}
    assert sorted(rooms - words - {"py.typed"}) == [], "rooms and files at the top that it does not name"
    assert not is_there("build.no_such_name", files)

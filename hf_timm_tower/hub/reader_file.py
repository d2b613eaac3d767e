"""`modeling_timm_tower.py`: the modules of `reader/` as the one file that travels with every tower.

transformers and timm alone then load the tower, under `trust_remote_code=True`. It is the sources one after the other
in the order of their imports, with the imports of other packages gathered at the top: plain concatenation, so that
whoever wants to trust it can read it from top to bottom and compare it with the package.

    python -m hf_timm_tower.hub.reader_file      writes the copy that is in the package
"""

import ast
from collections.abc import Sequence
from pathlib import Path

from ..files.disk import replaced_file

READER_NAME = "modeling_timm_tower.py"
"""The file, at the top of a tower's folder; the name under which people know such files from the Hub."""

READER_MODULES = (
    "errors",
    "model_args",
    "freezing",
    "config",
    "skip_init",
    "trunk",
    "graph_ops",
    "graph_program",
    "graph_schema",
    "graph_sizes",
    "graph_layers",
    "graph_head",
    "head",
    "image_processing",
    "image_processor",
    "tower",
    "weights",
    "computed_buffers",
    "hidden_states",
    "forward",
    "loading",
    "pretrained",
    "backbone",
    "modeling",
)
"""The modules of `reader/` that travel with a tower, each after those that it imports."""

PAIR_MODULES = (*READER_MODULES, "dual_encoder")
"""Those that travel with a pair of a tower and a text model."""

_MODULE = READER_NAME.removesuffix(".py")
AUTO_MAP = {
    "AutoBackbone": f"{_MODULE}.TimmTowerBackbone",
    "AutoConfig": f"{_MODULE}.TimmTowerConfig",
    "AutoImageProcessor": f"{_MODULE}.TimmTowerImageProcessor",
    "AutoModel": f"{_MODULE}.TimmTowerModel",
    "AutoModelForImageClassification": f"{_MODULE}.TimmTowerForImageClassification",
}
"""`auto_map` of `config.json`: which class of the file transformers takes for what."""

_PACKAGE = Path(__file__).resolve().parents[1]
_COPY = Path(__file__).with_name(READER_NAME)
_HEAD = '''"""Towers of hf_timm_tower in transformers, where that package is not installed.

This is the code that `trust_remote_code=True` runs, all of it: the modules of hf_timm_tower/reader, one after the other
in the order of their imports. It reads JSON and safetensors, builds a timm model and a head, and has no other business.
"""
'''


def reader_source(modules: Sequence[str] = READER_MODULES) -> str:
    """The file's text, from the sources of these modules."""
    imports: dict[str, set[str]] = {}
    parts: list[str] = []
    for name in modules:
        text = (_PACKAGE / "reader" / f"{name}.py").read_text(encoding="utf-8")
        lines, cut = text.splitlines(), set[int]()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                cut.update(range(node.lineno - 1, node.end_lineno or node.lineno))
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        imports.setdefault(f"import {ast.unparse(alias)}", set())
                elif not node.level:
                    names = {ast.unparse(alias) for alias in node.names}
                    imports.setdefault(f"from {node.module} import", set()).update(names)
        kept = "\n".join(line for number, line in enumerate(lines) if number not in cut).strip("\n")
        while "\n\n\n" in kept:
            kept = kept.replace("\n\n\n", "\n\n")
        parts.append(f"# --- {name}.py\n\n{kept}\n")
    return "\n".join([_HEAD, _import_lines(imports), *parts])


def _import_lines(imports: dict[str, set[str]]) -> str:
    lines = []
    for start, names in sorted(imports.items(), key=lambda item: (item[0].split()[1], item[0])):
        line = f"{start} {', '.join(sorted(names))}" if names else start
        if len(line) > 120:
            line = f"{start} (\n    " + ",\n    ".join(sorted(names)) + ",\n)"
        lines.append(line)
    return "\n".join(lines) + "\n"


def write_reader(folder: Path, *, for_pair: bool = False) -> None:
    """Write the file into a folder, the same bytes every time.

    Args:
        folder: Of a tower.
        for_pair: Of a tower and a text model as one (`hub/dual_encoder.py`).

    Raises:
        FolderError: it cannot be written.
    """
    with replaced_file(folder / READER_NAME) as file:
        file.write(reader_source(PAIR_MODULES).encode() if for_pair else _COPY.read_bytes())


if __name__ == "__main__":
    _COPY.write_text(reader_source(), encoding="utf-8")

"""The files of a user's own, parsed: which top-level statement gives a name its meaning, and what it reads.

Files are parsed, never run, and nothing is imported that is not there already.
"""

import ast
import functools
import importlib.util
import inspect
import site
import symtable
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..reader.errors import HeadError

_OWN_PACKAGE = "hf_timm_tower"


def is_installed(module_name: str) -> bool:
    """Whether a module is Python's, this package's, or lies where packages are installed."""
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names or root == _OWN_PACKAGE:
        return True
    module = sys.modules.get(module_name)
    if module is None:
        return True  # an import that was never reached: nothing of the user's that we could read
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    place = next((place for place in places if place), None)
    if place is None:  # made in memory: a console, a notebook, or the inner part of a package like torch._C
        return module_name != root and is_installed(root)
    return any(Path(place).resolve().is_relative_to(folder) for folder in _installed_folders())


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return tuple(Path(folder).resolve() for folder in found)


@dataclass(frozen=True)
class Statement:
    """A top-level statement: its text, the names it binds and those of the module that it reads."""

    node: ast.stmt
    text: str
    binds: frozenset[str]
    reads: frozenset[str]


@dataclass
class UserFile:
    """A user's module, parsed.

    Attributes:
        binders: Name -> the statements that bind it.
        effects: Name -> the statements that do something with it: `op.register(...)`, `TABLE[key] = value`.
        stars: Modules of `from ... import *`.
    """

    module: ModuleType
    statements: list[Statement] = field(default_factory=list)
    binders: dict[str, list[int]] = field(default_factory=dict)
    effects: dict[str, list[int]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    future: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.module.__name__

    @property
    def namespace(self) -> dict[str, Any]:
        return vars(self.module)

    @classmethod
    def read(cls, module_name: str) -> "UserFile":
        module = sys.modules.get(module_name)
        if module is None:
            raise HeadError(f"the module {module_name} is not loaded, so that its source cannot be told from its name")
        try:
            source = inspect.getsource(module)
            tree = ast.parse(source)
        except (OSError, TypeError) as error:
            raise HeadError(
                f"the module {module_name} has no source to store ({error}): a notebook, a console or an extension. "
                "Write the class into a .py file and import it from there"
            ) from error
        except (SyntaxError, ValueError, RecursionError) as error:
            raise HeadError(f"the source of {module_name} cannot be parsed: {error}") from error
        file = cls(module)
        lines, last = source.split("\n"), 0  # not splitlines: a form feed ends no line of Python
        for node in tree.body:
            start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
            text = "\n".join(lines[start - 1 : node.end_lineno]) if start > last else ast.unparse(node)
            last = node.end_lineno or start
            file._add(node, _without_registration(node, text, start, vars(module)))
        return file

    def resolve(self, node: ast.ImportFrom) -> str:
        return importlib.util.resolve_name("." * node.level + (node.module or ""), self.module.__package__ or self.name)

    def _add(self, node: ast.stmt, text: str) -> None:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            self.future.update(alias.name for alias in node.names)
            return
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            self.stars.append(self.resolve(node))
            return
        if isinstance(node, ast.If) and _is_not_for_import(node.test):
            return
        binds, reads = _names(text)
        index = len(self.statements)
        self.statements.append(Statement(node, text, binds, reads))
        for name in binds:
            self.binders.setdefault(name, []).append(index)
        for name in _acts_on(node):
            self.effects.setdefault(name, []).append(index)


def _names(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the module that a statement binds, and those that it reads, in functions and classes too."""
    top = symtable.symtable(text, "<head>", "exec")
    binds = frozenset(name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported())
    reads = {name.get_name() for name in top.get_symbols() if name.is_referenced()}
    stack = list(top.get_children())
    while stack:
        table = stack.pop()
        reads |= {name.get_name() for name in table.get_symbols() if name.is_global() and name.is_referenced()}
        stack += table.get_children()
    return binds, frozenset(reads)


def _acts_on(node: ast.stmt) -> Iterator[str]:
    """Names on which a statement acts without binding them."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield from _root(node.value.func)
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _root(target)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        yield from _root(node.target)
    elif isinstance(node, ast.FunctionDef):
        for item in node.decorator_list:
            yield from _root(item.func if isinstance(item, ast.Call) else item)


def _root(node: ast.expr) -> Iterator[str]:
    """The name `a` of `a.b`, `a[b]`, `a.b[c].d`."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return
    inner: ast.expr = node
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield inner.id


def _is_not_for_import(test: ast.expr) -> bool:
    text = ast.unparse(test)
    return text.startswith("__name__ == ") or text in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _without_registration(node: ast.stmt, text: str, start: int, namespace: dict[str, Any]) -> str:
    """A stored class is found by its file: it shall not take the name of a head registered where it is loaded."""
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return text
    lines = text.split("\n")
    for item in reversed(node.decorator_list):
        found = _value_of(item.func, namespace) if isinstance(item, ast.Call) else None
        if getattr(found, "__name__", "") == "register_head" and str(found.__module__).endswith(".reader.head"):
            del lines[item.lineno - start : (item.end_lineno or item.lineno) - start + 1]
    return "\n".join(lines)


def _value_of(node: ast.expr, namespace: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return namespace.get(node.id)
    if isinstance(node, ast.Attribute):
        holder = _value_of(node.value, namespace)
        return getattr(holder, node.attr, None) if isinstance(holder, ModuleType) else None
    return None

"""The source of a class and of all that it needs from its user's own files -> one file that stands alone.

Of the file that defines the class, the top-level statements that it refers to are taken, transitively, as they are
written; names that come from other files of the user are followed there; what is installed (torch, einops, ...) is
imported.
"""

import ast
import builtins
import math
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..reader.errors import HeadError
from .head_statements import UserFile, is_installed

_LONGEST_LITERAL = 20_000
_MOVE = "Move it to the top level of a .py file"


def gather_source(cls: type) -> str:
    """A file that defines `cls` under its name, with no import of the user's own files.

    Raises:
        HeadError: there is no source, or something in it cannot be moved into one file; says what to change.
    """
    name, where = cls.__name__, f"{cls.__module__}.{cls.__qualname__}"
    if "<locals>" in cls.__qualname__:
        raise HeadError(f"{where} is defined inside a function: what it closes over has no source of its own. {_MOVE}")
    if "." in cls.__qualname__:
        raise HeadError(f"{where} is defined inside another class. {_MOVE}")
    if cls.__module__.startswith("torch."):
        raise HeadError(
            f"{name} is a class of torch itself: what makes the head is how its parts were put together, and that has "
            "no source. Put the parts into a class of your own"
        )
    if is_installed(cls.__module__):
        return f"from {cls.__module__} import {name}\n"
    gatherer = _Gatherer()
    file = gatherer.file(cls.__module__)
    if file.namespace.get(name) is not cls:
        raise HeadError(f"{where} is no longer what the name {name} means in its file: it was replaced or defined anew")
    gatherer.need(file, name)
    return gatherer.text(file)


@dataclass
class _Gatherer:
    """What was taken so far: file -> statement -> lines of the new file."""

    files: dict[str, UserFile] = field(default_factory=dict)
    taken: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    uses: dict[str, list[str]] = field(default_factory=dict)
    done: set[tuple[str, str]] = field(default_factory=set)
    owners: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def file(self, module_name: str) -> UserFile:
        if module_name not in self.files:
            self.files[module_name] = UserFile.read(module_name)
            self.taken[module_name], self.uses[module_name] = {}, []
        return self.files[module_name]

    def need(self, file: UserFile, name: str) -> None:
        """Take everything that gives `name` its meaning in `file`."""
        if (file.name, name) in self.done:
            return
        self.done.add((file.name, name))
        if name not in file.binders:
            self._need_unbound(file, name)
            return
        frozen = self._literal(file, name)
        if frozen is not None:
            self._own(file, name)
            self.taken[file.name][file.binders[name][0]] = [frozen]
            return
        users_own = False
        for index in file.binders[name]:
            node = file.statements[index].node
            if isinstance(node, ast.Import):
                self._take_import(file, index, node, name)
            elif isinstance(node, ast.ImportFrom):
                users_own |= self._take_import_from(file, index, node, name)
            else:
                users_own = True
                self._take(file, index)
        if users_own:
            for index in file.effects.get(name, []):
                self._take(file, index)

    def _need_unbound(self, file: UserFile, name: str) -> None:
        for star in file.stars:
            if hasattr(sys.modules.get(star), name) and not name.startswith("__"):
                if is_installed(star):
                    self._emit(file, -1, name, f"from {star} import {name}")
                else:
                    self._follow(file, star, name)
                return
        if name == "__file__":
            raise HeadError(f"{file.name} reads __file__: where it lies is not stored")
        if name in file.namespace and not hasattr(builtins, name) and not name.startswith("__"):
            raise HeadError(f"{name} of {file.name} is not written at the top level of that file, so it has no source")

    def _take(self, file: UserFile, index: int) -> None:
        if index in self.taken[file.name]:
            return
        statement = file.statements[index]
        self.taken[file.name][index] = [statement.text.rstrip()]
        for name in sorted(statement.binds):
            self._own(file, name)
        for node in ast.walk(statement.node):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._check_inner_import(file, node)
        for name in sorted((statement.binds - {"_"}) | statement.reads):
            self.need(file, name)

    def _check_inner_import(self, file: UserFile, node: ast.Import | ast.ImportFrom) -> None:
        targets = [file.resolve(node)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for target in targets:
            if not is_installed(target):
                raise HeadError(
                    f"{file.name}, line {node.lineno}, imports {target} inside a function or block; it is a file of "
                    "your own, which can only be followed from an import at the top level"
                )

    def _take_import(self, file: UserFile, index: int, node: ast.Import, name: str) -> None:
        for alias in node.names:
            if name != (alias.asname or alias.name.partition(".")[0]):
                continue
            if not is_installed(alias.name):
                raise self._whole_module(file, node, alias.name)
            self._emit(file, index, name, f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))

    def _take_import_from(self, file: UserFile, index: int, node: ast.ImportFrom, name: str) -> bool:
        """Take one name of the statement; whether it leads to a file of the user's."""
        source = file.resolve(node)
        for alias in node.names:
            if name != (alias.asname or alias.name):
                continue
            value = file.namespace.get(name)
            if isinstance(value, ModuleType) and not is_installed(value.__name__):
                raise self._whole_module(file, node, value.__name__)
            if not is_installed(source):
                self._follow(file, source, alias.name)
                if alias.asname and alias.asname != alias.name:
                    self._emit(file, index, name, f"{name} = {alias.name}")
                return True
            spelled = alias.name + (f" as {alias.asname}" if alias.asname else "")
            self._emit(file, index, name, f"from {source} import {spelled}")
        return False

    def _follow(self, file: UserFile, module_name: str, name: str) -> None:
        other = self.file(module_name)
        if module_name not in self.uses[file.name]:
            self.uses[file.name].append(module_name)
        self.need(other, name)

    def _whole_module(self, file: UserFile, node: ast.stmt, module_name: str) -> HeadError:
        return HeadError(
            f"{file.name}, line {node.lineno}, imports the whole of {module_name}, a file of your own: import the "
            f"names that are used (from {module_name} import ...), which can be followed"
        )

    def _emit(self, file: UserFile, index: int, name: str, line: str) -> None:
        self._own(file, name)
        lines = self.taken[file.name].setdefault(index, [])
        if line not in lines:
            lines.append(line)

    def _own(self, file: UserFile, name: str) -> None:
        """One name has one meaning in the new file."""
        if name == "_" or name not in file.namespace:
            return
        value = file.namespace[name]
        owner, other = self.owners.setdefault(name, (file.name, value))
        same = other is value or (_is_plain(value) and type(other) is type(value) and other == value)
        if not same:
            raise HeadError(
                f"{name} means one thing in {file.name} and another in {owner}, and both would be stored in one file: "
                "rename one of them"
            )

    def _literal(self, file: UserFile, name: str) -> str | None:
        """`name = value` for plain data that was computed: what it was read from need not be there at load."""
        if len(file.binders[name]) != 1:
            return None
        node = file.statements[file.binders[name][0]].node
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            return None
        computed = any(isinstance(part, (ast.Call, ast.Attribute, ast.Subscript)) for part in ast.walk(node.value))
        empty = isinstance(node.value, ast.Call) and not node.value.args and not node.value.keywords
        value = file.namespace.get(name)
        if not computed or (empty and isinstance(value, (dict, list, set))) or not _is_plain(value):
            return None
        text = f"{name} = {value!r}"
        return text if len(text) <= _LONGEST_LITERAL else None

    def text(self, root: UserFile) -> str:
        """The new file; what a file uses from another one comes before it."""
        order: list[str] = []

        def visit(name: str, above: frozenset[str]) -> None:
            for used in self.uses[name]:
                if used not in above:
                    visit(used, above | {used})
            if name not in order:
                order.append(name)

        visit(root.name, frozenset({root.name}))
        future = sorted(set().union(*(self.files[name].future for name in order)))
        parts = [f"from __future__ import {', '.join(future)}\n"] if future else []
        imported: set[str] = set()
        for name in order:
            for index in sorted(self.taken[name]):
                for text in self.taken[name][index]:
                    if text in imported:
                        continue
                    if text.startswith(("import ", "from ")):
                        imported.add(text)
                    apart = parts and ("\n" in text or "\n" in parts[-1].strip())
                    parts.append(("\n\n" if apart else "") + text + "\n")
        return "".join(parts)


def _is_plain(value: Any, depth: int = 8) -> bool:
    if value is None or type(value) in (bool, int, str, bytes):
        return True
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in (tuple, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if type(value) is dict:
        return depth > 0 and all(_is_plain(part, depth - 1) for item in value.items() for part in item)
    return False

"""A stored forward: its records, and its reading. Every node, argument and reference is checked as it is read.

An operation must stand in the table, a reference must point back to something that exists, a string must be a word that
operations take, and numbers that decide alone how large a result is are bounded.
"""

import math
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from .errors import GraphError, shown
from .graph_ops import OPS

Json = Any

# The longest forward of the heads in this package's tests has 55 nodes; one that loops over 1,370 tokens has thousands.
MAX_NODES = 10_000
MAX_GRAPH_ITEMS = 10_000
MAX_ELEMENTS = 2**31
MAX_FORMULA_DEPTH = 6

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32 float64 float16 bfloat16 complex64 complex128 int8 int16 int32 int64 uint8 bool".split())
}
MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    "log": lambda a, b: math.log(a) * b,
    "max": max,
}
"""Operators of a formula in the batch size; powers are square roots only."""

_KEY = re.compile(r"[^.\x00-\x1f\x7f]{1,200}")
_KEYWORD = re.compile(r"[a-z][a-zA-Z0-9_]{0,40}")
_REFERENCE = re.compile(r"%(\d{1,6})((?:\.\d{1,4}){0,4})")
_CONSTANT = re.compile(r"#([0-9]{1,6})")
_EINSUM = re.compile(r"[A-Za-z.,>\- ]{1,200}")
_WORDS = frozenset(
    """
    mean sum none max min prod amax amin batchmean bilinear bicubic nearest nearest-exact linear trilinear area zeros
    border reflection constant reflect replicate circular tanh floor trunc ij xy fro nuc lower higher midpoint backward
    ortho forward same valid left right reduced complete r use_mm_for_euclid_dist_if_necessary use_mm_for_euclid_dist
    donot_use_mm_for_euclid_dist
    """.split()
)
MADE_OF_NUMBERS = frozenset(
    "torch.zeros torch.ones torch.full torch.rand torch.randn torch.randint torch.arange torch.eye torch.linspace "
    "torch.logspace torch.randperm torch.tril_indices torch.triu_indices".split()
)
"""Operations that make a tensor of numbers alone."""
_SIZED_BY_NUMBERS = MADE_OF_NUMBERS | frozenset(
    """
    torch.normal torch.tile torch.repeat_interleave torch.broadcast_to torch.tensor_split torch.chunk Tensor.new_full
    Tensor.new_ones Tensor.new_zeros Tensor.expand Tensor.repeat Tensor.tile Tensor.repeat_interleave
    Tensor.broadcast_to Tensor.tensor_split Tensor.chunk F.interpolate F.upsample F.one_hot F.pad
    F.adaptive_avg_pool2d F.adaptive_max_pool2d
    """.split()
)
"""Operations whose numbers alone say how large the result is. What sizes and numbers do together is counted when the
graph runs (`graph_sizes.Sizes`)."""


@dataclass(frozen=True)
class Late:
    """A value that is there only when the graph runs, or holds such values, by `kind` and what it is `of`.

    Tensors: "input"; "node", of its index and a path into its result; "tensor", of a parameter's or buffer's name;
    "constant", of an index. "formula", a number that follows the batch size. "device" and "dtype", of a tensor.
    "slice", of three parts. "d" and "ordered", a dict of pairs in order.
    """

    kind: str
    of: Any = None


_TENSORS = ("input", "node", "tensor", "constant")


@dataclass(frozen=True)
class Node:
    """One step of a program: ``kind`` is "op", "call" or "write", ``target`` the operation, module or buffer."""

    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    no_grad: bool
    autocast: tuple[tuple[str, bool, str | None], ...]


@dataclass(frozen=True)
class Program:
    """The forward of one mode; `tensors` are the parameters and buffers that it names."""

    nodes: tuple[Node, ...]
    output: Any
    tensors: frozenset[str]


# --- small pieces: each takes a value and where it stands, and gives it back checked


def _are_sizes(value: Json, least: int = 0, most: int = 2**40, *, may_vary: bool = False) -> bool:
    return (isinstance(value, list) and len(value) <= 8) and all(
        (size is None and may_vary) or (type(size) is int and least <= size <= most) for size in value
    )


def _is_key(value: Json) -> bool:
    return isinstance(value, str) and bool(_KEY.fullmatch(value)) and not value.startswith("__")


_KINDS: dict[str, tuple[str, Callable[[Json], bool]]] = {
    "value": ("anything", lambda value: True),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "flag": ("true or false", lambda value: type(value) is bool),
    "name": ("a name", lambda value: isinstance(value, str) and len(value) <= 2000),
    "key": ("a name for a module or tensor", _is_key),
    "dtype": (f"one of {sorted(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES),
    "shape": ("a shape", _are_sizes),
    "order": ("an order of dimensions", lambda value: _are_sizes(value) and sorted(value) == [*range(len(value))]),
    "input": (
        "a shape with null for the sizes that may vary",
        lambda value: value != [] and _are_sizes(value, 1, 2**31, may_vary=True),
    ),
    "device": ("'input' or 'cuda'", lambda value: value in ("input", "cuda")),
    "precision": ("null or a dtype", lambda value: value in (None, "float16", "bfloat16", "float32")),
}
"""What stands in a graph beside calls: its words in an error, and its test."""


def read_value(value: Json, kind: str, where: str) -> Any:
    """A value of one of these kinds; lists become tuples, names of dtypes these."""
    expected, fits = _KINDS[kind]
    if not fits(value):
        raise GraphError(f"{where}: expected {expected}, found {shown(value)}")
    return DTYPES[value] if kind == "dtype" else tuple(value) if kind in ("shape", "order", "input") else value


def read_list(value: Json, where: str, most: int = MAX_GRAPH_ITEMS) -> list[Json]:
    if not isinstance(value, list) or len(value) > most:
        raise GraphError(f"{where}: expected a list of at most {most} items, found {shown(value)}")
    return value


def read_rows(rows: Json, kinds: str, where: str, most: int = MAX_GRAPH_ITEMS) -> tuple[tuple[Any, ...], ...]:
    """A list of lists, each with one value of each of these kinds."""
    names = kinds.split()
    for row in read_list(rows, where, most):
        if not isinstance(row, list) or len(row) != len(names):
            raise GraphError(f"{where}: expected [{', '.join(names)}], found {shown(row)}")
    return tuple(tuple(map(read_value, row, names, [where] * len(row))) for row in rows)


def only(value: Json, known: Set[str], where: str) -> None:
    unknown = sorted(str(key) for key in read_value(value, "object", where) if key not in known)
    if unknown:
        raise GraphError(f"{where}: unknown keys {shown(unknown[:4])}; expected some of {sorted(known)}")


# --- programs


def read_program(value: Json, where: str, modules: set[str], constants: int) -> Program:
    """The forward of one mode; `modules` are the names it may call, `constants` how many tensors it may refer to."""
    only(value, {"nodes", "output"}, where)
    nodes: list[Node] = []
    names: set[str] = set()
    for index, item in enumerate(read_list(value.get("nodes"), f"{where}.nodes", MAX_NODES)):
        nodes.append(_node(item, _ValueReader(nodes, constants, names, f"{where}.nodes[{index}]"), modules))
    if "output" not in value:
        raise GraphError(f"{where}: has no output")
    output = _ValueReader(nodes, constants, names, f"{where}.output").read(value["output"])
    return Program(tuple(nodes), output, frozenset(names))


def _node(value: Json, reader: "_ValueReader", modules: set[str]) -> Node:
    where = reader.where
    only(value, {"op", "call", "write", "in", "kw", "no_grad", "autocast"}, where)
    kinds = [kind for kind in ("op", "call", "write") if kind in value]
    if len(kinds) != 1:
        raise GraphError(f"{where}: expected exactly one of op, call, write")
    kind, target = kinds[0], read_value(value[kinds[0]], "name", where)
    if kind == "op" and target not in OPS:
        raise GraphError(
            f"{where}: {shown(target)} is not an operation that a stored head may use (or this torch lacks it)"
        )
    if kind == "call" and target not in modules:
        raise GraphError(f"{where}: calls {shown(target)}, which is not a layer of the head")
    reader.op = target if kind == "op" else ""
    args = tuple(reader.items(value.get("in", [])))
    keywords = read_value(value.get("kw", {}), "object", where)
    if not all(isinstance(key, str) and _KEYWORD.fullmatch(key) for key in keywords):
        raise GraphError(f"{where}: keyword arguments {shown(keywords)} are not plain names")
    kwargs = tuple((key, reader.read(item)) for key, item in keywords.items())
    if kind == "write" and (kwargs or len(args) != 1 or getattr(args[0], "kind", None) not in _TENSORS):
        raise GraphError(f"{where}: a write takes exactly one tensor")
    if target in _SIZED_BY_NUMBERS and reader.product > MAX_ELEMENTS:
        raise GraphError(f"{where}: {target} asks for {reader.product:.3g} elements, more than {MAX_ELEMENTS}")
    autocast: Any = read_rows(value.get("autocast", []), "device flag precision", f"{where}.autocast", 8)
    return Node(kind, target, args, kwargs, read_value(value.get("no_grad", False), "flag", where), autocast)


class _ValueReader:
    """Reads the arguments of one node; references may only point to nodes before it. `names` takes those of tensors."""

    def __init__(self, nodes: Sequence[Node], constants: int, names: set[str], where: str) -> None:
        self.nodes, self.constants, self.names, self.where = nodes, constants, names, where
        self.op = ""
        self.product = 1.0

    def read(self, value: Json) -> Any:
        """Decode one JSON value; GraphError if it is not one that a save writes."""
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if abs(value) >= 2**63:
                raise GraphError(f"{self.where}: the number {shown(value)} is too large")
            self.product *= max(abs(value), 1)
            return value
        if isinstance(value, str):
            return self._reference(value)
        if isinstance(value, list):
            return self.items(value)
        if isinstance(value, dict) and len(value) == 1:
            return self._tagged(*next(iter(value.items())))
        raise GraphError(f"{self.where}: {shown(value)} is not an argument")

    def items(self, values: Json) -> list[Any]:
        """Each value of a list, decoded."""
        return [self.read(item) for item in read_list(values, self.where)]

    def _tagged(self, tag: str, inner: Json) -> Any:
        if tag == "t":
            return tuple(self.items(inner))
        if tag in ("d", "ordered"):
            pairs = read_rows(inner, "value value", self.where)
            return Late(tag, tuple((self._dict_key(key), self.read(item)) for key, item in pairs))
        if tag == "s":
            return self._string(inner)
        if tag == "slice" and isinstance(inner, list) and len(inner) == 3:
            return Late(tag, tuple(self.items(inner)))
        if tag == "..." and inner is True:
            return Ellipsis
        if tag == "f" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "complex" and isinstance(inner, list) and len(inner) == 2:
            parts = self.items(inner)
            if all(isinstance(part, (int, float)) for part in parts):
                return complex(*parts)
        if tag == "n":
            check_formula(inner)
            return Late("formula", inner)
        if tag in ("dtype", "device") and inner == "input":
            return Late(tag, Late("input"))
        if tag == "dtype" and isinstance(inner, str) and inner.startswith("$"):
            return Late(tag, self._reference(inner))
        if tag == "dtype":
            return read_value(inner, "dtype", self.where)
        if tag == "memory" and isinstance(inner, str) and inner in MEMORY_FORMATS:
            return MEMORY_FORMATS[inner]
        if tag == "layout" and inner == "strided":
            return torch.strided
        raise GraphError(f"{self.where}: {{{shown(tag)}: {shown(inner)}}} is not an argument")

    def _dict_key(self, value: Json) -> Any:
        if isinstance(value, dict) and set(value) == {"s"} and isinstance(value["s"], str) and len(value["s"]) <= 200:
            return value["s"]
        if value is None or type(value) in (bool, int):
            return value
        raise GraphError(f"{self.where}: {shown(value)} is not a key of a dict")

    def _string(self, value: Json) -> str:
        if isinstance(value, str) and (value in _WORDS or (self.op == "torch.einsum" and _EINSUM.fullmatch(value))):
            return value
        if isinstance(value, str) and self.where.endswith(".output") and len(value) <= 200:
            return value  # a label that the head returns beside its tensors
        raise GraphError(f"{self.where}: {shown(value)} is not a word that {self.op or 'a layer'} takes")

    def _reference(self, value: str) -> Late:
        if value == "x":
            return Late("input")
        if value.startswith("$"):
            self.names.add(value[1:])
            return Late("tensor", value[1:])
        if (constant := _CONSTANT.fullmatch(value)) and int(constant[1]) < self.constants:
            return Late("constant", int(constant[1]))
        match = _REFERENCE.fullmatch(value)
        if match and int(match[1]) < len(self.nodes) and self.nodes[int(match[1])].kind != "write":
            return Late("node", (int(match[1]), tuple(int(step) for step in match[2].split(".")[1:])))
        raise GraphError(f"{self.where}: {shown(value)} refers to nothing that exists before this point")


def check_formula(expr: Json, depth: int = 0) -> None:
    """Raise GraphError unless `expr` is a formula of the batch size: ``"B"``, a number, or ``[operator, a, b]``."""
    if expr == "B" or (type(expr) in (int, float) and abs(expr) <= 2**40):
        return
    known = isinstance(expr, list) and len(expr) == 3 and isinstance(expr[0], str) and expr[0] in FORMULAS
    if not known or depth >= MAX_FORMULA_DEPTH:
        raise GraphError(f"{shown(expr)} is not a formula of the batch size")
    if expr[0] == "**" and expr[2] not in (0.5, -0.5):
        raise GraphError(f"a formula of the batch size raises to the power {shown(expr[2])}; only 0.5 and -0.5 occur")
    check_formula(expr[1], depth + 1)
    check_formula(expr[2], depth + 1)


def evaluate(expr: Json, batch: int) -> int | float:
    """The value of an audited formula for a batch size. Raises GraphError where it has none (a division by zero)."""
    if expr == "B":
        return batch
    if isinstance(expr, list):
        try:
            return FORMULAS[expr[0]](evaluate(expr[1], batch), evaluate(expr[2], batch))  # type: ignore[no-any-return]
        except (ZeroDivisionError, ValueError, OverflowError) as error:
            raise GraphError(f"the head cannot take a batch of {batch}: {error}") from None
    return expr  # type: ignore[no-any-return]

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
_SIZED_BY_NUMBERS = frozenset(
    """
    torch.zeros torch.ones torch.full torch.rand torch.randn torch.randint torch.arange torch.eye torch.linspace
    torch.logspace torch.randperm torch.normal torch.tile torch.repeat_interleave torch.tril_indices torch.triu_indices
    torch.broadcast_to torch.tensor_split torch.chunk Tensor.new_full Tensor.new_ones Tensor.new_zeros Tensor.expand
    Tensor.repeat Tensor.tile Tensor.repeat_interleave Tensor.broadcast_to Tensor.tensor_split Tensor.chunk
    F.interpolate F.upsample F.one_hot F.pad F.adaptive_avg_pool2d F.adaptive_max_pool2d
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


def only(value: dict[str, Json], known: Set[str], where: str) -> None:
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise GraphError(f"{where}: unknown keys {shown(unknown[:4])}; expected some of {sorted(known)}")


def read_list(value: Json, where: str, most: int) -> list[Json]:
    if not isinstance(value, list) or len(value) > most:
        raise GraphError(f"{where}: expected a list of at most {most} items, found {shown(value)}")
    return value


def read_text(value: Json, where: str) -> str:
    if not isinstance(value, str) or len(value) > 2000:
        raise GraphError(f"{where}: expected a name, found {shown(value)}")
    return value


def read_pair(value: Json, where: str) -> tuple[Json, Json]:
    if not isinstance(value, list) or len(value) != 2:
        raise GraphError(f"{where}: expected a pair, found {shown(value)}")
    return value[0], value[1]


def read_names(value: Json, where: str) -> tuple[str, str]:
    first, second = read_pair(value, where)
    return read_text(first, where), read_text(second, where)


def read_dtype(value: Json, where: str) -> torch.dtype:
    if not isinstance(value, str) or value not in DTYPES:
        raise GraphError(f"{where}: {shown(value)} is not a dtype; expected one of {sorted(DTYPES)}")
    return DTYPES[value]


def _flag(value: Json, where: str) -> bool:
    if type(value) is not bool:
        raise GraphError(f"{where}: {shown(value)} is neither true nor false")
    return value


# --- programs


def read_program(value: Json, where: str, modules: set[str], constants: int) -> Program:
    """The forward of one mode; `modules` are the names it may call, `constants` how many tensors it may refer to."""
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object with nodes and output")
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
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object, found {shown(value)}")
    kinds = [kind for kind in ("op", "call", "write") if kind in value]
    if len(kinds) != 1:
        raise GraphError(f"{where}: expected exactly one of op, call, write")
    kind = kinds[0]
    only(value, {kind, "in", "kw", "no_grad", "autocast"}, where)
    target = read_text(value[kind], where)
    if kind == "op" and target not in OPS:
        raise GraphError(
            f"{where}: {shown(target)} is not an operation that a stored head may use (or this torch lacks it)"
        )
    if kind == "call" and target not in modules:
        raise GraphError(f"{where}: calls {shown(target)}, which is not a layer of the head")
    reader.op = target if kind == "op" else ""
    args = tuple(reader.read(item) for item in read_list(value.get("in", []), where, MAX_GRAPH_ITEMS))
    keywords = value.get("kw", {})
    if not isinstance(keywords, dict) or not all(isinstance(key, str) and _KEYWORD.fullmatch(key) for key in keywords):
        raise GraphError(f"{where}: keyword arguments {shown(keywords)} are not an object of plain names")
    kwargs = tuple((key, reader.read(item)) for key, item in keywords.items())
    if kind == "write" and (kwargs or len(args) != 1 or getattr(args[0], "kind", None) not in _TENSORS):
        raise GraphError(f"{where}: a write takes exactly one tensor")
    if target in _SIZED_BY_NUMBERS and reader.product > MAX_ELEMENTS:
        raise GraphError(f"{where}: {target} asks for {reader.product:.3g} elements, more than {MAX_ELEMENTS}")
    return Node(kind, target, args, kwargs, _flag(value.get("no_grad", False), where), _autocast(value, where))


def _autocast(value: dict[str, Json], where: str) -> tuple[tuple[str, bool, str | None], ...]:
    regions = []
    for item in read_list(value.get("autocast", []), f"{where}.autocast", 8):
        valid = isinstance(item, list) and len(item) == 3 and item[0] in ("input", "cuda") and type(item[1]) is bool
        if not valid or item[2] not in (None, "float16", "bfloat16", "float32"):
            raise GraphError(f"{where}: autocast {shown(item)} is not [device, enabled, dtype]")
        regions.append((item[0], item[1], item[2]))
    return tuple(regions)


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
            return [self.read(item) for item in read_list(value, self.where, MAX_GRAPH_ITEMS)]
        if isinstance(value, dict) and len(value) == 1:
            ((tag, inner),) = value.items()
            return self._tagged(tag, inner)
        raise GraphError(f"{self.where}: {shown(value)} is not an argument")

    def _tagged(self, tag: str, inner: Json) -> Any:
        if tag == "t":
            return tuple(self.read(item) for item in read_list(inner, self.where, MAX_GRAPH_ITEMS))
        if tag in ("d", "ordered"):
            pairs = [read_pair(item, self.where) for item in read_list(inner, self.where, MAX_GRAPH_ITEMS)]
            return Late(tag, tuple((self._dict_key(key), self.read(item)) for key, item in pairs))
        if tag == "s":
            return self._string(inner)
        if tag == "slice" and isinstance(inner, list) and len(inner) == 3:
            return Late(tag, tuple(self.read(item) for item in inner))
        if tag == "..." and inner is True:
            return Ellipsis
        if tag == "f" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "complex" and isinstance(inner, list) and len(inner) == 2:
            parts = [self.read(item) for item in inner]
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
            return read_dtype(inner, self.where)
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

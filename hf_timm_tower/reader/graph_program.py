"""Reading a stored forward: every node, argument and reference is checked as it is read.

An operation must stand in the table, a reference must point back to something that exists, a string must be a word that
operations take, and numbers that decide how large a result is are bounded.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..heads.batch_formula import check_formula
from .errors import GraphError
from .graph_json import MAX_ITEMS, only, read_dtype, read_list, read_pair, read_text, short
from .graph_ops import OPS
from .graph_records import DtypeOf, Formula, FromInput, Node, Pairs, Program, Reference, Slice
from .graph_values import MEMORY_FORMATS

Json = Any

MAX_NODES = 20_000
MAX_ELEMENTS = 2**31

_KEYWORD = re.compile(r"[a-z][a-zA-Z0-9_]{0,40}")
_REFERENCE = re.compile(r"%(\d{1,6})((?:\.\d{1,4}){0,4})")
_EINSUM = re.compile(r"[A-Za-z.,>\- ]{1,200}")
_WORDS = frozenset(
    """
    mean sum none max min prod amax amin batchmean bilinear bicubic nearest nearest-exact linear trilinear area zeros
    border reflection constant reflect replicate circular tanh floor trunc ij xy fro nuc lower higher midpoint backward
    ortho forward same valid left right reduced complete r use_mm_for_euclid_dist_if_necessary use_mm_for_euclid_dist
    donot_use_mm_for_euclid_dist
    """.split()
)
_GROWING = frozenset(
    """
    torch.zeros torch.ones torch.full torch.rand torch.randn torch.randint torch.arange torch.eye torch.linspace
    torch.logspace torch.randperm torch.normal torch.tile torch.repeat_interleave torch.tril_indices torch.triu_indices
    torch.broadcast_to torch.hann_window torch.hamming_window torch.bartlett_window torch.blackman_window torch.bincount
    torch.histc torch.diag torch.diag_embed torch.diagflat torch.tensor_split torch.chunk torch.multinomial torch.pad
    torch.constant_pad_nd torch.adaptive_avg_pool1d torch.adaptive_max_pool1d torch.combinations torch.conv1d
    torch.conv2d torch.conv3d torch.conv_transpose1d torch.conv_transpose2d torch.conv_transpose3d
    torch.affine_grid_generator torch.pixel_shuffle
    Tensor.new_full Tensor.new_ones Tensor.new_zeros Tensor.expand Tensor.repeat Tensor.tile Tensor.repeat_interleave
    Tensor.broadcast_to Tensor.bincount Tensor.histc Tensor.diag Tensor.diag_embed Tensor.diagflat Tensor.tensor_split
    Tensor.chunk Tensor.multinomial
    F.interpolate F.upsample F.one_hot F.pad F.fold F.affine_grid F.max_unpool1d F.max_unpool2d F.pixel_shuffle
    F.adaptive_avg_pool1d F.adaptive_avg_pool2d F.adaptive_avg_pool3d F.adaptive_max_pool1d F.adaptive_max_pool2d
    F.adaptive_max_pool3d F.adaptive_max_pool1d_with_indices F.adaptive_max_pool2d_with_indices
    F.adaptive_max_pool3d_with_indices F.conv1d F.conv2d F.conv3d F.conv_transpose1d F.conv_transpose2d
    F.conv_transpose3d
    fft.fft fft.ifft fft.rfft fft.irfft fft.fft2 fft.ifft2 fft.rfft2 fft.irfft2 fft.fftn fft.ifftn fft.rfftn fft.irfftn
    fft.fftfreq fft.rfftfreq linalg.vander
    """.split()
)
"""Operations where numbers among the arguments decide how large the result is."""


def read_program(value: Json, where: str, modules: set[str], constants: int) -> Program:
    """The forward of one mode; `modules` are the names it may call, `constants` how many tensors it may refer to."""
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object with nodes and output")
    only(value, {"nodes", "output"}, where)
    nodes: list[Node] = []
    for index, item in enumerate(read_list(value.get("nodes"), f"{where}.nodes", MAX_NODES)):
        reader = ValueReader(index, nodes, constants, f"{where}.nodes[{index}]")
        nodes.append(_node(item, reader, modules))
    reader = ValueReader(len(nodes), nodes, constants, f"{where}.output")
    if "output" not in value:
        raise GraphError(f"{where}: has no output")
    return Program(tuple(nodes), reader.read(value["output"]))


def _node(value: Json, reader: "ValueReader", modules: set[str]) -> Node:
    where = reader.where
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object, found {short(value)}")
    kinds = [kind for kind in ("op", "call", "write") if kind in value]
    if len(kinds) != 1:
        raise GraphError(f"{where}: expected exactly one of op, call, write")
    kind = kinds[0]
    only(value, {kind, "in", "kw", "no_grad", "autocast"}, where)
    target = read_text(value[kind], where)
    if kind == "op" and target not in OPS:
        raise GraphError(
            f"{where}: {target!r:.80} is not an operation that a stored head may use (or this torch lacks it)"
        )
    if kind == "call" and target not in modules:
        raise GraphError(f"{where}: calls {target!r:.80}, which is not a layer of the head")
    reader.op = target if kind == "op" else ""
    args = tuple(reader.read(item) for item in read_list(value.get("in", []), where, MAX_ITEMS))
    keywords = value.get("kw", {})
    if not isinstance(keywords, dict) or not all(isinstance(key, str) and _KEYWORD.fullmatch(key) for key in keywords):
        raise GraphError(f"{where}: keyword arguments {short(keywords)} are not an object of plain names")
    kwargs = tuple((key, reader.read(item)) for key, item in keywords.items())
    if kind == "write" and (kwargs or len(args) != 1 or not isinstance(args[0], Reference)):
        raise GraphError(f"{where}: a write takes exactly one tensor")
    if target in _GROWING:
        check_growth(target, (args, dict(kwargs)), where)
    return Node(kind, target, args, kwargs, _flag(value.get("no_grad", False), where), _autocast(value, where))


def _flag(value: Json, where: str) -> bool:
    if type(value) is not bool:
        raise GraphError(f"{where}: {short(value)} is neither true nor false")
    return value


def _autocast(value: dict[str, Json], where: str) -> tuple[tuple[str, bool, str | None], ...]:
    regions = []
    for item in read_list(value.get("autocast", []), f"{where}.autocast", 8):
        valid = isinstance(item, list) and len(item) == 3 and item[0] in ("input", "cuda") and type(item[1]) is bool
        if not valid or item[2] not in (None, "float16", "bfloat16", "float32"):
            raise GraphError(f"{where}: autocast {short(item)} is not [device, enabled, dtype]")
        regions.append((item[0], item[1], item[2]))
    return tuple(regions)


def check_growth(op: str, values: Any, where: str) -> None:
    """Refuse an operation whose numbers multiply to more than MAX_ELEMENTS, which is how large a result may be."""
    total = 1.0
    for number in _integers(values):
        total *= max(abs(number), 1)
    if total > MAX_ELEMENTS:
        raise GraphError(f"{where}: {op} asks for {total:.3g} elements, more than {MAX_ELEMENTS}")


def may_grow(op: str) -> bool:
    """Whether numbers among its arguments decide how large the result of the operation is."""
    return op in _GROWING


def _integers(value: Any) -> list[int]:
    if type(value) is int:
        return [value]
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in _integers(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in _integers(item)]
    return []


class ValueReader:
    """Reads the arguments of one node; references may only point to nodes before it."""

    def __init__(self, index: int, nodes: Sequence[Node], constants: int, where: str) -> None:
        self.index = index
        self.nodes = nodes
        self.constants = constants
        self.where = where
        self.op = ""

    def read(self, value: Json) -> Any:
        """Decode one JSON value; GraphError if it is not one that `graph_values` writes."""
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if abs(value) >= 2**63:
                raise GraphError(f"{self.where}: the number {value:.3g} is too large")
            return value
        if isinstance(value, str):
            return self._reference(value)
        if isinstance(value, list):
            return [self.read(item) for item in self._items(value)]
        if isinstance(value, dict) and len(value) == 1:
            ((tag, inner),) = value.items()
            return self._tagged(tag, inner)
        raise GraphError(f"{self.where}: {short(value)} is not an argument")

    def _items(self, value: Json) -> list[Json]:
        return read_list(value, self.where, MAX_ITEMS)

    def _tagged(self, tag: str, inner: Json) -> Any:
        if tag == "t":
            return tuple(self.read(item) for item in self._items(inner))
        if tag in ("d", "ordered"):
            pairs = [read_pair(item, self.where) for item in self._items(inner)]
            return Pairs(tag, tuple((self._dict_key(key), self.read(item)) for key, item in pairs))
        if tag == "s":
            return self._string(inner)
        if tag == "slice" and isinstance(inner, list) and len(inner) == 3:
            return Slice(*(self.read(item) for item in inner))
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
            return Formula(inner)
        if tag in ("dtype", "device") and inner == "input":
            return FromInput(tag)
        if tag == "dtype" and isinstance(inner, str) and inner.startswith("$"):
            return DtypeOf(self._reference(inner))
        if tag == "dtype":
            return read_dtype(inner, self.where)
        if tag == "memory" and isinstance(inner, str) and inner in MEMORY_FORMATS:
            return MEMORY_FORMATS[inner]
        if tag == "layout" and inner == "strided":
            return torch.strided
        raise GraphError(f"{self.where}: {{{tag!r:.20}: {short(inner)}}} is not an argument")

    def _dict_key(self, value: Json) -> Any:
        if isinstance(value, dict) and set(value) == {"s"} and isinstance(value["s"], str) and len(value["s"]) <= 200:
            return value["s"]
        if value is None or type(value) in (bool, int):
            return value
        raise GraphError(f"{self.where}: {short(value)} is not a key of a dict")

    def _string(self, value: Json) -> str:
        if isinstance(value, str) and (value in _WORDS or (self.op == "torch.einsum" and _EINSUM.fullmatch(value))):
            return value
        if isinstance(value, str) and self.where.endswith(".output") and len(value) <= 200:
            return value  # a label that the head returns beside its tensors
        raise GraphError(f"{self.where}: {short(value)} is not a word that {self.op or 'a layer'} takes")

    def _reference(self, value: str) -> Reference:
        if value == "x":
            return Reference("input")
        if value.startswith("$"):
            return Reference("tensor", name=value[1:])
        if value.startswith("#") and value[1:].isascii() and value[1:].isdigit() and len(value) < 8:
            if int(value[1:]) < self.constants:
                return Reference("constant", index=int(value[1:]))
        match = _REFERENCE.fullmatch(value)
        if match and int(match[1]) < self.index and self.nodes[int(match[1])].kind != "write":
            path = tuple(int(step) for step in match[2].split(".")[1:])
            return Reference("node", index=int(match[1]), path=path)
        raise GraphError(f"{self.where}: {short(value)} refers to nothing that exists before this point")

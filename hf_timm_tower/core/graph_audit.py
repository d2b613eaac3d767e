"""Phases one and two of reading a stored head: JSON to records, and every check that needs no module.

The JSON comes from strangers. After `parse_graph` every name is known, every operation is one of the table, every
reference points back to something that exists, every string is one that an operation takes, and sizes are bounded.
"""

import base64
import binascii
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import GraphError
from .graph_batch import check_formula
from .graph_ops import OPS
from .graph_values import DTYPES, MEMORY_FORMATS

Json = Any

VERSION = 1
MAX_MODULES = 10_000
MAX_MODULE_DEPTH = 32
MAX_NODES = 20_000
MAX_DEPTH = 16
MAX_ITEMS = 10_000
MAX_EMBEDDED_BYTES = 1 << 20
MAX_ELEMENTS = 2**31

_KEYS = frozenset("version input modules ties frozen dtypes layouts held constants forward train eval".split())
_NAME = re.compile(r"[^.\x00-\x20\x7f]{1,200}")
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


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer that the weights bring: its name within its module, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes the tensor will take."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ModuleSpec:
    """One module: a layer of the table, a torch container, a plain part, or another name of an earlier module."""

    name: str
    kind: str
    layer: str = ""
    args: Any = None
    same: str = ""
    params: tuple[TensorSpec, ...] = ()
    buffers: tuple[TensorSpec, ...] = ()
    values: tuple[tuple[str, torch.Tensor], ...] = ()
    """Buffers that are not in the state dict, with their values."""


@dataclass(frozen=True)
class Reference:
    """A tensor at run time: ``kind`` is "input", "node" (with a path into its result), "tensor" or "constant"."""

    kind: str
    index: int = 0
    path: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Formula:
    """A number that follows the batch size."""

    expr: Any


@dataclass(frozen=True)
class FromInput:
    """Something taken from the input at run time: "device" or "dtype"."""

    what: str


@dataclass(frozen=True)
class DtypeOf:
    """The dtype that a parameter or buffer has at run time."""

    tensor: Reference


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
    """The forward of one mode."""

    nodes: tuple[Node, ...]
    output: Any


@dataclass(frozen=True)
class Graph:
    """An audited graph. ``programs`` is empty where the root is itself a layer and needs none."""

    shape: tuple[int | None, ...]
    modules: tuple[ModuleSpec, ...]
    ties: tuple[tuple[str, str], ...]
    frozen: frozenset[str]
    dtypes: tuple[tuple[str, torch.dtype], ...]
    layouts: tuple[tuple[str, tuple[int, ...]], ...]
    held: tuple[tuple[str, bool, bool], ...]
    constants: tuple[torch.Tensor, ...]
    programs: dict[bool, Program] = field(default_factory=dict)


def parse_graph(graph: Json) -> Graph:
    """Turn untrusted JSON into an audited `Graph`. Raises GraphError naming what was found and what was expected."""
    if not isinstance(graph, dict):
        raise GraphError(f"a stored head is a JSON object, found {type(graph).__name__}")
    version = graph.get("version")
    if type(version) is not int or version != VERSION:
        raise GraphError(
            f"the stored head has graph version {version!r:.40}; this package reads version {VERSION}. A newer one "
            "needs a newer hf_timm_tower"
        )
    _only(graph, _KEYS, "the stored head")
    _check_depth(graph)
    budget = [MAX_EMBEDDED_BYTES]
    modules = tuple(_module(item, budget) for item in _list(graph.get("modules"), "modules", MAX_MODULES))
    _check_module_names(modules)
    names = _callable_names(modules)
    constants = tuple(
        parse_tensor(item, budget, f"constants[{i}]")
        for i, item in enumerate(_list(graph.get("constants", []), "constants", MAX_ITEMS))
    )
    parsed = Graph(
        shape=_input_shape(graph.get("input")),
        modules=modules,
        ties=tuple(_pair_of_names(item, "ties") for item in _list(graph.get("ties", []), "ties", MAX_ITEMS)),
        frozen=frozenset(_text(item, "frozen") for item in _list(graph.get("frozen", []), "frozen", MAX_ITEMS)),
        dtypes=tuple(
            (_text(name, "dtypes"), _dtype(dtype, f"dtypes[{name}]"))
            for name, dtype in (_pair(item, "dtypes") for item in _list(graph.get("dtypes", []), "dtypes", MAX_ITEMS))
        ),
        layouts=tuple(_layout(item) for item in _list(graph.get("layouts", []), "layouts", MAX_ITEMS)),
        held=tuple(_held(item) for item in _list(graph.get("held", []), "held", MAX_MODULES)),
        constants=constants,
    )
    programs = _programs(graph, names, len(constants))
    if not programs and modules[0].kind not in ("layer", "container"):
        raise GraphError("the stored head has no forward, and its root is not a layer that brings its own")
    if programs and modules[0].kind != "part":
        raise GraphError("the stored head has a forward of its own, so its root must be a part")
    parsed.programs.update(programs)
    return parsed


def _callable_names(modules: Sequence[ModuleSpec]) -> set[str]:
    names: set[str] = set()
    for module in modules:
        whole = module.kind == "layer" or (module.kind == "container" and module.layer == "Sequential")
        if (whole or module.same in names) and module.name:
            names.add(module.name)
    return names


def _programs(graph: dict[str, Json], names: set[str], constants: int) -> dict[bool, Program]:
    if "forward" in graph:
        if "train" in graph or "eval" in graph:
            raise GraphError("the stored head has both `forward` and one per mode")
        program = _program(graph["forward"], "forward", names, constants)
        return {True: program, False: program}
    if "train" in graph or "eval" in graph:
        if "train" not in graph or "eval" not in graph:
            raise GraphError("the stored head has a forward for one mode only; `train` and `eval` belong together")
        return {
            True: _program(graph["train"], "train", names, constants),
            False: _program(graph["eval"], "eval", names, constants),
        }
    return {}


# --- small pieces


def _only(value: dict[str, Json], known: Set[str], where: str) -> None:
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise GraphError(f"{where}: unknown keys {unknown[:5]}; expected some of {sorted(known)}")


def _check_depth(value: Json) -> None:
    """Bound nesting without recursion, so that no depth of JSON can exhaust the stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        level = [item for item in deeper if isinstance(item, (dict, list))]
        if not level:
            return
    raise GraphError(f"the stored head is nested deeper than {MAX_DEPTH} levels")


def _list(value: Json, where: str, most: int) -> list[Json]:
    if not isinstance(value, list) or len(value) > most:
        raise GraphError(f"{where}: expected a list of at most {most} items, found {_short(value)}")
    return value


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str) or len(value) > 2000:
        raise GraphError(f"{where}: expected a name, found {_short(value)}")
    return value


def _pair(value: Json, where: str) -> tuple[Json, Json]:
    if not isinstance(value, list) or len(value) != 2:
        raise GraphError(f"{where}: expected a pair, found {_short(value)}")
    return value[0], value[1]


def _pair_of_names(value: Json, where: str) -> tuple[str, str]:
    first, second = _pair(value, where)
    return _text(first, where), _text(second, where)


def _layout(value: Json) -> tuple[str, tuple[int, ...]]:
    name, order = _pair(value, "layouts")
    dims = _list(order, "layouts", 8)
    if not all(type(dim) is int for dim in dims) or sorted(dims) != list(range(len(dims))):
        raise GraphError(f"layouts: {_short(order)} is not an order of dimensions")
    return _text(name, "layouts"), tuple(dims)


def _held(value: Json) -> tuple[str, bool, bool]:
    if not (isinstance(value, list) and len(value) == 3 and all(type(flag) is bool for flag in value[1:])):
        raise GraphError(f"held: expected [module, in train, in eval], found {_short(value)}")
    return _text(value[0], "held"), value[1], value[2]


def _dtype(value: Json, where: str) -> torch.dtype:
    if not isinstance(value, str) or value not in DTYPES:
        raise GraphError(f"{where}: {_short(value)} is not a dtype; expected one of {sorted(DTYPES)}")
    return DTYPES[value]


def _shape(value: Json, where: str) -> tuple[int, ...]:
    sizes = _list(value, where, 8)
    if not all(type(size) is int and 0 <= size <= 2**40 for size in sizes):
        raise GraphError(f"{where}: {_short(value)} is not a shape")
    return tuple(sizes)


def _short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_tensor(value: Json, budget: list[int], where: str) -> torch.Tensor:
    """A tensor embedded in the graph: ``{"shape", "dtype", "data"}``, data in base64 of little-endian bytes.

    ``budget`` holds the bytes that the graph may still embed and is reduced.
    """
    if not isinstance(value, dict) or set(value) != {"shape", "dtype", "data"}:
        raise GraphError(f"{where}: expected an object of shape, dtype and data")
    shape, dtype = _shape(value["shape"], where), _dtype(value["dtype"], where)
    nbytes = math.prod(shape) * dtype.itemsize
    budget[0] -= nbytes
    if budget[0] < 0:
        raise GraphError(f"{where}: the tensors inside a stored head exceed {MAX_EMBEDDED_BYTES} bytes")
    try:
        data = base64.b64decode(value["data"], validate=True) if isinstance(value["data"], str) else b""
    except (binascii.Error, ValueError) as error:
        raise GraphError(f"{where}: data is not base64: {error}") from None
    if len(data) != nbytes:
        raise GraphError(f"{where}: {len(data)} bytes of data, expected {nbytes} for {shape} of {dtype}")
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype is torch.bool and set(data) - {0, 1}:
        raise GraphError(f"{where}: a bool tensor holds only 0 and 1")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _input_shape(value: Json) -> tuple[int | None, ...]:
    if not isinstance(value, dict) or set(value) != {"shape"}:
        raise GraphError(f"input: expected an object with the input's shape, found {_short(value)}")
    sizes = _list(value["shape"], "input.shape", 8)
    if not sizes or not all(size is None or (type(size) is int and 0 < size <= 2**31) for size in sizes):
        raise GraphError(f"input.shape: {_short(sizes)} is not a shape with null for the sizes that may vary")
    return tuple(sizes)


# --- modules


def _module(value: Json, budget: list[int]) -> ModuleSpec:
    if not isinstance(value, dict):
        raise GraphError(f"modules: expected objects, found {_short(value)}")
    name = _text(value.get("name"), "modules.name")
    where = f"module {name!r}"
    if "layer" in value:
        _only(value, {"name", "layer", "args"}, where)
        return ModuleSpec(name, "layer", layer=_text(value["layer"], where), args=value.get("args"))
    if "container" in value:
        _only(value, {"name", "container"}, where)
        if value["container"] not in ("Sequential", "ModuleList", "ModuleDict"):
            raise GraphError(f"{where}: unknown container {_short(value['container'])}")
        return ModuleSpec(name, "container", layer=value["container"])
    if "same" in value:
        _only(value, {"name", "same"}, where)
        return ModuleSpec(name, "same", same=_text(value["same"], where))
    _only(value, {"name", "part", "params", "buffers", "values"}, where)
    if value.get("part") is not True:
        raise GraphError(f"{where}: is neither a layer, a container, another name, nor a part")
    values = []
    for item in _list(value.get("values", []), where, MAX_ITEMS):
        key, tensor = _pair(item, where)
        values.append((_key(key, where), parse_tensor(tensor, budget, f"{where}, buffer {key}")))
    spec = ModuleSpec(
        name,
        "part",
        params=tuple(_tensor_spec(item, where) for item in _list(value.get("params", []), where, MAX_ITEMS)),
        buffers=tuple(_tensor_spec(item, where) for item in _list(value.get("buffers", []), where, MAX_ITEMS)),
        values=tuple(values),
    )
    keys = [item.name for item in (*spec.params, *spec.buffers)] + [key for key, _ in values]
    if len(set(keys)) != len(keys):
        raise GraphError(f"{where}: two tensors have the same name")
    return spec


def _tensor_spec(value: Json, where: str) -> TensorSpec:
    if not isinstance(value, list) or len(value) != 3:
        raise GraphError(f"{where}: expected [name, shape, dtype], found {_short(value)}")
    return TensorSpec(_key(value[0], where), _shape(value[1], where), _dtype(value[2], where))


def _key(value: Json, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value.startswith("__"):
        raise GraphError(f"{where}: {_short(value)} is not a name for a module or tensor")
    return value


def _check_module_names(modules: Sequence[ModuleSpec]) -> None:
    if not modules or modules[0].name != "" or modules[0].kind == "same":
        raise GraphError("modules: the first one must be the head itself, named ''")
    seen: dict[str, ModuleSpec] = {"": modules[0]}
    for module in modules[1:]:
        parent, _, key = module.name.rpartition(".")
        _key(key, f"module {module.name!r}")
        if module.name in seen:
            raise GraphError(f"modules: {module.name!r} is there twice")
        if parent not in seen:
            raise GraphError(f"modules: {module.name!r} comes before its parent")
        if seen[parent].kind in ("layer", "same"):
            raise GraphError(f"modules: {parent!r} is a {seen[parent].kind}, it cannot hold {key!r}")
        if module.kind == "same" and (module.same not in seen or seen[module.same].kind == "same"):
            raise GraphError(
                f"modules: {module.name!r} is another name of {module.same!r}, which is not there before it"
            )
        if module.kind == "same" and (module.name + ".").startswith(module.same + "." if module.same else ""):
            raise GraphError(f"modules: {module.name!r} cannot be the module {module.same!r} that holds it")
        taken = {item.name for item in (*seen[parent].params, *seen[parent].buffers)} | {
            name for name, _ in seen[parent].values
        }
        if key in taken:
            raise GraphError(f"modules: {module.name!r} has the name of a tensor")
        seen[module.name] = module
    _check_paths(modules)


def _check_paths(modules: Sequence[ModuleSpec]) -> None:
    """Refuse modules that hold each other, or so many names for the same ones that walking over them would not end."""
    children: dict[str, list[ModuleSpec]] = {}
    for module in modules[1:]:
        if module.name.count(".") >= MAX_MODULE_DEPTH:
            raise GraphError(f"modules: {module.name[:80]!r}... is nested deeper than {MAX_MODULE_DEPTH} levels")
        children.setdefault(module.name.rpartition(".")[0], []).append(module)
    sizes: dict[str, int] = {}
    open_names: set[str] = set()

    def size(name: str) -> int:
        if name in open_names:
            raise GraphError(f"modules: {name!r:.80} holds itself")
        if name not in sizes:
            open_names.add(name)
            sizes[name] = 1 + sum(size(child.same or child.name) for child in children.get(name, ()))
            open_names.remove(name)
        return sizes[name]

    if size("") > MAX_MODULES:
        raise GraphError(f"modules: shared modules have more than {MAX_MODULES} names")


# --- programs


def _program(value: Json, where: str, modules: set[str], constants: int) -> Program:
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object with nodes and output")
    _only(value, {"nodes", "output"}, where)
    nodes: list[Node] = []
    for index, item in enumerate(_list(value.get("nodes"), f"{where}.nodes", MAX_NODES)):
        reader = _ValueReader(index, nodes, constants, f"{where}.nodes[{index}]")
        nodes.append(_node(item, reader, modules))
    reader = _ValueReader(len(nodes), nodes, constants, f"{where}.output")
    if "output" not in value:
        raise GraphError(f"{where}: has no output")
    return Program(tuple(nodes), reader.read(value["output"]))


def _node(value: Json, reader: "_ValueReader", modules: set[str]) -> Node:
    where = reader.where
    if not isinstance(value, dict):
        raise GraphError(f"{where}: expected an object, found {_short(value)}")
    kinds = [kind for kind in ("op", "call", "write") if kind in value]
    if len(kinds) != 1:
        raise GraphError(f"{where}: expected exactly one of op, call, write")
    kind = kinds[0]
    _only(value, {kind, "in", "kw", "no_grad", "autocast"}, where)
    target = _text(value[kind], where)
    if kind == "op" and target not in OPS:
        raise GraphError(
            f"{where}: {target!r:.80} is not an operation that a stored head may use (or this torch lacks it)"
        )
    if kind == "call" and target not in modules:
        raise GraphError(f"{where}: calls {target!r:.80}, which is not a layer of the head")
    reader.op = target if kind == "op" else ""
    args = tuple(reader.read(item) for item in _list(value.get("in", []), where, MAX_ITEMS))
    keywords = value.get("kw", {})
    if not isinstance(keywords, dict) or not all(isinstance(key, str) and _KEYWORD.fullmatch(key) for key in keywords):
        raise GraphError(f"{where}: keyword arguments {_short(keywords)} are not an object of plain names")
    kwargs = tuple((key, reader.read(item)) for key, item in keywords.items())
    if kind == "write" and (kwargs or len(args) != 1 or not isinstance(args[0], Reference)):
        raise GraphError(f"{where}: a write takes exactly one tensor")
    if target in _GROWING:
        check_growth(target, (args, dict(kwargs)), where)
    return Node(kind, target, args, kwargs, _flag(value.get("no_grad", False), where), _autocast(value, where))


def _flag(value: Json, where: str) -> bool:
    if type(value) is not bool:
        raise GraphError(f"{where}: {_short(value)} is neither true nor false")
    return value


def _autocast(value: dict[str, Json], where: str) -> tuple[tuple[str, bool, str | None], ...]:
    regions = []
    for item in _list(value.get("autocast", []), f"{where}.autocast", 8):
        valid = isinstance(item, list) and len(item) == 3 and item[0] in ("input", "cuda") and type(item[1]) is bool
        if not valid or item[2] not in (None, "float16", "bfloat16", "float32"):
            raise GraphError(f"{where}: autocast {_short(item)} is not [device, enabled, dtype]")
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


class _ValueReader:
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
        raise GraphError(f"{self.where}: {_short(value)} is not an argument")

    def _items(self, value: Json) -> list[Json]:
        return _list(value, self.where, MAX_ITEMS)

    def _tagged(self, tag: str, inner: Json) -> Any:
        if tag == "t":
            return tuple(self.read(item) for item in self._items(inner))
        if tag in ("d", "ordered"):
            pairs = [_pair(item, self.where) for item in self._items(inner)]
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
            return _dtype(inner, self.where)
        if tag == "memory" and isinstance(inner, str) and inner in MEMORY_FORMATS:
            return MEMORY_FORMATS[inner]
        if tag == "layout" and inner == "strided":
            return torch.strided
        raise GraphError(f"{self.where}: {{{tag!r:.20}: {_short(inner)}}} is not an argument")

    def _dict_key(self, value: Json) -> Any:
        if isinstance(value, dict) and set(value) == {"s"} and isinstance(value["s"], str) and len(value["s"]) <= 200:
            return value["s"]
        if value is None or type(value) in (bool, int):
            return value
        raise GraphError(f"{self.where}: {_short(value)} is not a key of a dict")

    def _string(self, value: Json) -> str:
        if isinstance(value, str) and (value in _WORDS or (self.op == "torch.einsum" and _EINSUM.fullmatch(value))):
            return value
        if isinstance(value, str) and self.where.endswith(".output") and len(value) <= 200:
            return value  # a label that the head returns beside its tensors
        raise GraphError(f"{self.where}: {_short(value)} is not a word that {self.op or 'a layer'} takes")

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
        raise GraphError(f"{self.where}: {_short(value)} refers to nothing that exists before this point")


@dataclass(frozen=True)
class Pairs:
    """A dict in an argument or output, in order; ``kind`` is "d" or "ordered"."""

    kind: str
    items: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Slice:
    """A slice whose parts may be formulas."""

    start: Any
    stop: Any
    step: Any

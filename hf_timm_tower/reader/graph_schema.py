"""Phases one and two of reading a stored head: untrusted JSON to records, with every check that needs no module.

After `parse_graph` every name is known, every operation is one of the table, every reference points back to something
that exists, every string is one that an operation takes, and sizes are bounded. Each value is looked at once, so the
audit is linear in the text. docs/format.md describes the JSON.
"""

import base64
import binascii
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import GraphError, shown
from .graph_program import (
    MAX_GRAPH_ITEMS,
    Json,
    Program,
    only,
    read_dtype,
    read_list,
    read_names,
    read_pair,
    read_program,
    read_text,
)

VERSION = 1
# Of the heads in this package's tests (147, as people write them) the largest graph has 54 KiB of text, most of it an
# embedded mask, 551 values and 38 modules.
MAX_TEXT = 1 << 20
MAX_VALUES = 200_000
MAX_MODULES = 2_000
MAX_MODULE_DEPTH = 32
MAX_GRAPH_DEPTH = 16
MAX_EMBEDDED_BYTES = 1 << 20

_GRAPH_KEYS = frozenset("version input modules ties frozen dtypes layouts held constants forward train eval".split())
_KEY = re.compile(r"[^.\x00-\x1f\x7f]{1,200}")
# --- records: a stored head without any JSON left in it


TensorSpec = tuple[str, tuple[int, ...], torch.dtype]
"""A parameter or buffer that the weights bring: its name within its module, shape and dtype."""


@dataclass(frozen=True)
class ModuleSpec:
    """One module: a layer of the table, a torch container, a plain part, or another name of an earlier module.

    `values` are buffers that are not in the state dict, with their values.
    """

    name: str
    kind: str
    layer: str = ""
    args: Any = None
    same: str = ""
    params: tuple[TensorSpec, ...] = ()
    buffers: tuple[TensorSpec, ...] = ()
    values: tuple[tuple[str, torch.Tensor], ...] = ()


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


# --- the whole graph


def parse_graph(graph: Json) -> Graph:
    """Turn untrusted JSON into an audited `Graph`. Raises GraphError naming what was found and what was expected."""
    if not isinstance(graph, dict):
        raise GraphError(f"a stored head is a JSON object, found {type(graph).__name__}")
    version = graph.get("version")
    if type(version) is not int or version != VERSION:
        raise GraphError(
            f"the stored head has graph version {shown(version)}; this package reads version {VERSION}. A newer one "
            "needs a newer hf_timm_tower"
        )
    check_extent(graph)
    only(graph, _GRAPH_KEYS, "the stored head")
    left = [MAX_EMBEDDED_BYTES]
    modules = tuple(_module(item, left) for item in read_list(graph.get("modules"), "modules", MAX_MODULES))
    _check_module_names(modules)
    constants = [_tensor(item, left, f"constants[{i}]") for i, item in enumerate(_entries(graph, "constants"))]
    programs = _programs(graph, _callable_names(modules), len(constants))
    if not programs and modules[0].kind not in ("layer", "container"):
        raise GraphError("the stored head has no forward, and its root is not a layer that brings its own")
    if programs and modules[0].kind != "part":
        raise GraphError("the stored head has a forward of its own, so its root must be a part")
    return Graph(
        shape=_input_shape(graph.get("input")),
        modules=modules,
        ties=tuple(read_names(item, "ties") for item in _entries(graph, "ties")),
        frozen=frozenset(read_text(item, "frozen") for item in _entries(graph, "frozen")),
        dtypes=tuple(
            (read_text(name, "dtypes"), read_dtype(dtype, "dtypes"))
            for name, dtype in (read_pair(item, "dtypes") for item in _entries(graph, "dtypes"))
        ),
        layouts=tuple(_layout(item) for item in _entries(graph, "layouts")),
        held=tuple(_held(item) for item in _entries(graph, "held")),
        constants=tuple(constants),
        programs=programs,
    )


def check_extent(graph: Json) -> None:
    """Bound nesting, the number of values and the length of texts, without recursion and before anything else."""
    level, values, letters = [graph], 1, 0
    for _ in range(MAX_GRAPH_DEPTH):
        deeper: list[Json] = []
        for item in level:
            inner = item.values() if isinstance(item, dict) else item
            values += len(item)
            letters += sum(map(len, item)) if isinstance(item, dict) else 0
            letters += sum(len(part) for part in inner if isinstance(part, str))
            if isinstance(item, dict) and isinstance(data := item.get("data"), str):
                letters -= len(data)  # of an embedded tensor, which has a limit of its own
            deeper.extend(part for part in inner if isinstance(part, (dict, list)))
            if values > MAX_VALUES or letters > MAX_TEXT:
                raise GraphError(
                    f"the stored head has more than {MAX_VALUES} values or {MAX_TEXT} letters beside "
                    "its tensors: what makes so many calls is not stored as a graph"
                )
        level = deeper
        if not level:
            return
    raise GraphError(f"the stored head is nested deeper than {MAX_GRAPH_DEPTH} levels")


def _entries(graph: dict[str, Json], key: str) -> list[Json]:
    return read_list(graph.get(key, []), key, MAX_GRAPH_ITEMS)


def _callable_names(modules: Sequence[ModuleSpec]) -> set[str]:
    names: set[str] = set()
    for module in modules:
        whole = module.kind == "layer" or (module.kind == "container" and module.layer == "Sequential")
        if (whole or module.same in names) and module.name:
            names.add(module.name)
    return names


def _programs(graph: dict[str, Json], names: set[str], constants: int) -> dict[bool, Program]:
    keys = [key for key in ("forward", "train", "eval") if key in graph]
    if keys not in ([], ["forward"], ["train", "eval"]):
        raise GraphError(f"the stored head has {' and '.join(keys)}; expected `forward`, or both `train` and `eval`")
    read = [read_program(graph[key], key, names, constants) for key in keys]
    return {True: read[0], False: read[-1]} if read else {}


# --- small pieces: each takes a value and where it stands, and gives it back checked


def read_shape(value: Json, where: str) -> tuple[int, ...]:
    sizes = read_list(value, where, 8)
    if not all(type(size) is int and 0 <= size <= 2**40 for size in sizes):
        raise GraphError(f"{where}: {shown(value)} is not a shape")
    return tuple(sizes)


def _key(value: Json, where: str) -> str:
    if not isinstance(value, str) or not _KEY.fullmatch(value) or value.startswith("__"):
        raise GraphError(f"{where}: {shown(value)} is not a name for a module or tensor")
    return value


def _tensor(value: Json, left: list[int], where: str) -> torch.Tensor:
    """A tensor embedded in the graph; ``left`` holds the bytes that the graph may still embed and is reduced."""
    if not isinstance(value, dict) or set(value) != {"shape", "dtype", "data"}:
        raise GraphError(f"{where}: expected an object of shape, dtype and data")
    shape, dtype = read_shape(value["shape"], where), read_dtype(value["dtype"], where)
    nbytes = math.prod(shape) * dtype.itemsize
    left[0] -= nbytes
    if left[0] < 0:
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


# --- modules


def _input_shape(value: Json) -> tuple[int | None, ...]:
    if not isinstance(value, dict) or set(value) != {"shape"}:
        raise GraphError(f"input: expected an object with the input's shape, found {shown(value)}")
    sizes = read_list(value["shape"], "input.shape", 8)
    if not sizes or not all(size is None or (type(size) is int and 0 < size <= 2**31) for size in sizes):
        raise GraphError(f"input.shape: {shown(sizes)} is not a shape with null for the sizes that may vary")
    return tuple(sizes)


def _layout(value: Json) -> tuple[str, tuple[int, ...]]:
    name, order = read_pair(value, "layouts")
    dims = read_list(order, "layouts", 8)
    if not all(type(dim) is int for dim in dims) or sorted(dims) != list(range(len(dims))):
        raise GraphError(f"layouts: {shown(order)} is not an order of dimensions")
    return read_text(name, "layouts"), tuple(dims)


def _held(value: Json) -> tuple[str, bool, bool]:
    if not (isinstance(value, list) and len(value) == 3 and all(type(flag) is bool for flag in value[1:])):
        raise GraphError(f"held: expected [module, in train, in eval], found {shown(value)}")
    return read_text(value[0], "held"), value[1], value[2]


def _module(value: Json, left: list[int]) -> ModuleSpec:
    if not isinstance(value, dict):
        raise GraphError(f"modules: expected objects, found {shown(value)}")
    name = read_text(value.get("name"), "modules.name")
    where = f"module {shown(name)}"
    if "layer" in value:
        only(value, {"name", "layer", "args"}, where)
        return ModuleSpec(name, "layer", layer=read_text(value["layer"], where), args=value.get("args"))
    if "container" in value:
        only(value, {"name", "container"}, where)
        if value["container"] not in ("Sequential", "ModuleList", "ModuleDict"):
            raise GraphError(f"{where}: unknown container {shown(value['container'])}")
        return ModuleSpec(name, "container", layer=value["container"])
    if "same" in value:
        only(value, {"name", "same"}, where)
        return ModuleSpec(name, "same", same=read_text(value["same"], where))
    only(value, {"name", "part", "params", "buffers", "values"}, where)
    if value.get("part") is not True:
        raise GraphError(f"{where}: is neither a layer, a container, another name, nor a part")
    values = []
    for item in read_list(value.get("values", []), where, MAX_GRAPH_ITEMS):
        key, tensor = read_pair(item, where)
        values.append((_key(key, where), _tensor(tensor, left, f"{where}, buffer {shown(key)}")))
    params, buffers = (
        tuple(_tensor_spec(item, where) for item in read_list(value.get(kind, []), where, MAX_GRAPH_ITEMS))
        for kind in ("params", "buffers")
    )
    spec = ModuleSpec(name, "part", params=params, buffers=buffers, values=tuple(values))
    if len(_tensor_names(spec)) != len(params) + len(buffers) + len(values):
        raise GraphError(f"{where}: two tensors have the same name")
    return spec


def _tensor_names(spec: ModuleSpec) -> set[str]:
    return {item[0] for item in (*spec.params, *spec.buffers)} | {item[0] for item in spec.values}


def _tensor_spec(value: Json, where: str) -> TensorSpec:
    if not isinstance(value, list) or len(value) != 3:
        raise GraphError(f"{where}: expected [name, shape, dtype], found {shown(value)}")
    return _key(value[0], where), read_shape(value[1], where), read_dtype(value[2], where)


def _check_module_names(modules: Sequence[ModuleSpec]) -> None:
    if not modules or modules[0].name != "" or modules[0].kind == "same":
        raise GraphError("modules: the first one must be the head itself, named ''")
    seen = {"": modules[0]}
    tensors = {"": _tensor_names(modules[0])}
    sizes: dict[str, list[str]] = {"": []}
    for module in modules[1:]:
        name, same = module.name, module.same
        parent, _, key = name.rpartition(".")
        _key(key, f"module {shown(name)}")
        if name in seen:
            raise GraphError(f"modules: {shown(name)} is there twice")
        if name.count(".") >= MAX_MODULE_DEPTH:
            raise GraphError(f"modules: {shown(name)} is nested deeper than {MAX_MODULE_DEPTH} levels")
        if parent not in seen:
            raise GraphError(f"modules: {shown(name)} comes before its parent")
        if seen[parent].kind in ("layer", "same"):
            raise GraphError(f"modules: {shown(parent)} is a {seen[parent].kind}, it cannot hold {shown(key)}")
        if module.kind == "same" and (same not in seen or seen[same].kind == "same"):
            raise GraphError(f"modules: {shown(name)} is another name of {shown(same)}, which is not there before it")
        if module.kind == "same" and (name + ".").startswith(same + "." if same else ""):
            raise GraphError(f"modules: {shown(name)} cannot be the module {shown(same)} that holds it")
        if key in tensors[parent]:
            raise GraphError(f"modules: {shown(name)} has the name of a tensor")
        seen[name] = module
        tensors[name] = _tensor_names(module)
        sizes.setdefault(parent, []).append(same or name)
    _check_paths(sizes)


def _check_paths(children: dict[str, list[str]]) -> None:
    """Refuse modules that hold each other, or so many names for the same ones that walking over them would not end."""
    sizes: dict[str, int] = {}
    unfinished: set[str] = set()

    def size(name: str) -> int:
        if name in unfinished:
            raise GraphError(f"modules: {shown(name)} holds itself")
        if name not in sizes:
            unfinished.add(name)
            sizes[name] = 1 + sum(map(size, children.get(name, ())))
            unfinished.remove(name)
        return sizes[name]

    if size("") > MAX_MODULES:
        raise GraphError(f"modules: shared modules have more than {MAX_MODULES} names")

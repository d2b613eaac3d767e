"""Phases one and two of reading a stored head: untrusted JSON to records, with every check that needs no module.

After `parse_graph` every name is known, every operation is one of the table, every reference points back to something
that exists, every string is one that an operation takes, and sizes are bounded. Each value is looked at once, so the
audit is linear in the text. docs/format.md describes the JSON.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from .errors import GraphError, shown
from .graph_program import Json, Program, only, read_list, read_program, read_rows, read_value

VERSION = 1
# Of the heads in this package's tests (147, as people write them) the largest graph has 54 KiB of text, most of it an
# embedded mask, 551 values and 38 modules.
MAX_TEXT = 1 << 20
MAX_VALUES = 200_000
MAX_MODULES = 2_000
MAX_MODULE_DEPTH = 32
MAX_GRAPH_DEPTH = 16
MAX_EMBEDDED_BYTES = 1 << 20

_HEAD = "the stored head"
_GRAPH_KEYS = frozenset("version input modules ties frozen dtypes layouts held constants forward train eval".split())
# Lists of a graph, and what stands in each of their rows; of `held`: module, its mode in train, in eval.
_ROWS = {"ties": "name name", "dtypes": "name dtype", "layouts": "name order", "held": "name flag flag"}
_MODULE_KEYS = {
    "layer": {"name", "layer", "args"},
    "container": {"name", "container"},
    "same": {"name", "same"},
    "part": {"name", "part", "params", "buffers", "values"},
}
CONTAINERS: dict[str, type[nn.Module]] = {each.__name__: each for each in (nn.Sequential, nn.ModuleList, nn.ModuleDict)}

# --- records: a stored head without any JSON left in it


TensorSpec = tuple[str, tuple[int, ...], torch.dtype]
"""A parameter or buffer that the weights bring: its name within its module, shape and dtype."""


@dataclass(frozen=True)
class ModuleSpec:
    """One module: a layer of the table, a torch container, a plain part, or another name of an earlier module.

    `of` is the layer's, container's or earlier module's name; `values` are buffers that are not in the state dict.
    """

    name: str
    kind: str
    of: str = ""
    args: Any = None
    params: tuple[TensorSpec, ...] = ()
    buffers: tuple[TensorSpec, ...] = ()
    values: tuple[tuple[str, torch.Tensor], ...] = ()

    def tensor_names(self) -> list[str]:
        """Names of all of its own tensors."""
        return [str(item[0]) for item in (*self.params, *self.buffers, *self.values)]


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
    version = read_value(graph, "object", _HEAD).get("version")
    if type(version) is not int or version != VERSION:
        raise GraphError(
            f"the stored head has graph version {shown(version)}; this package reads version {VERSION}. A newer one "
            "needs a newer hf_timm_tower"
        )
    check_extent(graph)
    only(graph, _GRAPH_KEYS, _HEAD)
    only(graph.get("input"), {"shape"}, "input")
    left = [MAX_EMBEDDED_BYTES]
    modules = tuple(_module(item, left) for item in read_list(graph.get("modules"), "modules", MAX_MODULES))
    _check_module_names(modules)
    embedded = enumerate(read_list(graph.get("constants", []), "constants"))
    constants = tuple(_tensor(item, left, f"constants[{index}]") for index, item in embedded)
    # What a call may name: what brings a forward of its own.
    names = {each.name for each in modules[1:] if (each.kind, each.of) == ("container", "Sequential")}
    names |= {each.name for each in modules[1:] if each.kind == "layer"}
    names |= {each.name for each in modules if each.kind == "same" and each.of in names}
    programs = _programs(graph, names, len(constants))
    if not programs and modules[0].kind not in ("layer", "container"):
        raise GraphError("the stored head has no forward, and its root is not a layer that brings its own")
    if programs and modules[0].kind != "part":
        raise GraphError("the stored head has a forward of its own, so its root must be a part")
    rows: Any = {key: read_rows(graph.get(key, []), kinds, key) for key, kinds in _ROWS.items()}
    frozen = frozenset(read_value(item, "name", "frozen") for item in read_list(graph.get("frozen", []), "frozen"))
    shape = read_value(graph["input"].get("shape"), "input", "input.shape")
    return Graph(shape=shape, modules=modules, frozen=frozen, constants=constants, programs=programs, **rows)


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


def _programs(graph: dict[str, Json], names: set[str], constants: int) -> dict[bool, Program]:
    keys = [key for key in ("forward", "train", "eval") if key in graph]
    if keys not in ([], ["forward"], ["train", "eval"]):
        raise GraphError(f"the stored head has {' and '.join(keys)}; expected `forward`, or both `train` and `eval`")
    read = [read_program(graph[key], key, names, constants) for key in keys]
    return {True: read[0], False: read[-1]} if read else {}


# --- modules


def _tensor(value: Json, left: list[int], where: str) -> torch.Tensor:
    """A tensor embedded in the graph; ``left`` holds the bytes that the graph may still embed and is reduced."""
    only(value, {"shape", "dtype", "data"}, where)
    shape, dtype = (read_value(value.get(kind), kind, where) for kind in ("shape", "dtype"))
    nbytes = math.prod(shape) * dtype.itemsize
    left[0] -= nbytes
    if left[0] < 0:
        raise GraphError(f"{where}: the tensors inside a stored head exceed {MAX_EMBEDDED_BYTES} bytes")
    try:
        data = base64.b64decode(value.get("data"), validate=True)
    except (TypeError, ValueError) as error:
        raise GraphError(f"{where}: data is not base64: {error}") from None
    if len(data) != nbytes:
        raise GraphError(f"{where}: {len(data)} bytes of data, expected {nbytes} for {shape} of {dtype}")
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype is torch.bool and set(data) - {0, 1}:
        raise GraphError(f"{where}: a bool tensor holds only 0 and 1")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _module(value: Json, left: list[int]) -> ModuleSpec:
    name = read_value(read_value(value, "object", "modules").get("name"), "name", "modules.name")
    where = f"module {shown(name)}"
    kind = next((kind for kind in _MODULE_KEYS if kind in value), "part")
    only(value, _MODULE_KEYS[kind], where)
    of = "" if kind == "part" else read_value(value[kind], "name", where)
    if (kind == "part" and value.get("part") is not True) or (kind == "container" and of not in CONTAINERS):
        raise GraphError(f"{where}: is no layer, no part, not another name, and none of {', '.join(CONTAINERS)}")
    params, buffers = (read_rows(value.get(key, []), "key shape dtype", where) for key in ("params", "buffers"))
    rows = read_rows(value.get("values", []), "key value", where)
    values = tuple((key, _tensor(tensor, left, f"{where}, buffer {shown(key)}")) for key, tensor in rows)
    spec = ModuleSpec(name, kind, of, value.get("args"), params, buffers, values)
    if len(set(spec.tensor_names())) != len(spec.tensor_names()):
        raise GraphError(f"{where}: two tensors have the same name")
    return spec


def _check_module_names(modules: Sequence[ModuleSpec]) -> None:
    if not modules or modules[0].name != "" or modules[0].kind == "same":
        raise GraphError("modules: the first one must be the head itself, named ''")
    seen = {"": modules[0]}
    tensors = {"": set(modules[0].tensor_names())}
    sizes: dict[str, list[str]] = {"": []}
    for module in modules[1:]:
        name, same = module.name, module.of if module.kind == "same" else ""
        parent, _, key = name.rpartition(".")
        read_value(key, "key", f"module {shown(name)}")
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
        tensors[name] = set(module.tensor_names())
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

"""Phases one and two of reading a stored head: JSON to records, and every check that needs no module.

The JSON comes from strangers. After `parse_graph` every name is known, every operation is one of the table, every
reference points back to something that exists, every string is one that an operation takes, and sizes are bounded.
"""

import re
from collections.abc import Sequence
from typing import Any

from .errors import GraphError
from .graph_json import (
    MAX_EMBEDDED_BYTES,
    MAX_ITEMS,
    check_depth,
    only,
    read_dtype,
    read_list,
    read_names,
    read_pair,
    read_shape,
    read_tensor,
    read_text,
    short,
)
from .graph_program import read_program
from .graph_records import Graph, ModuleSpec, Program, TensorSpec

Json = Any

VERSION = 1
MAX_MODULES = 10_000
MAX_MODULE_DEPTH = 32

_KEYS = frozenset("version input modules ties frozen dtypes layouts held constants forward train eval".split())
_NAME = re.compile(r"[^.\x00-\x1f\x7f]{1,200}")


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
    only(graph, _KEYS, "the stored head")
    check_depth(graph)
    budget = [MAX_EMBEDDED_BYTES]
    modules = tuple(_module(item, budget) for item in read_list(graph.get("modules"), "modules", MAX_MODULES))
    _check_module_names(modules)
    names = _callable_names(modules)
    constants = tuple(
        read_tensor(item, budget, f"constants[{i}]")
        for i, item in enumerate(read_list(graph.get("constants", []), "constants", MAX_ITEMS))
    )
    parsed = Graph(
        shape=_input_shape(graph.get("input")),
        modules=modules,
        ties=tuple(read_names(item, "ties") for item in read_list(graph.get("ties", []), "ties", MAX_ITEMS)),
        frozen=frozenset(read_text(item, "frozen") for item in read_list(graph.get("frozen", []), "frozen", MAX_ITEMS)),
        dtypes=tuple(
            (read_text(name, "dtypes"), read_dtype(dtype, f"dtypes[{name}]"))
            for name, dtype in (
                read_pair(item, "dtypes") for item in read_list(graph.get("dtypes", []), "dtypes", MAX_ITEMS)
            )
        ),
        layouts=tuple(_layout(item) for item in read_list(graph.get("layouts", []), "layouts", MAX_ITEMS)),
        held=tuple(_held(item) for item in read_list(graph.get("held", []), "held", MAX_MODULES)),
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
        program = read_program(graph["forward"], "forward", names, constants)
        return {True: program, False: program}
    if "train" in graph or "eval" in graph:
        if "train" not in graph or "eval" not in graph:
            raise GraphError("the stored head has a forward for one mode only; `train` and `eval` belong together")
        return {
            True: read_program(graph["train"], "train", names, constants),
            False: read_program(graph["eval"], "eval", names, constants),
        }
    return {}


# --- modules


def _input_shape(value: Json) -> tuple[int | None, ...]:
    if not isinstance(value, dict) or set(value) != {"shape"}:
        raise GraphError(f"input: expected an object with the input's shape, found {short(value)}")
    sizes = read_list(value["shape"], "input.shape", 8)
    if not sizes or not all(size is None or (type(size) is int and 0 < size <= 2**31) for size in sizes):
        raise GraphError(f"input.shape: {short(sizes)} is not a shape with null for the sizes that may vary")
    return tuple(sizes)


def _layout(value: Json) -> tuple[str, tuple[int, ...]]:
    name, order = read_pair(value, "layouts")
    dims = read_list(order, "layouts", 8)
    if not all(type(dim) is int for dim in dims) or sorted(dims) != list(range(len(dims))):
        raise GraphError(f"layouts: {short(order)} is not an order of dimensions")
    return read_text(name, "layouts"), tuple(dims)


def _held(value: Json) -> tuple[str, bool, bool]:
    if not (isinstance(value, list) and len(value) == 3 and all(type(flag) is bool for flag in value[1:])):
        raise GraphError(f"held: expected [module, in train, in eval], found {short(value)}")
    return read_text(value[0], "held"), value[1], value[2]


def _module(value: Json, budget: list[int]) -> ModuleSpec:
    if not isinstance(value, dict):
        raise GraphError(f"modules: expected objects, found {short(value)}")
    name = read_text(value.get("name"), "modules.name")
    where = f"module {name!r}"
    if "layer" in value:
        only(value, {"name", "layer", "args"}, where)
        return ModuleSpec(name, "layer", layer=read_text(value["layer"], where), args=value.get("args"))
    if "container" in value:
        only(value, {"name", "container"}, where)
        if value["container"] not in ("Sequential", "ModuleList", "ModuleDict"):
            raise GraphError(f"{where}: unknown container {short(value['container'])}")
        return ModuleSpec(name, "container", layer=value["container"])
    if "same" in value:
        only(value, {"name", "same"}, where)
        return ModuleSpec(name, "same", same=read_text(value["same"], where))
    only(value, {"name", "part", "params", "buffers", "values"}, where)
    if value.get("part") is not True:
        raise GraphError(f"{where}: is neither a layer, a container, another name, nor a part")
    values = []
    for item in read_list(value.get("values", []), where, MAX_ITEMS):
        key, tensor = read_pair(item, where)
        values.append((_key(key, where), read_tensor(tensor, budget, f"{where}, buffer {key}")))
    spec = ModuleSpec(
        name,
        "part",
        params=tuple(_tensor_spec(item, where) for item in read_list(value.get("params", []), where, MAX_ITEMS)),
        buffers=tuple(_tensor_spec(item, where) for item in read_list(value.get("buffers", []), where, MAX_ITEMS)),
        values=tuple(values),
    )
    keys = [item.name for item in (*spec.params, *spec.buffers)] + [key for key, _ in values]
    if len(set(keys)) != len(keys):
        raise GraphError(f"{where}: two tensors have the same name")
    return spec


def _tensor_spec(value: Json, where: str) -> TensorSpec:
    if not isinstance(value, list) or len(value) != 3:
        raise GraphError(f"{where}: expected [name, shape, dtype], found {short(value)}")
    return TensorSpec(_key(value[0], where), read_shape(value[1], where), read_dtype(value[2], where))


def _key(value: Json, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value.startswith("__"):
        raise GraphError(f"{where}: {short(value)} is not a name for a module or tensor")
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

"""Tidying a recorded forward: calls that nobody needs go, constants that nobody uses go, the rest is renumbered."""

import re
from collections.abc import Callable
from typing import Any

import torch

from .batch_formula import same_bytes
from .operations import has_effect

Json = Any
Program = dict[str, Json]

_NODE = re.compile(r"%(\d+)((?:\.\d+)*)")


def prune(nodes: list[dict[str, Json]], output: Json) -> Program:
    """Drop operations without effect whose results are not used, and renumber the rest."""
    needed: set[int] = set()

    def need(ref: str) -> str:
        match = _NODE.fullmatch(ref)
        if match:
            needed.add(int(match[1]))
        return ref

    _rename(output, need)
    for index in range(len(nodes) - 1, -1, -1):
        if index in needed or _matters(nodes[index]):
            needed.add(index)
            _rename_node(nodes[index], need)
    numbers = {old: new for new, old in enumerate(sorted(needed))}

    def rename(ref: str) -> str:
        match = _NODE.fullmatch(ref)
        return f"%{numbers[int(match[1])]}{match[2]}" if match else ref

    kept = [_rename_node(nodes[old], rename) for old in sorted(needed)]
    return {"nodes": kept, "output": _rename(output, rename)}


def _matters(node: dict[str, Json]) -> bool:
    return "op" not in node or has_effect(node["op"], node.get("kw", ()))


def _rename_node(node: dict[str, Json], rename: Callable[[str], str]) -> dict[str, Json]:
    renamed = dict(node)
    if "in" in node:
        renamed["in"] = _rename(node["in"], rename)
    if "kw" in node:
        renamed["kw"] = {key: _rename(value, rename) for key, value in node["kw"].items()}
    return {key: value for key, value in renamed.items() if key != "kw" or value}


def _rename(value: Json, rename: Callable[[str], str]) -> Json:
    """Every reference in a JSON value through `rename`; tagged strings and formulas are none."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, list):
        return [_rename(item, rename) for item in value]
    if isinstance(value, dict):
        ((tag, inner),) = value.items()
        if tag in ("t", "slice"):
            return {tag: _rename(inner, rename)}
        if tag in ("d", "ordered"):
            return {tag: [[key, _rename(item, rename)] for key, item in inner]}
    return value


class Constants:
    """The constant tensors of a graph, each kept once for both modes, in the order of their first use."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def renumber(self, program: Program, own: list[torch.Tensor]) -> Program:
        """Give the constants of one program (numbered as in `own`) their common numbers."""

        def rename(ref: str) -> str:
            return f"#{self._number(own[int(ref[1:])])}" if ref.startswith("#") else ref

        nodes = [_rename_node(node, rename) for node in program["nodes"]]
        return {"nodes": nodes, "output": _rename(program["output"], rename)}

    def _number(self, tensor: torch.Tensor) -> int:
        for number, known in enumerate(self.tensors):
            if same_bytes(known, tensor):
                return number
        self.tensors.append(tensor)
        return len(self.tensors) - 1

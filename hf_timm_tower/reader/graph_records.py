"""What a stored head is once it has been read: plain records without any JSON left in them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch


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

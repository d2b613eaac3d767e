"""The runs of a head from which one mode of its graph is made.

Four batch sizes (and a batch of one in evaluation, where heads like to take another path) show which numbers follow the
batch. A run in double precision shows which dtypes are the input's own rather than fixed. Runs on other map sizes or
token counts show whether the head minds the size at all.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..reader.errors import GraphError
from ..reader.graph_head import submodule
from .arguments import DTYPE_NAMES
from .batch_formula import merge
from .isolation import copy_head, isolated
from .trace import Trace, callable_layers, named_tensors, run_and_record

Json = Any
Counter = tuple[str, str, int | float]
"""A module's name, an attribute of it, and the number that it shall hold."""

_BATCHES = (2, 3, 5, 8)


@dataclass(frozen=True)
class Mode:
    """One mode of a head: the calls of its forward, output, constants, and the input dimensions it does not mind."""

    nodes: list[dict[str, Json]]
    output: Json
    constants: list[torch.Tensor]
    free: frozenset[int]


def record_mode(head: nn.Module, example: torch.Tensor, *, training: bool) -> Mode:
    """Run copies of `head` in one mode and merge what they did. Raises GraphError where that is not data."""
    shape = example.shape[1:]
    runs = _Runs(head, tuple(callable_layers(head)), training)
    traces = [(batch, runs.run((batch, *shape), example.dtype)) for batch in _BATCHES]
    base = traces[0][1]
    if not training and runs.works((1, *shape), example.dtype):
        traces.insert(0, (1, runs.run((1, *shape), example.dtype)))
    merged = merge(traces)
    _check_counters(runs, example, base)
    follows = _dtypes_that_follow(runs, example, base)
    nodes = _mark_dtypes(merged.nodes, follows) if follows is not None else merged.nodes
    return Mode(nodes, merged.output, merged.constants, _free_dimensions(runs, example, base))


@dataclass(frozen=True)
class _Runs:
    """Runs of one head in one mode, each on a fresh copy."""

    head: nn.Module
    layers: tuple[str, ...]
    training: bool

    def run(self, shape: tuple[int, ...], dtype: torch.dtype, counters: Iterable[Counter] = ()) -> Trace:
        copy = copy_head(self.head)
        for name, attribute, value in counters:
            vars(submodule(copy, name))[attribute] = value
        if dtype == torch.float64:
            copy = nn.Module.double(copy)  # a head may have something else under this name
        copy.train(self.training)
        try:
            with isolated(_seed_of(shape)):
                return run_and_record(copy, _input_of(shape, dtype), self.layers, named_tensors(self.head))
        except GraphError:
            raise
        except Exception as error:  # the head's own failure, of any class
            mode = "training" if self.training else "evaluation"
            raise GraphError(
                f"the head fails in {mode} on an input of shape {list(shape)}: {type(error).__name__}: {error}"
            ) from error

    def works(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        try:
            with isolated(_seed_of(shape)):
                copy_head(self.head).train(self.training)(_input_of(shape, dtype))
        except Exception:  # whatever the head raises, it does not take this input
            return False
        return True


def _input_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fresh values for every run, so that nothing computed from them can pass for a constant."""
    generator = torch.Generator().manual_seed(_seed_of(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    return values.requires_grad_().clone()  # not a leaf, as a trunk's output is none


def _seed_of(shape: tuple[int, ...]) -> int:
    return 1000 + 31 * shape[0] + sum(shape)


def _check_counters(runs: _Runs, example: torch.Tensor, base: Trace) -> None:
    """Refuse a head that counts its calls in Python and does something else after many of them."""
    shape = (_BATCHES[0], *example.shape[1:])
    copy = copy_head(runs.head).train(runs.training)
    before = _numbers(copy)
    with warnings.catch_warnings(), isolated(_seed_of(shape)):
        warnings.simplefilter("ignore")
        copy(_input_of(shape, example.dtype))
    changed = [key for key, value in _numbers(copy).items() if before.get(key, value) != value]
    for far in (1_000, 10_000_019) if changed else ():
        other = runs.run(shape, example.dtype, [(*key, type(before[key])(far)) for key in changed])
        if other.nodes != base.nodes or other.output != base.output:
            names = ", ".join(".".join(filter(None, key)) for key in changed)
            raise GraphError(
                f"the forward counts in Python ({names}), and does something else after many calls; count in a buffer"
            )


def _numbers(head: nn.Module) -> dict[tuple[str, str], int | float]:
    return {
        (name, attribute): value
        for name, module in head.named_modules()
        for attribute, value in vars(module).items()
        if type(value) in (int, float)
    }


def _dtypes_that_follow(runs: _Runs, example: torch.Tensor, base: Trace) -> list[Json] | None:
    """The nodes of a run in double precision, or None if the head cannot run so or does something else then."""
    if example.dtype == torch.float64:
        return None
    try:
        double = runs.run((_BATCHES[0], *example.shape[1:]), torch.float64)
    except GraphError:
        return None
    same = len(double.nodes) == len(base.nodes) and all(
        one.get("op") == other.get("op") and one.get("call") == other.get("call")
        for one, other in zip(base.nodes, double.nodes, strict=True)
    )
    if not same:
        return None
    sources: dict[str, str] = {}
    for name, parameter in runs.head.named_parameters():
        sources.setdefault(DTYPE_NAMES[parameter.dtype], f"${name}")
    sources[DTYPE_NAMES[example.dtype]] = "input"
    return [_following(one, other, sources) for one, other in zip(base.nodes, double.nodes, strict=True)]


def _following(base: Json, double: Json, sources: dict[str, str]) -> Json:
    """A tree of the form of `base` that names, where a dtype turned into double, what it follows; None elsewhere.

    That is the input where its dtype is the one, or else the first parameter of that dtype.
    """
    if isinstance(base, dict) and isinstance(double, dict):
        if set(base) == {"dtype"} and set(double) == {"dtype"}:
            changed = base["dtype"] != "float64" and double["dtype"] == "float64"
            return sources.get(base["dtype"]) if changed else None
        return {key: _following(base[key], double[key], sources) for key in base if key in double}
    if isinstance(base, list) and isinstance(double, list) and len(base) == len(double):
        return [_following(one, other, sources) for one, other in zip(base, double, strict=True)]
    return None


def _mark_dtypes(value: Json, follows: Json) -> Json:
    if isinstance(follows, str):
        return {"dtype": follows}
    if isinstance(value, dict) and isinstance(follows, dict):
        return {key: _mark_dtypes(inner, follows.get(key)) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(follows, list) and len(value) == len(follows):
        return [_mark_dtypes(inner, follow) for inner, follow in zip(value, follows, strict=True)]
    return value


def _free_dimensions(runs: _Runs, example: torch.Tensor, base: Trace) -> frozenset[int]:
    """Dimensions whose size the head does not mind: rows and columns of a map, the number of tokens.

    Free only if runs at larger, much larger and smaller sizes make exactly the same calls with the same numbers.
    """
    dims = {3: (1,), 4: (2, 3)}.get(example.dim(), ())
    if not dims:
        return frozenset()
    changes: tuple[Callable[[int, int], int], ...] = (
        lambda size, step: size + step,
        lambda size, _: 2 * size,
        lambda size, _: max(1, size // 2),
    )
    for change in changes:
        shape = [_BATCHES[0], *example.shape[1:]]
        for step, dim in enumerate(dims, 1):
            shape[dim] = change(shape[dim], step)
        try:
            other = runs.run(tuple(shape), example.dtype)
        except GraphError:
            return frozenset()
        if other.nodes != base.nodes or other.output != base.output:
            return frozenset()
    return frozenset(dims)

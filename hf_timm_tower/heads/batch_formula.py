"""Numbers that follow the batch size.

Several runs of a head, each with another batch size, are laid side by side. They must make the same calls; a number
that is not the same in all of them is solved as a small formula in the batch size ``B`` that gives exactly what was
seen in every run. The formulas are JSON: ``"B"``, a number, or ``[operator, left, right]``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import torch

from ..reader.errors import GraphError, shown
from ..reader.graph_program import evaluate
from .trace import Trace

Json = Any
Number = int | float


def solve(batches: Sequence[int], values: Sequence[Number]) -> Json | None:
    """A formula that gives exactly `values` (of the same types) for `batches`, or None if no simple one does."""
    formulas = _candidates(batches, values)
    if batches[0] == 1:
        # `max(1, n // 2)`: the smallest batch is held up by a floor.
        formulas = chain(formulas, (["max", formula, values[0]] for formula in _candidates(batches[1:], values[1:])))
    for formula in formulas:
        try:
            given = [evaluate(formula, batch) for batch in batches]
        except GraphError:
            continue
        if all(type(a) is type(b) and a == b for a, b in zip(given, values, strict=True)):
            return formula
    return None


def _line(batches: Sequence[int], values: Sequence[Number]) -> Json | None:
    """Integers a, c with a * B + c = values, as a formula."""
    rounded = [round(value) for value in values]
    slope, rest = divmod(rounded[1] - rounded[0], batches[1] - batches[0])
    if rest or slope == 0:
        return None
    offset = rounded[0] - slope * batches[0]
    if any(slope * batch + offset != value for batch, value in zip(batches, rounded, strict=True)):
        return None
    scaled: Json = "B" if slope == 1 else ["*", "B", slope]
    return ["+", scaled, offset] if offset else scaled


def _half_square(batches: Sequence[int], values: Sequence[Number]) -> Json | None:
    """Integers a, b, c with a * B * B + b * B + c = 2 * values, as a formula of twice the value (pairs in a batch)."""
    doubled = [round(2 * value) for value in values]
    (x0, x1, x2), (y0, y1, y2) = batches[:3], doubled[:3]
    square = Fraction((y2 - y0) * (x1 - x0) - (y1 - y0) * (x2 - x0), (x2 - x0) * (x1 - x0) * (x2 - x1))
    slope = Fraction(y1 - y0, x1 - x0) - square * (x0 + x1)
    if square.denominator != 1 or slope.denominator != 1 or square == 0:
        return None
    a, b = int(square), int(slope)
    c = y0 - a * x0 * x0 - b * x0
    if any(a * x * x + b * x + c != y for x, y in zip(batches, doubled, strict=True)):
        return None
    return ["+", ["*", "B", ["+", ["*", "B", a], b]], c]


def _candidates(batches: Sequence[int], values: Sequence[Number]) -> Iterator[Json]:
    if len(values) < 3 or not all(math.isfinite(value) for value in values):
        return
    line = _line(batches, values)
    if all(isinstance(value, int) for value in values):
        if line is not None:
            yield line
        square = _half_square(batches, values)
        if square is not None:
            yield ["//", square, 2]
        for divisor in range(2, 17):
            spread = (values[-1] - values[0]) * divisor / (batches[-1] - batches[0])
            for slope in sorted({math.floor(spread), math.ceil(spread)} - {0}):
                for offset in sorted(range(-divisor, 2 * divisor + 1), key=abs):
                    scaled: Json = "B" if slope == 1 else ["*", "B", slope]
                    yield ["//", ["+", scaled, offset] if offset else scaled, divisor]
        return
    if line is not None:
        yield ["*", line, 1.0]
    square = _half_square(batches, values)
    if square is not None:
        yield ["/", square, 2]
    factors = {value / batch for value, batch in zip(values, batches, strict=True)}
    for factor in sorted(factors):
        yield ["*", "B", factor]
        if factor:
            yield ["/", "B", float(round(1 / factor))]
            yield ["/", "B", round(1 / factor)]
    if all(value != 0 for value in values):
        products = {value * batch for value, batch in zip(values, batches, strict=True)}
        for scale in (1.0, 1, *sorted(products)):
            inverse = _line(batches, [scale / value for value in values])
            if inverse is not None:
                yield ["/", scale, inverse]
        squares = _line(batches, [value * value for value in values])
        if squares is not None:
            yield ["**", squares, 0.5]
        inverses = _line(batches, [1 / (value * value) for value in values])
        if inverses is not None:
            yield ["**", inverses, -0.5]
            yield ["/", 1.0, ["**", inverses, 0.5]]
    if all(value < 700 for value in values):
        inside = _line(batches, [math.exp(value) for value in values])
        if inside is not None:
            yield ["log", inside, 1.0]


@dataclass(frozen=True)
class MergedTrace:
    """What several runs have in common: JSON nodes and output with formulas in them, and the constants."""

    nodes: list[dict[str, Json]]
    output: Json
    constants: list[torch.Tensor]


def merge(traces: Sequence[tuple[int, Trace]]) -> MergedTrace:
    """Lay runs of different batch sizes side by side.

    Raises GraphError, with the user's line, where they make different calls or a number follows no simple formula.
    """
    batches = [batch for batch, _ in traces]
    runs = [trace for _, trace in traces]
    first = runs[0]
    nodes = []
    for index in range(min(len(run.nodes) for run in runs)):
        nodes.append(_merge_json(batches, [run.nodes[index] for run in runs], first.where[index]))
    if len({len(run.nodes) for run in runs}) > 1:
        counts = ", ".join(f"{len(run.nodes)} for a batch of {batch}" for batch, run in traces)
        raise GraphError(f"the number of calls depends on the batch or on chance: {counts}")
    _compare_constants(runs)
    output = _merge_json(batches, [run.output for run in runs], "the output")
    return MergedTrace(nodes, output, first.constants)


def _compare_constants(runs: Sequence[Trace]) -> None:
    for index, tensor in enumerate(runs[0].constants):
        for run in runs[1:]:
            if index >= len(run.constants) or not same_bytes(tensor, run.constants[index]):
                raise GraphError(
                    f"a tensor of shape {tuple(tensor.shape)} is made in a way that torch's function protocol does not "
                    "show (numpy, compiled script, an extension) and differs from run to run"
                )


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes (NaN by its bits)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(flat_bytes(one), flat_bytes(other).to(one.device))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the order of its elements, uint8 ``[nbytes]``."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)  # one element may have any stride
    plain.copy_(tensor.detach().resolve_conj().resolve_neg())
    return plain.reshape(-1).view(torch.uint8)


def _merge_json(batches: Sequence[int], values: Sequence[Json], where: str) -> Json:
    first = values[0]
    if all(type(value) is type(first) and value == first for value in values) and not isinstance(first, (dict, list)):
        return first
    if isinstance(first, dict) and all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {key: _merge_json(batches, [value[key] for value in values], where) for key in first}
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_merge_json(batches, list(items), where) for items in zip(*values, strict=True)]
    if all(type(value) in (int, float) and type(value) is type(first) for value in values):
        formula = solve(batches, values)
        if formula is not None:
            return {"n": formula}
    if (
        isinstance(first, dict)
        and ("op" in first or "call" in first)
        and not all(
            isinstance(value, dict) and [value.get("op"), value.get("call")] == [first.get("op"), first.get("call")]
            for value in values
        )
    ):
        calls = ", ".join(
            f"{value.get('op') or value.get('call') or 'a write'} for a batch of {batch}"
            for batch, value in zip(batches, values, strict=True)
        )
        raise GraphError(f"which calls are made depends on the batch size or on chance: {calls} ({where})")
    found = ", ".join(
        f"{shown(value, 60)} for a batch of {batch}" for batch, value in zip(batches, values, strict=True)
    )
    raise GraphError(
        f"what is computed depends on the batch size or on chance in a way that is not data: {found} ({where})"
    )

"""A copy of a tower that runs faster, and how far it is from the exact one. Only what is asked for is done."""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model  # type: ignore[attr-defined]

from ..files.fingerprint import probe_image
from ..reader.errors import ArgumentError
from ..reader.trunk import native_size
from .embedder import Block, Embedder, Outputs

Step = Literal["reparameterize", "channels_last", "bfloat16", "float16", "compile"]
_RUNS = 5


@dataclass(frozen=True)
class Measured:
    """What one step did, together with those before it.

    Attributes:
        step: Its name.
        speedup: Time of the exact tower / time now; medians of interleaved runs of one batch on this machine.
        relative_difference: Largest difference of an output, relative to the largest output of the exact tower.
        cosine: The least cosine of an image's output with the exact one.
        changed: Whether it did anything: a trunk without such layers has nothing to reparameterize.
    """

    step: str
    speedup: float
    relative_difference: float
    cosine: float
    changed: bool


@dataclass(frozen=True)
class Optimized:
    """What `optimize` gives.

    Attributes:
        tower: The copy: for `embed` and inference, not to be trained or, once it is reparameterized, saved.
        measured: One for each step, in order.
    """

    tower: Any
    measured: list[Measured]


def optimize(tower: Any, steps: tuple[Step, ...], batch_size: int) -> Optimized:
    """A faster copy of a tower; see `EmbeddingMixin.optimize`."""
    known = get_args(Step)
    if not steps or set(steps) - set(known) or len(set(steps)) < len(steps):
        raise ArgumentError(f"steps={list(steps)}: expected some of {', '.join(known)}, each once")
    exact, faster = Embedder(tower, Outputs(batch_size)), copy.deepcopy(tower).eval()
    pixels = _probes(tower, batch_size)
    expected = _run(exact, pixels)
    measured = []
    for step in steps:
        changed = _apply(faster, step)
        running = Embedder(faster, Outputs(batch_size))
        found = _run(running, pixels)
        before, now = _times(exact, running, pixels)
        measured.append(Measured(step, before / now, *_deviation(expected, found), changed))
    return Optimized(faster, measured)


def _apply(tower: Any, step: Step) -> bool:
    if step == "reparameterize":
        before = [type(part) for part in tower.trunk.modules()]
        reparameterize_model(tower.trunk, inplace=True)
        return before != [type(part) for part in tower.trunk.modules()]
    if step == "channels_last":
        tower.to(memory_format=torch.channels_last)
        return any(isinstance(part, nn.Conv2d) for part in tower.modules())
    if step == "compile":
        tower.compile()
    else:
        tower.to(getattr(torch, step))
    return True


def _probes(tower: Any, count: int) -> torch.Tensor:
    """The fingerprint's probe, each time shifted further: `[count, in_chans, height, width]`."""
    probe = probe_image(tower.config.in_chans, native_size(tower.config))
    return torch.cat([probe.roll((5 * row, 3 * row), (2, 3)) for row in range(count)])


def _run(embedder: Embedder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = list(range(len(pixels)))
    return embedder.run((pixels, Block(0, [str(row) for row in rows], rows, {}, None, []))).values


def _times(exact: Embedder, faster: Embedder, pixels: torch.Tensor) -> tuple[float, float]:
    """Seconds of a batch, by both in turn; both have run before."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_RUNS):
        for embedder, each in zip((exact, faster), times, strict=True):
            started = time.perf_counter()
            _run(embedder, pixels)
            each.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _deviation(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[float, float]:
    pairs: Any = [tuple(each[path].double()[:, None].flatten(1) for each in (expected, found)) for path in expected]
    largest = max(float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) for one, other in pairs)
    return largest, min(float(F.cosine_similarity(one, other, dim=1).min()) for one, other in pairs)

"""Batches of images -> blocks of embeddings, in one process: what every way of running over many images calls.

A batch always has `batch_size` places, whatever is in it: missing and broken images leave zeros. So the kernels, and
the bits of an image's embedding, do not depend on how many images there are or which stand beside it.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..reader.errors import ArgumentError, TowerError, shown
from ..reader.trunk import eval_mode, float_dtype
from .open_image import Preparer, reason_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_AT_ONCE = 2**16  # a manifest may be anybody's

# Held while a tower is in eval mode for a batch only: another thread would see that mode, and run in the one after it.
_switched = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork that another thread makes has the mode before, and no lock that stays
    os.register_at_fork(before=_switched.acquire, after_in_parent=_switched.release, after_in_child=_switched.release)


@contextmanager
def _evaluating(tower: Any) -> Iterator[None]:
    with _switched, eval_mode(tower):
        yield


@dataclass(frozen=True)
class Failure:
    """An image that has no embedding.

    Attributes:
        index: Its position in the source, from 0.
        id: Its path, key or number.
        reason: Why.
    """

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class Outputs:
    """What is computed for each image.

    Attributes:
        batch_size: Images of a batch.
        normalize: Scale every vector to length 1, in maps those of the places.
        dtype: Of the result; None: the tower's own.
        tokens: Also the trunk's unpooled features.
        layers: Also the maps of these layers, as `forward_intermediates` counts them.
    """

    batch_size: int
    normalize: bool = False
    dtype: torch.dtype | None = None
    tokens: bool = False
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in self.layers):
            raise ArgumentError(f"layers={shown(self.layers)}: expected a list of whole numbers")
        if type(self.batch_size) is not int or not 1 <= self.batch_size <= _MOST_AT_ONCE:
            raise ArgumentError(
                f"batch_size={self.batch_size!r}: expected a whole number from 1 on, to {_MOST_AT_ONCE}"
            )
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ArgumentError(f"dtype={self.dtype}: expected one of {', '.join(map(str, _DTYPES))}, or None")


@dataclass(frozen=True)
class Block:
    """The results of one batch.

    Attributes:
        first: Position of its first image in the source.
        ids: Of all its images, `n`.
        good: Which of them have an embedding, as places in `ids`, ascending.
        values: Path in the head's output (`""` for a single tensor) -> `[len(good), ...]`, on the CPU.
        form: The head's output with such paths in the place of tensors; None where no image of the batch was good.
        failures: The others.
    """

    first: int
    ids: list[str]
    good: list[int]
    values: dict[str, torch.Tensor]
    form: Any
    failures: list[Failure]


class Embedder:
    """A tower, made ready for batches of images of any kind. The tower itself stays as it is.

    Args:
        tower: A TimmModel, on the device where it shall run; its mode is looked at here.
        outputs: What is computed.
    """

    def __init__(self, tower: Any, outputs: Outputs) -> None:
        self.tower, self.outputs = tower, outputs
        self.preparer = Preparer(tower.config)
        self._anchor = next(tower.parameters())
        with _switched:
            self._trains = any(part.training for part in tower.modules())

    def __call__(self, task: tuple[int, Sequence[tuple[str, Any]]]) -> Block:
        """The position of the first image and up to `batch_size` pairs (id, image) -> their block."""
        return self.run(self.prepare(task))

    def prepare(self, task: tuple[int, Sequence[tuple[str, Any]]]) -> tuple[torch.Tensor, Block]:
        """Decode and transform: the pixels `[batch_size, in_chans, H, W]`, and the block that is still without values.

        An image that cannot be decoded is one more failure.
        """
        # all of it on one thread: a copy by several wakes threads that then spin beside the decoder
        with one_thread(torch.device("cpu")):
            return self._prepare(*task)

    def _prepare(self, first: int, items: Sequence[tuple[str, Any]]) -> tuple[torch.Tensor, Block]:
        size, pixels = self.outputs.batch_size, None
        good, failures = [], []
        if len(items) > size:
            raise ArgumentError(f"{len(items)} images, but a batch has {size}")
        for place, (name, image) in enumerate(items):
            try:
                made = self.preparer(image)
            except Exception as error:  # whatever a decoder raises for a damaged file costs this file only
                failures.append(Failure(first + place, name, reason_of(error)))
                continue
            if pixels is None:
                pixels = made.new_empty((size, *made.shape))
            pixels[place] = made
            good.append(place)
        if pixels is None:
            pixels = torch.empty((size, *self.preparer.shape), device="cpu")
        pixels[[place for place in range(size) if place not in good]] = 0
        return pixels, Block(first, [name for name, _ in items], good, {}, None, failures)

    def run(self, prepared: tuple[torch.Tensor, Block]) -> Block:
        """The pixels through the tower, in eval mode and without gradients."""
        pixels, block = prepared
        if not block.good:
            return block
        device = self._anchor.device
        pixels = pixels.to(device, float_dtype(self.tower.trunk), non_blocking=True)
        cuda = [device] if device.type == "cuda" else []
        # to ask every module for each batch takes a small trunk 3% of its time
        evaluating = _evaluating(self.tower) if self._trains else nullcontext()
        with torch.no_grad(), evaluating, torch.random.fork_rng(devices=cuda), one_thread(device):
            values: dict[str, torch.Tensor] = {}
            form = flattened(self._forward(pixels), "", values)
            finished = {path: self._finished(tensor, path) for path, tensor in values.items()}
            lost = {place for path, tensor in values.items() for place in _overflowed(tensor, finished[path])}
            good = [place for place in block.good if place not in lost]
            rows = torch.tensor(good, dtype=torch.int64, device=device)
            values = {path: tensor[rows].cpu() for path, tensor in finished.items()}
        reason = f"its embedding has a number that is too large for dtype={self.outputs.dtype}"
        failures = [
            Failure(block.first + place, block.ids[place], reason) for place in block.good if place in lost
        ] + block.failures
        return Block(block.first, block.ids, good, values, form, sorted(failures, key=lambda each: each.index))

    def _forward(self, pixels: torch.Tensor) -> Any:
        tower, wanted = self.tower, self.outputs
        if not wanted.tokens and not wanted.layers:
            return tower(pixels)
        found: dict[str, Any] = {}
        if wanted.tokens:
            features = tower.forward_features(pixels)
            found |= {"embedding": tower.forward_head(features), "tokens": features}
        if wanted.layers:
            try:
                inner = tower.forward_intermediates(pixels, list(wanted.layers))
            except AssertionError as error:  # timm's, for one that there is not
                raise ArgumentError(f"layers={list(wanted.layers)}: {error}") from error
            found = {"embedding": inner["image_features"], **found, "layers": inner["image_intermediates"]}
        return found

    def _finished(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        if tensor.ndim == 0 or len(tensor) != self.outputs.batch_size:
            raise TowerError(
                f"the head gives {list(tensor.shape)} at {path or 'its output'} for {self.outputs.batch_size} images; "
                "expected one row for each"
            )
        if not tensor.is_floating_point():
            return tensor
        if self.outputs.normalize and tensor.ndim > 1:  # a number for each image is no vector
            tensor = F.normalize(tensor, dim=self._channels(tensor, path))
        return tensor if self.outputs.dtype is None else tensor.to(self.outputs.dtype)

    def _channels(self, tensor: torch.Tensor, path: str) -> int:
        """The dimension of a vector: the last, in maps `[N, C, H, W]` the second."""
        tower = self.tower
        as_it_is = path == "tokens" or (tower.config.head is None and not path.startswith("layers."))
        last = as_it_is and getattr(tower.trunk, "output_fmt", None) == "NHWC"
        return 1 if tensor.ndim == 4 and not last else -1


def _overflowed(tensor: torch.Tensor, finished: torch.Tensor) -> list[int]:
    """The rows that a smaller dtype has made infinite."""
    if finished.dtype == tensor.dtype:
        return []
    became = (tensor.isfinite() > finished.isfinite()).reshape(len(tensor), -1).any(dim=1)
    return [int(row) for row in became.nonzero()]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one thread for a while: with more of them the last bits would depend on how many there are."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flattened(value: Any, path: str, into: dict[str, torch.Tensor]) -> Any:
    """A head's output with paths in the place of its tensors, which are put into `into`."""
    if isinstance(value, torch.Tensor):
        if path in into:
            raise TowerError(f"the tower gives two tensors at {path}: a name has a dot, or a number has two spellings")
        into[path] = value
        return path
    if isinstance(value, Mapping):
        return {key: flattened(item, f"{path}.{key}" if path else str(key), into) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kept = [flattened(item, f"{path}.{place}" if path else str(place), into) for place, item in enumerate(value)]
        return kept if isinstance(value, list) else tuple(kept)
    raise TowerError(f"the tower gives a {type(value).__name__} at {path or 'the top'}, expected tensors")


def rebuilt(form: Any, values: Mapping[str, Any]) -> Any:
    """A block's `form` with values in the place of paths."""
    if isinstance(form, str):
        return values[form]
    if isinstance(form, dict):
        return {key: rebuilt(item, values) for key, item in form.items()}
    return type(form)(rebuilt(item, values) for item in form)

"""Working on a copy of somebody's head without leaving a trace."""

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from ..files.private_draws import private_draws
from ..reader.errors import GraphError, HeadError


def copy_head(head: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy of a head.

    Args:
        head: It stays as it is.
        weights: Keys of the head -> what the copy holds in place of the head's own tensors.

    Raises:
        GraphError: it cannot be copied, with the reason.
    """
    try:
        return copy_module(head, weights)
    except Exception as error:  # a user's __deepcopy__, locks, files: whatever it is, there is no copy to work on
        raise GraphError(
            f"the head cannot be copied, so it cannot be examined: {type(error).__name__}: {error}"
        ) from error


def copy_module(
    module: nn.Module, weights: Mapping[str, torch.Tensor] | None = None, device: str | None = None
) -> nn.Module:
    """A deep copy; tensors that hold a graph are copied without it, which `copy.deepcopy` alone refuses to do.

    Such are the cached weight of the old-style ``weight_norm``, what a head remembers of a training step, and attention
    biases that LeViT, TinyViT and EfficientFormer keep after a forward in eval mode.

    Args:
        module: It stays as it is.
        weights: Keys of the module -> what the copy holds in place of the module's own tensors.
        device: Where parameters and buffers of the copy are.
    """
    memo: dict[int, object] = {}
    own = module.state_dict(keep_vars=True) if weights else {}
    replaced = [(own[key], new) for key, new in (weights or {}).items() if key in own]
    if device is not None:
        replaced += [(tensor, tensor.detach().to(device)) for tensor in (*module.parameters(), *module.buffers())]
    for tensor, new in replaced:
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new.detach(), tensor.requires_grad) if is_parameter else new.detach()
    for part in module.modules():
        for tensor in _tensors_held(list(vars(part).values())):
            if not tensor.is_leaf and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _tensors_held(value: object, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_held(item, depth - 1)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a head as if nothing around it were there: no autocast, and random numbers of its own, seeded."""
    with private_draws(seed), torch.autocast("cpu", enabled=False), _plain_checkpoints():
        yield


_ISOLATED: ContextVar[bool] = ContextVar("isolated", default=False)
_LOCK = threading.Lock()
_USERS = [0]


class _PlainCheckpoint:
    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        native = _NATIVE["CheckpointFunction"]
        return function(*args) if _ISOLATED.get() else native.apply(function, preserve_rng_state, *args)


def _plain_generator(name: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if _ISOLATED.get():
            yield
        else:
            yield from _NATIVE[name](*args, **kwargs)

    return run


_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")  # by version
_NATIVE: dict[str, Any] = {
    name: getattr(checkpoint, name) for name in ("CheckpointFunction", *_GENERATORS) if hasattr(checkpoint, name)
}
_PLAIN: dict[str, Any] = {
    name: _PlainCheckpoint if name == "CheckpointFunction" else _plain_generator(name) for name in _NATIVE
}


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Run checkpointed parts once, without running them again in the backward pass; in this thread only.

    Run again they would draw other random numbers: torch sets its global generator back for them, which is not used.
    """
    with _LOCK:
        if not _USERS[0]:
            vars(checkpoint).update(_PLAIN)
        _USERS[0] += 1
    token = _ISOLATED.set(True)
    try:
        yield
    finally:
        _ISOLATED.reset(token)
        with _LOCK:
            _USERS[0] -= 1
            if not _USERS[0]:
                vars(checkpoint).update(_NATIVE)


def output_of(head: nn.Module, example: torch.Tensor, where: str) -> Any:
    """What a head gives for an example, run on a copy in eval mode, autocast off, with random numbers of its own.

    Args:
        head: Any head.
        example: `[2, C]`, `[2, N, C]` or `[2, C, H, W]`.
        where: What the example is, for the message.

    Raises:
        HeadError: the head fails on it.
    """
    anchor = next(head.parameters(), None)
    if anchor is not None:
        example = example.to(anchor.device)
    with isolated(0), torch.no_grad(), torch.autocast(example.device.type, enabled=False):
        try:
            return copy_module(head).eval()(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            raise HeadError(
                f"custom_head={type(head).__name__} fails on {where} of shape {tuple(example.shape)}: {error}"
            ) from error


def width_of(output: Any) -> int | None:
    """Width of an embedding: D of `[B, D]` and `[B, N, D]`, C of `[B, C, H, W]`, None for tuples and dicts."""
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 3, 4):
        return None
    return int(output.shape[1] if output.ndim == 4 else output.shape[-1])

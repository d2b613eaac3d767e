"""Working on a copy of somebody's head without leaving a trace."""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from ..reader.errors import GraphError
from ..reader.head import copy_module
from ..reader.skip_init import PrivateDraws


def copy_head(head: nn.Module) -> nn.Module:
    """A deep copy of `head`. Raises GraphError with the reason if it cannot be copied."""
    try:
        return copy_module(head)
    except Exception as error:  # a user's __deepcopy__, locks, files: whatever it is, there is no copy to work on
        raise GraphError(
            f"the head cannot be copied, so it cannot be examined: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a head as if nothing around it were there: no autocast, and random numbers of its own, seeded.

    torch's generators are not touched. Those of Python and numpy, which have no such thing, are put back afterwards.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        with PrivateDraws(seed), torch.autocast("cpu", enabled=False), _plain_checkpoints():
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


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

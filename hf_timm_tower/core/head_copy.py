"""Working on a copy of somebody's head without leaving a trace."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import GraphError


def copy_head(head: nn.Module) -> nn.Module:
    """A deep copy of `head`. Raises GraphError with the reason if it cannot be copied.

    Tensors that hold a graph (the cached weight of the old-style ``weight_norm``) are copied without it, which
    `copy.deepcopy` alone refuses to do.
    """
    memo: dict[int, object] = {}
    for module in head.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(head, memo)
    except Exception as error:  # a user's __deepcopy__, locks, files: whatever it is, there is no copy to work on
        raise GraphError(
            f"the head cannot be copied, so it cannot be examined: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put back torch's, Python's and (where it is loaded) numpy's random states afterwards."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)

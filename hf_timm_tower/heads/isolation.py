"""Working on a copy of somebody's head without leaving a trace."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..reader.errors import GraphError


def copy_head(head: nn.Module) -> nn.Module:
    """A deep copy of `head`. Raises GraphError with the reason if it cannot be copied.

    Tensors that hold a graph (the cached weight of the old-style ``weight_norm``) are copied without it, which
    `copy.deepcopy` alone refuses to do.
    """
    memo: dict[int, object] = {}
    for module in head.modules():
        for tensor in _tensors_held(list(vars(module).values())):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(head, memo)
    except Exception as error:  # a user's __deepcopy__, locks, files: whatever it is, there is no copy to work on
        raise GraphError(
            f"the head cannot be copied, so it cannot be examined: {type(error).__name__}: {error}"
        ) from error


def submodule(head: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; unlike `get_submodule` also where a method has the name of a module (``half``)."""
    module = head
    for key in name.split(".") if name else ():
        child = module._modules[key]
        assert child is not None
        module = child
    return module


def _tensors_held(value: object, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)) and depth:
        for item in value:
            yield from _tensors_held(item, depth - 1)
    elif isinstance(value, dict) and depth:
        for item in value.values():
            yield from _tensors_held(item, depth - 1)


def seed_cpu(seed: int) -> None:
    """Seed the generators of torch (CPU only), Python, and numpy where it is loaded."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put back the random states that `seed_cpu` changes."""
    numpy = sys.modules.get("numpy")
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

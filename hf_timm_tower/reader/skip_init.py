"""Construct a module without initialising its parameters.

timm's constructors spend most of their time in random initialisation that a checkpoint overwrites at once. Inside
`no_init()` every in-place write into an `nn.Parameter` is left out, and nothing else: buffers and tensors computed
in the constructor are real, which the meta device cannot offer (relative position indices, rotary tables, attention
biases). Memory of the parameters is reserved, not touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from .errors import ConfigError

# These reserve memory without touching it, so that they may be counted after the fact; the others write at once.
_LAZY = {torch.empty, torch.zeros}
_EAGER = {torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange, torch.linspace}
# One tensor costs Python time even if it is tiny, so that a config with a million layers ends as well.
_LEAST_CHARGE = 2**18


class _SkipInit(TorchFunctionMode):
    def __init__(self, budget: int | None) -> None:
        super().__init__()
        self.budget = budget
        self.spent = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # functions of torch.nn.init pass their target by keyword when they come through here
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter):
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
                return target
        if self.budget is None:
            return func(*args, **kwargs)
        if func in _LAZY:
            try:
                made = func(*args, **kwargs)
            except RuntimeError:
                self._charge(func(*args, **{**kwargs, "device": "meta"}))  # more than the machine has
                raise
            self._charge(made)
            return made
        if func in _EAGER:
            self._charge(func(*args, **{**kwargs, "device": "meta"}))
        return func(*args, **kwargs)

    def _charge(self, made: torch.Tensor) -> None:
        self.spent += max(made.numel() * made.element_size(), _LEAST_CHARGE)
        if self.budget is not None and self.spent > self.budget:
            raise ConfigError(
                f"the config asks for a model of more than {self.budget / 2**30:.2f} GiB, which its weight files do "
                "not hold: refused before it is built. The config does not belong to these weights."
            )


@contextmanager
def no_init(budget: int | None = None) -> Iterator[None]:
    """Leave out every in-place write into a parameter, and leave torch's random state as it was.

    Args:
        budget: Most bytes that the constructor may ask for, None for no limit.

    Raises:
        ConfigError: the budget is exceeded.
    """
    with torch.random.fork_rng(devices=[]), _SkipInit(budget):
        yield


class Budget:
    """TEMPORARY shim until the counted budget arrives."""

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes

    @classmethod
    def default(cls) -> "Budget":
        return cls(None)

    @classmethod
    def for_weights(cls, nbytes: int) -> "Budget":
        return cls(4 * nbytes + 2**30)


@contextmanager
def skip_init(budget: Budget | None = None) -> Iterator[None]:
    with no_init(None if budget is None else budget.nbytes):
        yield

"""Construct a module without initialising its parameters, and within bounds.

timm's constructors spend most of their time in random initialisation that a checkpoint overwrites at once. Inside
`skip_init()` every in-place write into an `nn.Parameter`, a view of one or its `.data` is left out, and nothing else:
buffers and tensors computed in the constructor are real, which the meta device cannot offer (relative position indices,
rotary tables, attention biases). Memory of the parameters is reserved, not touched. Whatever is drawn inside comes from
a generator of its own, so that torch's global one is neither read nor set back.

A config may come from anybody, so what it costs to build is counted while it is built: a `Budget`.
"""

import copy
import inspect
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from .errors import ConfigError


class Budget:
    """What building a model may cost, and what it cost so far. Time is bounded by these counts, not by a clock.

    The limits, and the most that one of timm 1.0.31's largest architectures needs:

    - `reserved`, 64 GiB: bytes of `torch.empty` and `torch.zeros`, which take no memory until they are written
      (vit_7b_patch16_dinov3, 25 GiB in float32).
    - `computed`, 8 GiB: bytes that are computed, copied or written for real, also those that are gone again
      (beit_large_patch16_512, 1.7 GiB).
    - `kept`, 512 MiB: those of them that are still there (swinv2_cr_giant_384, 70 MiB).
    - `tensors`, 100,000: calls of torch, a copy counted ten times for the module around it (maxvit_xlarge_tf_512,
      30,073).
    - `modules`, 10,000: modules put into another one (efficientnet_l2, 1,760).

    Where the size of the weight files is known, what is reserved and kept together is at most four times as much and
    1 GiB: there are buffers, tables and files in half precision, but not another order of size.

    Args:
        total: Most bytes reserved and kept together, None where only the limits above hold.
    """

    def __init__(self, total: int | None = None) -> None:
        self.limits = {"reserved": 2**36, "computed": 2**33, "kept": 2**29, "tensors": 100_000, "modules": 10_000}
        if total is not None:
            self.limits["bytes"] = total
        self.spent = dict.fromkeys((*self.limits, "bytes"), 0)

    @classmethod
    def default(cls) -> "Budget":
        """The absolute limits alone, for a config whose weight files nobody has seen."""
        return cls()

    @classmethod
    def for_weights(cls, nbytes: int) -> "Budget":
        """For a config whose weight files hold so many bytes."""
        budget = cls(4 * nbytes + 2**30)
        budget.limits["kept"] += nbytes  # layers that torch makes by copying one
        return budget

    def charge(self, kind: str, amount: int) -> None:
        """Count `amount` of one of `limits`, bytes together too; `ConfigError` where a limit is exceeded."""
        spent, limits = self.spent, self.limits
        spent[kind] += amount
        if spent[kind] > limits[kind]:
            raise _too_large(kind, limits[kind])
        if kind in ("reserved", "kept"):
            spent["bytes"] += amount
            if spent["bytes"] > limits.get("bytes", spent["bytes"]):
                raise _too_large("bytes", limits["bytes"])

    def charge_made(self, nbytes: int) -> None:
        """Count bytes that are computed and, for the moment, kept."""
        self.charge("computed", nbytes)
        self.charge("kept", nbytes)

    def release(self, nbytes: int) -> None:
        """Count bytes as no longer kept."""
        self.spent["kept"] -= nbytes
        self.spent["bytes"] -= nbytes


def _too_large(kind: str, limit: int) -> ConfigError:
    what = f"{limit} {kind}" if kind in ("tensors", "modules") else f"{limit / 2**30:.2f} GiB"
    return ConfigError(
        f"the config asks for a model of more than {what}"
        + (", which its weight files do not hold" if kind == "bytes" else "")
        + ": refused before it is built. The config does not belong to these weights, or is not one of timm"
    )


_ACTIVE: ContextVar[Budget | None] = ContextVar("budget", default=None)
_SIZED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_LAZY = frozenset({torch.empty, torch.zeros})
# Most of the calls that a constructor makes; the first one is `torch.no_grad`.
_MAKE_NOTHING = frozenset("_set_grad_enabled dim size numel is_floating_point".split())
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36
# Results of fewer elements than this are measured after they were made, larger ones on the meta device before.
_SMALL = 2**22
_DRAWS = frozenset(
    """
    rand randn randint randperm normal bernoulli poisson multinomial normal_ uniform_ random_ exponential_ geometric_
    cauchy_ log_normal_ bernoulli_
    """.split()
)


class _Construction(TorchFunctionMode):
    def __init__(self, budget: Budget | None, *, skip: bool) -> None:
        super().__init__()
        self.budget = budget
        self.skip = skip
        self.generators: dict[str, torch.Generator] = {}
        self.parameter_data: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAZY and "out" not in kwargs:  # what parameters are made of, most of the work of this mode
            if self.budget is not None:
                self.budget.charge("tensors", 1)
                self.budget.charge("reserved", _size_of(func, args, kwargs))
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # functions of torch.nn.init pass their target by keyword when they come through here
        target = args[0] if args else kwargs.get("tensor")
        if name in ("__get__", "__set__"):
            found = func(*args, **kwargs)
            if isinstance(found, torch.Tensor) and isinstance(target, torch.Tensor) and self._is_parameter(target):
                self.parameter_data[id(found)] = found  # kept, so that the id stays its own
            return found
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place and self.skip and isinstance(target, torch.Tensor) and self._is_parameter(target):
            return target
        draws = name in _DRAWS or name.endswith("_like") or getattr(func, "__module__", "") == "torch.nn.init"
        if draws and self.skip:  # where weights are initialised, the seed is the user's
            func, args, kwargs = self._with_generator(func, name, target, args, kwargs)
        if self.budget is None or name in _MAKE_NOTHING:
            return func(*args, **kwargs)
        self.budget.charge("tensors", 10 if name == "clone" else 1)
        return self._charged(self.budget, func, name, target if in_place else None, args, kwargs)

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        return (
            isinstance(tensor, nn.Parameter)
            or isinstance(tensor._base, nn.Parameter)
            or (id(tensor if tensor._base is None else tensor._base) in self.parameter_data)
        )

    def _charged(
        self, budget: Budget, func: Any, name: str, written: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function; what it makes is charged before it takes memory."""
        if written is not None:
            if self.skip:
                budget.charge("computed", written.nbytes)
            return func(*args, **kwargs)
        if func in _SIZED and "out" not in kwargs:
            made = _size_of(func, args, kwargs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        leaves = _leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not inputs and ("device" in kwargs or name in _FACTORIES):
            made = _size_of(func, args, kwargs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        numbers = [max(abs(leaf), 1) for leaf in leaves if type(leaf) is int]
        most = math.prod(max(tensor.numel(), 1) for tensor in inputs) * math.prod(numbers)
        if most * max(len(inputs), 1) > _SMALL:
            try:
                made = _bytes_on_meta(func, args, kwargs)
            except NotImplementedError:  # decided by values: at most as large as what it is made of, times its rank
                made = 8 * sum(tensor.nbytes for tensor in inputs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        result = func(*args, **kwargs)
        made = _fresh(result, {tensor.untyped_storage()._cdata for tensor in inputs})
        budget.charge_made(made)
        return _released(budget, result, made)

    def _with_generator(
        self, func: Any, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The same call, drawing from a generator of this block."""
        place = target.device if isinstance(target, torch.Tensor) else kwargs.get("device")
        kind = torch.device(place or torch.get_default_device()).type
        if kind == "meta" or kwargs.get("generator") is not None:
            return func, args, kwargs
        if kind not in self.generators:
            self.generators[kind] = torch.Generator(kind).manual_seed(0)
        if name in ("rand_like", "randn_like"):
            draw = torch.Tensor.uniform_ if name == "rand_like" else torch.Tensor.normal_
            generator = self.generators[kind]
            return lambda *a, **k: draw(torch.empty_like(*a, **k), generator=generator), args, kwargs
        if name not in _DRAWS and not _takes_generator(func):
            return func, args, kwargs
        return func, args, {**kwargs, "generator": self.generators[kind]}


def _released(budget: Budget, result: Any, nbytes: int) -> Any:
    """A result whose bytes are taken off what is kept as soon as it is gone; not worth it for small ones."""
    if isinstance(result, torch.Tensor) and nbytes >= _SMALL // 4:
        weakref.finalize(result, budget.release, nbytes)
    return result


_FACTORIES = frozenset("arange linspace logspace eye randint randperm tensor tril_indices triu_indices".split())


_PLAIN = frozenset({int, float, bool, str, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device})


@lru_cache(maxsize=256)
def _takes_generator(func: Any) -> bool:
    try:
        return "generator" in inspect.signature(func).parameters
    except (ValueError, TypeError):  # of a function in C
        return False


def _leaves(value: Any) -> list[Any]:
    """What is in tuples, lists and dicts, however deep, in order."""
    # At the first sight of a type `isinstance(..., Mapping)` takes milliseconds.
    if type(value) in _PLAIN or not hasattr(value, "__iter__") or not isinstance(value, (tuple, list, Mapping)):
        return [value]
    found: list[Any] = []
    for item in value.values() if isinstance(value, Mapping) else value:
        found += [item] if type(item) in _PLAIN else _leaves(item)
    return found


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in arguments or a result: one, or tuples, lists and dicts of them, however deep."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _size_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that a factory function is asked for, found without making them."""
    if func not in _SIZED:
        if getattr(func, "__name__", "") == "tensor":
            return 0  # as large as the Python values that are there already
        made = func(*args, **{**kwargs, "device": "meta", **({"generator": None} if "generator" in kwargs else {})})
        return int(made.nbytes) if isinstance(made, torch.Tensor) else 0  # `.to(...)` parses its arguments by a call
    size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return math.prod(int(each) for each in size) * int(dtype.itemsize)


def _bytes_on_meta(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that a call would make, found without making them."""
    move = MetaTwins()
    args, kwargs = move(tuple(args)), {key: move(value) for key, value in kwargs.items() if key != "device"}
    with torch.device("meta"):
        made = func(*args, **kwargs)
    return _fresh(made, {twin.untyped_storage()._cdata for twin in move.memo.values()})


class MetaTwins:
    """Values as they are, but for tensors and modules, which become twins without memory; one twin for one tensor."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.memo:
                # with the strides of an expanded tensor, so that copying it counts
                twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                self.memo[id(value)] = twin
            return self.memo[id(value)]
        if isinstance(value, nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                twin = tensor.detach().to("meta")
                self.memo[id(tensor)] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
            return copy.deepcopy(value, self.memo)
        if isinstance(value, torch.device):
            return torch.device("meta")
        if isinstance(value, (tuple, list)):
            return type(value)(*map(self, value)) if hasattr(value, "_fields") else type(value)(map(self, value))
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return None if isinstance(value, torch.Generator) else value


def _fresh(made: Any, known: set[int]) -> int:
    """Bytes of the tensors of a result that are not on the memory of an argument."""
    return sum(tensor.nbytes for tensor in tensors_in(made) if tensor.untyped_storage()._cdata not in known)


_COUNTS_MODULES = [False]


def _count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
    budget = _ACTIVE.get()
    if budget is not None:
        budget.charge("modules", 1)


@contextmanager
def _construction(budget: Budget | None, *, skip: bool) -> Iterator[None]:
    if budget is not None and not _COUNTS_MODULES[0]:
        # Once for the process and never taken away: other threads walk torch's table of these hooks.
        _COUNTS_MODULES[0] = True
        register_module_module_registration_hook(_count_module)
    token = _ACTIVE.set(budget if budget is not None else _ACTIVE.get())
    try:
        with _Construction(budget, skip=skip):
            yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def skip_init(budget: Budget | None = None) -> Iterator[None]:
    """Leave out every in-place write into a parameter; `ConfigError` where more is built than a budget allows."""
    with _construction(budget, skip=True):
        yield


@contextmanager
def within_budget(budget: Budget) -> Iterator[None]:
    """Initialise as usual, but count, as in `skip_init`; nothing where one around it counts already."""
    if _ACTIVE.get() is not None:
        yield
        return
    if not torch.empty(0).is_meta:  # what is initialised takes memory
        budget.limits["reserved"] = min(budget.limits["reserved"], _MEMORY)
    with _construction(budget, skip=False):
        yield

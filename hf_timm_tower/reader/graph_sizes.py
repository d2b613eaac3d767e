"""How large the results of a stored head's calls become, known before each call is made.

Each call of a graph may be modest and their sequence not: ``cat([y, y])`` thirty times, an outer product, one call that
splits a tensor into millions, a product of two numbers that are expanded to matrices. So at the first input of a shape
each call is made on the meta device before it is made for real, and the bytes and the work that all of them ask for are
bounded. The same call on the same shapes is not looked at again.
"""

import math
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .errors import GraphError, shown
from .graph_program import MADE_OF_NUMBERS
from .skip_init import MetaTwins, tensors_in

# What all calls of one forward may make together: 128 MiB, and 1024 times the input and 64 times the weights. Attention
# written by hand over 1,370 tokens of width 1024 and 16 heads makes 220 times its input; a margin loss over 100,000
# classes ten times the logits of its batch.
_LEAST, _PER_INPUT, _PER_WEIGHTS = 2**27, 1024, 64
# What they may compute together, in multiplications and the like: 2**36, as much for each number of the input as
# attention over 16,384 tokens, and 64 times what it takes to use every weight once at every position of the input.
_LEAST_WORK, _WORK_PER_INPUT, _WORK_PER_WEIGHT = 2**36, 2**14, 64
_MAX_TENSORS = 2**16
_MAX_KNOWN = 4096
_BY_VALUES = frozenset(
    "torch.nonzero torch.argwhere torch.masked_select torch.unique_consecutive Tensor.nonzero Tensor.argwhere "
    "Tensor.masked_select Tensor.unique Tensor.unique_consecutive Tensor.__getitem__ Tensor.__setitem__ torch.where "
    "Tensor.where torch.index_put Tensor.index_put Tensor.index_put_".split()
)
"""Values decide the size of the result, which is at most that of the largest argument times its rank."""
_DECOMPOSITIONS = frozenset(
    "_linalg_svd linalg_qr _linalg_eigh _linalg_det _linalg_slogdet linalg_inv_ex linalg_pinv _linalg_solve_ex ormqr "
    "linalg_matrix_exp linalg_lu_factor_ex linalg_cholesky_ex linalg_householder_product cholesky_inverse "
    "cholesky_solve linalg_solve_triangular".split()
)
"""Of aten, inside of norms and solvers too: work grows with the cube of a matrix's width, its bytes with the square."""
RECORDING: ContextVar[bool] = ContextVar("recording", default=False)
"""Set while a head of this process is recorded to be stored: looking at sizes would be recorded too."""


class Sizes:
    """What is known of the sizes in one head: which calls were looked at, and what they make."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[int, int, bool]] = {}

    def start(self, head: nn.Module, x: torch.Tensor) -> "_Counted | None":
        """The count of one forward; None where torch compiles or exports the head, which calls nothing for real."""
        if torch.compiler.is_compiling() or RECORDING.get() or torch._C._get_tracing_state() or x.is_meta:
            return None
        weights = sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers()))
        positions = x.numel() // max([1, *x.shape[1:]])
        work = _LEAST_WORK + _WORK_PER_INPUT * x.numel() + _WORK_PER_WEIGHT * weights * positions
        if len(self.known) > _MAX_KNOWN:
            self.known.clear()
        limit = _LEAST + _PER_INPUT * x.nbytes + _PER_WEIGHTS * weights
        return _Counted(self.known, (tuple(x.shape), x.dtype, head.training), limit, work)


class _Counted:
    """Bytes that one forward has made so far, and its work."""

    def __init__(self, known: dict[Any, Any], key: tuple[Any, ...], limit: int, most_work: int) -> None:
        self.known, self.key, self.limit, self.most_work = known, key, limit, most_work
        self.spent = self.worked = 0

    def check(self, index: int, name: str, function: Any, args: Any, kwargs: Any) -> None:
        """Count a call that is about to be made. Raises GraphError if the forward makes too much with it."""
        tensors = tensors_in((args, kwargs))
        key = (*self.key, index, *((tensor.shape, tensor.dtype) for tensor in tensors))
        made, work, lasting = self.known.get(key) or self._measure(name, function, args, kwargs, tensors)
        if lasting:
            self.known[key] = made, work, lasting
        self.spent += made
        self.worked += work
        if self.spent > self.limit:
            raise _too_much(name, self.spent, self.limit)
        if self.worked > self.most_work:
            raise GraphError(
                f"the stored head computes more than {self.most_work:.1e} products for this input (at {name}, "
                f"{self.worked:.1e} so far): it is refused before it takes the time"
            )

    def _measure(
        self, name: str, function: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]
    ) -> tuple[int, int, bool]:
        """Bytes that a call makes, its work, and whether that holds for all inputs of these shapes."""
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        if name in ("torch.bincount", "Tensor.bincount", "F.one_hot", "torch.repeat_interleave",
                    "Tensor.repeat_interleave") and (made := _by_counts(name, args, kwargs)) is not None:  # fmt: skip
            return made, 0, False
        failed: Exception | None = None
        for by_numbers in (False, True):  # a tensor of one number may say how large the result is
            count, move = _Count(self.limit), _Twins()
            first, move.keeps_numbers = move(args[:1]), by_numbers
            first = move(args[:1]) if name in MADE_OF_NUMBERS else first
            try:
                with torch.no_grad(), torch.device("meta"), count:
                    move(function)(*first, *move(args[1:]), **move(kwargs))
                return count.made, count.work, not by_numbers
            except GraphError:
                raise _too_much(name, self.spent + count.made, self.limit) from None
            except Exception as error:
                failed = failed or error
        # this call cannot be sized; a call that is wrong fails for real just after
        by_values = name in _BY_VALUES or isinstance(function, nn.Module)
        if not by_values and not isinstance(failed, NotImplementedError):
            return 0, 0, False
        rank = max((tensor.dim() for tensor in tensors), default=1)
        if by_values:
            return 8 * max(rank, 1) * largest, 0, True
        return min(8 * math.prod(max(tensor.numel(), 1) for tensor in tensors), self.limit + 1), 0, True


def _too_much(name: str, spent: int, limit: int) -> GraphError:
    return GraphError(
        f"the stored head makes more than {limit / 2**20:.0f} MiB of intermediate tensors for this input (at {name}, "
        f"{shown(spent)} bytes so far): it is refused before it takes the memory"
    )


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that calls make and their work, and ends the run where bytes or tensors are too many."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.made, self.tensors, self.work = limit, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::unbind", "aten::split") and isinstance(args[0], torch.Tensor):
            dim = args[1] if name == "aten::unbind" and len(args) > 1 else args[2] if len(args) > 2 else 0
            size = 1 if name == "aten::unbind" else max(args[1], 1) if isinstance(args[1], int) else 1
            self._add(0, args[0].shape[dim] // size)
        given = tensors_in((args, kwargs))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        memory = [tensor.untyped_storage() for tensor in made]
        fresh = [each.nbytes() for each in memory if each._cdata not in known]
        if fresh or not made:  # no view: what is expanded is written out by many kernels
            fresh += [tensor.nbytes for tensor in given if tensor.nbytes > tensor.untyped_storage().nbytes()]
            self.work += _work_of(func, args, kwargs, result, given, made)
        self._add(sum(fresh), len(made))
        return result

    def _add(self, nbytes: int, tensors: int) -> None:
        self.made += nbytes
        self.tensors += tensors
        if self.made > self.limit or self.tensors > _MAX_TENSORS:
            raise GraphError("too much")


def _work_of(
    func: Any, args: Any, kwargs: Any, result: Any, given: list[torch.Tensor], made: list[torch.Tensor]
) -> int:
    """Multiplications of a call, or as many as it has numbers to read and to write."""
    name, work = func._schema.name, max(sum(each.numel() for each in tensors) for tensors in (given, made))
    if func._overloadpacket in flop_registry:
        return max(work, int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)) // 2)
    if name.removeprefix("aten::") in _DECOMPOSITIONS:
        return work * max(max(each.shape[-2:], default=1) for each in given)
    if "dist_forward" in name or name == "aten::addbmm":  # each row with each row
        return max(work, given[-2].numel() * given[-1].shape[-2 if "cdist" in name else -1])
    if "_pool" in name and "adaptive" not in name and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return max(work, sum(each.numel() for each in made) * math.prod(args[1] * (3 if len(args[1]) == 1 else 1)))
    return work


class _Twins(MetaTwins):
    """On request tensors of one number stay what they are."""

    keeps_numbers = False

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and self.keeps_numbers and value.dim() == 0:
            return value.detach().clone().cpu()
        return super().__call__(value)


def _by_counts(name: str, args: Any, kwargs: Any) -> int | None:
    """Bytes of a result that is as large as the numbers in a tensor say; None where none says it."""
    values = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if name.endswith("repeat_interleave"):
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", values)
        if not isinstance(repeats, torch.Tensor) or repeats.is_meta:
            return None
        row = 1 if values is None or values is repeats else max(values.numel() // max(values.shape[0], 1), 1)
        return 8 * int(repeats.sum()) * max(row, 1)
    if values is None or values.is_meta or not values.numel():
        return None
    width = int(values.max()) + 1
    return 8 * width * (values.numel() if name == "F.one_hot" else 1)

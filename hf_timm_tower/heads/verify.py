"""Proof that a rebuilt head is the original: same bits in evaluation, same training, same sharing of tensors.

Outputs alone are not proof. A gradient reversal shows only in the input's gradient, a memory queue only in training, a
running statistic only in a buffer after the step. So both heads are run side by side, in evaluation on two batch sizes
and through two optimizer steps, each time from the same random state, and everything that can be seen is compared byte
for byte (NaN included).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..reader.errors import HeadError
from ..reader.graph_head import GraphHead
from ..reader.skip_init import tensors_in
from .batch_formula import same_bytes
from .isolation import copy_head, isolated

# Other sizes than those a head is traced at, so that a formula of the batch size is proven where it was not found.
_EVALUATION_BATCHES = (4, 7)
_TRAINING_BATCHES = (6, 3)
_LEARNING_RATE = 0.05


def verify_head(original: nn.Module, rebuilt: nn.Module, example: torch.Tensor) -> None:
    """Raise HeadError, naming what differs, unless `rebuilt` behaves as `original` does.

    `example` is an input of the head with a batch of any size, floating point; its values are not used. Both heads are
    copied first, and the copy of `rebuilt` is given the original's state dict, strictly: weights, buffers, modes,
    `.grad` and all random states of what was passed in stay as they were.
    """
    ours, theirs = copy_head(original), copy_head(rebuilt)
    _compare_keys(ours, theirs)
    _compare_sharing(ours, theirs)
    _compare_evaluation(ours, theirs, example, "in evaluation")
    _compare_training(ours, theirs, example)
    _compare_evaluation(ours, theirs, example, "in evaluation after two training steps")


def _compare_keys(ours: nn.Module, theirs: nn.Module) -> None:
    expected, found = ours.state_dict(), theirs.state_dict()
    if list(expected) != list(found):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        reason = f"missing {missing[:5]}, unexpected {extra[:5]}" if missing or extra else "their order differs"
        raise HeadError(f"the rebuilt head has other state-dict keys: {reason}")
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor):
            raise HeadError(f"the state dict's {key} is a {type(value).__qualname__}, not a tensor")
        other = found[key]
        if (value.shape, value.dtype) != (other.shape, other.dtype):
            raise HeadError(
                f"{key} is {other.dtype} {list(other.shape)} in the rebuilt head, {value.dtype} {list(value.shape)} in "
                "the original"
            )
    theirs.load_state_dict(expected, strict=True)


def _compare_sharing(ours: nn.Module, theirs: nn.Module) -> None:
    for what in ("parameters", "buffers"):
        expected, found = (_groups(getattr(head, f"named_{what}")(remove_duplicate=False)) for head in (ours, theirs))
        if expected != found:
            raise HeadError(
                f"{what} that are one tensor differ: {found} in the rebuilt head, {expected} in the original"
            )
    frozen = [
        {name for name, parameter in head.named_parameters() if not parameter.requires_grad} for head in (ours, theirs)
    ]
    if frozen[0] != frozen[1]:
        raise HeadError(f"frozen parameters differ: {sorted(frozen[0] ^ frozen[1])[:5]}")


def _groups(named: Iterator[tuple[str, torch.Tensor]]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _compare_evaluation(ours: nn.Module, theirs: nn.Module, example: torch.Tensor, when: str) -> None:
    ours.eval()
    theirs.eval()
    shapes = [(batch, *example.shape[1:]) for batch in _EVALUATION_BATCHES]
    for shape in shapes:
        for context, how in ((torch.no_grad, ""), (torch.enable_grad, " with gradients on")):
            with context():
                _compare_call(ours, theirs, _probe(shape, example.dtype, 100), f"{when} on a batch of {shape[0]}{how}")
        _compare_buffers(ours, theirs, f"{when} on a batch of {shape[0]}")
    with torch.no_grad():
        for shape in _shapes_if_possible(theirs, example):
            values = _probe(shape, example.dtype, 101)
            if _takes(ours, values):
                _compare_call(ours, theirs, values, f"{when} on an input of shape {list(shape)}")


def _shapes_if_possible(rebuilt: nn.Module, example: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """A batch of one, and other sizes where the rebuilt head claims to take them."""
    yield (1, *example.shape[1:])
    if isinstance(rebuilt, GraphHead):
        free = [dim for dim, size in enumerate(rebuilt.input_shape) if dim and size is None]
        if free:
            yield tuple(size + 3 if dim in free else size for dim, size in enumerate(example.shape))


def _takes(head: nn.Module, values: torch.Tensor) -> bool:
    try:
        with isolated(103):
            copy_head(head)(values.clone())
    except Exception:  # whatever the original raises, there is nothing to compare
        return False
    return True


def _compare_call(ours: nn.Module, theirs: nn.Module, values: torch.Tensor, when: str) -> None:
    expected, found = _both(ours, theirs, partial(_call, values), 103, when)
    _compare_outputs(expected, found, when)


def _call(values: torch.Tensor, head: nn.Module) -> Any:
    return head(values.clone())  # a head may write into its input


def _compare_training(ours: nn.Module, theirs: nn.Module, example: torch.Tensor) -> None:
    ours.train()
    theirs.train()
    for step, batch in enumerate(_TRAINING_BATCHES, 1):
        when = f"in training step {step}"
        seed = 200 + step

        values = _probe((batch, *example.shape[1:]), example.dtype, seed)
        (expected, ours_grad), (found, theirs_grad) = _both(ours, theirs, partial(_train_step, values), seed, when)
        _compare_outputs(expected, found, when)
        _compare_pair(ours_grad, theirs_grad, f"{when}: the input's gradient")
        parameters = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            _compare_pair(parameter.grad, parameters[name].grad, f"{when}: the gradient of {name}")
            _compare_pair(parameter, parameters[name], f"{when}: {name} after the step")
        _compare_buffers(ours, theirs, when)


def _train_step(values: torch.Tensor, head: nn.Module) -> tuple[Any, torch.Tensor | None]:
    """One step of gradient descent on a fixed random projection of the outputs; gives them and the input's gradient."""
    leaf = values.clone().requires_grad_()
    output = head(leaf.clone())  # a trunk's output is no leaf, so writing into it is allowed
    loss = torch.zeros((), dtype=torch.float64)
    for index, tensor in enumerate(tensors_in(output)):
        if tensor.requires_grad:
            generator = torch.Generator().manual_seed(300 + index)
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            weights = torch.rand(real.shape, generator=generator, dtype=torch.float64) + 0.5
            loss = loss + (real.double() * weights).sum()
    head.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.grad is not None:
                # Scaled to the parameter, so that a step moves it in any dtype and however small the gradient is.
                size = parameter.grad.abs().amax().clamp(min=1e-20) if parameter.numel() else 1.0
                parameter.sub_((_LEARNING_RATE * parameter.grad / size).to(parameter.dtype))
    return output, leaf.grad


def _both(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], Any], seed: int, when: str) -> tuple[Any, Any]:
    results = []
    for head, whose in ((ours, "original"), (theirs, "rebuilt")):
        try:
            with isolated(seed):
                results.append(run(head))
        except Exception as error:
            raise HeadError(f"the {whose} head fails {when}: {type(error).__name__}: {error}") from error
    return results[0], results[1]


def _probe(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(dtype)


def _compare_outputs(expected: Any, found: Any, when: str, where: str = "output") -> None:
    if type(expected) is not type(found) and not (
        isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
    ):
        raise HeadError(
            f"{when}: {where} is a {type(found).__qualname__}, the original gives a {type(expected).__qualname__}"
        )
    if isinstance(expected, torch.Tensor):
        _compare_pair(expected, found, f"{when}: {where}")
        if expected.requires_grad != found.requires_grad:
            raise HeadError(f"{when}: {where} carries a gradient in one of the two heads only")
    elif isinstance(expected, (tuple, list)):
        if len(expected) != len(found):
            raise HeadError(f"{when}: {where} has {len(found)} items, the original gives {len(expected)}")
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            _compare_outputs(one, other, when, f"{where}[{index}]")
    elif isinstance(expected, Mapping):
        if list(expected) != list(found):
            raise HeadError(f"{when}: {where} has keys {list(found)}, the original gives {list(expected)}")
        for key, value in expected.items():
            _compare_outputs(value, found[key], when, f"{where}[{key!r}]")
    elif expected != found and not (expected != expected and found != found):
        raise HeadError(f"{when}: {where} is {found!r}, the original gives {expected!r}")


def _compare_buffers(ours: nn.Module, theirs: nn.Module, when: str) -> None:
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if name not in buffers:
            raise HeadError(f"{when}: the rebuilt head has no buffer {name}")
        _compare_pair(buffer, buffers[name], f"{when}: the buffer {name}")


def _compare_pair(expected: torch.Tensor | None, found: torch.Tensor | None, what: str) -> None:
    if expected is None or found is None:
        if expected is not found:
            raise HeadError(f"{what} is missing in {'the original' if expected is None else 'the rebuilt head'} only")
        return
    if not same_bytes(expected, found):
        if (expected.shape, expected.dtype) != (found.shape, found.dtype):
            detail = f"{found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
        else:
            gap = (expected.detach().to(torch.complex128) - found.detach().to(torch.complex128)).abs().max()
            detail = f"largest difference {gap.item():.3g}"
        raise HeadError(f"{what} differs between the original and the rebuilt head: {detail}")

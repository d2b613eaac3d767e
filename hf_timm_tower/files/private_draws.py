"""Random numbers of one's own: what runs inside draws from generators that nobody else has.

torch's global generators are neither read nor set while a tower is probed or a head examined, so that other threads
draw what they would have drawn.
"""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def private_draws(seed: int) -> Iterator[None]:
    """Draw inside what `torch.manual_seed(seed)` would give; Python's and numpy's generators are seeded and put back.

    Args:
        seed: Of the generators, one for each device.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        with PrivateDraws(seed):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class PrivateDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, random operations of torch draw from generators of this block, also in the backward pass.

    Args:
        seed: Of the generators.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what calls of torch are made in turn is nobody's call
            return self._draw(func, args, dict(kwargs or {}))

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        without_dropout = "dropout_p" in names and not values.get("dropout_p")  # attention
        if without_dropout or values.get("generator") is not None:
            return func(*args, **kwargs)
        generator = self._generator_of(values)
        if generator is None:
            return func(*args, **kwargs)
        if "generator" in names:
            return func(*args, **{**kwargs, "generator": generator})
        packet = func.overloadpacket
        if packet.__name__ in ("rand_like", "randn_like"):
            made = torch.empty_like(args[0], **kwargs)
            draw = made.uniform_ if packet.__name__ == "rand_like" else made.normal_
            return draw(generator=generator)
        overload = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
        if overload in packet.overloads():
            return getattr(packet, overload)(*args, **{**kwargs, "generator": generator})
        return self._swapped(generator, func, args, kwargs)

    def _generator_of(self, values: Mapping[str, Any]) -> torch.Generator | None:
        device = values.get("device")
        if device is None:
            tensors = (value for value in values.values() if isinstance(value, torch.Tensor))
            device = next((tensor.device for tensor in tensors), "cpu")
        device = torch.device(device)
        if device.type == "meta":
            return None
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    @staticmethod
    def _swapped(generator: torch.Generator, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """For operations that take no generator: torch's own has our state while the one operation runs."""
        cuda = generator.device.type == "cuda"
        shared = torch.cuda.default_generators[generator.device.index or 0] if cuda else torch.default_generator
        before = shared.get_state()
        shared.set_state(generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            generator.set_state(shared.get_state())
            shared.set_state(before)

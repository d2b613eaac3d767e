"""Whether a stored graph runs at all, found out on the meta device, where nothing is computed.

The audit looks at every call by itself. That a call gets a number where it needs a tensor, or sizes that do not fit,
shows only when they follow each other: here, when the tower is loaded, and not at its first image.
"""

from typing import Any

import torch

from ..heads.to_graph import construct
from .errors import GraphError

_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


def check_runs(graph: Any) -> None:
    """Run a graph that `construct` takes once in each mode on the meta device.

    Args:
        graph: Of an untrusted config.

    Raises:
        GraphError: a call of it fails.
    """
    with torch.device("meta"):
        head = construct(graph).to("meta")
    floating = [tensor.dtype for tensor in head.parameters() if tensor.is_floating_point()]
    shape = [2 if size is None else size for size in graph["input"]["shape"]]
    for mode in (True, False):
        with torch.device("meta"), torch.no_grad():
            image = torch.empty(shape, dtype=floating[0] if floating else torch.float32)
            try:
                head.train(mode)(image)
            except NotImplementedError:
                return  # a call that needs numbers: nothing can be said
            except _ERRORS as error:
                raise GraphError(
                    f"config.head: the stored graph does not run on an input of shape {shape}: "
                    f"{type(error).__name__}: {error}. The file is damaged or was edited; save the tower again."
                ) from error

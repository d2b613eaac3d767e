"""Operators that a head's own code registers with torch, once and for all in a process.

torch takes an operator of the same name for a newer version of the first, and destroys that: who still holds it calls
into freed memory. The code of a head runs a second time where its class is in use already, when the head is saved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS

from ..reader.errors import HeadError


@contextmanager
def known_operators() -> Iterator[None]:
    """While code runs in here, `torch.library.custom_op` gives the operator that there is already, if it is the same.

    Raises:
        HeadError: out of the code that runs: there is another operator of this name.
    """
    stock: Any = torch.library.custom_op

    def custom_op(name: str, fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        def define(function: Callable[..., Any]) -> Any:
            known: Any = OPDEFS.get(name)
            if known is None:
                return stock(name, function, **options)
            if _content(known._init_fn.__code__) != _content(function.__code__):
                raise HeadError(
                    f"it registers the operator {name!r}, and there is another of this name in this process already"
                )
            return known

        return define if fn is None else define(fn)

    torch.library.custom_op = custom_op
    try:
        yield
    finally:
        torch.library.custom_op = stock


def _content(code: CodeType) -> tuple[Any, ...]:
    """What code does, wherever it stands."""
    constants = tuple(_content(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, constants

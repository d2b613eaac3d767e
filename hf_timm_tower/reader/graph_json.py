"""Small pieces of untrusted JSON: each function takes a value and where it stands, and gives it back checked."""

import base64
import binascii
import math
from collections.abc import Set
from typing import Any

import torch

from .errors import GraphError
from .graph_values import DTYPES

Json = Any

MAX_DEPTH = 16
MAX_ITEMS = 10_000
MAX_EMBEDDED_BYTES = 1 << 20


def only(value: dict[str, Json], known: Set[str], where: str) -> None:
    """Raise GraphError if `value` has keys other than `known`."""
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise GraphError(f"{where}: unknown keys {unknown[:5]}; expected some of {sorted(known)}")


def check_depth(value: Json) -> None:
    """Bound nesting without recursion, so that no depth of JSON can exhaust the stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        level = [item for item in deeper if isinstance(item, (dict, list))]
        if not level:
            return
    raise GraphError(f"the stored head is nested deeper than {MAX_DEPTH} levels")


def read_list(value: Json, where: str, most: int) -> list[Json]:
    """A list of at most `most` items."""
    if not isinstance(value, list) or len(value) > most:
        raise GraphError(f"{where}: expected a list of at most {most} items, found {short(value)}")
    return value


def read_text(value: Json, where: str) -> str:
    """A string of sane length."""
    if not isinstance(value, str) or len(value) > 2000:
        raise GraphError(f"{where}: expected a name, found {short(value)}")
    return value


def read_pair(value: Json, where: str) -> tuple[Json, Json]:
    """A list of two."""
    if not isinstance(value, list) or len(value) != 2:
        raise GraphError(f"{where}: expected a pair, found {short(value)}")
    return value[0], value[1]


def read_names(value: Json, where: str) -> tuple[str, str]:
    """A list of two strings."""
    first, second = read_pair(value, where)
    return read_text(first, where), read_text(second, where)


def read_dtype(value: Json, where: str) -> torch.dtype:
    """A dtype by its name."""
    if not isinstance(value, str) or value not in DTYPES:
        raise GraphError(f"{where}: {short(value)} is not a dtype; expected one of {sorted(DTYPES)}")
    return DTYPES[value]


def read_shape(value: Json, where: str) -> tuple[int, ...]:
    """A list of sizes."""
    sizes = read_list(value, where, 8)
    if not all(type(size) is int and 0 <= size <= 2**40 for size in sizes):
        raise GraphError(f"{where}: {short(value)} is not a shape")
    return tuple(sizes)


def short(value: Json) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_tensor(value: Json, budget: list[int], where: str) -> torch.Tensor:
    """A tensor embedded in the graph: ``{"shape", "dtype", "data"}``, data in base64 of little-endian bytes.

    ``budget`` holds the bytes that the graph may still embed and is reduced.
    """
    if not isinstance(value, dict) or set(value) != {"shape", "dtype", "data"}:
        raise GraphError(f"{where}: expected an object of shape, dtype and data")
    shape, dtype = read_shape(value["shape"], where), read_dtype(value["dtype"], where)
    nbytes = math.prod(shape) * dtype.itemsize
    budget[0] -= nbytes
    if budget[0] < 0:
        raise GraphError(f"{where}: the tensors inside a stored head exceed {MAX_EMBEDDED_BYTES} bytes")
    try:
        data = base64.b64decode(value["data"], validate=True) if isinstance(value["data"], str) else b""
    except (binascii.Error, ValueError) as error:
        raise GraphError(f"{where}: data is not base64: {error}") from None
    if len(data) != nbytes:
        raise GraphError(f"{where}: {len(data)} bytes of data, expected {nbytes} for {shape} of {dtype}")
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype is torch.bool and set(data) - {0, 1}:
        raise GraphError(f"{where}: a bool tensor holds only 0 and 1")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

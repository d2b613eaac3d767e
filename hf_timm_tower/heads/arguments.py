"""How arguments of recorded calls are written as JSON.

=====================  =====================================================================================
in the file            stands for
=====================  =====================================================================================
``null true 3 0.5``    themselves
``"x"``                the head's input
``"%3"``, ``"%3.0"``   the result of node 3, or item 0 of it
``"$fc.weight"``       a parameter or buffer
``"#0"``               a constant tensor kept in the graph
``[...]``              a list
``{"t": [...]}``       a tuple
``{"d": [[k, v]]}``    a dict, in order
``{"s": "mean"}``      a string
``{"slice": [a,b,c]}`` a slice
``{"...": true}``      an ellipsis
``{"f": "inf"}``       a float that JSON cannot write: inf, -inf, nan
``{"complex": [a,b]}`` a complex number
``{"dtype": "..."}``   a dtype; ``"input"`` is the input's own, ``"$fc.weight"`` that of a parameter
``{"device": "input"}``the input's device
``{"memory": "..."}``  a memory format
``{"n": expr}``        a number that follows the batch size (see `batch_formula`)
=====================  =====================================================================================
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..reader.errors import GraphError
from ..reader.graph_program import DTYPES, MEMORY_FORMATS

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MEMORY_NAMES = {value: name for name, value in MEMORY_FORMATS.items()}
_LEGACY_TYPES = {
    "torch.FloatTensor": "float32", "torch.DoubleTensor": "float64", "torch.HalfTensor": "float16",
    "torch.BFloat16Tensor": "bfloat16", "torch.LongTensor": "int64", "torch.IntTensor": "int32",
    "torch.ShortTensor": "int16", "torch.CharTensor": "int8", "torch.ByteTensor": "uint8", "torch.BoolTensor": "bool",
}  # fmt: skip

Encoder = Callable[[torch.Tensor], str]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype that a graph may hold; GraphError for the others (quantised, float8...)."""
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise GraphError(f"a tensor of dtype {dtype} cannot be stored in a graph")
    return name


def encode_float(value: float) -> Any:
    """A float as JSON: itself, or ``{"f": ...}`` where JSON has no word for it."""
    return float(value) if math.isfinite(value) else {"f": str(float(value))}


def encode(value: Any, tensor_ref: Encoder) -> Any:
    """Write one argument of a call as JSON; `tensor_ref` names tensors.

    Raises GraphError for a value that is not plain data (an object of a class of one's own, a function, a generator).
    """
    if isinstance(value, torch.Tensor):
        return tensor_ref(value)
    if value is None or isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), tensor_ref)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, str):
        return _encode_text(value)
    if isinstance(value, (tuple, list, range)):
        items = [encode(item, tensor_ref) for item in value]
        return {"t": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {"d": [[encode(key, tensor_ref), encode(item, tensor_ref)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part, tensor_ref) for part in (value.start, value.stop, value.step)]}
    return _encode_torch(value)


def _encode_text(value: str) -> Any:
    if value in _LEGACY_TYPES:
        return {"dtype": _LEGACY_TYPES[value]}
    if value.split(":")[0] in ("cpu", "cuda", "mps", "xpu"):
        return {"device": "input"}
    return {"s": value}


def _encode_torch(value: Any) -> Any:
    if value is Ellipsis:
        return {"...": True}
    if isinstance(value, complex):
        return {"complex": [encode_float(value.real), encode_float(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": "input"}
    if isinstance(value, torch.memory_format):
        return {"memory": _MEMORY_NAMES[value]}
    if value is torch.strided:
        return {"layout": "strided"}
    raise GraphError(f"an argument of type {type(value).__module__}.{type(value).__qualname__} is not data")


def encode_output(value: Any, tensor_ref: Encoder) -> Any:
    """Write what the head returns; only tensors in exact tuples, lists and dicts (and plain constants) are data."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, torch.nn.Parameter):
            raise GraphError(f"the head returns a tensor of class {kind.__qualname__}, which is not data")
        return tensor_ref(value)
    if kind is tuple:
        return {"t": [encode_output(item, tensor_ref) for item in value]}
    if kind is list:
        return [encode_output(item, tensor_ref) for item in value]
    if kind is dict or kind is OrderedDict:
        pairs = [[encode(key, tensor_ref), encode_output(item, tensor_ref)] for key, item in value.items()]
        return {"d": pairs} if kind is dict else {"ordered": pairs}
    if value is None or kind in (bool, int, float, str):
        return encode(value, tensor_ref)
    raise GraphError(
        f"the head returns an object of class {kind.__module__}.{kind.__qualname__}; only tensors, tuples, lists and "
        "dicts come back as data"
    )

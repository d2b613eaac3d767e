"""What a recorder must know of the operations in the table: their names, and what they do beside their result."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributions.dirichlet import _Dirichlet

from ..reader.graph_ops import OP_NAMES, TENSOR_PROPERTIES

RANDOM_NAMES = frozenset(
    """
    torch.alpha_dropout torch.bernoulli torch.dropout torch.dropout_ torch.feature_alpha_dropout torch.feature_dropout
    torch.multinomial torch.normal torch.poisson torch.rand torch.rand_like torch.randint torch.randint_like torch.randn
    torch.randn_like torch.randperm torch.rrelu torch._standard_gamma torch.binomial
    torch._sample_dirichlet torch.draw_dirichlet torch.gru torch.lstm torch.rnn_relu torch.rnn_tanh
    Tensor.bernoulli Tensor.bernoulli_ Tensor.cauchy_ Tensor.exponential_ Tensor.geometric_ Tensor.log_normal_
    Tensor.multinomial Tensor.normal_ Tensor.random_ Tensor.uniform_
    F.alpha_dropout F.dropout F.dropout1d F.dropout2d F.dropout3d F.feature_alpha_dropout F.gumbel_softmax
    F.multi_head_attention_forward F.rrelu F.scaled_dot_product_attention
    """.split()
)
"""Operations whose result is not fixed by their arguments: they draw numbers."""


def _function_key(function: Any) -> Any:
    """What identifies a function that torch hands to a function mode; getters and setters by their property."""
    if getattr(function, "__name__", None) == "__get__":
        return ("get", id(function.__self__))
    if getattr(function, "__name__", None) == "__set__":
        return ("set", id(function.__self__))
    return function


def _names() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for prefix, space, name in OP_NAMES:
        names.setdefault(_function_key(getattr(space, name)), f"{prefix}.{name}")
    for name in TENSOR_PROPERTIES:
        names[("get", id(getattr(torch.Tensor, name)))] = f"Tensor.{name}"
    for empty, zeros in ((torch.empty, "torch.zeros"), (torch.empty_like, "torch.zeros_like")):
        names[empty] = zeros
    names[torch.Tensor.new_empty] = "Tensor.new_zeros"
    names[("set", id(torch.Tensor.data))] = "Tensor.set_data_"
    return names


_NAMES = _names()


def name_of(function: Any) -> str | None:
    """The table's name for a function as torch's function protocol reports it, or None if it is not in the table."""
    try:
        return _NAMES.get(_function_key(function))
    except TypeError:  # unhashable callables are never ours
        return None


TORCH_FUNCTIONS: dict[type, str] = {_Dirichlet: "torch.draw_dirichlet"}
"""Autograd functions of torch itself that stand in the table."""

METADATA = frozenset(
    """
    shape size dim ndim ndimension dtype device is_cuda is_cpu is_floating_point is_complex is_contiguous stride numel
    nelement __len__ requires_grad is_leaf layout is_sparse is_quantized is_meta is_mps is_xpu storage_offset
    element_size itemsize nbytes get_device is_nested is_inference is_conj is_neg is_signed is_same_size __hash__
    __repr__ __format__ __str__ names has_names is_distributed _is_view is_sparse_csr is_mkldnn
    """.split()
)
"""Questions about a tensor that its values do not decide: answered natively while tracing, never recorded."""

VALUE_READERS = frozenset(
    """
    __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ __nonzero__ __long__ item tolist numpy
    is_nonzero equal allclose __dlpack__ __array_interface__
    """.split()
)
"""Calls that turn tensor values into Python values; data only where the tensor is the same in every run."""


def plain_name(function: Any) -> str:
    """The bare name of a torch function or property getter, for messages and the sets above."""
    name = str(getattr(function, "__name__", function))
    if name in {"__get__", "__set__", "__delete__"}:
        owner = function.__self__
        bare = getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", "property")
        return str(bare) if name == "__get__" else f"{bare}.{name}"
    return name


def is_random(op: str) -> bool:
    """Whether the operation's result is not fixed by its arguments."""
    return op in RANDOM_NAMES


_WRITES_STATISTICS = frozenset(
    "F.batch_norm torch.batch_norm F.instance_norm torch.instance_norm F.embedding F.embedding_bag".split()
)


def writes_in_place(op: str, keywords: Iterable[str] = ()) -> bool:
    """Whether the operation may change an argument: ``add_``, ``__iadd__``, ``__setitem__``, ``out=``, ``inplace=``."""
    name = op.split(".", 1)[1]
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_") or not {"out", "inplace"}.isdisjoint(keywords)


def has_effect(op: str, keywords: Iterable[str] = ()) -> bool:
    """Whether the operation matters even if nobody uses its result: it draws numbers, writes, or keeps statistics."""
    return is_random(op) or op in _WRITES_STATISTICS or writes_in_place(op, keywords)

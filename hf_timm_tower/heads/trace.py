"""Run a head once and record every tensor operation it performs.

The head runs natively, on real tensors, under a `TorchFunctionMode`: Python sees real sizes, so loops, branches on
shapes, `int`, `len`, helper objects and libraries on top of tensor methods need no support here. Recorded is the flat
list of calls with their arguments. Numbers that depend on the batch size show when runs of several batch sizes are
laid side by side (`batch_formula`). Calls that read tensor values into Python are refused, and so is what the function
protocol does not show: a tensor that comes from nowhere is a constant, and must be the same in every run.
"""

import linecache
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..reader.errors import GraphError
from ..reader.graph_head import submodule
from ..reader.graph_ops import OPS
from ..reader.graph_sizes import RECORDING
from ..reader.skip_init import tensors_in
from .arguments import encode, encode_output
from .layers import read_layer
from .operations import (
    METADATA,
    TORCH_FUNCTIONS,
    VALUE_READERS,
    is_random,
    name_of,
    plain_name,
    writes_in_place,
)

Json = Any
_MAX_CALLS = 20_000
_ZEROS = frozenset({"torch.zeros", "torch.zeros_like", "Tensor.new_zeros"})
_FROM_DATA = frozenset({"torch.tensor", "torch.as_tensor", "torch.asarray"})
_FOR_WARNINGS_ONLY = frozenset({"_stacklevel"})


@dataclass
class Trace:
    """One run: the calls in order, the output, and the constant tensors met on the way."""

    nodes: list[dict[str, Json]] = field(default_factory=list)
    output: Json = None
    constants: list[torch.Tensor] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    """For each node, the line of the user's code that made the call: for messages only."""


class _Recorder(TorchFunctionMode):
    """Collects a `Trace`. Values are known by identity; every tensor is kept alive, so that identities stay unique."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], example: torch.Tensor, originals: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self._originals = {id(tensor): name for name, tensor in originals.items()}
        self.trace = Trace()
        self.refusal: GraphError | None = None
        self.suspended = 0
        self.autocast: list[list[Json]] = []
        self._refs: dict[int, str] = {id(example): "x"}
        self._alive: list[torch.Tensor] = [example, *tensors.values()]
        self._varying = {_storage(example)} | {_storage(tensor) for tensor in tensors.values()}
        for name, tensor in tensors.items():
            self._refs.setdefault(id(tensor), f"${name}")

    def refuse(self, reason: str) -> GraphError:
        """The error to raise; kept, so that a `try` in the user's code cannot hide it."""
        error = GraphError(f"{reason} ({_user_line()})")
        self.refusal = self.refusal or error
        return error

    def ref(self, tensor: torch.Tensor) -> str:
        """The name of a tensor; one that no recorded call made becomes a constant."""
        known = self._refs.get(id(tensor))
        if known is None:
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise GraphError(f"a tensor of class {type(tensor).__qualname__} is not data")
            if id(tensor) in self._originals:
                raise GraphError(
                    f"the forward reaches {self._originals[id(tensor)]} through a closure or a global, so that copies "
                    "of the head would share it; reach it through self"
                )
            known = f"#{len(self.trace.constants)}"
            self.trace.constants.append(tensor.detach().clone())
            self._refs[id(tensor)] = known
            self._alive.append(tensor)
        return known

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        op = name_of(func)
        if op is None or (op == "Tensor.type" and len(args) == 1 and not kwargs):
            return self._unlisted(func, args, kwargs)
        if op in _FROM_DATA and args and type(args[0]).__module__ == "numpy":
            return func(*args, **kwargs)  # a constant, if anybody uses it and it is the same in every run
        return self._run_op(op, OPS[op] if op in _ZEROS else func, args, kwargs)

    def _run_op(self, op: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation of the table natively and record it."""
        try:
            node = {"op": op, **self._arguments(args, kwargs)}
        except GraphError as error:
            raise self.refuse(f"{op}: {error}") from None
        known = tensors_in((args, kwargs))
        varying = is_random(op) or any(_storage(tensor) in self._varying for tensor in known)
        in_place = writes_in_place(op, kwargs)
        self.suspended += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.suspended -= 1
        if varying and in_place:
            self._varying.update(_storage(tensor) for tensor in known)
        return self._record(node, result, known, varying, alias=not in_place)

    def _unlisted(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = plain_name(func)
        if name in METADATA or name in ("_set_grad_enabled", "type"):
            return func(*args, **kwargs)
        if name == "_assert" and args and not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)  # about sizes, which the head knows
        if name in VALUE_READERS:
            if not any(_storage(tensor) in self._varying for tensor in tensors_in((args, kwargs))):
                return func(*args, **kwargs)  # made of constants alone: the same in every run
            raise self.refuse(
                f"{name} takes the value of a tensor into Python, so what the head does depends on values"
            )
        owner = getattr(func, "__module__", None) or "torch"
        if owner == "torch._ops.profiler":
            return func(*args, **kwargs)
        raise self.refuse(f"{owner}.{name} is not among the operations that can be stored")

    def call_layer(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer natively and record it as one call."""
        try:
            node = {"call": name, **self._arguments(args, kwargs)}
        except GraphError as error:
            raise self.refuse(f"layer {name}: {error}") from None
        self.suspended += 1
        try:
            result = forward(*args, **kwargs)
        finally:
            self.suspended -= 1
        return self._record(node, result, tensors_in((args, kwargs)), True, alias=True)

    def call_function(
        self, cls: type, native: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """An autograd function: known ones are recorded, others are refused."""
        op = TORCH_FUNCTIONS.get(cls)
        if op is None:
            raise self.refuse(
                f"{cls.__qualname__} is an autograd function of its own: its backward is code, which a graph would lose"
            )
        return self._run_op(op, native, args, kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Json]:
        written: dict[str, Json] = {"in": [encode(arg, self.ref) for arg in args]}
        if kwargs:
            written["kw"] = {
                key: encode(value, self.ref) for key, value in kwargs.items() if key not in _FOR_WARNINGS_ONLY
            }
        if not torch.is_grad_enabled():
            written["no_grad"] = True
        if self.autocast:
            written["autocast"] = [list(entry) for entry in self.autocast]
        return written

    def _record(
        self, node: dict[str, Json], result: Any, inputs: list[torch.Tensor], varying: bool, *, alias: bool
    ) -> Any:
        index = len(self.trace.nodes)
        if index >= _MAX_CALLS:
            raise self.refuse(f"the forward makes more than {_MAX_CALLS} calls")
        self.trace.nodes.append(node)
        self.trace.where.append(_user_line())
        taken = {id(tensor) for tensor in inputs}
        return self._name_results(result, f"%{index}", taken, varying, alias)

    def _name_results(self, result: Any, ref: str, taken: set[int], varying: bool, alias: bool) -> Any:
        if isinstance(result, torch.Tensor):
            if id(result) in taken:
                if not alias:
                    return result  # written in place: the object keeps its first name
                # A cast or dropout that had nothing to do gives its input back. It must still be told from the input,
                # for in another dtype or mode it has something to do.
                with torch._C.DisableTorchFunction():
                    result = torch.ops.aten.alias.default(result)
            self._alive.append(result)
            self._refs[id(result)] = ref
            if varying:
                self._varying.add(_storage(result))
            return result
        if isinstance(result, (tuple, list)):
            items = [self._name_results(item, f"{ref}.{i}", taken, varying, alias) for i, item in enumerate(result)]
            if all(new is old for new, old in zip(items, result, strict=True)):
                return result
            return tuple(items) if type(result) is tuple else items
        if result is None or isinstance(result, (bool, int, float, str)):
            return result
        raise self.refuse(f"a call gives an object of class {type(result).__qualname__}, which is not data")


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError) as error:
            raise GraphError(f"a tensor without memory of its own (vmap, sparse...) is not data: {error}") from None


def _user_line() -> str:
    """The innermost line of code that is neither torch's nor ours."""
    frame = sys._getframe(1)
    torch_root = torch.__path__[0]
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((torch_root, "<")):
            line = linecache.getline(name, frame.f_lineno).strip()
            where = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11 on
            return f"{where}, line {frame.f_lineno}: {line}" if line else where
        frame = frame.f_back
    return "in torch itself"


def run_and_record(
    head: nn.Module, example: torch.Tensor, layers: Iterable[str], originals: dict[str, torch.Tensor]
) -> Trace:
    """Record one forward of `head` (which is changed by it: give a copy) on `example`.

    `layers` are the names that `callable_layers` gives. `originals` are the tensors of the head that was copied; a
    forward that still reaches them is refused. Raises GraphError with the reason and the user's line where the forward
    cannot be data; other errors are the head's own.
    """
    tensors = named_tensors(head)
    recorder = _Recorder(tensors, example, originals)
    for name in layers:
        _divert(submodule(head, name), name, recorder)
    with _watched(recorder), torch.enable_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the head warns of is not news to its author
        recorder.autocast.clear()
        recording = RECORDING.set(True)
        try:
            with recorder:
                output = head(example)
        except Exception:
            if recorder.refusal is not None:
                raise recorder.refusal from None
            raise
        finally:
            RECORDING.reset(recording)
    if recorder.refusal is not None:
        raise recorder.refusal
    trace = recorder.trace
    for name, tensor in named_tensors(head).items():
        if tensors.get(name) is not tensor:
            if name not in tensors or isinstance(tensor, nn.Parameter) or isinstance(tensors[name], nn.Parameter):
                raise GraphError(f"the forward replaces or adds the tensor {name}; only buffers may be reassigned")
            trace.nodes.append({"write": name, "in": [recorder.ref(tensor)]})
            trace.where.append(f"buffer {name} reassigned")
    trace.output = encode_output(output, recorder.ref)
    return trace


def named_tensors(head: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by state-dict style names, every name of a shared one included, in module order."""
    return {
        **dict(head.named_parameters(remove_duplicate=False)),
        **dict(head.named_buffers(remove_duplicate=False)),
    }


def _divert(module: nn.Module, name: str, recorder: _Recorder) -> None:
    """Make a layer report its call instead of being traced through."""
    native = module.forward
    own = [
        (part, key, tensor)
        for part in module.modules()
        for key, tensor in {**part._parameters, **part._buffers}.items()
    ]

    settings = _settings(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if recorder.suspended:
            return native(*args, **kwargs)
        untouched = all({**part._parameters, **part._buffers}.get(key) is tensor for part, key, tensor in own)
        # A forward that lends a layer other weights, or changes its arguments, is traced through it.
        if not untouched or _settings(module) != settings:
            return native(*args, **kwargs)
        return recorder.call_layer(name, native, args, kwargs)

    module.forward = forward


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if name != "training" and isinstance(value, (bool, int, float, str, tuple, type(None)))
    ]


def callable_layers(head: nn.Module) -> dict[str, nn.Module]:
    """The submodules that a graph calls as a whole: layers of the table, and plain Sequentials of nothing else."""
    found: dict[str, nn.Module] = {}
    verdicts: dict[nn.Module, bool] = {}

    def is_whole(module: nn.Module) -> bool:
        if module not in verdicts:
            if type(module) is nn.Sequential:
                bare = not any(getattr(module, hook) for hook in ("_forward_hooks", "_forward_pre_hooks"))
                bare = bare and "forward" not in vars(module) and not module._parameters and not module._buffers
                verdicts[module] = bare and all(is_whole(child) for child in module)
            else:
                verdicts[module] = read_layer(module) is not None
        return verdicts[module]

    for name, module in head.named_modules():
        if name and is_whole(module):
            found[name] = module
    return found


@contextmanager
def _watched(recorder: _Recorder) -> Iterator[None]:
    """While recording: refuse autograd functions of one's own, note autocast regions, see through compiled functions.

    Replaces three methods of torch for the time of one run, so heads are examined one at a time.
    """

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        bound: Any = native_apply.__get__(None, cls)
        if recorder.suspended:
            return bound(*args, **kwargs)
        return recorder.call_function(cls, bound, args, kwargs)

    def enter(self: Any) -> Any:
        result = native_enter(self)
        if not recorder.suspended:
            device = "input" if self.device == "cpu" else self.device
            dtype = str(self.fast_dtype).removeprefix("torch.") if self._enabled else None
            recorder.autocast.append([device, bool(self._enabled), dtype])
        return result

    def leave(self: Any, *args: Any) -> Any:
        if not recorder.suspended and recorder.autocast:
            recorder.autocast.pop()
        return native_leave(self, *args)

    def run_script(self: Any, *args: Any, **kwargs: Any) -> Any:
        python = getattr(self, "_torchdynamo_inline", None)  # the function that was scripted
        if recorder.suspended or python is None:
            return native_script(self, *args, **kwargs)
        return python(*args, **kwargs)

    native_apply: Any = torch.autograd.Function.__dict__["apply"]
    native_enter: Any = torch.autocast.__enter__
    native_leave: Any = torch.autocast.__exit__
    native_script: Any = torch.jit.ScriptFunction.__call__
    checks = torch.distributions.Distribution._validate_args
    torch.autograd.Function.apply = classmethod(apply)
    torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
    torch.jit.ScriptFunction.__call__ = run_script  # type: ignore[method-assign]
    # Argument checks of distributions look at values; without them the numbers are the same.
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.autograd.Function.apply = native_apply
        torch.autocast.__enter__, torch.autocast.__exit__ = native_enter, native_leave  # type: ignore[method-assign]
        torch.jit.ScriptFunction.__call__ = native_script  # type: ignore[method-assign]
        torch.distributions.Distribution.set_default_validate_args(checks)

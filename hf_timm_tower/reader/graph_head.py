"""Phase three of reading a stored head: build the module of an audited graph, and run it.

`GraphHead` is an ordinary module: its layers are real `torch.nn` and `timm.layers` layers under their old names, so
state dicts, `.to()`, freezing, optimizers and adapters see what they saw in the original. Its forward is an interpreter
over the audited nodes; no text is ever turned into code.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
import torch.nn as nn

from .errors import ConfigError, GraphError, HeadError, shown
from .graph_layers import build_layer
from .graph_ops import OPS
from .graph_program import DTYPES, Late, Node, evaluate
from .graph_schema import CONTAINERS, Graph, ModuleSpec, parse_graph
from .graph_sizes import Sizes
from .skip_init import Budget, within_budget

# A call of a layer runs all that is in it. The longest of the heads in this package's tests runs 102 modules and calls.
MAX_STEPS = 50_000


class HeadPart(nn.Module):
    """A module of the user's own, reduced to what it holds: parameters, buffers, children."""


class GraphHead(nn.Module):
    """A head rebuilt from a graph. `forward` takes a tensor of the recorded shape, any batch, and returns what the
    original returned. Raises HeadError for an input of another shape.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.__graph = graph
        self.__constants = list(graph.constants)
        self.__sizes = Sizes()
        if graph.ties or graph.layouts:
            self.register_load_state_dict_post_hook(_settle_after_load)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> Any:
        """Input [B, ...] of the recorded shape; the output is the original head's, nested containers included."""
        self.__check_input(x)
        program = self.__graph.programs[self.training]
        run = _Run(self, x, self.__constants, self.__sizes)
        for (no_grad, autocast), nodes in groupby(program.nodes, key=lambda node: (node.no_grad, node.autocast)):
            with ExitStack() as stack:
                if no_grad:
                    stack.enter_context(torch.no_grad())
                for device, enabled, dtype in autocast:
                    kind = x.device.type if device == "input" else device
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=DTYPES[dtype] if dtype else None))
                for node in nodes:
                    run.step(node)
        return run.resolve(program.output)

    def __check_input(self, x: torch.Tensor) -> None:
        shape = self.__graph.shape
        fits = x.dim() == len(shape) and all(
            size is None or size == found for size, found in zip(shape, x.shape, strict=True)
        )
        if not fits:
            expected = ["B" if i == 0 else "any" if size is None else str(size) for i, size in enumerate(shape)]
            raise HeadError(
                f"this head was stored for inputs of shape [{', '.join(expected)}], found {list(x.shape)}; "
                "use the tower's own image size and pool"
            )

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """The shape of the inputs that the head takes; None where any size will do."""
        return self.__graph.shape

    def settle(self) -> None:
        """Share again what the original shared, and lay out again in memory what it laid out in another order.

        Loading with ``assign=True`` puts separate, contiguous tensors in place. `load_state_dict` ends with this call;
        who puts tensors in by other means makes it afterwards.
        """
        for alias, first in self.__graph.ties:
            _replace(self, alias, _tensor_of(self, first))
        for name, order in self.__graph.layouts:
            tensor = _tensor_of(self, name)
            back = [order.index(dim) for dim in range(len(order))]
            tensor.data = tensor.data.permute(order).contiguous().permute(back)

    def train(self, mode: bool = True) -> "GraphHead":
        """Switch modes; modules that the original kept in one mode (frozen BatchNorm) stay in it."""
        super().train(mode)
        for name, in_train, in_eval in self.__graph.held:
            submodule(self, name).training = in_train if mode else in_eval
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GraphHead":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for index, constant in enumerate(self.__constants):
            # Only the device is taken from `fn`: constants keep dtype and values, whatever `.half()` or `.to_empty()`
            # do to weights, just as a tensor that the original held outside its buffers would.
            device = fn(torch.empty(0, device=constant.device)).device
            if device.type != "meta":
                self.__constants[index] = constant.to(device)
        return self


def _settle_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, GraphHead):
        module.settle()


class _Run:
    """One forward: the results so far."""

    def __init__(self, head: nn.Module, x: torch.Tensor, constants: list[torch.Tensor], sizes: Sizes) -> None:
        self.head, self.x, self.batch, self.constants = head, x, x.shape[0], constants
        self.results: list[Any] = []
        self.counted = sizes.start(head, x)

    def step(self, node: Node) -> None:
        """Make one call, once it is known that its result is of a bearable size."""
        args = [self.resolve(value) for value in node.args]
        kwargs = {key: self.resolve(value) for key, value in node.kwargs}
        if node.kind == "write":
            owner, key = _owner(self.head, node.target)
            owner._buffers[key] = args[0]
            self.results.append(None)
            return
        function = OPS[node.target] if node.kind == "op" else submodule(self.head, node.target)
        if self.counted is not None:
            self.counted.check(len(self.results), node.target, function, args, kwargs)
        try:
            self.results.append(function(*args, **kwargs))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise GraphError(
                f"the stored head cannot make its call {shown(node.target)}: {shown(str(error), 200)}. The file is "
                "damaged or was edited; save the tower again"
            ) from error

    def resolve(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)([self.resolve(item) for item in value])
        if not isinstance(value, Late):
            return value
        kind, of = value.kind, value.of
        if kind == "input":
            return self.x
        if kind == "node":
            result = self.results[of[0]]
            for step in of[1]:
                result = result[step]
            return result
        if kind == "tensor":
            return _tensor_of(self.head, of)
        if kind == "constant":
            return self.constants[of]
        if kind == "formula":
            return evaluate(of, self.batch)
        if kind in ("device", "dtype"):
            return getattr(self.resolve(of), kind)
        if kind == "slice":
            return slice(*[self.resolve(part) for part in of])
        pairs = [(key, self.resolve(item)) for key, item in of]
        return dict(pairs) if kind == "d" else OrderedDict(pairs)


def _owner(head: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return submodule(head, parent), key


def _tensor_of(head: nn.Module, name: str) -> Any:
    owner, key = _owner(head, name)
    for table in (owner._parameters, owner._buffers):
        if (found := table.get(key)) is not None:
            return found
    return getattr(owner, key)  # declared by the graph; somebody parametrized it since


def submodule(head: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; unlike `get_submodule` also where a method has the name of a module (``half``)."""
    module: Any = head
    for key in name.split(".") if name else ():
        module = module._modules[key]
    return module  # type: ignore[no-any-return]


def construct(graph: Any, *, budget: Budget | None = None) -> nn.Module:
    """Build the head of an untrusted graph: parse, audit, construct; nothing of it is ever run as code.

    The result has the original's state-dict keys, shapes and dtypes; its weights are arbitrary until they are loaded.
    It is made on the ambient default device; embedded tensors are on the CPU and follow ``.to()``. `GraphError` for
    anything that a save would not have written, or more than the budget allows, where no `skip_init` around it counts.
    """
    parsed = parse_graph(graph)
    try:
        with within_budget(budget or Budget.default()):
            return _assemble(parsed)
    except ConfigError as error:
        raise GraphError(f"the stored head is refused: {error}") from error


def _assemble(graph: Graph) -> nn.Module:
    built: dict[str, nn.Module] = {}
    for spec in graph.modules:
        module = built[spec.of] if spec.kind == "same" else _construct(graph, spec)
        built[spec.name] = module
        if spec.name:
            parent, _, key = spec.name.rpartition(".")
            built[parent]._modules[key] = module
    root = built[""]
    _finish(graph, root)
    _check_steps(graph, root)
    return root


def _check_steps(graph: Graph, root: nn.Module) -> None:
    """Bound what one forward runs: calls of operations, and the modules inside the layers that are called."""
    weights: dict[str, int] = {}
    for mode, program in graph.programs.items():
        steps = 0
        for node in program.nodes:
            if node.kind == "call" and node.target not in weights:
                weights[node.target] = sum(1 for _ in submodule(root, node.target).modules())
            steps += weights[node.target] if node.kind == "call" else 1
        if steps > MAX_STEPS:
            where = "training" if mode else "evaluation"
            raise GraphError(f"the stored head runs {steps} calls and modules in {where}, more than {MAX_STEPS}")


def _construct(graph: Graph, spec: ModuleSpec) -> nn.Module:
    if spec.kind == "layer":
        return build_layer(spec.of, spec.args)
    if spec.kind == "container":
        return CONTAINERS[spec.of]()
    module = GraphHead(graph) if spec.name == "" else HeadPart()
    try:
        made = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in (*spec.params, *spec.buffers)}
    except RuntimeError as error:
        raise GraphError(f"module {shown(spec.name)}: its tensors cannot be made: {error}") from None
    for name, _, dtype in spec.params:
        grad = dtype.is_floating_point or dtype.is_complex
        module._parameters[name] = nn.Parameter(made.pop(name), requires_grad=grad)
    module._buffers.update(made)
    for name, value in spec.values:
        module._buffers[name] = value.clone()
        module._non_persistent_buffers_set.add(name)
    return module


def _finish(graph: Graph, root: nn.Module) -> None:
    """Dtypes, ties, frozen parameters and held modes, by names that must exist."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(root.named_buffers(remove_duplicate=False))}
    dtypes = dict(graph.dtypes)
    _all_known(dtypes, tensors, "dtypes")
    declared = {f"{spec.name}.{item[0]}".lstrip(".") for spec in graph.modules for item in spec.params + spec.buffers}
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if tensor.dtype != dtype and name not in declared:
            _replace(root, name, tensor.detach().to(dtype))
    for name, order in graph.layouts:
        _all_known([name], tensors, "layouts")
        if tensors[name].dim() != len(order):
            raise GraphError(f"layouts: {shown(name)} has {tensors[name].dim()} dimensions, not {len(order)}")
    if (graph.ties or graph.layouts) and not isinstance(root, GraphHead):
        raise GraphError("ties and layouts need a head with a forward of its own")
    for alias, first in graph.ties:
        _all_known([alias, first], tensors, "ties")
        if tensors[alias].shape != tensors[first].shape or (alias in parameters) != (first in parameters):
            raise GraphError(f"ties: {shown(alias)} and {shown(first)} are not alike")
    if isinstance(root, GraphHead):
        root.settle()
    parameters = dict(root.named_parameters(remove_duplicate=False))
    _all_known(graph.frozen, parameters, "frozen")
    for name in graph.frozen:
        parameters[name].requires_grad_(False)
    modules = dict(root.named_modules(remove_duplicate=False))
    _all_known([name for name, _, _ in graph.held], modules, "held")
    buffers = dict(root.named_buffers(remove_duplicate=False))
    for program in graph.programs.values():
        _all_known(program.tensors, tensors, "a call of the forward")
        _all_known([node.target for node in program.nodes if node.kind == "write"], buffers, "a write of the forward")


def _all_known(names: Any, known: dict[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            raise GraphError(f"{where}: the head has no {shown(name)}")


def _replace(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put another tensor under a name that exists; recurrent layers notice only an ordinary assignment."""
    owner, key = _owner(root, name)
    if key in owner._parameters:
        old = owner._parameters[key]
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=bool(old is not None and old.requires_grad))
        if isinstance(owner, nn.RNNBase):
            setattr(owner, key, value)  # a name that torch itself gave the parameter
        else:
            owner._parameters[key] = value
    else:
        owner._buffers[key] = value

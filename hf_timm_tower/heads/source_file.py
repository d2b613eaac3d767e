"""Heads that are stored as code: the file of their class in the repository, run only where it is trusted.

The last resort for heads whose forward is not a fixed function of tensors. As transformers' `custom_object_save` does,
the file that defines the class is stored as it is, byte for byte: nothing is gathered from elsewhere, and no value that
a name has in memory is written. It must stand alone, and the class must be made with JSON: the arguments that
`@register_head` kept, or attributes of the same names. That this gives the same head is proven before it is stored.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import linecache
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import OPDEFS

from ..reader.errors import HeadError, shown
from ..reader.head import check_code_spec, head_of_class
from ..reader.skip_init import Budget, skip_init
from .isolation import isolated
from .registry import STORED_MODULE, known_arguments
from .verify import verify_head

CODE_FILE = "head_code.py"
PACKAGES = frozenset(
    "torch torchvision timm numpy scipy einops PIL safetensors huggingface_hub transformers hf_timm_tower".split()
)
"""What the file of a head may import beside Python's own modules: what is there, or named, wherever towers are read."""

_MADE_WITH = "_hf_timm_tower_code_arguments"
_SOURCE = "__source_of_head__"
_MOST_SOURCE = 2**20
_MISSING = object()
_RUNNING = threading.RLock()


def store_source(
    head: nn.Module, example: torch.Tensor, *, in_features: int, embed_dim: int | None
) -> tuple[dict[str, Any], str]:
    """The file of a head's class and the arguments that make this head from it, verified.

    Args:
        head: On the CPU; it stays as it is.
        example: Its input `[2, ...]`, float.
        in_features: Channels of what the pool leaves: the first argument, where no attribute says otherwise.
        embed_dim: Width of the embedding: the second one likewise; None where there is none.

    Returns:
        JSON for `config.head`, and the text of the file `head_code.py`.

    Raises:
        HeadError: the file does not stand alone, or the arguments do not give this head again.
    """
    cls = type(head)
    source = _source_of(cls)
    known = known_arguments(head)
    arguments = vars(head).get(_MADE_WITH) if known is None else known
    kwargs = _arguments_of(cls, head, (in_features, embed_dim)) if arguments is None else _as_json(dict(arguments))
    if kwargs is _MISSING:
        raise HeadError(f"{cls.__name__} was made with arguments that are not JSON")
    spec = {"form": "code", "file": CODE_FILE, "class": cls.__name__, "sha256": _digest(source), **_state(head)}
    spec["kwargs"] = kwargs
    budget = Budget.for_weights(sum(tensor.nbytes for tensor in head.state_dict().values()))
    with isolated(0), skip_init(budget):
        rebuilt = construct_code(spec, source, where=f"the file of {cls.__name__} as it would be stored")
    try:
        verify_head(_PlainOutputs(head), _PlainOutputs(rebuilt), example)
    except HeadError as error:
        raise HeadError(f"{_call(cls, kwargs)} gives another head: {error}. {_REMEDY}") from error
    return spec, source


_REMEDY = (
    "Put @register_head('a-name') on the class, or keep each argument of its constructor (numbers, texts, lists) in an "
    "attribute of the same name, and change nothing afterwards"
)


def construct_code(spec: Mapping[str, Any], source: str, *, where: str) -> nn.Module:
    """Run the code of a head and make the head; its weights are still to come. Call it for trusted code only.

    Args:
        spec: `config.head`.
        source: The text of its file.
        where: The file, for tracebacks and messages.

    Raises:
        HeadError: the spec is none, the source is not the one it was saved with, or the code fails.
    """
    check_code_spec(spec)
    if _digest(source) != spec["sha256"]:
        raise HeadError(
            f"{where}: not the code that this tower was saved with (its SHA-256 is {_digest(source)}, config.json "
            f"says {spec['sha256']}). Take both files from one commit"
        )
    module = _run(source, where)
    cls = getattr(module, spec["class"], None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise HeadError(f"{where}: defines no nn.Module of the name {shown(spec['class'])}")
    try:
        head = head_of_class(cls, spec)
    except Exception as error:  # a constructor may raise anything
        raise HeadError(f"{where}: {_call(cls, spec['kwargs'])} fails: {_at(error, str(module.__file__))}") from error
    object.__setattr__(head, _MADE_WITH, dict(spec["kwargs"]))
    return head


# --- the file


def _source_of(cls: type) -> str:
    """The text of the file that defines a class. Raises HeadError if there is none that stands alone."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    module = sys.modules.get(cls.__module__)
    if "." in cls.__qualname__:
        raise HeadError(f"{where} is defined inside a function or class. Move it to the top level of a .py file")
    if cls.__module__.partition(".")[0] in PACKAGES - {"hf_timm_tower"}:
        raise HeadError(
            f"{where} is a class of a library: what makes the head is how its parts were put together, and that has no "
            "source. Put the parts into a class of your own"
        )
    if module is not None and cls.__module__.startswith(STORED_MODULE):
        return str(vars(module)[_SOURCE])  # it came from such a file: the same again, byte for byte
    file = getattr(module, "__file__", None)
    if module is None or not file or cls.__module__ == "__main__":
        raise HeadError(
            f"{where} has no file of its own to store (a script, a notebook or a console): write the class into a .py "
            "file and import it from there"
        )
    if getattr(module, cls.__name__, None) is not cls:
        raise HeadError(f"{where} is no longer what the name {cls.__name__} means in its file: it was replaced")
    try:
        data = Path(file).read_bytes()
        source = data.decode("utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise HeadError(f"the file of {where} cannot be read as Python source: {error}") from error
    for node in ast.walk(tree):
        _check_import(node, Path(file).name)
    return source


def _check_import(node: ast.AST, file: str) -> None:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = ["." * node.level + (node.module or "")]
    for name in names:
        root = name.partition(".")[0]
        if name.startswith(".") or (root not in PACKAGES and root not in sys.stdlib_module_names):
            raise HeadError(
                f"{file}, line {getattr(node, 'lineno', '?')}, imports {name}, which need not be there where the tower "
                "is loaded. One file is stored, with the class in it: it may import Python's own modules and "
                f"{', '.join(sorted(PACKAGES))}. Put what the head needs into that file"
            )


def _arguments_of(cls: type[nn.Module], head: nn.Module, likely: tuple[int | None, ...]) -> Any:
    """Keyword arguments of a constructor, from attributes of the same names; defaults stay as they are."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except (ValueError, TypeError) as error:
        raise HeadError(f"the constructor of {cls.__name__} cannot be read: {error}") from error
    kwargs: dict[str, Any] = {}
    for place, parameter in enumerate(parameters):
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        value = _as_json(vars(head).get(parameter.name, _MISSING))
        if value is _MISSING and parameter.default is inspect.Parameter.empty and place < len(likely):
            value = _MISSING if likely[place] is None else likely[place]
        if value is not _MISSING:
            kwargs[parameter.name] = value
        elif parameter.default is inspect.Parameter.empty:
            raise HeadError(f"the argument {parameter.name!r} of {cls.__name__} is kept nowhere. {_REMEDY}")
    return kwargs


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back, `_MISSING` where it is not JSON."""
    if not isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        return _MISSING
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return _MISSING


def _state(head: nn.Module) -> dict[str, Any]:
    """What was done to a head after its constructor and can be done again: its dtype, its frozen parameters."""
    dtypes = {tensor.dtype for tensor in (*head.parameters(), *head.buffers()) if tensor.is_floating_point()}
    state: dict[str, Any] = {}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        state["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    state["frozen"] = sorted(name for name, parameter in head.named_parameters() if not parameter.requires_grad)
    return state


def _call(cls: type, kwargs: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{cls.__name__}({text if len(text) <= 200 else text[:197] + '...'})"


# --- running it


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _run(source: str, where: str) -> ModuleType:
    """The module of a source; one source is run once in a process, as an import is."""
    if len(source) > _MOST_SOURCE:
        raise HeadError(f"{where}: {len(source)} characters of code, more than {_MOST_SOURCE}")
    name = STORED_MODULE + _digest(source)[:32]
    with _RUNNING:
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = where
        vars(module)[_SOURCE] = source
        # Known before it runs, as in an import: dataclasses look their module up, torch.jit.script its source.
        sys.modules[name] = module
        linecache.cache[where] = (len(source), None, [f"{line}\n" for line in source.split("\n")], where)
        try:
            with _operators_stay():
                exec(compile(source, where, "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            missing = f". It needs the package {error.name!r}" if isinstance(error, ModuleNotFoundError) else ""
            raise HeadError(f"{where}: the head's code fails: {_at(error, where)}{missing}") from error
        return module


@contextlib.contextmanager
def _operators_stay() -> Iterator[None]:
    """`torch.library.custom_op` gives the operator that there is already, if it is the same.

    torch takes an operator of the same name for a newer version of the first, and destroys that: who still holds it
    calls into freed memory. The code of a head runs a second time where its class is in use, when the head is saved.
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


def _at(error: BaseException, where: str) -> str:
    """What an error says, and the last line of the file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == where]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


# --- comparing


class _PlainOutputs(nn.Module):
    """A head whose outputs of its own classes are taken apart: the rebuilt head's classes are others by identity."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, values: torch.Tensor) -> Any:
        return _plain(self.head(values))


def _plain(value: Any) -> Any:
    kind = type(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": kind.__qualname__, **{item.name: _plain(getattr(value, item.name)) for item in fields(value)}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": kind.__qualname__, **{name: _plain(getattr(value, name)) for name in value._fields}}
    if kind in (tuple, list):
        return kind(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {"class": kind.__qualname__, "items": {key: _plain(item) for key, item in value.items()}}
    if kind.__module__.startswith(STORED_MODULE) or (hasattr(value, "__dict__") and not callable(value)):
        if not isinstance(value, torch.Tensor):
            return {"class": kind.__qualname__, **{name: _plain(item) for name, item in vars(value).items()}}
    return value

"""Heads that are stored as code: one Python file in the repository, run only where it is trusted.

The last resort for heads whose forward is not a fixed function of tensors. `describe_code` gathers the source of the
head's class (`head_source`), finds constructor arguments under which that source gives the same head, and proves it.
`construct_code` runs such a file; only a caller who was told to trust it may call that.
"""

import hashlib
import inspect
import itertools
import json
import linecache
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..reader.errors import HeadError
from ..reader.skip_init import no_init
from .head_operators import known_operators
from .head_source import gather_source
from .head_statements import is_installed
from .isolation import keep_random_state
from .verify import verify_head

CODE_FILE = "head_code.py"

_MODULE_PREFIX = "_hf_timm_tower_head_"
_MADE_WITH = "_hf_timm_tower_code_arguments"
_SOURCE = "__source_of_head__"
_MOST_SOURCE = 2**22
# Sets of arguments that are tried, and those of them whose weights fit that are run.
_MOST_TRIED, _MOST_RUN = 400, 6
_MISSING = object()
_RUNNING = threading.RLock()


def describe_code(
    head: nn.Module,
    example: torch.Tensor,
    *,
    in_features: int,
    embed_dim: int | None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """The source of a head's class and the arguments that make this head from it, verified.

    Args:
        head: On the CPU; it stays as it is.
        example: Its input `[2, ...]`, float.
        in_features: Channels of what the pool leaves, a likely first argument.
        embed_dim: Width of the embedding, a likely second argument; None where there is none.
        arguments: Keyword arguments that the head is known to have been made with.

    Returns:
        JSON for `config.head`, and the text of the file `head_code.py`.

    Raises:
        HeadError: there is no source, it leads to what cannot be stored, or no arguments give this head again.
    """
    with keep_random_state():
        return _describe(head, example, [in_features, embed_dim], arguments)


def _describe(
    head: nn.Module, example: torch.Tensor, likely: Sequence[int | None], arguments: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    cls = type(head)
    module = sys.modules.get(cls.__module__)
    if module is not None and cls.__module__.startswith(_MODULE_PREFIX):
        source = vars(module)[_SOURCE]  # it came from such a file: the same again, byte for byte
    else:
        source = _header(cls) + gather_source(cls)
    made = _run(source, f"the source of {cls.__name__} as it would be stored")
    rebuilt_class = getattr(made, cls.__name__)
    spec = {
        "form": "code",
        "file": CODE_FILE,
        "class": cls.__name__,
        "sha256": _digest(source),
        **_state(head),
    }
    known = arguments if arguments is not None else vars(head).get(_MADE_WITH)
    budget = 4 * sum(tensor.numel() * tensor.element_size() for tensor in head.state_dict().values()) + 2**30
    tried, reasons = 0, []
    for kwargs in _candidates(rebuilt_class, head, likely, example.shape[1:], known):
        tried += 1
        try:
            with no_init(budget=budget):
                rebuilt = _make(rebuilt_class, {**spec, "kwargs": kwargs})
        except Exception as error:  # whatever the class raises for arguments that are not its own
            reasons.append(f"{_call(cls, kwargs)} raises {type(error).__name__}: {error}")
            continue
        if not _fits(head, rebuilt):
            reasons.append(f"{_call(cls, kwargs)} gives other weights")
            continue
        _check_parts(rebuilt)
        try:
            verify_head(_PlainOutputs(head), _PlainOutputs(rebuilt), example)
        except HeadError as error:
            reasons.insert(0, f"{_call(cls, kwargs)} fits, but {error}")  # the nearest reason first
            if sum("fits, but" in reason for reason in reasons) >= _MOST_RUN:
                break
            continue
        return {**spec, "kwargs": kwargs}, source
    raise HeadError(
        f"of {tried} sets of arguments that {cls.__name__} may have been made with, none gives this head again: "
        f"{'; '.join(reasons[:3]) or 'its constructor takes arguments that are not JSON'}. Keep each argument of the "
        "constructor (numbers, texts, lists) in an attribute of the same name, and change nothing afterwards"
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
    _check_spec(spec)
    if _digest(source) != spec["sha256"]:
        raise HeadError(
            f"{where}: not the code that this tower was saved with (its SHA-256 is {_digest(source)}, config.json "
            f"says {spec['sha256']}). Take both files from one commit"
        )
    module = _run(source, where)
    cls = getattr(module, spec["class"], None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise HeadError(f"{where}: defines no nn.Module of the name {spec['class']!r}")
    try:
        return _make(cls, spec)
    except Exception as error:  # a stranger's constructor may raise anything
        raise HeadError(f"{where}: {_call(cls, spec['kwargs'])} fails: {_at(error, str(module.__file__))}") from error


# Running


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _run(source: str, where: str) -> ModuleType:
    """The module of a source; one source is run once in a process, as an import is."""
    with _RUNNING:
        return _run_alone(source, where)


def _run_alone(source: str, where: str) -> ModuleType:
    if len(source) > _MOST_SOURCE:
        raise HeadError(f"{where}: {len(source)} characters of code, more than {_MOST_SOURCE}")
    name = _MODULE_PREFIX + _digest(source)[:32]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = where
    vars(module)[_SOURCE] = source
    # Known before it runs, as in an import: dataclasses look their module up, torch.jit.script its source.
    sys.modules[name] = module
    linecache.cache[where] = (len(source), None, [f"{line}\n" for line in source.split("\n")], where)
    try:
        with known_operators():
            exec(compile(source, where, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        missing = f". It needs the package {error.name!r}" if isinstance(error, ModuleNotFoundError) else ""
        raise HeadError(f"{where}: the head's code fails: {_at(error, where)}{missing}") from error
    return module


def _at(error: BaseException, where: str) -> str:
    """What an error says, and the last line of the file that it passed."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == where:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line is not None else "")


def _make(cls: type[nn.Module], spec: Mapping[str, Any]) -> nn.Module:
    head = cls(**spec["kwargs"])
    object.__setattr__(head, _MADE_WITH, dict(spec["kwargs"]))
    if "dtype" in spec:
        head.to(getattr(torch, spec["dtype"]))
    if "frozen" in spec:
        frozen = set(map(str, spec["frozen"]))
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return head


def _check_spec(spec: Mapping[str, Any]) -> None:
    kwargs, dtype = spec.get("kwargs"), spec.get("dtype", "float32")
    fits = (
        spec.get("file") == CODE_FILE
        and isinstance(spec.get("class"), str)
        and spec["class"].isidentifier()
        and isinstance(spec.get("sha256"), str)
        and isinstance(kwargs, dict)
        and isinstance(spec.get("frozen", []), list)
        and dtype in ("float16", "bfloat16", "float32", "float64")
    )
    if not fits:
        raise HeadError(f"config.head: a head of code has file {CODE_FILE!r}, class, kwargs and sha256")


def _state(head: nn.Module) -> dict[str, Any]:
    """What was done to a head after its constructor and can be done again: its dtype, its frozen parameters."""
    dtypes = {tensor.dtype for tensor in (*head.parameters(), *head.buffers()) if tensor.is_floating_point()}
    state: dict[str, Any] = {}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        state["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    state["frozen"] = sorted(name for name, parameter in head.named_parameters() if not parameter.requires_grad)
    return state


def _header(cls: type) -> str:
    return (
        f"# The head {cls.__name__}, gathered from {cls.__module__} when its tower was saved by hf_timm_tower.\n"
        "# Loading the tower runs this file under trust_remote_code=True, and not otherwise.\n\n"
    )


# Finding the arguments


def _candidates(
    cls: type[nn.Module],
    head: nn.Module,
    likely: Sequence[int | None],
    shape: Sequence[int],
    known: Mapping[str, Any] | None,
) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the head may have been made with, likely ones first."""
    if known is not None:
        if (plain := _as_json(dict(known))) is not _MISSING:
            yield plain
    try:
        signature = inspect.signature(cls)
    except (ValueError, TypeError) as error:
        raise HeadError(f"the constructor of {cls.__name__} cannot be read: {error}") from error
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if any(parameter.kind is inspect.Parameter.POSITIONAL_ONLY for parameter in parameters):
        raise HeadError(f"the constructor of {cls.__name__} takes positional-only arguments, which cannot be stored")
    weights = sorted({size for tensor in head.state_dict().values() for size in tensor.shape}, reverse=True)
    sizes = [*shape, *([math.prod(shape[1:])] if len(shape) == 3 else []), *weights]
    options = [
        _options(parameter, head, likely[place] if place < len(likely) else None, sizes)
        for place, parameter in enumerate(parameters)
    ]
    seen = [] if known is None else [dict(known)]
    for values in itertools.islice(_nearest_first(options), _MOST_TRIED):
        kwargs = {
            parameter.name: value
            for parameter, value in zip(parameters, values, strict=True)
            if value is not parameter.default and not _same(value, parameter.default)
        }
        if kwargs not in seen:
            seen.append(kwargs)
            yield kwargs


def _options(parameter: inspect.Parameter, head: nn.Module, likely: int | None, sizes: Sequence[int]) -> list[Any]:
    options: list[Any] = []
    for name in (parameter.name, f"_{parameter.name}"):
        if (value := _as_json(vars(head).get(name, _MISSING))) is not _MISSING:
            options.append(value)
    default = parameter.default
    has_default = default is not inspect.Parameter.empty
    if likely is not None and (not has_default or type(default) is int):
        options.append(likely)
    if has_default:
        options.append(default)
    if not has_default or type(default) is int:
        options += sizes  # a width that is kept nowhere still shows in the weights
    return [option for place, option in enumerate(options) if not any(_same(option, old) for old in options[:place])]


def _nearest_first(options: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """All combinations, those of early options before those of late ones."""
    most = sum(len(choices) - 1 for choices in options)
    for distance in range(most + 1):
        yield from _at_distance(options, distance)


def _at_distance(options: Sequence[Sequence[Any]], distance: int) -> Iterator[tuple[Any, ...]]:
    if not options:
        if distance == 0:
            yield ()
        return
    first, *rest = options
    for place in range(min(distance, len(first) - 1) + 1):
        for others in _at_distance(rest, distance - place):
            yield (first[place], *others)


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back, `_MISSING` where it is not JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return _MISSING
    if not isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        return _MISSING
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return _MISSING


def _same(one: Any, other: Any) -> bool:
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    return type(one) is type(other) and isinstance(one, plain) and bool(one == other)


def _fits(head: nn.Module, rebuilt: nn.Module) -> bool:
    ours, theirs = head.state_dict(), rebuilt.state_dict()
    return list(ours) == list(theirs) and all(
        isinstance(theirs[key], torch.Tensor) and (value.shape, value.dtype) == (theirs[key].shape, theirs[key].dtype)
        for key, value in ours.items()
    )


def _check_parts(rebuilt: nn.Module) -> None:
    """Files of the user's that code loads by name are there now, and will not be where the tower is loaded."""
    for name, part in rebuilt.named_modules():
        home = type(part).__module__
        if not home.startswith(_MODULE_PREFIX) and not is_installed(home):
            raise HeadError(
                f"its part {name or 'itself'} is a {home}.{type(part).__qualname__}, a file of your own that its code "
                "loads by name: import the class at the top level of the head's file, which can be followed"
            )


def _call(cls: type, kwargs: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{cls.__name__}({text if len(text) <= 200 else text[:197] + '...'})"


# Comparing


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
    if kind.__module__.startswith(_MODULE_PREFIX) or (hasattr(value, "__dict__") and not callable(value)):
        if not isinstance(value, torch.Tensor):
            return {"class": kind.__qualname__, **{name: _plain(item) for name, item in vars(value).items()}}
    return value

"""Heads: the built-in pools and projections, the registry, and which form a custom head is stored in.

A custom head is stored in the first form that works, is verified, and otherwise refused with the reason against
each form: as data (`heads/to_graph.py`), by a registered name.
"""

import copy
import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn as nn
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp

from ..files.open_folder import require_plain_name
from ..heads.to_graph import construct, describe
from ..heads.verify import verify_head
from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, FormatError, HeadError, shown
from .skip_init import no_init

HeadFactory = Callable[..., nn.Module]
CustomHead = nn.Module | HeadFactory | str
F = TypeVar("F", bound=HeadFactory)

# `config.head["form"]` of heads that are not stored: one that lives in memory only, until saving finds a form for it,
# and one that a subclass of the tower makes itself.
LIVE = "live"
SUBCLASS = "subclass"
# The source of the head's class lies beside the weights (`heads/head_code.py`).
CODE = "code"

_REGISTRY: dict[str, HeadFactory] = {}
_STAMP = "_hf_timm_tower_registered"


def builtin_head(config: TimmTowerConfig) -> nn.Sequential:
    """The head that pool and proj name; weight keys are open_clip's (`pool.*`, `proj.weight`, `mlp.fc1.weight`).

    Args:
        config: with `num_features` (the trunk's width), and `feat_size` where the pool is `abs_attn`.

    Returns:
        `[B, num_features]` -> `[B, embed_dim]`; tokens and channels-last maps keep their other dimensions.

    Raises:
        ConfigError: `embed_dim` is missing where it does not follow.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    attention = config.pool in ("abs_attn", "rot_attn")
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; build a tower from it first")
    width, embed_dim = config.num_features, config.embed_dim or 0
    if not embed_dim and (attention or config.proj in ("linear", "mlp")):
        raise ConfigError(
            f"embed_dim=None: pool={config.pool!r} with proj={config.proj!r} needs a width of the embedding"
        )
    if config.pool == "abs_attn":
        layers["pool"] = AttentionPool2d(width, feat_size=_pair(config.feat_size), out_features=embed_dim)
        width = embed_dim
    elif config.pool == "rot_attn":
        layers["pool"] = RotAttentionPool2d(width, out_features=embed_dim)
        width = embed_dim
    if config.proj == "linear":
        layers["drop"] = nn.Dropout(config.drop)
        layers["proj"] = nn.Linear(width, embed_dim, bias=config.proj_bias)
    elif config.proj == "mlp":
        hidden = 2 * embed_dim
        layers["mlp"] = Mlp(width, hidden, embed_dim, drop=(config.drop, 0), bias=(True, config.proj_bias))
    return nn.Sequential(layers)


def _pair(size: Any) -> tuple[int, int]:
    if size is None:
        raise ConfigError("feat_size=None: pool='abs_attn' needs the height and width of the feature map")
    return size[0], size[1]


def register_head(name: str) -> Callable[[F], F]:
    """Class decorator: heads of this class are stored by name where they cannot be stored as data.

    The class (or a function that returns a module) is called with the keyword arguments it was made with, which
    must be JSON. At load the same name must be registered: import the module that does it.

    Args:
        name: Unique in the process; letters, digits, `_`, `-`, `.` and `/`.

    Raises:
        ArgumentError: the name is malformed or taken by another class.
    """
    if not isinstance(name, str) or not name or not all(char.isalnum() or char in "_-./" for char in name):
        raise ArgumentError(f"register_head({name!r}): expected a name of letters, digits, '_', '-', '.' and '/'")

    def register(factory: F) -> F:
        taken = _REGISTRY.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ArgumentError(
                f"register_head({name!r}): the name belongs to {taken.__module__}.{taken.__qualname__}, "
                f"it cannot be given to {factory.__module__}.{factory.__qualname__} too"
            )
        made = _stamp_class(name, factory) if isinstance(factory, type) else _stamp_function(name, factory)
        _REGISTRY[name] = made
        return made  # type: ignore[return-value]

    return register


def _stamp_class(name: str, cls: type[nn.Module]) -> type[nn.Module]:
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if type(self) is cls:  # a subclass is another head
            object.__setattr__(self, _STAMP, (name, _bind(plain_init, (self, *args), kwargs, skip=1)))

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _stamp_function(name: str, function: HeadFactory) -> HeadFactory:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        module = function(*args, **kwargs)
        object.__setattr__(module, _STAMP, (name, _bind(function, args, kwargs, skip=0)))
        return module

    return make


def _bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], skip: int) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    parameters = list(bound.signature.parameters.values())
    values: dict[str, Any] = {}
    for parameter in parameters[skip:]:
        if parameter.name not in bound.arguments:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            values["*" + parameter.name] = value  # cannot be passed by keyword: refused when saved
        else:
            values[parameter.name] = value
    return values


def registered_factory(name: str) -> HeadFactory:
    """The class or function registered under a name.

    Raises:
        HeadError: nothing is; says what to do.
    """
    factory = _REGISTRY.get(name)
    if factory is None:
        known = ", ".join(sorted(_REGISTRY)) or "none"
        raise HeadError(
            f"no head is registered as {name!r} in this process (registered: {known}). Import the module that holds "
            f"the class under @register_head({name!r}) first, or pass custom_head=... to from_pretrained."
        )
    return factory


def make_custom_head(custom_head: CustomHead, in_features: int, embed_dim: int | None) -> nn.Module:
    """A head given as a module, class, callable or registered name -> a module.

    Args:
        custom_head: A module is taken as it is; anything else is called with `(in_features, embed_dim)`.
        in_features: Channels of what the pool leaves.
        embed_dim: As the user gave it.

    Raises:
        HeadError: the call fails or does not give a module.
        ArgumentError: not something a head can be made of.
    """
    if isinstance(custom_head, nn.Module):
        return custom_head
    factory = registered_factory(custom_head) if isinstance(custom_head, str) else custom_head
    if not callable(factory):
        raise ArgumentError(
            f"custom_head={custom_head!r}: expected an nn.Module, a class or callable taking "
            "(in_features, embed_dim), or the name of a registered head"
        )
    name = custom_head if isinstance(custom_head, str) else getattr(factory, "__name__", repr(factory))
    try:
        head = factory(in_features, embed_dim)
    except TypeError as error:
        raise HeadError(
            f"custom_head={name} was called with (in_features={in_features}, embed_dim={embed_dim}) and failed: {error}"
        ) from error
    if not isinstance(head, nn.Module):
        raise HeadError(f"custom_head={name} gave a {type(head).__name__}, expected an nn.Module")
    return head


def output_of(head: nn.Module, example: torch.Tensor, where: str) -> Any:
    """What a head gives for an example, run on a copy in eval mode, the random state untouched.

    Args:
        head: Any head.
        example: `[2, C]`, `[2, N, C]` or `[2, C, H, W]`.
        where: What the example is, for the message.

    Raises:
        HeadError: the head fails on it.
    """
    anchor = next(head.parameters(), None)
    if anchor is not None:
        example = example.to(anchor.device)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return copy.deepcopy(head).eval()(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            raise HeadError(
                f"custom_head={type(head).__name__} fails on {where} of shape {tuple(example.shape)}: {error}"
            ) from error


def width_of(output: Any) -> int | None:
    """Width of an embedding: D of `[B, D]` and `[B, N, D]`, C of `[B, C, H, W]`, None for tuples and dicts."""
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 3, 4):
        return None
    return int(output.shape[1] if output.ndim == 4 else output.shape[-1])


def store_head(head: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """The form in which a custom head comes back, verified.

    Args:
        head: The head, on the CPU; its weights, modes and the random state stay as they are.
        example: The head's input `[2, ...]`, float.

    Returns:
        JSON for `config.head`: `{"form": "graph" | "registered", ...}`.

    Raises:
        HeadError: no form works, with the reason against each and the remedies.
    """
    reasons = []
    try:
        graph = json.loads(json.dumps(describe(head, example)))
        with no_init():
            rebuilt = construct(graph)
        _copy_weights(head, rebuilt)
        verify_head(head, rebuilt, example)
    except HeadError as error:
        reasons.append(f"as data: {error}")
    else:
        return {"form": "graph", "graph": graph}
    try:
        spec = _registered_spec(head)
        with no_init():
            rebuilt = rebuild_head(spec)
        _copy_weights(head, rebuilt)
        verify_head(head, rebuilt, example)
    except HeadError as error:
        reasons.append(f"by registered name: {error}")
    else:
        return spec
    reasons.append("as code in the repository: only with include_code=True, and loading then needs trust")
    raise HeadError(
        f"the head {type(head).__name__} cannot be stored so that it comes back. Nothing was written.\n"
        + "\n".join(f"  - {reason}" for reason in reasons)
        + "\nRemedies: put @register_head('a-name') on its class and make it with JSON arguments; or rewrite its "
        "forward with torch functions only, without branches on values; or replace it before saving."
    )


def known_arguments(head: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments that a registered head was made with, None for others."""
    stamp = getattr(head, _STAMP, None)
    return None if stamp is None else dict(stamp[1])


def _registered_spec(head: nn.Module) -> dict[str, Any]:
    stamp = getattr(head, _STAMP, None)
    if stamp is None:
        raise HeadError(f"{type(head).__name__} is not registered (no @register_head on its class)")
    name, kwargs = stamp
    try:
        plain = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise HeadError(f"the arguments of {name!r} are not JSON: {error}") from error
    if any(key.startswith("*") for key in plain):
        raise HeadError(f"{name!r} was made with positional-only or *args arguments, which have no names to store")
    return {"form": "registered", "name": name, "kwargs": plain}


def check_stored(spec: Any, tower_class: str | None) -> None:
    """Refuse a `head` entry of a file that no save writes.

    Args:
        spec: `config.head`.
        tower_class: `config.tower_class`.

    Raises:
        HeadError: names the form.
    """
    if spec is None:
        return
    form = spec.get("form")
    if form not in ("graph", "registered", CODE, SUBCLASS) or (form == SUBCLASS and tower_class is None):
        raise HeadError(
            f"config.head: form {form!r} is not one of a saved tower (graph, registered, code, or subclass with "
            "tower_class)"
        )


def code_file(config: dict[str, Any]) -> str | None:
    """Name of the source file of a head that is stored as code, None for every other head.

    Raises:
        FormatError: it is not the plain name of a Python file.
    """
    head = config.get("head")
    if not isinstance(head, dict) or head.get("form") != CODE:
        return None
    name = head.get("file")
    if not isinstance(name, str) or not name.endswith(".py"):
        raise FormatError(f"config.head.file={name!r}: expected the name of a Python file")
    require_plain_name(name, "config.head.file")
    return name


def rebuild_head(spec: dict[str, Any]) -> nn.Module:
    """`config.head` -> a head whose weights are still to come. The spec may be a stranger's: no code of it runs.

    Raises:
        HeadError: an unknown form, a graph that the audit refuses, a name that is not registered.
    """
    form = spec.get("form")
    if form == "graph":
        return construct(spec.get("graph"))
    if form == "registered":
        name, kwargs = spec.get("name"), spec.get("kwargs", {})
        if not isinstance(name, str) or not isinstance(kwargs, dict):
            raise HeadError("config.head: a registered head has a 'name' and 'kwargs'")
        try:
            head: nn.Module = registered_factory(name)(**kwargs)
        except TypeError as error:
            raise HeadError(f"the head registered as {name!r} does not take {kwargs}: {error}") from error
        return head
    if form == CODE:
        raise HeadError("the head is stored as code, which runs only under trust_remote_code=True")
    raise HeadError(f"config.head: unknown form {form!r}; this version reads 'graph', 'registered' and 'code'")


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    missing, unexpected = [], []
    theirs, ours = source.state_dict(), target.state_dict()
    missing, unexpected = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unexpected:
        raise HeadError(f"rebuilt with other weight names: lacks {unexpected[:4]}, has {missing[:4]}")
    try:
        target.load_state_dict({key: value.detach().clone() for key, value in theirs.items()})
    except RuntimeError as error:
        raise HeadError(f"rebuilt with other weight shapes: {error}") from error


def refuse_code(spec: dict[str, Any], *, repo: str, revision: str | None) -> HeadError:
    """The error for a head of code that nobody said to trust."""
    file = code_file({"head": spec}) or ""
    at = f" at revision {shown(revision)[1:-1]}" if revision else ""
    again = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    return HeadError(
        f"the head of {repo}{at} is the class {shown(spec.get('class'))}, stored as code in {file}. Code of a repository "
        f"is not run unless you say so, and nothing was run. Read {file}{at} first; then either\n"
        f"  - from_pretrained({again}, trust_remote_code=True) runs it, or\n"
        f"  - from_pretrained({again}, custom_head=...) takes a head of your own, checked against the weights"
    )


def make_code_head(spec: dict[str, Any], place: str, **download: Any) -> nn.Module:
    """STUB: a head that is stored as code, which runs here: to be called where it is trusted."""
    from pathlib import Path

    from transformers.utils.hub import cached_file

    from ..heads.head_code import construct_code
    file = code_file({"head": spec}) or ""
    path = Path(cached_file(place, file, **download) or file)
    return construct_code(spec, path.read_text(encoding="utf-8"), where=str(path))

"""Custom heads that a user brings: registered names, and making a head from what was given."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..reader.errors import ArgumentError, HeadError, shown
from ..reader.head import rebuild_head

HeadFactory = Callable[..., nn.Module]
CustomHead = nn.Module | HeadFactory | str
F = TypeVar("F", bound=HeadFactory)

HEAD_FACTORIES: dict[str, HeadFactory] = {}
"""Name -> class or function, filled by `register_head`."""

STORED_MODULE = "_hf_timm_tower_head_"
"""How the modules are called that come from a tower's own `head_code.py`."""

_STAMP = "_hf_timm_tower_registered"


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
        stamp: Any = _stamp_class if isinstance(factory, type) else _stamp_function
        if factory.__module__.startswith(STORED_MODULE):
            # code of a tower's own: the class is found by its file, and takes no name from one that is imported here
            return stamp(name, factory)  # type: ignore[no-any-return]
        taken = HEAD_FACTORIES.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ArgumentError(
                f"register_head({name!r}): the name belongs to {taken.__module__}.{taken.__qualname__}, "
                f"it cannot be given to {factory.__module__}.{factory.__qualname__} too"
            )
        HEAD_FACTORIES[name] = stamp(name, factory)
        return HEAD_FACTORIES[name]  # type: ignore[return-value]

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


def known_arguments(head: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments that a registered head was made with, None for others."""
    stamp = getattr(head, _STAMP, None)
    return None if stamp is None else dict(stamp[1])


def registered_spec(head: nn.Module) -> dict[str, Any]:
    """`config.head` of a registered head. Raises HeadError if it is none, or was made with what is not JSON."""
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


def rebuild_stored(spec: dict[str, Any]) -> nn.Module:
    """As `reader.head.rebuild_head`, of heads that are registered in this process too.

    Raises:
        HeadError: as there, or the name is not registered.
    """
    if spec.get("form") != "registered":
        return rebuild_head(spec)
    name, kwargs = spec.get("name"), spec.get("kwargs", {})
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise HeadError("config.head: a registered head has a 'name' and 'kwargs'")
    try:
        return _registered_factory(name)(**kwargs)
    except TypeError as error:
        raise HeadError(f"the head registered as {name!r} does not take {shown(kwargs)}: {error}") from error


def _registered_factory(name: str) -> HeadFactory:
    factory = HEAD_FACTORIES.get(name)
    if factory is None:
        known = ", ".join(sorted(HEAD_FACTORIES)) or "none"
        raise HeadError(
            f"no head is registered as {shown(name)} in this process (registered: {known}). Import the module that "
            f"holds the class under @register_head({shown(name)}) first, or pass custom_head=... to TimmModel's "
            "from_pretrained."
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
    factory = _registered_factory(custom_head) if isinstance(custom_head, str) else custom_head
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

"""Build a tower again from its config: the class's own constructor runs, on the config instead of arguments.

So a subclass with a constructor or steps of its own is built by its own code, and by nothing else.
"""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.nn as nn

from .heads.registry import CustomHead
from .reader.config import TimmTowerConfig
from .reader.errors import ArgumentError, HeadError, one_line, shown

T = TypeVar("T", bound=nn.Module)

# Steps of a tower that a subclass may replace; the stored tower then needs that subclass.
OVERRIDABLE = ("_create_trunk", "_create_head", "forward", "forward_features", "forward_head", "__init__")


@dataclass(frozen=True)
class Stored:
    """What a constructor that builds a tower again takes instead of its arguments."""

    config: TimmTowerConfig
    custom_head: CustomHead | None


REBUILDING: ContextVar[Stored | None] = ContextVar("rebuilding", default=None)


def overrides(cls: type[nn.Module], name: str) -> bool:
    """Whether a subclass replaces one of TimmModel's steps."""
    return any(name in base.__dict__ for base in cls.__mro__[: _depth(cls)])


def _depth(cls: type[nn.Module]) -> int:
    return next(index for index, base in enumerate(cls.__mro__) if "_is_tower_base" in base.__dict__)


def rebuild(cls: type[T], config: TimmTowerConfig, custom_head: CustomHead | None = None) -> T:
    """A tower of this class from its config; a subclass's constructor gets the arguments that it adds.

    Raises:
        ArgumentError: the subclass's constructor does not take what was stored for it.
    """
    arguments: dict[str, Any] = dict(config.tower_kwargs or {})
    accepted = inspect.signature(cls.__init__).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for name, value in (("model_name", config.architecture), ("embed_dim", config.embed_dim)):
        if name in accepted or passes_on:
            arguments.setdefault(name, value)
    token = REBUILDING.set(Stored(config, custom_head))
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ArgumentError(
            f"{cls.__name__} cannot be built again from {shown(arguments)}: {one_line(error)}"
        ) from error
    else:
        return cls(**arguments)
    finally:
        REBUILDING.reset(token)


def added_arguments(tower: Any) -> dict[str, Any]:
    """Arguments that a subclass adds to the constructor, as it was called.

    Args:
        tower: of the subclass.

    Raises:
        HeadError: one is not JSON.
    """
    base = type(tower).__mro__[_depth(type(tower))]
    own = inspect.signature(base.__init__).parameters  # type: ignore[misc]  # TimmModel's own
    given: dict[str, Any] = dict(tower._hub_mixin_config or {})
    added: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(tower).__init__).parameters.items():
        if name in own or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in given:
            added[name] = given[name]
        else:
            raise HeadError(
                f"{type(tower).__name__}.__init__ has an argument {name!r} whose value is not JSON: it cannot be "
                "stored, so the tower could not be built again. Nothing was written."
            )
    return added

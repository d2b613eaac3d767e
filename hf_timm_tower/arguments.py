"""The constructor's arguments -> fields of the config, with what they may not be."""

from typing import TYPE_CHECKING, Any

from .reader.errors import ArgumentError, ConfigError
from .reader.head import LIVE, SUBCLASS, CustomHead
from .reader.model_args import check_names
from .subclassing import overrides

if TYPE_CHECKING:
    from .timm_model import TimmModel


def checked_arguments(model_kwargs: Any) -> dict[str, Any]:
    """A copy of the constructor's `model_kwargs`, checked.

    Raises:
        ArgumentError: not a dict.
        ConfigError: an argument that a tower does not take from there.
    """
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, dict):
        raise ArgumentError(f"model_kwargs={model_kwargs!r}: expected a dict of arguments of timm.create_model")
    check_names(model_kwargs)
    return dict(model_kwargs)


def add_rates(model_args: dict[str, Any], drop_path: float | None, patch_drop: float | None) -> None:
    """Put the constructor's `drop_path` and `patch_drop` among the arguments of `timm.create_model`.

    Raises:
        ConfigError: not a rate.
        ArgumentError: given there too, with another value.
    """
    for name, rate in (("drop_path_rate", drop_path), ("patch_drop_rate", patch_drop)):
        if rate is None:
            continue
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ConfigError(f"{name}={rate!r}: expected a rate, 0 <= rate < 1")
        if model_args.setdefault(name, rate) != rate:
            raise ArgumentError(f"{name} is given twice, as {rate} and in model_kwargs as {model_args[name]}")


def head_fields(
    cls: "type[TimmModel]",
    embed_dim: int | None,
    pool: str | None,
    proj: str | None,
    proj_bias: bool,
    drop: float,
    custom_head: CustomHead | None,
) -> dict[str, Any]:
    """The fields of the config that say what comes after the trunk.

    Args:
        cls: The class of the tower; it may make its own head.
        embed_dim: As in the constructor, like all further arguments.
        pool: As in the constructor.
        proj: As in the constructor.
        proj_bias: As in the constructor.
        drop: As in the constructor.
        custom_head: As in the constructor.

    Raises:
        ConfigError: the pool is not a name.
        ArgumentError: a custom head beside arguments of the built-in projection.
    """
    if pool is not None and not isinstance(pool, str):
        raise ConfigError(f"pool={pool!r}: expected the name of a pool, or None")
    own_head = custom_head is not None or overrides(cls, "_create_head")
    if custom_head is not None:
        given = {"proj": (proj, ("linear", "none", None, "")), "proj_bias": (proj_bias, (False,)), "drop": (drop, (0,))}
        for name, (value, neutral) in given.items():
            if value not in neutral:
                raise ArgumentError(f"{name}={value!r} is for the built-in projection; the custom head has its own")
        proj = "none"
    if pool is None or (pool == "" and own_head):
        pool = "none"
    return {
        "embed_dim": embed_dim,
        "pool": pool or "default",
        "proj": proj,
        "proj_bias": proj_bias,
        "drop": drop,
        "head": {"form": LIVE if custom_head is not None else SUBCLASS} if own_head else None,
    }

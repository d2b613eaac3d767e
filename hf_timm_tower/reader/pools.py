"""Pools by name: what a trunk has, what the tower asks it for, and whether that is what runs."""

import torch.nn as nn

from .config import ATTENTION_POOLS, TimmTowerConfig
from .errors import ConfigError

# Pool names that timm's models know, in the order in which an error lists them.
TIMM_POOLS = (
    "avg", "max", "avgmax", "catavgmax", "token", "map", "prr",
    "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax",
)  # fmt: skip
# timm's attention pools split the trunk's width into heads of this many channels, as open_clip leaves it.
ATTENTION_HEAD_WIDTH = 64
ALL_POOLS = (*TIMM_POOLS, "token_avg", *ATTENTION_POOLS, "default", "none")


class PoolRefused(ConfigError):
    """The trunk does not offer a pool. `tower.build` adds the pools that it does offer."""

    def __init__(self, config: TimmTowerConfig, reason: str) -> None:
        super().__init__(
            f"pool={config.pool!r} with proj={config.proj!r} is not offered by {config.architecture}: "
            f"{reason.rstrip('.')}."
        )


def trunk_pool(pool: str | None) -> str | None:
    """The tower's pool -> what the trunk is asked for: None leaves its own, `""` is unpooled."""
    if pool in (*ATTENTION_POOLS, "token_avg", "none"):
        return ""
    return None if pool == "default" else pool


def own_pool(trunk: nn.Module) -> str | None:
    """Name of the pool that the trunk has now, `""` for none, None if it does not say.

    Read from the module that pools before the attribute of the model, which some models leave at its first value.
    """
    head = getattr(trunk, "head", None)
    for holder in (
        getattr(head, "global_pool", None),
        getattr(head, "pool_type", None),
        getattr(trunk, "global_pool", None),
    ):
        name = getattr(holder, "pool_type", holder)
        if isinstance(name, str):
            return name
    return None


def class_and_patch_tokens(trunk: nn.Module) -> int | None:
    """Number of prefix tokens of a trunk with a class token first, None where there is no class token."""
    prefix = getattr(trunk, "num_prefix_tokens", None)
    tokens = (getattr(trunk, "cls_token", None), getattr(getattr(trunk, "embeds", None), "cls_token", None))
    if not isinstance(prefix, int) or prefix < 1 or all(token is None for token in tokens):
        return None
    return prefix

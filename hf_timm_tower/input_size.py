"""Another input size for a tower that exists, for both faces: timm resamples, the config says what the trunk now is."""

import copy
from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from .build import check_embedding, example_input, resolve_config
from .heads.isolation import copy_module
from .reader.config import TimmTowerConfig, check_size
from .reader.errors import ConfigError
from .reader.model_args import FROM_TRUNK
from .reader.tower import HeadInput
from .reader.trunk import BUILD_ERRORS
from .trunk_facts import record_size, trunk_arguments


def set_input_size(tower: Any, image_size: int | Sequence[int], *, own_trunk: bool = False) -> None:
    """Change the input size of a tower; position embeddings are resampled by timm.

    Args:
        tower: With `config`, `trunk`, `head` and `_head_input`; on an error it is as before.
        image_size: Pixels, an int or (height, width).
        own_trunk: A subclass of TimmModel makes the trunk by its own code.

    Raises:
        ConfigError: the trunk does not run at this size, or timm cannot build it for this size.
    """
    size = check_size("image_size", image_size)
    if size == tower.config.image_size:
        return
    if not tower.config.attribute_map:
        raise ConfigError(
            f"image_size={size}: this tower is a part of another model, whose own config keeps the size and would no "
            "longer load what is saved. Set the size of the tower before it becomes a part"
        )
    # on a copy first: timm changes some trunks before it refuses a size
    trial = copy_module(tower.trunk)
    config = record_size(trial, _resized(tower, trial, size), own_trunk=own_trunk)
    _resized(tower, tower.trunk, size)
    vars(tower.config).update(vars(config))  # in place: a model that this one is a part of has the same object
    tower._head_input = HeadInput.of(config, tower.trunk)


def _resized(tower: Any, trunk: nn.Module, size: list[int]) -> TimmTowerConfig:
    """Resize a trunk and say what the config then is; the head must still fit."""
    config = copy.deepcopy(tower.config)
    config.image_size = size
    if hasattr(trunk, "set_input_size"):
        try:
            trunk.set_input_size(img_size=tuple(size))  # type: ignore[operator]
        except BUILD_ERRORS as error:
            raise ConfigError(f"{config.architecture} cannot take image_size={size}: {error}") from error
        now = trunk_arguments(trunk)["model_args"]
        kept = {key: now[key] for key in now if key not in FROM_TRUNK}
        config.model_args = {**(config.model_args or {}), **kept}
    config, output = resolve_config(config, trunk)
    if config.pool == "abs_attn" and config.feat_size != tower.config.feat_size:
        raise ConfigError(
            f"image_size={size}: pool='abs_attn' has a position for every place of a {tower.config.feat_size} map, "
            f"which would become {config.feat_size}; pool='rot_attn' takes any size"
        )
    if config.head is not None:
        check_embedding(config, tower.head, example_input(config, trunk, output))
    return config


def with_stored_size(config: TimmTowerConfig, stored: Any) -> TimmTowerConfig:
    """A config with the size that is stored: a tower is loaded as it was saved, and resized then.

    Args:
        config: With another size, perhaps.
        stored: `image_size` of the tower's `config.json`.
    """
    if stored is None or stored == config.image_size:
        return config
    config = copy.deepcopy(config)
    config.image_size = check_size("image_size", stored)
    return config

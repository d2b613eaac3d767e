"""`TimmTowerEncoderConfig`: a tower's trunk as the models around it ask for an encoder of tokens.

LLaVA and its kin read the width, the patches and the layers of their vision model from its config, under the names that
transformers' own models have. In `TimmTowerConfig` `hidden_size` is the width of the embedding, as a dual encoder needs
it, and `image_size` is a pair: so encoders have a config of their own, around the tower's.
"""

import copy
import os
from typing import Any, ClassVar

import torch.nn as nn
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .build import build_for_transformers
from .reader.config import TimmTowerConfig
from .reader.errors import ConfigError, shown
from .reader.hidden_states import first_block
from .reader.skip_init import Budget, skip_init
from .reader.tower import plain_defaults, without_head
from .reader.trunk import native_size

_FACTS = ("hidden_size", "image_size", "patch_size", "num_channels", "num_hidden_layers", "num_attention_heads")


@strict
class TimmTowerEncoderConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What an encoder is: a tower's config, and what others ask about its tokens.

    `TimmTowerEncoderConfig.from_pretrained(tower)` reads the folder or the repository of a tower; the head is left out.
    All but `tower_config` follows from it and need not be given.

    Args:
        tower_config: A `TimmTowerConfig`, or its fields.
        hidden_size: Width of the tokens.
        image_size: Side of the square image in pixels, or `[height, width]`.
        patch_size: Pixels from one token to the next; a square image has `(image_size // patch_size) ** 2` tokens, and
            class token and registers.
        num_channels: Channels of the image.
        num_hidden_layers: Blocks or stages: how many hidden states there are after the first.
        num_attention_heads: Heads of each attention layer; None where there are none, or not equally many in each.

    Raises:
        ConfigError: the tower's config describes no trunk that can be built in this process.
    """

    model_type = "timm_tower_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"tower_config": TimmTowerConfig}

    tower_config: dict[str, Any] | PreTrainedConfig | None = None
    hidden_size: int | None = None
    image_size: int | list[int] | None = None
    patch_size: int | None = None
    num_channels: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.tower_config, dict):
            self.tower_config = TimmTowerConfig(**self.tower_config)
        if isinstance(self.tower_config, TimmTowerConfig) and self.hidden_size is None:
            with plain_defaults(), skip_init(Budget.default()):
                tower = build_for_transformers(without_head(self.tower_config), False, None)
            self.tower_config = tower.config
            for name, value in token_facts(tower.config, tower.trunk).items():
                setattr(self, name, value)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FACTS and self.__dict__.get(name) not in (None, value):
            raise ConfigError(
                f"{name}={shown(value)}: it follows from tower_config and is {shown(getattr(self, name))}. For images "
                "of another size take the config of TimmTowerEncoder.from_pretrained(tower, image_size=...)"
            )
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', where the config of a tower is the `tower_config` of an encoder."""
        found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found.get("model_type") == TimmTowerConfig.model_type:
            found.pop("auto_map", None)  # of the tower's files
            found = {"model_type": cls.model_type, "tower_config": found}
        return found, rest


def token_facts(config: TimmTowerConfig, trunk: nn.Module) -> dict[str, Any]:
    """What a trunk says of its tokens, by the names of `TimmTowerEncoderConfig`.

    Raises:
        ConfigError: timm has no intermediate layers of this trunk.
    """
    layers: Any = getattr(trunk, "feature_info", None)
    if not layers:
        raise ConfigError(f"{type(trunk).__name__} has no intermediate layers in timm: it cannot be an encoder")
    height, width = native_size(config)
    heads = {part.num_heads for part in trunk.modules() if isinstance(getattr(part, "num_heads", None), int)}
    return {
        "hidden_size": int(trunk.num_features),  # type: ignore[arg-type]
        "image_size": height if height == width else [height, width],
        "patch_size": int(layers[-1]["reduction"]),
        "num_channels": config.in_chans,
        "num_hidden_layers": len(layers) - (first_block(trunk) is None),  # then the first is the stem
        "num_attention_heads": int(heads.pop()) if len(heads) == 1 else None,  # type: ignore[arg-type]
    }


def as_part(config: TimmTowerConfig, width: int) -> TimmTowerConfig:
    """The config that a model of several parts assigns to this one, as the part's own.

    An encoder-decoder asks the encoder for its `config.hidden_size` and means the width of `last_hidden_state`; a dual
    encoder asks its own config for that of the vision model, and means the embedding's. So the former is answered here.
    """
    if config.embed_dim == width:
        return config
    part = copy.copy(config)
    vars(part).update(attribute_map={}, hidden_size=width)
    return part

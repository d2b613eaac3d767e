"""`TimmTowerEncoderConfig`: a tower's trunk as the models around it ask for an encoder of tokens.

LLaVA and its kin read the width, the patches and the layers of their vision model from its config, under the names that
transformers' own models have. In `TimmTowerConfig` `hidden_size` is the width of the embedding, as a dual encoder needs
it, and `image_size` is a pair: so encoders have a config of their own, around the tower's.
"""

import os
from typing import Any, ClassVar

import torch.nn as nn
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .build import build_for_transformers
from .reader.config import TimmTowerConfig
from .reader.errors import ConfigError
from .reader.skip_init import Budget, skip_init
from .reader.tower import plain_defaults, without_head


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
    num_channels: int = 3
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.tower_config, dict):
            self.tower_config = TimmTowerConfig(**self.tower_config)
        if isinstance(self.tower_config, TimmTowerConfig) and self.hidden_size is None:
            with plain_defaults(), skip_init(Budget.default()):
                tower = build_for_transformers(without_head(self.tower_config), False, None)
            self.describe(tower.config, tower.trunk)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def describe(self, config: TimmTowerConfig, trunk: nn.Module) -> None:
        """Take over a tower's config, and what its trunk says of itself.

        Raises:
            ConfigError: timm has no intermediate layers of this trunk.
        """
        layers: Any = getattr(trunk, "feature_info", None)
        if not layers or config.image_size is None:
            raise ConfigError(
                f"{type(trunk).__name__} has no forward_intermediates in timm: it is no encoder of tokens"
            )
        height, width = config.image_size  # type: ignore[misc]
        heads = {part.num_heads for part in trunk.modules() if isinstance(getattr(part, "num_heads", None), int)}
        self.tower_config = config
        self.hidden_size = int(trunk.num_features)  # type: ignore[arg-type]
        self.image_size = height if height == width else [height, width]
        self.patch_size = int(layers[-1]["reduction"])
        self.num_channels = config.in_chans
        self.num_hidden_layers = len(layers)
        self.num_attention_heads = int(heads.pop()) if len(heads) == 1 else None  # type: ignore[arg-type]

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

"""A tower and a text model as one, where hf_timm_tower is not installed.

transformers finds the code of a model by `auto_map` at the top of a config and never in the config of a part: these two
classes are what `auto_map` of such a pair names (see `hf_timm_tower.make_self_contained`).
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .config import TimmTowerConfig
from .modeling import TimmTowerModel


@strict
class TowerTextConfig(VisionTextDualEncoderConfig):  # type: ignore[no-untyped-call]
    """transformers' config of two models; reading one makes towers known to transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:
            AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig)
            AutoModel.register(TimmTowerConfig, TimmTowerModel)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class TowerTextModel(VisionTextDualEncoderModel):  # type: ignore[no-untyped-call]
    """transformers' model of a vision and a text model, with a tower for the former."""

    config_class = TowerTextConfig

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers saves it, under the name of its own class: pipelines look for that one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, "config.json")
        if kwargs.get("is_main_process", True):
            config = {**json.loads(path.read_bytes()), "architectures": [VisionTextDualEncoderModel.__name__]}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

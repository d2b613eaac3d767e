"""A tower and a text model as one: how transformers' `VisionTextDualEncoderModel` loads where this package is absent.

transformers finds the code of a model by `auto_map` at the top of a config and never in the config of a part. A folder
of two models as transformers saves it therefore does not load without this package, whatever travels with the tower.
`make_self_contained` mends such a folder.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..files.json import write_json
from ..files.names import CODE_NAME, CONFIG_NAME
from ..files.open_folder import read_json
from ..files.safetensors_layout import write_aligned
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError
from ..reader.modeling import TimmTowerModel
from .code_files import DOOR, write_code

AUTO_MAP = {
    "AutoConfig": f"{CODE_NAME}/{DOOR}.TowerTextConfig",
    "AutoImageProcessor": f"{CODE_NAME}/{DOOR}.TimmTowerImageProcessor",
    "AutoModel": f"{CODE_NAME}/{DOOR}.TowerTextModel",
}
# None for AutoModelForZeroShotImageClassification, in whose list transformers does not have this model: its pipeline
# then takes the class that the config names, and asks nobody to trust code where this package is imported.


@strict
class TowerTextConfig(VisionTextDualEncoderConfig):  # type: ignore[no-untyped-call]
    """transformers' config of two models; reading one makes towers known to transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:
            AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig)
            AutoModel.register(TimmTowerConfig, TimmTowerModel)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Not so: transformers would copy the code into the top of each folder that is saved."""


class TowerTextModel(VisionTextDualEncoderModel):  # type: ignore[no-untyped-call]
    """transformers' model of a vision and a text model, with a tower for the former."""

    config_class = TowerTextConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """As in the config."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers saves it, and self-contained."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            make_self_contained(save_directory)


def make_self_contained(folder: Any) -> None:
    """Let a folder of a `VisionTextDualEncoderModel` with a tower inside load where this package is absent.

    `core/` is written into it and named by its config, so that `pipeline("zero-shot-image-classification", ...,
    trust_remote_code=True)` and `AutoModel` work with transformers and timm alone; where this package is imported,
    nothing changes. Weights are written anew in the layout in which mapped tensors are aligned: kernels may give other
    last bits for weights at odd addresses.

    Args:
        folder: What `VisionTextDualEncoderModel.save_pretrained` wrote.

    Raises:
        ConfigError: it holds no such model, or none with a tower.
        FolderError: it cannot be read or written.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    vision = config.get("vision_config")
    if not isinstance(vision, dict) or vision.get("model_type") != TimmTowerConfig.model_type:
        raise ConfigError(
            f"{folder / CONFIG_NAME}: expected a {VisionTextDualEncoderConfig.model_type} with a tower as its vision "
            f"model, found model_type {config.get('model_type')!r}; a tower by itself carries its code already"
        )
    write_code(folder)
    for path in sorted(folder.glob("*.safetensors")):
        write_aligned(path, load_file(path))
    names = {"architectures": [VisionTextDualEncoderModel.__name__], "auto_map": AUTO_MAP}
    write_json(folder / CONFIG_NAME, {**config, **names})

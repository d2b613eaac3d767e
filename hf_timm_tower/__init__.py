"""Any timm backbone plus any head as one Hugging Face Hub model.

Names load on first use, so that importing the package costs nothing. transformers' Auto classes then know towers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto import register

__version__ = "0.1.0.dev0"

_HOME = {
    "TimmModel": ".timm_model",
    "TimmTowerBackbone": ".backbone",
    "TimmTowerConfig": ".reader.config",
    "TimmTowerEncoder": ".encoder",
    "TimmTowerEncoderConfig": ".encoder_config",
    "TimmTowerForImageClassification": ".modeling",
    "TimmTowerImageProcessor": ".reader.image_processor",
    "TimmTowerModel": ".modeling",
    "Verification": ".files.fingerprint",
    "align_weights": ".hub.dual_encoder",
    "make_self_contained": ".hub.dual_encoder",
    "register_head": ".heads.registry",
    "TowerError": ".reader.errors",
    "ArgumentError": ".reader.errors",
    "ConfigError": ".reader.errors",
    "ExportError": ".reader.errors",
    "FolderError": ".reader.errors",
    "FormatError": ".reader.errors",
    "GraphError": ".reader.errors",
    "HeadError": ".reader.errors",
    "HubError": ".reader.errors",
    "WeightsError": ".reader.errors",
}

if TYPE_CHECKING:
    from .backbone import TimmTowerBackbone
    from .encoder import TimmTowerEncoder
    from .encoder_config import TimmTowerEncoderConfig
    from .files.fingerprint import Verification
    from .heads.registry import register_head
    from .hub.dual_encoder import align_weights, make_self_contained
    from .modeling import TimmTowerForImageClassification, TimmTowerModel
    from .reader.config import TimmTowerConfig
    from .reader.errors import (
        ArgumentError,
        ConfigError,
        ExportError,
        FolderError,
        FormatError,
        GraphError,
        HeadError,
        HubError,
        TowerError,
        WeightsError,
    )
    from .reader.image_processor import TimmTowerImageProcessor
    from .timm_model import TimmModel

__all__ = [
    "ArgumentError",
    "ConfigError",
    "ExportError",
    "FolderError",
    "FormatError",
    "GraphError",
    "HeadError",
    "HubError",
    "TimmModel",
    "TimmTowerBackbone",
    "TimmTowerConfig",
    "TimmTowerEncoder",
    "TimmTowerEncoderConfig",
    "TimmTowerForImageClassification",
    "TimmTowerImageProcessor",
    "TimmTowerModel",
    "TowerError",
    "Verification",
    "WeightsError",
    "__version__",
    "align_weights",
    "make_self_contained",
    "register_head",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home, __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()

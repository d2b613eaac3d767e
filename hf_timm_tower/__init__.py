"""Any timm backbone plus any head as one Hugging Face Hub model.

Names load on first use, so that importing the package costs nothing. transformers' Auto classes then know towers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto import register

__version__ = "0.1.0.dev0"

_HOME = {
    "TimmModel": ".timm_model",
    "TimmTowerConfig": ".core.config",
    "TimmTowerForImageClassification": ".core.modeling",
    "TimmTowerImageProcessor": ".core.image_processor",
    "TimmTowerModel": ".core.modeling",
    "Verification": ".core.fingerprint",
    "make_self_contained": ".core.dual_encoder",
    "register_head": ".core.head",
    "TowerError": ".core.errors",
    "ArgumentError": ".core.errors",
    "ConfigError": ".core.errors",
    "ExportError": ".core.errors",
    "FolderError": ".core.errors",
    "FormatError": ".core.errors",
    "GraphError": ".core.errors",
    "HeadError": ".core.errors",
    "HubError": ".core.errors",
    "WeightsError": ".core.errors",
}

if TYPE_CHECKING:
    from .core.config import TimmTowerConfig
    from .core.dual_encoder import make_self_contained
    from .core.errors import (
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
    from .core.fingerprint import Verification
    from .core.head import register_head
    from .core.image_processor import TimmTowerImageProcessor
    from .core.modeling import TimmTowerForImageClassification, TimmTowerModel
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
    "TimmTowerConfig",
    "TimmTowerForImageClassification",
    "TimmTowerImageProcessor",
    "TimmTowerModel",
    "TowerError",
    "Verification",
    "WeightsError",
    "__version__",
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

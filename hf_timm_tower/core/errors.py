"""The old import path of `hf_timm_tower.reader.errors`."""

from ..reader.errors import (
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

__all__ = [
    "ArgumentError",
    "ConfigError",
    "ExportError",
    "FolderError",
    "FormatError",
    "GraphError",
    "HeadError",
    "HubError",
    "TowerError",
    "WeightsError",
]

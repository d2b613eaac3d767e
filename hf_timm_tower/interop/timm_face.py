"""What timm asks of a model in training and for data, on a tower: layer groups, weight decay, preprocessing.

`timm.optim.create_optimizer_v2(tower, layer_decay=0.7)` then decays as for the bare trunk, and
`timm.data.create_transform(**timm.data.resolve_model_data_config(tower))` prepares images as `tower.transform()`.
"""

from collections.abc import Callable
from typing import Any

from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError
from ..training.param_groups import group_matcher, no_weight_decay

_PLAIN = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0]}


def data_cfg(config: TimmTowerConfig) -> dict[str, Any]:
    """timm's fields for the images of a tower.

    Raises:
        ConfigError: it prepares images in a way that timm's fields cannot say.
    """
    block: dict[str, Any] = config.preprocess or {}
    odd = [f"{name} {block[name]}" for name, plain in _PLAIN.items() if block[name] != plain]
    if odd:
        raise ConfigError(
            f"timm's pretrained_cfg has no words for {', '.join(odd)}: its pixels would be others than the tower's; "
            "use the tower's own transform() or image processor"
        )
    return {
        "input_size": (config.in_chans, *config.image_size),  # type: ignore[misc]
        "fixed_input_size": True,
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        **{key: tuple(block[key]) for key in ("mean", "std")},
    }


class TimmFace:
    """Mixed into both faces; each reads the live `config`, `trunk` and `head`."""

    config: Any

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int | float]:
        """Name of a parameter or module -> its layer group, as timm counts them; see `training.param_groups`."""
        return group_matcher(self, coarse)  # type: ignore[arg-type]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that get no weight decay because trunk or head say so."""
        return no_weight_decay(self)  # type: ignore[arg-type]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The tower's input size and preprocessing in timm's fields; without an architecture, which a tower is not."""
        return data_cfg(self.config)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's earlier name of `pretrained_cfg`."""
        return data_cfg(self.config)

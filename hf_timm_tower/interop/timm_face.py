"""What timm asks of a model in training and for data, on a tower: layer groups, weight decay, preprocessing.

`timm.optim.create_optimizer_v2(tower, layer_decay=0.7)` then decays as for the bare trunk, and
`timm.data.create_transform(**timm.data.resolve_model_data_config(tower))` prepares images as `tower.transform()`.
"""

from collections.abc import Callable
from typing import Any

from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError
from ..training.param_groups import group_matcher, no_weight_decay
from ..trunk_facts import PLAIN_PREPROCESS


def image_fields(config: TimmTowerConfig) -> tuple[dict[str, Any], list[str]]:
    """timm's fields for the images of a tower, and in words what of its preprocessing they cannot say.

    A value range other than 0 to 1 becomes part of mean and std.
    """
    block: dict[str, Any] = config.preprocess or {}
    mean, std, (lo, hi) = block["mean"], block["std"], block["value_range"]
    lost = [f"{name} {block[name]}" for name, plain in PLAIN_PREPROCESS.items() if block[name] != plain]
    if (lo, hi) != (0, 1):
        mean, std = [(value - lo) / (hi - lo) for value in mean], [value / (hi - lo) for value in std]
    return {
        "input_size": (config.in_chans, *config.image_size),  # type: ignore[misc]
        "fixed_input_size": True,
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple(mean),
        "std": tuple(std),
    }, lost


def data_cfg(
    config: TimmTowerConfig, way_out: str = "use the tower's own transform() or image processor"
) -> dict[str, Any]:
    """`image_fields` where they say all of it.

    Raises:
        ConfigError: it prepares images in a way that timm's fields cannot say.
    """
    fields, lost = image_fields(config)
    if lost:
        raise ConfigError(
            f"timm's pretrained_cfg has no words for {', '.join(lost)}: its pixels would be others than the tower's; "
            f"{way_out}"
        )
    return fields


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

"""A tower's weights and config in open_clip's form, and a tower in the place of open_clip's own `TimmModel`."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..reader.errors import ConfigError
from ..reader.skip_init import skip_init
from ..reader.trunk import create_trunk
from ..subclassing import OVERRIDABLE, overrides
from ..trunk_facts import shapes_of, trunk_arguments
from .open_clip_config import VISION_PREFIX, model_cfg_of, preprocess_cfg_of, vision_arguments


def to_open_clip_state_dict(tower: Any) -> dict[str, Tensor]:
    """The tower's weights under the keys of an open_clip model, for its strict `load_state_dict` beside the text's.

    Args:
        tower: One that open_clip's `vision_cfg` can describe.

    Returns:
        `visual.*` -> tensor, sharing memory with the tower.

    Raises:
        ConfigError: open_clip builds another tower from whatever its `vision_cfg` can say.
    """
    to_open_clip_model_cfg(tower)
    return {f"{VISION_PREFIX}{key}": tensor for key, tensor in tower.state_dict().items()}


def to_open_clip_model_cfg(tower: Any) -> dict[str, Any]:
    """open_clip's `model_cfg` of a tower: `embed_dim` and `vision_cfg`; `text_cfg` is the user's.

    Raises:
        ConfigError: as `to_open_clip_state_dict`.
    """
    changed = [step for step in OVERRIDABLE if overrides(type(tower), step)]
    if changed:
        raise ConfigError(f"{type(tower).__name__} overrides {', '.join(changed)}, of which open_clip knows nothing")
    model_cfg = model_cfg_of(tower.config)
    with skip_init():
        twin = type(tower)(**vision_arguments(model_cfg, "the tower").arguments)
    facts = ("pool", "proj", "layout", "num_features", "classifier")
    differ = [name for name in facts if getattr(twin.config, name) != getattr(tower.config, name)]
    if shapes_of(twin.state_dict()) != shapes_of(tower.state_dict()):
        differ.append("the weights' keys or shapes")
    for part in ("trunk", "head"):
        if repr(twin.get_submodule(part)) != repr(tower.get_submodule(part)):
            differ.append(f"the layers of the {part}")
    if differ:
        raise ConfigError(
            f"open_clip builds another tower from vision_cfg={model_cfg['vision_cfg']}: {', '.join(differ)} differ"
        )
    return model_cfg


def to_open_clip_config(tower: Any, text_cfg: Mapping[str, Any], **model_cfg: Any) -> dict[str, Any]:
    """What `open_clip_config.json` holds for a model with this vision tower.

    Args:
        tower: The vision tower.
        text_cfg: open_clip's config of the text tower.
        model_cfg: Further entries (`custom_text`, `init_logit_bias`, ...).

    Raises:
        ConfigError: as `to_open_clip_state_dict`, or open_clip cannot prepare the same pixels.
    """
    return {
        "model_cfg": {**to_open_clip_model_cfg(tower), "text_cfg": dict(text_cfg), **model_cfg},
        "preprocess_cfg": preprocess_cfg_of(tower.config),
    }


def fit_inside_open_clip(tower: Any, state: dict[str, Any], prefix: str) -> None:
    """Let a tower that open_clip built with `force_image_size` take weights of the trunk's native size.

    open_clip builds its trunk natively, loads, and resizes then; a tower is built for its size at once. So the
    weights go through a trunk of the native size and timm's own `set_input_size`: the same outputs as in open_clip.

    Args:
        tower: The tower that loads.
        state: What `nn.Module._load_from_state_dict` is given; changed in place.
        prefix: `visual.` inside of an open_clip model; anything else is left alone.
    """
    trunk_prefix = f"{prefix}trunk."
    incoming = {
        key.removeprefix(trunk_prefix): value
        for key, value in state.items()
        if key.startswith(trunk_prefix) and isinstance(value, Tensor)
    }
    if prefix != VISION_PREFIX or not hasattr(tower.trunk, "set_input_size"):
        return
    if not incoming or shapes_of(incoming) == shapes_of(tower.trunk.state_dict()):
        return
    native = copy.deepcopy(tower.config)
    native.image_size = None
    with skip_init():
        twin = create_trunk(native, initialise=False)
    if shapes_of(incoming) != shapes_of(twin.state_dict()):
        return  # torch says what does not fit
    twin.load_state_dict({key: value.detach().cpu() for key, value in incoming.items()}, strict=True, assign=True)
    size = tuple(tower.config.image_size)
    twin.set_input_size(img_size=size)  # type: ignore[operator]
    windows = trunk_arguments(twin)["model_args"].get("window_size")
    if windows is not None:
        # Swin's windows grow with the size in set_input_size, but not in the constructor.
        tower.trunk.set_input_size(img_size=size, window_size=windows)
        tower.config.model_args = {**(tower.config.model_args or {}), "window_size": windows}
    state.update((f"{trunk_prefix}{key}", value) for key, value in twin.state_dict().items())

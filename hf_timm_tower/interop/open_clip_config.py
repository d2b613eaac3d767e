"""open_clip's configuration <-> a tower's. Plain data on both sides; open_clip is not needed.

`open_clip_config.json` holds `model_cfg` (with `embed_dim` and `vision_cfg`) and `preprocess_cfg`. The meaning of each
entry is that of open_clip 3.3: `_build_vision_tower` and `CLIPVisionCfg` in its `model.py`, `TimmModel` in its
`timm_model.py`, `image_transform` in its `transform.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..reader.config import ATTENTION_POOLS, TimmTowerConfig, check_size
from ..reader.errors import ConfigError, shown
from ..reader.trunk import has_fixed_size, native_cfg
from ..trunk_facts import PLAIN_PREPROCESS, TIMM_POOLS

VISION_PREFIX = "visual."
"""What stands before the vision tower's keys in the state dict of an open_clip model."""

# Entries of vision_cfg that make a timm tower, and open_clip's default of each.
_TIMM_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
    "patch_dropout": 0.0,
}
# Entries for open_clip's own towers, which it accepts beside a timm trunk and does not look at, and one that says
# whether timm's weights were the start.
_WITHOUT_MEANING = frozenset(
    "layers width head_width mlp_ratio patch_size ls_init_value attentional_pool attn_pooler_queries attn_pooler_heads "
    "no_ln_pre pos_embed_type final_ln_after_pool pool_type output_tokens act_kwargs norm_kwargs block_type qk_norm "
    "scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc timm_model_pretrained".split()
)

_OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
_OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
_PREPROCESS_DEFAULTS: dict[str, Any] = {
    "size": None,
    "mode": "RGB",
    "mean": _OPENAI_MEAN,
    "std": _OPENAI_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@dataclass(frozen=True)
class VisionArguments:
    """What open_clip's `model_cfg` says of its vision tower.

    Attributes:
        arguments: For the constructor of `TimmModel`; `image_size` is the one that the trunk is built for.
        declared_size: `[height, width]` that the config names.
    """

    arguments: dict[str, Any]
    declared_size: list[int]

    @property
    def built_size(self) -> list[int]:
        """`[height, width]` that open_clip builds the trunk for."""
        return list(self.arguments["image_size"])


def vision_arguments(model_cfg: Mapping[str, Any], where: str) -> VisionArguments:
    """`model_cfg` -> the constructor's arguments, as open_clip's `_build_vision_tower` understands it.

    open_clip never hands its `image_size` to timm: a trunk with position embeddings is built for its own size.

    Args:
        model_cfg: With `embed_dim` and `vision_cfg`; the rest is the text tower's and is not looked at.
        where: For messages.

    Raises:
        ConfigError: no timm tower, an unknown entry or a value that cannot be used.
    """
    vision = model_cfg.get("vision_cfg")
    if not isinstance(vision, Mapping) or "embed_dim" not in model_cfg:
        raise ConfigError(f"{where}: expected an open_clip model config with embed_dim and vision_cfg")
    name = vision.get("timm_model_name")
    if not name:
        own = "ModifiedResNet" if isinstance(vision.get("layers"), (list, tuple)) else "VisionTransformer"
        raise ConfigError(
            f"{where}: the vision tower is open_clip's own {own}, not a timm model "
            "(vision_cfg has no timm_model_name); it stays with open_clip"
        )
    unknown = sorted(set(vision) - set(_TIMM_DEFAULTS) - _WITHOUT_MEANING - {"timm_model_name"})
    if unknown:
        raise ConfigError(
            f"{where}: vision_cfg has {_listed(unknown)}, which open_clip 3.3 does not know either; the tower "
            "might be another one without it"
        )
    found = {key: vision.get(key, default) for key, default in _TIMM_DEFAULTS.items()}
    if not isinstance(name, str):
        raise ConfigError(f"{where}: timm_model_name={shown(name)}: expected the name of a timm model")
    if ":" in name:
        raise ConfigError(
            f"{where}: timm_model_name={shown(name)}: expected the name of a timm model without a scheme; what is "
            "behind a scheme may change, and a config must rebuild the tower without a network"
        )
    patch_dropout = found["patch_dropout"]
    if isinstance(patch_dropout, bool) or not isinstance(patch_dropout, (int, float)):
        raise ConfigError(f"{where}: patch_dropout={shown(patch_dropout)}: expected a rate")
    # open_clip names what the trunk's own pool is by the empty text, except where timm's constructor gets it.
    proj, pool = found["timm_proj"] or None, found["timm_pool"]
    if pool is None:
        pool = "default"
    elif pool == "":
        pool = "default" if proj in ("linear", "mlp") else "none"
    declared = check_size("image_size", found["image_size"])
    cfg = native_cfg(name)
    fixed = has_fixed_size(cfg, {}) or pool == "abs_attn"
    return VisionArguments(
        {
            "model_name": name,
            "embed_dim": model_cfg["embed_dim"],
            "image_size": list(cfg["input_size"][1:]) if fixed else declared,
            "pool": pool,
            "proj": proj,
            "proj_bias": found["timm_proj_bias"],
            "drop": found["timm_drop"],
            "drop_path": found["timm_drop_path"],
            "patch_drop": patch_dropout if patch_dropout > 0 else None,
        },
        declared,
    )


def preprocess_entries(preprocess_cfg: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` -> the entries of a tower's preprocess block that it decides.

    Its `size` is not looked at, as in open_clip: the model's size counts.

    Raises:
        ConfigError: an unknown entry, or one that a tower cannot do to the pixel.
    """
    unknown = sorted(set(preprocess_cfg) - set(_PREPROCESS_DEFAULTS))
    if unknown:
        raise ConfigError(
            f"{where}: preprocess_cfg has {_listed(unknown)}, which open_clip does not look at; pass preprocess_cfg="
            f"{{...}} with what you mean ({', '.join(_PREPROCESS_DEFAULTS)})"
        )
    given = {key: value for key, value in preprocess_cfg.items() if value is not None}
    found = {**_PREPROCESS_DEFAULTS, **given}
    if found["mode"] != "RGB":
        raise ConfigError(f"{where}: preprocess_cfg.mode={shown(found['mode'])}: open_clip knows RGB only")
    if found["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise ConfigError(
            f"{where}: preprocess_cfg.interpolation={shown(found['interpolation'])}: expected bicubic, bilinear or "
            "random"
        )
    mean, std = (_per_channel(found[key], f"{where}: preprocess_cfg.{key}") for key in ("mean", "std"))
    modes = {"shortest": "center", "squash": "squash"}
    if found["resize_mode"] == "longest" and _is_border(found["fill_color"], mean):
        modes["longest"] = "border"
    if found["resize_mode"] not in tuple(modes):
        raise ConfigError(
            f"{where}: resize_mode={shown(found['resize_mode'])} with fill_color={shown(found['fill_color'])} in "
            "preprocess_cfg cannot be prepared to the same pixels here: known are shortest, squash, and longest where "
            "the border has the colour of mean. Pass preprocess_cfg={...} with another resize_mode if other pixels are "
            "meant."
        )
    return {
        # "random" is for training; open_clip evaluates with bicubic then
        "interpolation": "bilinear" if found["interpolation"] == "bilinear" else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": modes[found["resize_mode"]],
        "mean": mean,
        "std": std,
    }


def _per_channel(value: Any, where: str) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in values):
        raise ConfigError(f"{where}={shown(value)}: expected three numbers")
    return [float(one) for one in values]


def _listed(keys: list[str]) -> str:
    return ", ".join(shown(key)[1:-1] for key in keys[:8]) + (", ..." if len(keys) > 8 else "")


def _is_border(fill_color: Any, mean: list[float]) -> bool:
    return all(round(255 * value) == fill_color for value in mean)


def model_cfg_of(config: TimmTowerConfig) -> dict[str, Any]:
    """A tower's config -> open_clip's `model_cfg`, without a text tower.

    Raises:
        ConfigError: open_clip has no words for this tower: says for what.
    """
    args = dict(config.model_args or {})
    drop_path, patch_drop = args.pop("drop_path_rate", None), args.pop("patch_drop_rate", 0.0)
    args.pop("num_classes", None)
    args.pop("global_pool", None)
    cannot = [f"model_kwargs {', '.join(args)}"] if args else []
    if config.head is not None:
        cannot.append("a custom head")
    if config.in_chans != 3:
        cannot.append(f"in_chans={config.in_chans}")
    known = (*TIMM_POOLS, *ATTENTION_POOLS, "default", "none")
    if config.pool not in known or (config.pool == "none" and config.proj in ("linear", "mlp")):
        cannot.append(f"pool={config.pool!r} with proj={config.proj!r}")
    cfg = native_cfg(config.architecture)
    size, native = check_size("image_size", config.image_size), list(cfg["input_size"][1:])
    if size != native and (has_fixed_size(cfg, {}) or config.pool == "abs_attn"):
        cannot.append(f"weights for {size} pixels (open_clip builds {config.architecture} for {native})")
    if cannot:
        raise ConfigError(f"open_clip's vision_cfg cannot say what this tower is: {'; '.join(cannot)}")
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": size[0] if size[0] == size[1] else size,
            "timm_model_name": config.architecture,
            "timm_model_pretrained": False,
            "timm_pool": "" if config.pool in ("default", "none") else config.pool,
            "timm_proj": config.proj,
            "timm_proj_bias": config.proj_bias,
            "timm_drop": config.drop,
            "timm_drop_path": drop_path,
            "patch_dropout": patch_drop,
        },
    }


def preprocess_cfg_of(config: TimmTowerConfig) -> dict[str, Any]:
    """A tower's config -> open_clip's `preprocess_cfg`.

    Raises:
        ConfigError: open_clip cannot prepare the same pixels.
    """
    block = dict(config.preprocess or {})
    size = check_size("image_size", config.image_size)
    modes = {"center": "shortest", "squash": "squash", "border": "longest"}
    cfg = {
        "size": size[0] if size[0] == size[1] else size,
        "mode": "RGB",
        "mean": block.get("mean"),
        "std": block.get("std"),
        "interpolation": block.get("interpolation"),
        "resize_mode": modes.get(str(block.get("crop_mode"))),
        "fill_color": round(255 * block["mean"][0]) if block.get("crop_mode") == "border" else 0,
    }
    if cfg["interpolation"] in ("bicubic", "bilinear") and cfg["resize_mode"]:
        if {**block, **preprocess_entries(cfg, "this tower"), **PLAIN_PREPROCESS} == block:
            return cfg
    raise ConfigError(
        f"open_clip cannot prepare the same pixels as this tower: {block}. It knows bicubic and bilinear, crop_pct 1, "
        "crop_mode center and squash, and nothing else."
    )

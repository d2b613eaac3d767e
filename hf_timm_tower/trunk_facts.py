"""What a trunk is and does, found out by asking and running it: for building, wrapping and saving a tower.

Loading a stored tower needs none of this: its config says it all (`reader/trunk.py`).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import timm
import torch
import torch.nn as nn
from timm.data.config import resolve_data_config

from .heads.isolation import copy_module
from .reader.config import ATTENTION_POOLS, TimmTowerConfig, check_size
from .reader.errors import ConfigError, TowerError
from .reader.model_args import FROM_TRUNK, encode
from .reader.skip_init import skip_init
from .reader.trunk import (
    BUILD_ERRORS,
    UnsupportedPool,
    class_and_patch_tokens,
    create_trunk,
    eval_mode,
    float_dtype,
    has_fixed_size,
    native_cfg,
    native_size,
    own_pool,
    split_tag,
    trunk_pool,
)
from .trunk_changes import what_changed

# Pool names that timm's models know, in the order in which an error lists them.
TIMM_POOLS = (
    "avg", "max", "avgmax", "catavgmax", "token", "map", "prr",
    "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax",
)  # fmt: skip
# timm's attention pools split the trunk's width into heads of this many channels, as open_clip leaves it.
ATTENTION_HEAD_WIDTH = 64
ALL_POOLS = (*TIMM_POOLS, "token_avg", *ATTENTION_POOLS, "default", "none")

PLAIN_PREPROCESS = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0]}
"""The entries of a preprocess block that timm and open_clip have no words for, where they do nothing."""

Layout = Literal["NC", "NLC", "NCHW", "NHWC"]


@dataclass(frozen=True)
class TrunkOutput:
    """What a trunk gives for one batch, without the batch dimension.

    Attributes:
        layout: `NC` a vector, `NLC` tokens, `NCHW` and `NHWC` maps.
        width: Channels C.
        size: Height and width of a map, number of tokens as `(L,)`, or `()`.
    """

    layout: Layout
    width: int
    size: tuple[int, ...]


def trunk_output(trunk: nn.Module, in_chans: int, image_size: list[int]) -> TrunkOutput:
    """Run the trunk once without arithmetic and say what it gives.

    Args:
        trunk: A trunk without a classifier.
        in_chans: Channels of the image.
        image_size: Height and width in pixels.

    Raises:
        ConfigError: it does not run at this size, or does not give one tensor.
    """
    shape = (2, in_chans, *image_size)
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if isinstance(grid, tuple) and 0 in grid:
        # older torch runs this on meta without a word
        raise ConfigError(f"image_size={image_size}: smaller than one patch of {type(trunk).__name__}")
    twin = copy_module(trunk, device="meta").eval()  # a copy, for models that cache by input size
    try:
        with torch.no_grad():
            features = twin(torch.empty(shape, device="meta", dtype=float_dtype(trunk)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        # Not every model runs on meta (constants made on the CPU); whether it runs at all is settled for real.
        features = _run_for_real(trunk, shape)
    if not isinstance(features, torch.Tensor):
        raise ConfigError(
            f"{type(trunk).__name__} gives a {type(features).__name__}, not one tensor, with this pool; "
            "a tower needs one tensor. Use another pool, or forward_intermediates."
        )
    return infer_output(trunk, features.shape)


def infer_output(trunk: nn.Module, shape: torch.Size | tuple[int, ...]) -> TrunkOutput:
    """Shape of a batch of features -> its layout, width and size."""
    _, *rest = shape
    if len(rest) == 1:
        return TrunkOutput("NC", rest[0], ())
    if len(rest) == 2:
        return TrunkOutput("NLC", rest[1], (rest[0],))
    if len(rest) == 3:
        if getattr(trunk, "output_fmt", None) == "NHWC":
            return TrunkOutput("NHWC", rest[2], (rest[0], rest[1]))
        return TrunkOutput("NCHW", rest[0], (rest[1], rest[2]))
    raise ConfigError(f"{type(trunk).__name__} gives features of shape {tuple(shape)}: a tower takes rank 2 to 4")


def _run_for_real(trunk: nn.Module, shape: tuple[int, ...]) -> Any:
    anchor = next(trunk.parameters())
    try:
        with torch.no_grad(), eval_mode(trunk):
            return trunk(torch.zeros(shape, device=anchor.device, dtype=anchor.dtype))
    except BUILD_ERRORS as error:
        raise ConfigError(
            f"{type(trunk).__name__} does not run on an image of shape {shape[1:]} (C, H, W): {error}"
        ) from error


def check_pool(trunk: nn.Module, config: TimmTowerConfig, output: TrunkOutput) -> None:
    """The pool that was asked for is the one that runs, and the classifier as projection has the width asked for.

    A trunk that takes a name and then ignores it would give another vector without a word.

    Raises:
        ConfigError: they are not.
    """
    wanted = trunk_pool(config.pool)
    has = own_pool(trunk)
    if wanted is not None and has is not None and has != wanted and hasattr(trunk, "reset_classifier"):
        raise UnsupportedPool(config, f"the trunk keeps its pool {has!r}")
    unpooled = has == "" and hasattr(trunk, "reset_classifier")  # its own choice, as it was built
    if config.pool == "default" and output.layout != "NC" and not unpooled:
        raise UnsupportedPool(
            config,
            f"it gives {output.layout} features, it has no pool of its own (pool='none' takes them as they are)",
        )
    if wanted == "" and output.layout == "NC":
        raise UnsupportedPool(config, "the trunk still gives a vector")
    if wanted and output.layout != "NC":
        raise UnsupportedPool(config, f"the trunk gives {output.layout} features, not a vector")
    if config.pool in ATTENTION_POOLS and output.layout not in ("NCHW", "NHWC"):
        raise UnsupportedPool(config, f"attention pools need a feature map, the trunk gives {output.layout}")
    if config.pool in ATTENTION_POOLS and output.width % ATTENTION_HEAD_WIDTH:
        raise UnsupportedPool(
            config, f"attention heads are {ATTENTION_HEAD_WIDTH} wide, which does not divide the width {output.width}"
        )
    if config.pool == "token_avg" and (output.layout != "NLC" or class_and_patch_tokens(trunk) is None):
        raise UnsupportedPool(config, "it needs tokens with a class token first")
    by_classifier = config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS
    if by_classifier and config.embed_dim is not None and output.width != config.embed_dim:
        raise UnsupportedPool(
            config,
            f"the trunk has no classifier to project with and gives width {output.width}, not "
            f"embed_dim={config.embed_dim}; use proj='linear', 'mlp' or 'none'",
        )


def offered_pools(config: TimmTowerConfig, among: Sequence[str] = ALL_POOLS) -> list[str]:
    """The pools that work for this architecture and projection, found by trying each on the meta device."""
    same = {name: getattr(config, name) for name in ("architecture", "model_args", "image_size", "in_chans")}
    same |= {name: getattr(config, name) for name in ("proj", "embed_dim", "head")}
    if set(FROM_TRUNK) & set(config.model_args or {}):
        same["classifier"] = config.classifier  # of a trunk that existed before its tower
    found = []
    for pool in among:
        try:
            trial = _settled(TimmTowerConfig(**same, pool=pool))
            trunk = create_trunk(trial, initialise=False)
            check_pool(trunk, trial, trunk_output(trunk, trial.in_chans, native_size(trial)))
        except ConfigError:
            continue
        found.append(pool)
    return found


def settle_arguments(config: TimmTowerConfig) -> TimmTowerConfig:
    """A copy of a config that is not completed, with what timm must be told beyond what the user said.

    `image_size` goes to timm as `img_size` wherever the architecture takes it. A trunk that timm cannot build with its
    own pool (a ViT with `class_token=False`) is built with the tower's.

    Raises:
        UnsupportedPool: timm cannot build the trunk with this pool, but with others.
        ConfigError: timm cannot build the trunk with these arguments in any way.
    """
    try:
        return _settled(config)
    except UnsupportedPool:
        raise
    except ConfigError as error:
        if offered_pools(config):
            raise UnsupportedPool(config, str(error)) from error
        raise


def _settled(config: TimmTowerConfig) -> TimmTowerConfig:
    config = copy.deepcopy(config)
    arguments = dict(config.model_args or {})
    if config.image_size is not None and "img_size" not in arguments and _must_be_told(config):
        config.model_args = dict(sorted({**arguments, "img_size": list(native_size(config))}.items()))
    if not arguments or set(FROM_TRUNK) & set(arguments):
        return config
    try:
        create_trunk(config, initialise=False)
    except UnsupportedPool:
        raise
    except ConfigError as error:
        if config.classifier == "construct" or config.pool == "default":
            raise
        with_pool = copy.deepcopy(config)
        with_pool.classifier = "construct"
        try:
            create_trunk(with_pool, initialise=False)
        except ConfigError:
            raise error from None
        return with_pool
    return config


def _must_be_told(config: TimmTowerConfig) -> bool:
    """Whether timm takes an input size for this trunk, but not by itself from `config.image_size`."""
    kwargs = config.model_args or {}
    names = {config.architecture, split_tag(config.architecture)[0]}
    return not all(has_fixed_size(native_cfg(name), kwargs) for name in names) and takes_img_size(min(names))


@lru_cache(maxsize=256)
def takes_img_size(architecture: str) -> bool:
    """Whether timm's constructor of an architecture takes `img_size`, found by trying it."""
    size = tuple(native_cfg(architecture)["input_size"][1:])
    try:
        with skip_init():
            timm.create_model(architecture, img_size=size)
    except TypeError as error:
        if "img_size" in str(error):
            return False
        raise
    return True


def trunk_arguments(trunk: nn.Module) -> dict[str, Any]:
    """How a timm model that exists was made, as it is now: fields of the config.

    Returns:
        `architecture`, `model_args`, `image_size` and `in_chans`.

    Raises:
        ConfigError: it is not a model of timm's registry, or was made with an argument that cannot be stored.
    """
    cfg = getattr(trunk, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not timm.is_model(cfg.get("architecture") or ""):
        raise ConfigError(
            f"{type(trunk).__name__} is not a model that timm.create_model made (no known architecture in its "
            "pretrained_cfg): build the tower by name, or subclass TimmModel and override _create_trunk"
        )
    args = timm.models.get_model_args(trunk)
    # timm leaves the drop rates out, they matter only in training; a tower goes on training
    made = getattr(trunk, "_model_args", {})
    args |= {key: value for key, value in made.items() if "drop" in key and key.endswith("_rate")}
    args = {key: encode(value, f"model_args.{key}") for key, value in args.items() if value is not None}
    traits = timm.models.get_model_traits(trunk)
    told = args.pop("img_size", None)
    in_chans = args.pop("in_chans", None) or traits.get("in_chans") or cfg["input_size"][0]
    tag = cfg.get("tag")
    architecture = f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"]
    if told is not None and not all(
        has_fixed_size(native_cfg(name), args) for name in {architecture, cfg["architecture"]}
    ):
        args["img_size"] = told
    return {
        "architecture": architecture,
        "model_args": args,
        "image_size": check_size("image_size", told or list(cfg["input_size"][1:])),
        "in_chans": in_chans,
    }


def check_rebuilt(trunk: nn.Module, config: TimmTowerConfig, *, with_classifier: bool = False) -> None:
    """A trunk and the trunk that its config makes have the same weights by name and shape.

    Args:
        trunk: As it is now.
        config: Completed, or of `trunk_arguments`.
        with_classifier: The trunk still has its own classifier.

    Raises:
        ConfigError: they do not; says what was changed.
    """
    if with_classifier:
        config = copy.deepcopy(config)
        config.proj, config.head, config.pool = None, None, "default"
    if (again := _otherwise(trunk, config)) is not None:
        raise _changed(config, trunk, again)


def _otherwise(trunk: nn.Module, config: TimmTowerConfig) -> nn.Module | None:
    """The trunk that a config makes, where its weights have other names or shapes than those of this one."""
    again = create_trunk(config, initialise=False)
    return None if shapes_of(trunk.state_dict()) == shapes_of(again.state_dict()) else again


def record_size(trunk: nn.Module, config: TimmTowerConfig, *, own_trunk: bool = False) -> TimmTowerConfig:
    """The config of a trunk at another size, so that it is built again as it is.

    Args:
        trunk: Of a tower, resized.
        config: Completed, with the new `image_size`.
        own_trunk: A subclass of TimmModel makes the trunk by its own code.

    Raises:
        ConfigError: timm builds another trunk for this size (CrossViT, SAM).
    """
    if not own_trunk and _otherwise(trunk, config) is not None:
        raise ConfigError(
            f"{config.architecture} cannot take image_size={config.image_size}: timm makes other weights for this "
            "size, so that the tower could not be built again. Build a new tower with image_size=..."
        )
    told = timm.models.get_model_traits(trunk).get("img_size")
    if told is None or list(told) == native_size(config) or "img_size" in (config.model_args or {}):
        return config
    # XCiT and others run at any size, and stay as they were built.
    config = copy.deepcopy(config)
    config.model_args = dict(sorted({**(config.model_args or {}), "img_size": list(told)}.items()))
    return config


def record_changes(trunk: nn.Module, config: TimmTowerConfig) -> TimmTowerConfig:
    """The config of a trunk as it is now, where timm can be told to build it so (blocks fused for inference).

    Args:
        trunk: Of a tower, without its classifier.
        config: The completed config that it was built from; it is not changed.

    Raises:
        ConfigError: the trunk was changed in a way that no config says; the message says how.
    """
    again = _otherwise(trunk, config)
    if again is None:
        return config
    fused = copy.deepcopy(config)
    fused.model_args = {**(config.model_args or {}), "inference_mode": True}
    try:
        if _otherwise(trunk, fused) is None:
            return fused
    except TowerError:
        pass  # this architecture cannot be told
    raise _changed(config, trunk, again)


def _changed(config: TimmTowerConfig, trunk: nn.Module, again: nn.Module) -> ConfigError:
    return ConfigError(f"the trunk {config.architecture} cannot be built again as it is: {what_changed(trunk, again)}")


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def preprocess_from_timm(pretrained_cfg: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """timm's `pretrained_cfg` -> the preprocess block.

    Args:
        pretrained_cfg: Of the trunk as it was built.
        in_chans: Channels of the image; where they are not as many as timm has means for, each channel gets the
            average of timm's means and standard deviations, as timm's first convolution is averaged over channels.
    """
    data = resolve_data_config(pretrained_cfg=pretrained_cfg)  # type: ignore[no-untyped-call]
    mean, std = list(data["mean"]), list(data["std"])
    if len(mean) != in_chans:
        mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
    timms = {key: data[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return {**timms, "mean": mean, "std": std, **copy.deepcopy(PLAIN_PREPROCESS)}

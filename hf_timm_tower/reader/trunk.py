"""Config -> timm trunk: the model that a completed config describes, without its classifier."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.nn as nn

from .config import ATTENTION_POOLS, TimmTowerConfig, check_size
from .errors import ArgumentError, ConfigError, one_line, shown
from .model_args import RECORDED, decode
from .skip_init import skip_init

# What timm's constructors raise for arguments they cannot use.
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError,
                RuntimeError, TypeError, ValueError)  # fmt: skip


class UnsupportedPool(ConfigError):
    """The trunk does not have this pool, or not with this projection."""

    def __init__(self, config: TimmTowerConfig, reason: str) -> None:
        super().__init__(
            f"pool={config.pool!r} with proj={config.proj!r} is not supported by {config.architecture}: "
            f"{reason.rstrip('.')}."
        )


def split_tag(architecture: str) -> tuple[str, str]:
    """`arch.tag` -> (arch, tag); the tag is empty where there is none."""
    arch, _, tag = architecture.partition(".")
    return arch, tag


def native_cfg(architecture: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of `arch` or `arch.tag`, or its defaults; `ConfigError` for a tag it does not know."""
    arch, tag = split_tag(architecture)
    try:
        cfg = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        known = sorted(timm.models.get_arch_pretrained_cfgs(arch))
        raise ConfigError(
            f"architecture={architecture!r}: timm {timm.__version__} has no pretrained tag {tag!r} for {arch}. "
            f"It has: {', '.join(name.partition('.')[2] for name in known) or 'none'}"
        ) from error
    cfg = cfg or timm.models.PretrainedCfg()
    return dict(cfg.to_dict())  # type: ignore[no-untyped-call]


def native_size(config: TimmTowerConfig) -> list[int]:
    """The config's image size, or the architecture's own: `[height, width]` in pixels."""
    told = config.image_size if config.image_size is not None else (config.model_args or {}).get("img_size")
    if told is not None:
        return check_size("image_size", told)
    return list(native_cfg(config.architecture)["input_size"][1:])


def create_trunk(config: TimmTowerConfig, *, pretrained: bool = False, initialise: bool = True) -> nn.Module:
    """The trunk that a config describes, in train mode, its classifier removed (or made the projection, `proj=None`).

    Args:
        config: A fresh config (`preprocess` is None: `architecture` may name a pretrained tag), or a completed one.
        pretrained: Fetch timm's weights for the architecture.
        initialise: False leaves all parameters as uninitialised memory, to be assigned.

    Raises:
        ConfigError, ArgumentError: timm cannot build it; says which argument.
    """
    arch, tag = split_tag(config.architecture)
    name = config.architecture
    kwargs = {key: decode(value, f"model_args.{key}") for key, value in (config.model_args or {}).items()}
    cfg = native_cfg(arch if config.preprocess is not None else config.architecture)
    if config.preprocess is not None:
        # Rebuilding: everything is in the config, so that the tag need not be known to this timm.
        name = arch
        kwargs["pretrained_cfg_overlay"] = _preprocess_overlay(config, tag)
    if config.in_chans != cfg["input_size"][0]:
        kwargs["in_chans"] = config.in_chans
    if "img_size" in kwargs:
        kwargs["img_size"] = tuple(check_size("model_args.img_size", kwargs["img_size"]))
    elif config.image_size is not None and has_fixed_size(cfg, kwargs):
        kwargs["img_size"] = tuple(config.image_size)  # type: ignore[arg-type]
    if config.classifier == "construct":
        kwargs["num_classes"] = config.embed_dim if config.proj is None and config.head is None else 0
        if config.pool != "default":
            kwargs["global_pool"] = trunk_pool(config.pool)
    try:
        if initialise:
            trunk = timm.create_model(name, pretrained=pretrained, **kwargs)
        else:
            with skip_init():
                trunk = timm.create_model(name, **kwargs)
    except BUILD_ERRORS as error:
        raise _build_error(config, kwargs, error) from error
    remove_classifier(trunk, config)
    return trunk


def has_fixed_size(cfg: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether timm itself, by its `pretrained_cfg` and these arguments, builds a trunk for one input size: the config's

    For any other trunk `img_size` is what `config.model_args` holds: nothing, or the size that timm was told.
    """
    return bool(
        cfg.get("fixed_input_size") and not kwargs.get("dynamic_img_size") and kwargs.get("strict_img_size", True)
    )


def _preprocess_overlay(config: TimmTowerConfig, tag: str) -> dict[str, Any]:
    preprocess = config.preprocess or {}
    overlay = {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key)}
    overlay.update({key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess.get(key)})
    if tag:
        overlay["tag"] = tag
    return overlay


def remove_classifier(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """Take the trunk's own classifier off and set its pool by timm's `reset_classifier`, or raise `ConfigError`."""
    if config.classifier == "construct":
        return
    pool = trunk_pool(config.pool)
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        # A trunk that came with its classifier keeps it as the projection; another pool would need another classifier.
        if pool is not None and pool != own_pool(trunk):
            raise UnsupportedPool(config, f"the classifier that is kept was made for pool {own_pool(trunk)!r}")
        return
    if not hasattr(trunk, "reset_classifier"):
        # Encoders (features only) have nothing to remove and nothing to set.
        if pool:
            raise ConfigError(
                f"pool={config.pool!r}: {config.architecture} has no pooling of its own (timm gives it no "
                "reset_classifier); use pool='default' or 'none'."
            )
        return
    try:
        if pool is None or pool == own_pool(trunk):
            trunk.reset_classifier(0)  # type: ignore[operator]
        else:
            trunk.reset_classifier(0, global_pool=pool)  # type: ignore[operator]
    except BUILD_ERRORS as error:
        raise UnsupportedPool(config, one_line(error)) from error


def _build_error(config: TimmTowerConfig, kwargs: dict[str, Any], error: BaseException) -> ConfigError | ArgumentError:
    text = one_line(str(error) or type(error).__name__)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        name = text.rsplit("'", 2)[-2]
        if name == "global_pool":
            return UnsupportedPool(config, text)
        if name in (config.model_args or {}) and name not in RECORDED:
            return ArgumentError(f"model_kwargs[{shown(name)}]: {config.architecture} does not take it ({text})")
    if kwargs.get("global_pool") and ("pool" in text.lower() or isinstance(error, AssertionError)):
        return UnsupportedPool(config, text)
    given = {key: value for key, value in kwargs.items() if key != "pretrained_cfg_overlay"}
    return ConfigError(f"timm cannot build {config.architecture} with {shown(given, 300)}: {text}")


def trunk_pool(pool: str | None) -> str | None:
    """The tower's pool -> what the trunk is asked for: None leaves its own, `""` is unpooled."""
    if pool in (*ATTENTION_POOLS, "token_avg", "none"):
        return ""
    return None if pool == "default" else pool


def own_pool(trunk: nn.Module) -> str | None:
    """Name of the pool that the trunk has now, `""` for none, None if it does not say.

    Read from the module that pools before the attribute of the model, which some models leave at its first value.
    """
    head = getattr(trunk, "head", None)
    for holder in (
        getattr(head, "global_pool", None),
        getattr(head, "pool_type", None),
        getattr(trunk, "global_pool", None),
    ):
        name = getattr(holder, "pool_type", holder)
        if isinstance(name, str):
            return name
    return None


def class_and_patch_tokens(trunk: nn.Module) -> int | None:
    """Number of prefix tokens of a trunk with a class token first, None where there is no class token."""
    prefix = getattr(trunk, "num_prefix_tokens", None)
    tokens = (getattr(trunk, "cls_token", None), getattr(getattr(trunk, "embeds", None), "cls_token", None))
    if not isinstance(prefix, int) or prefix < 1 or all(token is None for token in tokens):
        return None
    return prefix


def float_dtype(trunk: nn.Module) -> torch.dtype:
    """dtype of the images that the trunk takes: that of its first floating-point parameter."""
    return next((tensor.dtype for tensor in trunk.parameters() if tensor.is_floating_point()), torch.float32)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def buffers_as_timm(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the buffers that no file holds the dtype that `module.to(dtype)` gives them, once the weights are in.

    timm keeps some tables in float32 (RoPE frequencies and periods), by an `_apply` of their modules. So it is asked:
    these modules are cast by their own `_apply`, everything but such buffers left as it is.
    """
    cast: dict[int, torch.Tensor] = {}
    for part in every_module(module):
        if not part._non_persistent_buffers_set:
            continue
        computed = {id(part._buffers.get(name)) for name in part._non_persistent_buffers_set}
        if any(id(each) in computed and each.is_floating_point() for each in part.buffers(recurse=False)):
            part._apply(  # type: ignore[no-untyped-call]
                lambda tensor, computed=computed: (
                    # One buffer that several modules hold stays one.
                    cast.setdefault(id(tensor), tensor.to(dtype))
                    if id(tensor) in computed and tensor.is_floating_point()
                    else tensor
                ),
                recurse=False,
            )


def every_module(module: nn.Module) -> list[nn.Module]:
    """As `modules()`, whose generators take several times as long."""
    found, known = [module], {id(module)}
    for part in found:  # it grows
        for child in part._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found

"""Config -> timm trunk, and what the trunk really gives: width, layout, pools, input size.

Nothing here trusts a trunk's attributes where a shape can be had: the output is taken from a run on the meta device,
which costs no arithmetic.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn as nn

from .config import ATTENTION_POOLS, TimmTowerConfig
from .errors import ArgumentError, ConfigError
from .model_args import decode
from .pools import ALL_POOLS, ATTENTION_HEAD_WIDTH, PoolRefused, class_and_patch_tokens, own_pool, trunk_pool
from .skip_init import skip_init

Layout = Literal["NC", "NLC", "NCHW", "NHWC"]

# What timm's constructors raise for arguments they cannot use.
BUILD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
                ValueError, ZeroDivisionError)  # fmt: skip


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


def split_tag(architecture: str) -> tuple[str, str]:
    """`arch.tag` -> (arch, tag); the tag is empty where there is none."""
    arch, _, tag = architecture.partition(".")
    return arch, tag


def native_cfg(architecture: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of `arch` or `arch.tag`, with the defaults of timm where the registry has none.

    Raises:
        ConfigError: the tag is unknown to this timm.
    """
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


def create_trunk(config: TimmTowerConfig, *, pretrained: bool = False, initialise: bool = True) -> nn.Module:
    """Build the trunk that the config describes, its classifier removed (or made the projection, `proj=None`).

    Args:
        config: A fresh config (`preprocess` is None: `architecture` may name a pretrained tag), or a completed one.
        pretrained: Fetch timm's weights for the architecture.
        initialise: False leaves all parameters as uninitialised memory, to be assigned.

    Returns:
        The trunk, in train mode, on the CPU.

    Raises:
        ConfigError, ArgumentError: timm cannot build it; says which argument, and which pools there are.
    """
    arch, tag = split_tag(config.architecture)
    name = config.architecture
    kwargs = {key: decode(value, f"model_args.{key}") for key, value in (config.model_args or {}).items()}
    cfg = native_cfg(arch if config.preprocess is not None else config.architecture)
    if config.preprocess is not None:
        # Rebuilding: everything is in the config, so that the tag need not be known to this timm.
        name = arch
        kwargs["pretrained_cfg_overlay"] = _overlay(config, tag)
    if config.in_chans != cfg["input_size"][0]:
        kwargs["in_chans"] = config.in_chans
    if config.image_size is not None and takes_img_size(cfg, kwargs):
        kwargs["img_size"] = tuple(config.image_size)  # type: ignore[arg-type]
    if config.classifier == "construct":
        kwargs["num_classes"] = 0 if config.proj == "none" else config.embed_dim
        if config.pool != "default":
            kwargs["global_pool"] = "" if config.pool == "none" else config.pool
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


def takes_img_size(cfg: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether this trunk is built for one input size, as timm itself decides it."""
    return bool(
        cfg.get("fixed_input_size") and not kwargs.get("dynamic_img_size") and kwargs.get("strict_img_size", True)
    )


def _overlay(config: TimmTowerConfig, tag: str) -> dict[str, Any]:
    preprocess = config.preprocess or {}
    overlay = {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key)}
    overlay.update({key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess.get(key)})
    if tag:
        overlay["tag"] = tag
    return overlay


def remove_classifier(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """Take the trunk's own classifier off and set its pool, by timm's `reset_classifier`.

    Raises:
        ConfigError: the trunk cannot do it.
    """
    if config.classifier == "construct":
        return
    pool = trunk_pool(config.pool)
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        # A trunk that came with its classifier keeps it as the projection; another pool would need another classifier.
        if pool is not None and pool != own_pool(trunk):
            raise PoolRefused(config, f"the classifier that is kept was made for pool {own_pool(trunk)!r}")
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
        raise PoolRefused(config, str(error)) from error


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
    twin = _meta_twin(trunk)
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
    return describe_output(trunk, features.shape)


def describe_output(trunk: nn.Module, shape: torch.Size | tuple[int, ...]) -> TrunkOutput:
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


def float_dtype(trunk: nn.Module) -> torch.dtype:
    """dtype of the images that the trunk takes: that of its first floating-point parameter."""
    return next((tensor.dtype for tensor in trunk.parameters() if tensor.is_floating_point()), torch.float32)


def _meta_twin(trunk: nn.Module) -> nn.Module:
    """A copy of the trunk in eval mode whose tensors have no memory. A copy, for models that cache by input size."""
    memo: dict[int, Any] = {}
    for parameter in trunk.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in trunk.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(trunk, memo).eval()


def _run_for_real(trunk: nn.Module, shape: tuple[int, ...]) -> Any:
    anchor = next(trunk.parameters())
    try:
        with torch.no_grad(), eval_mode(trunk):
            return trunk(torch.zeros(shape, device=anchor.device, dtype=anchor.dtype))
    except BUILD_ERRORS as error:
        raise ConfigError(
            f"{type(trunk).__name__} does not run on an image of shape {shape[1:]} (C, H, W): {error}"
        ) from error


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


def native_size(config: TimmTowerConfig) -> list[int]:
    """The config's image size, or the architecture's own: `[height, width]` in pixels."""
    if config.image_size is not None:
        return list(config.image_size)  # type: ignore[arg-type]
    return list(native_cfg(config.architecture)["input_size"][1:])


def check_pool(trunk: nn.Module, config: TimmTowerConfig, output: TrunkOutput) -> None:
    """The pool that was asked for is the one that runs.

    A trunk that takes a name and then ignores it would give another vector without a word.

    Raises:
        ConfigError: lists the pools that the trunk offers.
    """
    wanted = trunk_pool(config.pool)
    has = own_pool(trunk)
    if wanted is not None and has is not None and has != wanted and hasattr(trunk, "reset_classifier"):
        raise PoolRefused(config, f"the trunk keeps its pool {has!r}")
    if wanted == "" and output.layout == "NC":
        raise PoolRefused(config, "the trunk still gives a vector")
    if wanted and output.layout != "NC":
        raise PoolRefused(config, f"the trunk gives {output.layout} features, not a vector")
    if config.pool in ATTENTION_POOLS and output.layout not in ("NCHW", "NHWC"):
        raise PoolRefused(config, f"attention pools need a feature map, the trunk gives {output.layout}")
    if config.pool in ATTENTION_POOLS and output.width % ATTENTION_HEAD_WIDTH:
        raise PoolRefused(
            config, f"attention heads are {ATTENTION_HEAD_WIDTH} wide, which does not divide the width {output.width}"
        )
    if config.pool == "token_avg" and (output.layout != "NLC" or class_and_patch_tokens(trunk) is None):
        raise PoolRefused(config, "it needs tokens with a class token first")


def offered_pools(config: TimmTowerConfig, among: Sequence[str] = ALL_POOLS) -> list[str]:
    """The pools that work for this architecture and projection, found by trying each on the meta device."""
    found = []
    for pool in among:
        trial = copy.deepcopy(config)
        trial.pool = pool
        try:
            trunk = create_trunk(trial, initialise=False)
            check_pool(trunk, trial, trunk_output(trunk, trial.in_chans, native_size(trial)))
        except ConfigError:
            continue
        found.append(pool)
    return found


def describe_trunk(trunk: nn.Module) -> dict[str, Any]:
    """How a timm model that exists was made, as it is now: fields of the config.

    Returns:
        `architecture`, `model_args`, `image_size` and `in_chans`.

    Raises:
        ConfigError: it is not a model of timm's registry.
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
    args = {key: value for key, value in args.items() if value is not None}
    traits = timm.models.get_model_traits(trunk)
    size = args.pop("img_size", None) or cfg["input_size"][1:]
    in_chans = args.pop("in_chans", None) or traits.get("in_chans") or cfg["input_size"][0]
    tag = cfg.get("tag")
    return {
        "architecture": f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"],
        "model_args": args,
        "image_size": [size, size] if isinstance(size, int) else list(size),
        "in_chans": in_chans,
    }


def check_made_again(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """A trunk that exists and the trunk that its config makes have the same weights by name and shape.

    Raises:
        ConfigError: they do not: the trunk was changed by hand.
    """
    keep = copy.deepcopy(config)
    keep.proj, keep.head, keep.pool = None, None, "default"  # the classifier stays on
    again = create_trunk(keep, initialise=False)
    ours = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in again.state_dict().items()}
    if ours != theirs:
        odd = sorted(key for key in set(ours) | set(theirs) if ours.get(key) != theirs.get(key))
        raise ConfigError(
            f"the trunk {config.architecture} cannot be built again as it is: with its own arguments "
            f"{config.model_args} timm makes other weights ({len(odd)} keys differ, {', '.join(odd[:4])}). It was "
            "changed by hand; subclass TimmModel and override _create_trunk."
        )


def _build_error(config: TimmTowerConfig, kwargs: dict[str, Any], error: BaseException) -> ConfigError | ArgumentError:
    text = str(error) or type(error).__name__
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        name = text.rsplit("'", 2)[-2]
        if name == "global_pool":
            return PoolRefused(config, text)
        if name in (config.model_args or {}):
            return ArgumentError(f"model_kwargs[{name!r}]: {config.architecture} does not take it ({text})")
    if kwargs.get("global_pool") and ("pool" in text.lower() or isinstance(error, AssertionError)):
        return PoolRefused(config, text)
    given = {key: value for key, value in kwargs.items() if key != "pretrained_cfg_overlay"}
    return ConfigError(f"timm cannot build {config.architecture} with {given}: {text}")

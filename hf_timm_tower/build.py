"""Arguments -> config -> tower: the one way in which a new tower comes about, for `TimmModel` and for transformers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from .heads.isolation import output_of, width_of
from .heads.registry import CustomHead, rebuild_stored
from .reader.config import ATTENTION_POOLS, TimmTowerConfig
from .reader.errors import ArgumentError, ConfigError, HeadError
from .reader.head import LIVE, SUBCLASS, builtin_head
from .reader.image_processing import check_preprocess
from .reader.model_args import check_names
from .reader.tower import HeadInput, Tower, build_tower, check_buildable, make_classifier
from .reader.trunk import UnsupportedPool, create_trunk, float_dtype, native_size, own_pool
from .trunk_facts import TrunkOutput, check_pool, offered_pools, preprocess_from_timm, settle_arguments, trunk_output

# --- arguments -> config


def checked_arguments(model_kwargs: Any) -> dict[str, Any]:
    """A copy of the constructor's `model_kwargs`, checked.

    Raises:
        ArgumentError: not a dict.
        ConfigError: an argument that a tower does not take from there.
    """
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, dict):
        raise ArgumentError(f"model_kwargs={model_kwargs!r}: expected a dict of arguments of timm.create_model")
    check_names(model_kwargs)
    return dict(model_kwargs)


@dataclass(frozen=True)
class Rates:
    """Regularisation that a stored tower is loaded with in place of its own; None keeps that.

    Attributes:
        drop: Dropout probability of the projection.
        drop_path: Stochastic depth rate of the trunk.
        patch_drop: Patch dropout rate of the trunk.
    """

    drop: float | None = None
    drop_path: float | None = None
    patch_drop: float | None = None

    def put_into(self, config: TimmTowerConfig) -> TimmTowerConfig:
        """The same config with these rates.

        Raises:
            ConfigError: not a rate.
            ArgumentError: the tower has no projection of ours that `drop` could be for.
        """
        named = {"drop_path_rate": self.drop_path, "patch_drop_rate": self.patch_drop}
        done = copy.deepcopy(config)
        args = {name: value for name, value in (config.model_args or {}).items() if named.get(name) is None}
        add_rates(args, self.drop_path, self.patch_drop)
        done.model_args = dict(sorted(args.items()))
        if self.drop is not None:
            _check_rate("drop", self.drop)
            if config.head is not None or config.proj not in ("linear", "mlp"):
                raise ArgumentError(
                    f"drop={self.drop} is for the built-in projection, which this tower does not have; drop_path and "
                    "patch_drop are the trunk's"
                )
            done.drop = float(self.drop)
        return done


def add_rates(model_args: dict[str, Any], drop_path: float | None, patch_drop: float | None) -> None:
    """Put the constructor's `drop_path` and `patch_drop` among the arguments of `timm.create_model`.

    Raises:
        ConfigError: not a rate.
        ArgumentError: given there too, with another value.
    """
    for name, rate in (("drop_path_rate", drop_path), ("patch_drop_rate", patch_drop)):
        if rate is None:
            continue
        _check_rate(name, rate)
        if model_args.setdefault(name, rate) != rate:
            raise ArgumentError(f"{name} is given twice, as {rate} and in model_kwargs as {model_args[name]}")


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ConfigError(f"{name}={rate!r}: expected a rate, 0 <= rate < 1")


def head_fields(
    own_head: bool,
    embed_dim: int | None,
    pool: str | None,
    proj: str | None,
    proj_bias: bool,
    drop: float,
    custom_head: CustomHead | None,
) -> dict[str, Any]:
    """The fields of the config that say what comes after the trunk.

    Args:
        own_head: The class of the tower makes a head of its own.
        embed_dim, pool, proj, proj_bias, drop, custom_head: As in `TimmModel`.

    Raises:
        ConfigError: the pool is not a name.
        ArgumentError: a custom head beside arguments of the built-in projection.
    """
    if pool is not None and not isinstance(pool, str):
        raise ConfigError(f"pool={pool!r}: expected the name of a pool, or None")
    if custom_head is not None:
        given = {"proj": (proj, ("linear", "none", None, "")), "proj_bias": (proj_bias, (False,)), "drop": (drop, (0,))}
        for name, (value, neutral) in given.items():
            if value not in neutral:
                raise ArgumentError(f"{name}={value!r} is for the built-in projection; the custom head has its own")
        proj = "none"
        if pool in ATTENTION_POOLS:
            raise ArgumentError(f"pool={pool!r} is itself a head with weights; a custom head takes pool='none'")
    has_head = own_head or custom_head is not None
    if pool is None or (pool == "" and has_head):
        pool = "none"
    return {
        "embed_dim": embed_dim,
        "pool": pool or "default",
        "proj": proj,
        "proj_bias": proj_bias,
        "drop": drop,
        "head": {"form": LIVE if custom_head is not None else SUBCLASS} if has_head else None,
    }


# --- config -> tower


def build_parts(
    config: TimmTowerConfig,
    make_trunk: Callable[[TimmTowerConfig], nn.Module],
    make_head: Callable[[TimmTowerConfig], nn.Module],
) -> tuple[TimmTowerConfig, nn.Module, nn.Module, HeadInput]:
    """Trunk and head of a config, and the config completed by what they are.

    Args:
        config: Fresh or completed; it is not changed.
        make_trunk: The config, with all that timm must be told -> the trunk.
        make_head: The completed config -> the head.

    Returns:
        The completed config, trunk, head, and how the trunk's features become the head's input.

    Raises:
        ConfigError: the trunk cannot be built, or its pool is not supported; lists those that are.
        HeadError: the head does not fit what the pool leaves, or gives another width than `embed_dim`.
    """
    fresh, example = config.num_features is None, None
    try:
        config = settle_arguments(config) if fresh else copy.deepcopy(config)
        trunk = make_trunk(config)
    except UnsupportedPool as error:
        raise with_supported(error, config) from error
    if fresh:
        config, output = resolve_config(config, trunk)
        example = example_input(config, trunk, output)
    head = make_head(config)
    if config.head is not None:
        if example is not None:
            config.embed_dim = check_embedding(config, head, example)
        config.head.setdefault("class", type(head).__name__)
    elif not len(head):  # type: ignore[arg-type]  # a built-in head is a Sequential
        config.embed_dim = _width_of_nothing(config)
    return config, trunk, head, HeadInput.of(config, trunk)


def build_for_transformers(config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:
    """`reader.tower.build_tower`, for configs that are not completed too.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """
    if make_head is None and config.head is not None:
        make_head = partial(rebuild_stored, config.head)
    if config.num_features is not None:
        return build_tower(config, with_classifier=with_classifier, make_head=make_head)
    check_buildable(config)

    def head_of(done: TimmTowerConfig) -> nn.Module:
        made: nn.Module = builtin_head(done) if make_head is None else make_head()
        return made.to(dtype=torch.get_default_dtype())

    done, trunk, head, _ = build_parts(config, create_trunk, head_of)
    return Tower(done, trunk, head, make_classifier(done) if with_classifier else None)


def resolve_config(config: TimmTowerConfig, trunk: nn.Module) -> tuple[TimmTowerConfig, TrunkOutput]:
    """The config, completed by what the trunk is (pool, width, layout, input size, preprocessing), and its output.

    Raises:
        ConfigError: pool, image size and trunk do not go together; a stored config does not describe this trunk.
    """
    done = copy.deepcopy(config)
    done.image_size = native_size(config)
    output = trunk_output(trunk, done.in_chans, done.image_size)
    try:
        check_pool(trunk, done, output)
    except UnsupportedPool as error:
        raise with_supported(error, config) from error
    if done.pool == "default" and hasattr(trunk, "reset_classifier"):
        name = own_pool(trunk)
        done.pool = {None: "default", "": "none"}.get(name, name)
    if done.proj is None and done.head is None and done.pool not in ATTENTION_POOLS:
        if done.embed_dim is None:
            raise ConfigError(
                "embed_dim=None: proj=None makes the trunk's own classifier the projection, of that width"
            )
    done.layout = output.layout
    done.num_features = 2 * output.width if done.pool == "token_avg" else output.width
    done.feat_size = list(output.size) if output.layout in ("NCHW", "NHWC") else None
    if done.preprocess is None:
        done.preprocess = preprocess_from_timm(trunk.pretrained_cfg, done.in_chans)  # type: ignore[arg-type]
    check_preprocess(done.preprocess, done.in_chans)
    return done, output


def with_supported(error: UnsupportedPool, config: TimmTowerConfig) -> ConfigError:
    """A refused pool -> an error that lists the pools which the trunk supports."""
    if supported := offered_pools(config):
        return ConfigError(f"{error} Supported pools: {', '.join(supported)}.")
    return ConfigError(f"{error} No pool works with proj={config.proj!r}; use proj='linear', 'mlp' or 'none'.")


def example_input(config: TimmTowerConfig, trunk: nn.Module, output: TrunkOutput | None = None) -> torch.Tensor:
    """An input for the head of a completed config, of the sizes and dtype that the trunk gives: `[2, ...]`.

    Args:
        config: Completed.
        trunk: The trunk.
        output: What it gives, where that is known already.
    """
    output = output or trunk_output(trunk, config.in_chans, native_size(config))
    shape = {
        "NC": (2, output.width),
        "NLC": (2, *output.size, output.width),
        "NCHW": (2, output.width, *output.size),
        "NHWC": (2, *output.size, output.width),
    }[output.layout]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return HeadInput.of(config, trunk)(features.to(float_dtype(trunk)))


def check_embedding(config: TimmTowerConfig, head: nn.Module, example: torch.Tensor) -> int | None:
    """Width of what the head really gives; what the user said must agree.

    Args:
        config: A completed config.
        head: A custom head.
        example: From `example_input`.

    Returns:
        The embedding's width, None where the head gives a tuple, a dict or another rank.

    Raises:
        HeadError: the head fails on what the pool leaves, or gives another width than `embed_dim`.
    """
    where = f"what pool={config.pool!r} of {config.architecture} leaves ({config.layout})"
    width = width_of(output_of(head, example, where))
    if width is None:
        return config.embed_dim
    if config.embed_dim is not None and width != config.embed_dim:
        raise HeadError(
            f"embed_dim={config.embed_dim}, but the head {type(head).__name__} gives width {width}. "
            f"Pass embed_dim={width}, or embed_dim=None to take what the head gives."
        )
    return width


def _width_of_nothing(config: TimmTowerConfig) -> int | None:
    """Width of the embedding where no layer comes after the trunk.

    Raises:
        ConfigError: `proj="none"` with an `embed_dim` that is not the trunk's width.
    """
    if config.embed_dim is not None and config.embed_dim != config.num_features:
        raise ConfigError(
            f"embed_dim={config.embed_dim}: with proj={config.proj!r} the embedding is what the trunk gives, of width "
            f"{config.num_features}. Pass embed_dim={config.num_features} or None, or use proj='linear'."
        )
    return config.num_features

"""Config -> tower, and the one forward that both faces use."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from ..trunk_facts import TrunkOutput, check_pool, offered_pools, trunk_output
from .config import TimmTowerConfig
from .errors import ConfigError, HeadError
from .head import builtin_head, output_of, width_of
from .image_processing import check_preprocess, preprocess_from_timm
from .trunk import UnsupportedPool, class_and_patch_tokens, float_dtype, native_size, own_pool


@dataclass(frozen=True)
class Arrangement:
    """How the trunk's features become the head's input.

    Attributes:
        prefix: Number of prefix tokens for `token_avg`, else None.
        to_nchw: The trunk gives `[B, H, W, C]` and the head takes `[B, C, H, W]`.
        per_position: The projection runs over the channels of every position of a `[B, C, H, W]` map.
    """

    prefix: int | None = None
    to_nchw: bool = False
    per_position: bool = False

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the trunk gives them -> the head's input."""
        if self.prefix is not None:
            patches = features[:, self.prefix :]
            return torch.cat([features[:, 0], patches.mean(dim=1)], dim=1)
        if self.to_nchw:
            return features.permute(0, 3, 1, 2).contiguous()
        return features


def arrange(config: TimmTowerConfig, trunk: nn.Module) -> Arrangement:
    """The arrangement that a completed config needs."""
    if config.pool == "token_avg":
        return Arrangement(prefix=class_and_patch_tokens(trunk))
    wants_map = config.head is not None or config.pool in ("abs_attn", "rot_attn")
    return Arrangement(
        to_nchw=wants_map and config.layout == "NHWC",
        per_position=not wants_map and config.layout == "NCHW" and config.proj in ("linear", "mlp"),
    )


def run_head(head: nn.Module, arrangement: Arrangement, features: torch.Tensor) -> Any:
    """Pooled or unpooled features of the trunk -> the embedding (whatever the head returns)."""
    inputs = arrangement(features)
    if arrangement.per_position:
        return head(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return head(inputs)


def complete(config: TimmTowerConfig, trunk: nn.Module) -> tuple[TimmTowerConfig, TrunkOutput]:
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
        raise with_offers(error, config) from error
    if done.pool == "default" and hasattr(trunk, "reset_classifier"):
        name = own_pool(trunk)
        done.pool = {None: "default", "": "none"}.get(name, name)
    if done.proj is None and done.head is None and done.pool not in ("abs_attn", "rot_attn"):
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


def with_offers(error: UnsupportedPool, config: TimmTowerConfig) -> ConfigError:
    """A refused pool -> an error that lists the pools which the trunk offers."""
    supported = offered_pools(config)
    if supported:
        return ConfigError(f"{error} Supported pools: {', '.join(supported)}.")
    return ConfigError(f"{error} No pool works with proj={config.proj!r}; use proj='linear', 'mlp' or 'none'.")


def head_example(config: TimmTowerConfig, trunk: nn.Module) -> torch.Tensor:
    """An input for the head of a completed config, of the sizes and dtype that the trunk gives: `[2, ...]`."""
    output = trunk_output(trunk, config.in_chans, native_size(config))
    return head_input(config, trunk, output)


def head_input(config: TimmTowerConfig, trunk: nn.Module, output: TrunkOutput) -> torch.Tensor:
    """The same from an output that is known already."""
    shape = {
        "NC": (2, output.width),
        "NLC": (2, *output.size, output.width),
        "NCHW": (2, output.width, *output.size),
        "NHWC": (2, *output.size, output.width),
    }[output.layout]
    generator = torch.Generator().manual_seed(0)
    return arrange(config, trunk)(torch.randn(shape, generator=generator).to(float_dtype(trunk)))


def check_embedding(config: TimmTowerConfig, head: nn.Module, example: torch.Tensor) -> int | None:
    """Width of what the head really gives; what the user said must agree.

    Args:
        config: A completed config.
        head: Built-in or custom.
        example: From `head_example`.

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


def make_builtin(config: TimmTowerConfig) -> tuple[nn.Sequential, int | None]:
    """The built-in head of a completed config, and the embedding's width (no run needed: it follows).

    Raises:
        ConfigError: `proj="none"` with an `embed_dim` that is not the trunk's width.
    """
    head = builtin_head(config)
    if len(head):
        return head, config.embed_dim
    if config.embed_dim is not None and config.embed_dim != config.num_features:
        raise ConfigError(
            f"embed_dim={config.embed_dim}: with proj={config.proj!r} the embedding is what the trunk gives, of width "
            f"{config.num_features}. Pass embed_dim={config.num_features} or None, or use proj='linear'."
        )
    return head, config.num_features

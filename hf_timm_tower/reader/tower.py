"""A completed config -> a tower, and the one forward that every class of a tower uses."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .config import ATTENTION_POOLS, TimmTowerConfig
from .errors import ConfigError, HeadError, shown
from .head import LIVE, SUBCLASS, builtin_head, rebuild_head
from .image_processing import check_preprocess
from .trunk import class_and_patch_tokens, create_trunk

CLASSIFIER = "classifier"
"""Name of the classifier that an image classification model has on top of its tower, in modules and weight keys."""


@dataclass(frozen=True)
class HeadInput:
    """How the trunk's features become the head's input."""

    prefix: int | None = None  # number of prefix tokens for `token_avg`
    to_nchw: bool = False  # the trunk gives `[B, H, W, C]` and the head takes `[B, C, H, W]`
    per_position: bool = False  # the projection runs over the channels of every position of a `[B, C, H, W]` map

    @classmethod
    def of(cls, config: TimmTowerConfig, trunk: nn.Module) -> "HeadInput":
        """What a completed config asks for."""
        if config.pool == "token_avg":
            return cls(prefix=class_and_patch_tokens(trunk))
        wants_map = config.head is not None or config.pool in ATTENTION_POOLS
        return cls(
            to_nchw=wants_map and config.layout == "NHWC",
            per_position=not wants_map and config.layout == "NCHW" and config.proj in ("linear", "mlp"),
        )

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the trunk gives them -> the head's input."""
        if self.prefix is not None:
            patches = features[:, self.prefix :]
            return torch.cat([features[:, 0], patches.mean(dim=1)], dim=1)
        if self.to_nchw:
            return features.permute(0, 3, 1, 2).contiguous()
        return features


def run_head(head: nn.Module, head_input: HeadInput, features: torch.Tensor) -> Any:
    """Pooled or unpooled features of the trunk -> the embedding (whatever the head returns)."""
    inputs = head_input(features)
    if head_input.per_position:
        return head(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return head(inputs)


class Tower(nn.Module):
    """Trunk and head of a completed config, and nothing else: what a folder holds and what a save compares.

    A classifier on top of the embedding is stored beside it; `forward` leaves it out.
    """

    _tp_plan = _pp_plan = None  # transformers asks a `base_model` for these

    def __init__(
        self, config: TimmTowerConfig, trunk: nn.Module, head: nn.Module, classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.head = head
        if classifier is not None:
            self.add_module(CLASSIFIER, classifier)
        self.head_input = HeadInput.of(config, trunk)

    def forward(self, images: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]` -> the embedding `[B, embed_dim]`, or whatever a custom head returns."""
        return run_head(self.head, self.head_input, self.trunk(images))


def build_tower(
    config: TimmTowerConfig, *, with_classifier: bool = False, make_head: Callable[[], nn.Module] | None = None
) -> Tower:
    """A tower with fresh weights, in train mode, from a completed config alone, which is not changed.

    Args:
        config: Completed.
        with_classifier: Add the classifier of `config.num_labels` classes.
        make_head: Makes a head that is stored as code, and trusted; None refuses such heads.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """
    check_buildable(config)
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; hf_timm_tower.TimmModel completes it")
    config = copy.deepcopy(config)
    trunk = create_trunk(config)
    if config.head is None:
        head: nn.Module = builtin_head(config)
    else:
        head = rebuild_head(config.head) if make_head is None else make_head()
    return Tower(config, trunk, head, make_classifier(config) if with_classifier else None)


def check_buildable(config: TimmTowerConfig) -> None:
    """Refuse a config that only its own class can build: `ConfigError`, `HeadError` say what is needed."""
    if config.tower_class is not None:
        raise ConfigError(
            f"this tower was saved by {shown(config.tower_class)}, a subclass of TimmModel that changes how it is "
            "built or run; transformers' classes cannot build it. Load it with that class's from_pretrained(...)."
        )
    if config.preprocess is not None:
        check_preprocess(config.preprocess, config.in_chans)  # timm is told it, and would raise what it likes
    if config.head is not None and config.head.get("form") in (LIVE, SUBCLASS):
        raise HeadError("the config says that there is a custom head, but not which: save the tower with its head")


def without_head(config: TimmTowerConfig) -> TimmTowerConfig:
    """The same trunk without a head: the config of a tower that gives what its trunk pools."""
    bare = copy.deepcopy(config)
    if config.frozen is not None:
        bare.frozen = {
            key: [name for name in names if f"{name}.".startswith("trunk.")] for key, names in config.frozen.items()
        }
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        return bare  # the head is the trunk's own classifier
    bare.head, bare.proj, bare.proj_bias, bare.drop = None, "none", False, 0.0
    if config.pool in (*ATTENTION_POOLS, "token_avg"):
        bare.pool = "none"
        if config.pool == "token_avg" and config.num_features is not None:
            bare.num_features = config.num_features // 2
    bare.embed_dim = bare.num_features
    return bare


def make_classifier(config: TimmTowerConfig) -> nn.Module:
    """A fresh classifier `[B, embed_dim]` -> `[B, num_labels]`; nothing where the trunk's own gives the scores.

    `ConfigError` where the embedding has no width, or there are no labels.
    """
    if config.embed_dim is None:
        raise ConfigError(
            "a classifier needs an embedding of a known width; this tower's head gives a tuple, a dict or another rank"
        )
    if config.is_classifier:
        if config.num_labels != config.embed_dim:
            config.num_labels = config.embed_dim
        return nn.Identity()
    if not config.num_labels:
        raise ConfigError("num_labels=0: a classifier needs at least one label; pass num_labels=... or id2label={...}")
    layer = nn.Linear(config.embed_dim, config.num_labels)
    init_classifier(layer)
    return layer


def init_classifier(layer: nn.Linear) -> None:
    """Fresh weights as transformers gives its own classifiers: normal of deviation 0.02, bias 0."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def has_classifier(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether among these weights there are those of a classifier."""
    return any(key.startswith(f"{CLASSIFIER}.") for key in weights)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 on the CPU for what is made inside, whatever the process has set as its default dtype and device.

    What a constructor computes (relative positions, rotary tables) is then the same everywhere. Also a decorator.
    """
    wanted = torch.get_default_dtype()
    # Only where it is needed: under a device context torch goes through Python at every call.
    with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(wanted)

"""A tower as both faces share it: built from its config, read from a folder, its config in the form that is stored."""

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn as nn

from ..files.assign import assign_weights
from ..files.folder import building_budget, read_tower
from ..files.names import HEAD_CODE_NAME
from ..heads.head_code import construct_code, describe_code
from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, HeadError
from .freezing import describe_frozen, head_without_lock
from .graph_head import GraphHead
from .head import LIVE, SUBCLASS, builtin_head, known_arguments, rebuild_head, store_head
from .pools import PoolRefused
from .skip_init import no_init
from .tower import (
    arrange,
    check_embedding,
    complete,
    head_example,
    head_input,
    make_builtin,
    run_head,
    with_offers,
)
from .trunk import create_trunk, float_dtype

Steps = Literal["features", "features, head", "whole"]

CLASSIFIER = "classifier"
"""Name of the classifier that an image classification model has on top of its tower, in modules and weight keys."""


class Tower(nn.Module):
    """Trunk and head, and nothing else: what a folder holds and what saving compares.

    Args:
        config: A completed config.
        trunk: The trunk.
        head: The head.
        classifier: A layer on top of the embedding, stored beside it; `forward` leaves it out.
    """

    def __init__(
        self, config: TimmTowerConfig, trunk: nn.Module, head: nn.Module, classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.head = head
        if classifier is not None:
            self.add_module(CLASSIFIER, classifier)
        self.arrangement = arrange(config, trunk)

    def forward(self, images: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]` -> the embedding `[B, embed_dim]`, or whatever a custom head returns."""
        return run_head(self.head, self.arrangement, self.trunk(images))


def build(
    config: TimmTowerConfig, *, with_classifier: bool = False, make_head: Callable[[], nn.Module] | None = None
) -> Tower:
    """A tower with fresh weights, in train mode, from a config alone.

    Args:
        config: Completed or not; it is not changed.
        with_classifier: Add the classifier of `config.num_labels` classes.
        make_head: Makes a head that is stored as code, and trusted; None refuses such heads.

    Raises:
        ConfigError: the config needs a subclass of TimmModel, or describes no tower.
        HeadError: the head cannot be rebuilt in this process.
    """
    if config.tower_class is not None:
        raise ConfigError(
            f"this tower was saved by {config.tower_class}, a subclass of TimmModel that changes how it is built or "
            f"run; transformers' classes cannot build it. Load it with {config.tower_class}.from_pretrained(...)."
        )
    form = None if config.head is None else config.head.get("form")
    if form in (LIVE, SUBCLASS):
        raise HeadError("the config says that there is a custom head, but not which: save the tower with its head")
    try:
        trunk = create_trunk(config)
    except PoolRefused as error:
        raise with_offers(error, config) from error
    fresh = config.num_features is None
    example = None
    if fresh:
        config, output = complete(config, trunk)
        example = head_input(config, trunk, output)
    else:
        config = copy.deepcopy(config)
    if config.head is not None:
        head = rebuild_head(config.head) if make_head is None else make_head()
    else:
        head, config.embed_dim = make_builtin(config)
    if example is not None:
        head.to(dtype=float_dtype(trunk))
        config.embed_dim = check_embedding(config, head, example)
    return Tower(config, trunk, head, make_classifier(config) if with_classifier else None)


def make_classifier(config: TimmTowerConfig) -> nn.Linear:
    """A fresh classifier `[B, embed_dim]` -> `[B, num_labels]`.

    Raises:
        ConfigError: the embedding has no width, or there are no labels.
    """
    if config.embed_dim is None:
        raise ConfigError(
            "a classifier needs an embedding of a known width; this tower's head gives a tuple, a dict or another rank"
        )
    if not config.num_labels:
        raise ConfigError("num_labels=0: a classifier needs at least one label; pass num_labels=... or id2label={...}")
    layer = nn.Linear(config.embed_dim, config.num_labels)
    init_classifier(layer)
    return layer


def init_classifier(layer: nn.Linear) -> None:
    """Fresh weights as transformers gives its own classifiers: normal of deviation 0.02, bias 0."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def load(folder: str | os.PathLike[str], *, trust_head_code: bool = False) -> Tower:
    """A folder -> its tower on the CPU, in eval mode; with the classifier if the folder has one.

    Args:
        folder: The folder.
        trust_head_code: Run the source of a head that is stored as code.

    Raises:
        TowerError: by what is wrong with the folder.
    """
    files = read_tower(folder)
    make_head = None
    if trust_head_code and files.head_source is not None:
        make_head = partial(construct_code, files.config.head or {}, files.head_source, where=str(folder))
    with no_init(budget=files.budget()):
        tower = build(files.config, with_classifier=has_classifier(files.weights), make_head=make_head)
    assign_weights(tower, files.weights, source=str(folder))
    match_buffers(tower.trunk)
    return tower.eval()


def match_buffers(trunk: nn.Module) -> None:
    """Give the buffers that no file holds the dtype of the weights that were loaded, as `trunk.to(dtype)` had done."""
    dtype = float_dtype(trunk)
    for part in trunk.modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None and buffer.dtype == torch.float32 and dtype != torch.float32:
                part._buffers[name] = buffer.to(dtype)


def has_classifier(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether among these weights there are those of a classifier."""
    return any(key.startswith(f"{CLASSIFIER}.") for key in weights)


def steps_of(trunk: nn.Module) -> Steps:
    """What the trunk's forward is made of, for a tensor x: `forward_head(forward_features(x))` and nothing else
    (`features, head`), `forward_features(x)` alone (`features`), or something that is not known (`whole`).

    Told from the names that the code of its class uses: one that this does not know is not taken for steps.
    """
    code = getattr(type(trunk).forward, "__code__", None)
    names = set(code.co_names) if code is not None else set()
    if names == {"forward_features"}:
        return "features"
    more = tuple(sorted(names - {"forward_features", "forward_head"}))
    known = not more or (type(trunk).__name__, *more) in _STEPS_WITH_SWITCHES
    return "features, head" if known and {"forward_features", "forward_head"} <= names else "whole"


# Classes of timm whose forward has switches that a tower never turns: features of inner layers (CoaT, FastViT), a
# second classifier for training (Inception), packed patches of several sizes (NaFlexVit).
_STEPS_WITH_SWITCHES = {
    ("CoaT", "is_scripting", "jit", "return_interm_layers", "torch"),
    ("FastVit", "fork_feat"),
    ("InceptionV3", "aux_logits"),
    ("NaFlexVit", "_assert", "dict", "get", "isinstance"),
}


def budget_of(folder: str | os.PathLike[str]) -> int:
    """Most bytes that building the tower of a folder may ask for, from the sizes of its weight files."""
    held = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
    return building_budget(held)


def storable_config(
    tower: nn.Module, *, own_head: bool = False, include_code: bool | None = None
) -> tuple[TimmTowerConfig, dict[str, str]]:
    """A copy of the tower's config with the head in the form in which it comes back, verified, and files it needs.

    Args:
        tower: With `config` (completed), `trunk` and `head`; it is not changed.
        own_head: A subclass of TimmModel makes the head by its own code.
        include_code: True: a head that comes back in no other form is stored as code.

    Returns:
        The config, with what is frozen now; and file name -> text.

    Raises:
        HeadError: no form works.
    """
    config, trunk, live = cast(TimmTowerConfig, tower.config), cast(nn.Module, tower.trunk), cast(nn.Module, tower.head)
    stored, sources = copy.deepcopy(config), dict[str, str]()
    if stored.head is None and not _is_builtin(live, stored):
        # somebody put another head in its place, or other layers into it
        stored.head, stored.proj = {"form": LIVE}, "none"
    if stored.head is not None:
        name = stored.head.get("class") if isinstance(live, GraphHead) else None
        with head_without_lock(tower):
            head, example = _on_cpu(live), head_example(stored, trunk)
            stored.embed_dim = None
            stored.embed_dim = check_embedding(stored, head, example)
            stored.head, sources = ({"form": SUBCLASS}, {}) if own_head else _store(head, example, stored, include_code)
        stored.head["class"] = name or type(live).__name__
    stored.frozen = describe_frozen(tower)
    return stored, sources


def _store(
    head: nn.Module, example: torch.Tensor, config: TimmTowerConfig, include_code: bool | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The head's stored form, and the file it needs where that is code."""
    try:
        return store_head(head, example), {}
    except HeadError as refused:
        if not include_code:
            raise
        assert config.num_features is not None
        try:
            spec, source = describe_code(
                head,
                example,
                in_features=config.num_features,
                embed_dim=config.embed_dim,
                arguments=known_arguments(head),
            )
        except HeadError as error:
            raise HeadError(f"{refused}\nNeither as code: {error}") from error
        return spec, {HEAD_CODE_NAME: source}


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype, given as such or by name.

    Raises:
        ArgumentError: not one.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(f"dtype={dtype!r} is not a floating-point dtype of torch or the name of one")
    return found


def _on_cpu(head: nn.Module) -> nn.Module:
    if all(tensor.device.type == "cpu" for tensor in (*head.parameters(), *head.buffers())):
        return head
    return copy.deepcopy(head).to("cpu")


def _is_builtin(head: nn.Module, config: TimmTowerConfig) -> bool:
    with no_init():
        made = builtin_head(config)
    return repr(head) == repr(made) and [type(m) for m in head.modules()] == [type(m) for m in made.modules()]

"""A tower's own way to a folder and back: which config is stored, and how a stored one becomes a tower."""

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn

from .core.assign import assign_weights
from .core.checkpoint import HEAD_CODE_NAME
from .core.config import TimmTowerConfig
from .core.download import Access
from .core.errors import ArgumentError, ConfigError, FolderError, HeadError
from .core.folder import read_tower
from .core.freezing import describe_frozen, head_without_lock, restore_frozen
from .core.graph_module import GraphHead
from .core.head import LIVE, SUBCLASS, CustomHead, builtin_head, code_file, known_arguments, store_head
from .core.head_code import construct_code, describe_code, refuse_code
from .core.no_init import no_init
from .core.tower import check_embedding, head_example
from .rebuilding import STEPS, added_arguments, overrides, rebuild

if TYPE_CHECKING:
    from .hub_mixin import TowerHubMixin

T = TypeVar("T", bound="TowerHubMixin")


def storable_config(tower: "TowerHubMixin", include_code: bool | None = None) -> tuple[TimmTowerConfig, dict[str, str]]:
    """The tower's config with its head in the form in which it comes back, verified, and source files that it needs.

    Args:
        tower: The tower; it is not changed.
        include_code: True: a head that comes back in no other form is stored as code.

    Raises:
        HeadError: no form works.
    """
    cls = type(tower)
    stored, sources = copy.deepcopy(tower.config), dict[str, str]()
    if stored.head is None and not _is_builtin(tower.head, stored):
        # somebody put another head in its place, or other layers into it
        stored.head, stored.proj = {"form": LIVE}, "none"
    if stored.head is not None:
        name = stored.head.get("class") if isinstance(tower.head, GraphHead) else None
        own = overrides(cls, "_create_head")
        with head_without_lock(tower):
            head, example = _on_cpu(tower.head), head_example(stored, tower.trunk)
            stored.embed_dim = None
            stored.embed_dim = check_embedding(stored, head, example)
            stored.head, sources = ({"form": SUBCLASS}, {}) if own else _store(head, example, stored, include_code)
        stored.head["class"] = name or type(tower.head).__name__
    stored.frozen = describe_frozen(tower)
    stored.tower_class = cls.__name__ if any(overrides(cls, step) for step in STEPS) else None
    stored.tower_kwargs = added_arguments(tower) or None
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


def load_tower(
    cls: type[T],
    folder: str | os.PathLike[str],
    *,
    custom_head: CustomHead | None = None,
    strict: bool = True,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    access: Access | None = None,
    trust_remote_code: bool = False,
    origin: str | None = None,
    frozen: bool = True,
) -> T:
    """A folder -> a tower in eval mode. Parameters are the mapped files themselves, nothing is initialised.

    Args:
        cls: TimmModel or a subclass.
        folder: A tower's folder.
        custom_head: Takes the place of the stored head.
        strict: False ignores weights that the tower has no place for, with a warning.
        dtype: Cast floating-point weights.
        device: Where the weights go.
        access: How to reach the repository of a trunk that lies elsewhere.
        trust_remote_code: Run the source of a head that is stored as code.
        origin: Repository and revision that the folder comes from, for messages.
        frozen: Freeze what was frozen when the tower was saved.

    Raises:
        TowerError: by what is wrong with the folder.
    """
    files = read_tower(folder, access)
    _check_class(cls, files.config, folder)
    if custom_head is None and (file := code_file({"head": files.config.head})):
        if not trust_remote_code:
            repo, _, revision = (origin or str(folder)).partition("@")
            raise refuse_code(files.config.head or {}, repo=repo, revision=revision or None, file=file)
        if files.head_source is None:
            raise FolderError(f"{Path(folder, file)} is missing, the source of the tower's head; download it again")
        with no_init(budget=files.budget()):
            custom_head = construct_code(files.config.head or {}, files.head_source, where=f"{Path(folder, file)}")
    with no_init(budget=files.budget()):
        tower = rebuild(cls, files.config, custom_head)
    weights = files.weights if strict else _without_strangers(files.weights, tower, folder)
    assign_weights(tower, weights, source=str(folder), dtype=as_dtype(dtype), device=device)
    if frozen:
        restore_frozen(tower, files.config.frozen)
    else:
        tower.config.frozen = None
    tower._fingerprint = files.fingerprint
    return tower.eval()


def check_given_head(tower: "TowerHubMixin") -> None:
    """A head of another class may have the same weights; the fingerprint tells them apart.

    Raises:
        HeadError: it gives other numbers than the head that was saved.
    """
    if tower._fingerprint is None:
        raise HeadError(
            f"custom_head={type(tower.head).__name__}: the folder has no fingerprint.json to check it against. Load "
            "the tower without it and set tower.head."
        )
    found = tower.verify()
    if found.status == "different":
        raise HeadError(
            f"the head {type(tower.head).__name__} takes the stored weights but gives other numbers than the saved "
            f"{(tower.config.head or {}).get('class', 'head')} ({found}). To change the head on purpose, load the "
            "tower and set tower.head."
        )


def _check_class(cls: type["TowerHubMixin"], config: TimmTowerConfig, folder: str | os.PathLike[str]) -> None:
    if config.tower_class is not None and not any(base.__name__ == config.tower_class for base in cls.__mro__):
        raise ConfigError(
            f"{folder}: this tower was saved by {config.tower_class}, a subclass of TimmModel that changes how it is "
            f"built or run. Load it with {config.tower_class}.from_pretrained(...), not {cls.__name__}."
        )


def _without_strangers(
    weights: Mapping[str, torch.Tensor], tower: nn.Module, folder: str | os.PathLike[str]
) -> dict[str, torch.Tensor]:
    places = tower.state_dict().keys()
    strangers = sorted(set(weights) - set(places))
    if strangers:
        warnings.warn(
            f"{folder}: strict=False ignores {len(strangers)} weights that the tower has no place for: "
            f"{', '.join(strangers[:5])}",
            stacklevel=4,
        )
    return {key: tensor for key, tensor in weights.items() if key in places}


def _on_cpu(head: nn.Module) -> nn.Module:
    if all(tensor.device.type == "cpu" for tensor in (*head.parameters(), *head.buffers())):
        return head
    return copy.deepcopy(head).to("cpu")


def _is_builtin(head: nn.Module, config: TimmTowerConfig) -> bool:
    with no_init():
        made = builtin_head(config)
    return repr(head) == repr(made) and [type(m) for m in head.modules()] == [type(m) for m in made.modules()]


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


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that this torch does not have.

    Raises:
        ArgumentError: names it.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        raise ArgumentError(f"device={device!r} cannot be used: {error}") from error

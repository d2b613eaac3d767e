"""A tower's own way to a folder and back: which config is stored, and how a stored one becomes a tower."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn as nn

from .files.assign import assign_weights
from .files.folder import read_tower
from .heads.source_file import construct_code, refuse_code
from .hub.download import Access
from .reader import build
from .reader.build import as_dtype, match_buffers
from .reader.config import TimmTowerConfig
from .reader.errors import ArgumentError, ConfigError, FolderError, HeadError
from .reader.freezing import restore_frozen
from .reader.head import CustomHead, code_file
from .reader.skip_init import skip_init
from .subclassing import STEPS, added_arguments, overrides, rebuild

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
    stored, sources = build.storable_config(
        tower, own_head=overrides(cls, "_create_head"), include_code=include_code
    )
    stored.tower_class = cls.__name__ if any(overrides(cls, step) for step in STEPS) else None
    stored.tower_kwargs = added_arguments(tower) or None
    return stored, sources


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
        with skip_init(budget=files.budget()):
            custom_head = construct_code(files.config.head or {}, files.head_source, where=f"{Path(folder, file)}")
    with skip_init(budget=files.budget()):
        tower = rebuild(cls, files.config, custom_head)
    weights = _without_classifier(files.weights, folder)
    if len(weights) < len(files.weights):
        tower.config.architectures = None
    if not strict:
        weights = _without_strangers(weights, tower, folder)
    assign_weights(tower, weights, source=str(folder), dtype=as_dtype(dtype), device=device)
    if dtype is None:
        match_buffers(tower.trunk)
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


def _without_classifier(
    weights: Mapping[str, torch.Tensor], folder: str | os.PathLike[str]
) -> Mapping[str, torch.Tensor]:
    """The same but for the classifier of a `TimmTowerForImageClassification`, which a tower has no place for."""
    if not build.has_classifier(weights):
        return weights
    warnings.warn(
        f"{folder} holds a classifier on top of the tower, which is left out: this is the tower alone, its output the "
        "embedding. TimmTowerForImageClassification.from_pretrained loads both.",
        stacklevel=4,
    )
    return {key: tensor for key, tensor in weights.items() if not key.startswith(f"{build.CLASSIFIER}.")}


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

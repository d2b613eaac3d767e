"""Folder -> tower: parse, audit, construct. Both `TimmModel` and a save's proof load through here."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from transformers.utils.hub import cached_file

from .build import Rates
from .files.fingerprint import Verification, compare
from .files.names import CONFIG_NAME, FINGERPRINT_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME
from .files.open_folder import OpenFolder
from .files.same_save import check_processor, mismatch, other_processor
from .files.staging import read_folder
from .files.weights import read_weights
from .heads.registry import CustomHead, rebuild_stored
from .heads.source_file import construct_code
from .hub.download import Access
from .hub.identify import identify
from .hub.trunk_source import merged, read_trunk
from .reader.config import TimmTowerConfig
from .reader.errors import ArgumentError, ConfigError, FolderError, HeadError, shown
from .reader.freezing import apply_frozen
from .reader.head import CODE, SUBCLASS, code_file, refuse_code
from .reader.image_processing import check_preprocess
from .reader.skip_init import Budget, skip_init
from .reader.tower import CLASSIFIER, Tower, build_tower, has_classifier, plain_defaults
from .reader.trunk import buffers_as_timm, float_dtype, native_size
from .reader.weights import StoredTower, assign_weights, parse_trunk_source
from .subclassing import rebuild

T = TypeVar("T", bound=nn.Module)


def read_tower(folder: str | os.PathLike[str], access: Access | None = None, *, mmap: bool = True) -> StoredTower:
    """Parse and audit a tower's folder: JSON and safetensors, nothing else.

    Args:
        folder: The folder.
        access: How to reach the repository of a trunk that is stored elsewhere.
        mmap: Map the weight files; False reads them into memory.

    Raises:
        FolderError: there is no folder or a file is missing.
        FormatError: a file is damaged, too large or of a newer version.
        ConfigError: the config does not describe a tower.
    """
    described, weights, digests, fingerprint, processor, processors = read_folder(folder, partial(_parse, mmap=mmap))
    kind = described.get("model_type")
    if kind != TimmTowerConfig.model_type:
        raise ConfigError(
            f"{os.path.join(folder, CONFIG_NAME)}: model_type is {shown(kind)}, not {TimmTowerConfig.model_type!r}: "
            f"this is not a tower saved by hf_timm_tower. {identify((), described, os.fspath(folder))}".rstrip()
        )
    described.pop("auto_map", None)  # of the files, not of the tower: every save decides on it anew
    config: TimmTowerConfig = TimmTowerConfig.from_dict(described)
    _check_stored_form(config.head, config.tower_class)
    if config.num_features is None or config.layout is None or config.image_size is None:
        raise ConfigError(f"{os.path.join(folder, CONFIG_NAME)}: num_features, layout and image_size must be there")
    check_preprocess(config.preprocess or {}, config.in_chans)
    _check_against_fingerprint(config, fingerprint or {})
    if processor is not None:
        check_processor(processor, config)
    if config.trunk_source is not None:
        trunk = read_trunk(parse_trunk_source(config.trunk_source), access or Access())
        weights = merged(weights, trunk, str(folder))
    if words := mismatch(fingerprint, described, digests, os.fspath(folder)):
        warnings.warn(words, stacklevel=5)
    if words := other_processor((processors or {}).get("image_processor"), config):
        warnings.warn(f"{folder}: {words}", stacklevel=5)
    return StoredTower(config, weights, fingerprint)


def _parse(files: OpenFolder, mmap: bool) -> tuple[Any, ...]:
    config = files.read_json(CONFIG_NAME)
    names = (FINGERPRINT_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME)
    beside = [files.read_json(name) if files.has(name) else None for name in names]
    digests: dict[str, str] = {}
    weights = read_weights(files, mmap=mmap, digests=digests)
    return config, weights, digests, *beside


def _check_stored_form(spec: Any, tower_class: str | None) -> None:
    """Refuse `config.head` of a file that no save writes by a `HeadError` that names the form."""
    if spec is None:
        return
    form = spec.get("form")
    if form not in ("graph", "registered", CODE, SUBCLASS) or (form == SUBCLASS and tower_class is None):
        raise HeadError(
            f"config.head: form {shown(form)} is not one of a saved tower (graph, registered, code, or subclass with "
            "tower_class)"
        )


def _check_against_fingerprint(config: TimmTowerConfig, fingerprint: dict[str, Any]) -> None:
    """Widths and sizes are in both files; one that was edited by hand shows."""
    probe, outputs = fingerprint.get("probe"), fingerprint.get("outputs")
    described = [1, config.in_chans, *native_size(config)]
    if probe is not None and probe != described:
        raise ConfigError(
            f"image_size and in_chans of config.json describe images {described}, fingerprint.json was made with "
            f"{shown(probe)}: one of them was edited. Another size is taken with from_pretrained(..., image_size=...)."
        )
    shape = outputs[""].get("shape") if isinstance(outputs, dict) and isinstance(outputs.get(""), dict) else None
    if isinstance(shape, list) and len(shape) == 2 and config.embed_dim is not None and shape[1] != config.embed_dim:
        raise ConfigError(
            f"embed_dim={config.embed_dim}, but fingerprint.json holds an embedding of width {shown(shape[1])}: "
            "one was edited"
        )


@plain_defaults()
def load_tower(
    cls: type[T],
    folder: str | os.PathLike[str],
    *,
    custom_head: CustomHead | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    access: Access | None = None,
    trust_remote_code: bool = False,
    origin: str | None = None,
    frozen: bool = True,
    mmap: bool = True,
    rates: Rates | None = None,
) -> T:
    """A folder -> a tower of TimmModel or a subclass, in eval mode. Parameters are the mapped files themselves.

    Args:
        cls: TimmModel or a subclass.
        folder: A tower's folder.
        custom_head: Takes the place of the stored head.
        strict: False ignores weights that the tower has no place for, with a warning.
        dtype: Cast floating-point weights, as `tower.to(dtype)`.
        device: Where the weights go.
        access: How to reach the repository of a trunk that is stored elsewhere.
        trust_remote_code: Run the source of a head that is stored as code.
        origin: Repository and revision that the folder comes from, for messages.
        frozen: Freeze what was frozen when the tower was saved.
        mmap: Map the weight files; False reads them into memory.
        rates: Regularisation in place of the stored one.

    Raises:
        TowerError: by what is wrong with the folder.
    """
    stored = read_tower(folder, access, mmap=mmap)
    if rates not in (None, Rates()):
        stored = replace(stored, config=rates.put_into(stored.config))
    _check_class(cls, stored.config, folder)
    weights = _without_classifier(stored.weights, folder)

    def make() -> nn.Module:
        head = custom_head
        if head is None and (stored.config.head or {}).get("form") == CODE:
            head = _trusted_head(stored.config.head or {}, folder, trust_remote_code, origin)
        return rebuild(cls, stored.config, head)

    tower: Any = _construct(stored, weights, make, str(folder), device, strict=strict)
    if len(weights) < len(stored.weights):
        tower.config.architectures = None
    if not frozen:
        tower.config.frozen = None
    apply_frozen(tower, tower.config.frozen)
    tower._fingerprint = stored.fingerprint
    by_code = (tower.config.head or {}).get("form") in ("registered", CODE) or tower.config.tower_class is not None
    if custom_head is not None or (by_code and stored.fingerprint is not None):
        check_given_head(tower)  # code of this process made a part: the outputs must be those of the save
    if dtype is not None:
        tower.to(dtype)
    return tower  # type: ignore[no-any-return]


@plain_defaults()
def load_bare(folder: str | os.PathLike[str], *, trust_head_code: bool = False, access: Access | None = None) -> Tower:
    """A folder -> its tower on the CPU, in eval mode, with the classifier if the folder has one.

    Args:
        folder: The folder.
        trust_head_code: Run the source of a head that is stored as code.
        access: How to reach the repository of a trunk that is stored elsewhere.

    Raises:
        TowerError: by what is wrong with the folder.
    """
    stored = read_tower(folder, access)
    make_head, spec = None, stored.config.head
    if spec is not None:
        by_code = partial(_trusted_head, spec, folder, trust_head_code, None)
        make_head = by_code if spec.get("form") == CODE else partial(rebuild_stored, spec)
    make = partial(build_tower, stored.config, with_classifier=has_classifier(stored.weights), make_head=make_head)
    return _construct(stored, stored.weights, make, str(folder), None)


def _construct(
    stored: StoredTower,
    weights: Mapping[str, torch.Tensor],
    make: Callable[[], T],
    where: str,
    device: str | torch.device | None,
    *,
    strict: bool = True,
) -> T:
    """Build without initialisation and within the budget, put the weights in, eval mode."""
    with skip_init(Budget.for_weights(sum(tensor.nbytes for tensor in stored.weights.values()))):
        tower = make()
    if not strict:
        weights = _without_unexpected(weights, tower, where)
    assign_weights(tower, weights, source=where, device=device)
    buffers_as_timm(tower.trunk, float_dtype(tower.trunk))  # type: ignore[arg-type]
    return tower.eval()


def _trusted_head(
    spec: dict[str, Any], folder: str | os.PathLike[str], trust_remote_code: bool, origin: str | None
) -> nn.Module:
    if not trust_remote_code:
        repo, _, revision = (origin or str(folder)).partition("@")
        raise refuse_code(spec, repo=repo, revision=revision or None)
    name = code_file({"head": spec}) or ""
    source = read_folder(folder, lambda files: files.read_text(name))
    return construct_code(spec, source, where=os.path.join(folder, name))


def make_code_head(spec: dict[str, Any], place: str, **download: Any) -> nn.Module:
    """As `reader.head.make_code_head`, so that the head can be stored as code again.

    Raises:
        HeadError: the file is not the one that was saved, or its code fails.
    """
    name = code_file({"head": spec}) or ""
    path = Path(cached_file(place, name, **download) or name)
    return _trusted_head(spec, path.parent, True, None)


@plain_defaults()
def verify(tower: Any) -> Verification:
    """Whether a tower gives the outputs that it was saved with, on this timm, torch and device.

    Raises:
        FolderError: it was neither saved nor loaded yet, or its folder has no fingerprint.
    """
    if tower._fingerprint is None:
        raise FolderError("this tower has no fingerprint: it was neither saved nor loaded, or its folder has none")
    return compare(tower._fingerprint, tower)


def check_given_head(tower: Any) -> None:
    """A head of another class may have the same weights; the fingerprint that the tower keeps tells them apart.

    Raises:
        HeadError: it gives other outputs than the head that was saved.
    """
    spec = tower.config.head or {}
    if tower._fingerprint is None:
        raise HeadError(
            f"custom_head={type(tower.head).__name__}: the folder has no fingerprint.json to check it against. Load "
            "the tower without it and set tower.head."
        )
    found = verify(tower)
    if found.status == "different":
        named = f"the head registered as {shown(spec.get('name'))}" if spec.get("form") == "registered" else "the head"
        raise HeadError(
            f"{named} ({type(tower.head).__name__}) takes the stored weights but gives other outputs than the saved "
            f"{shown(spec.get('class', 'head'))} ({found}). Register or pass the class that the tower was saved with; "
            "to change the head on purpose, load the tower and set tower.head."
        )


def _check_class(cls: type[nn.Module], config: TimmTowerConfig, folder: str | os.PathLike[str]) -> None:
    if config.tower_class is not None and not any(base.__name__ == config.tower_class for base in cls.__mro__):
        raise ConfigError(
            f"{folder}: this tower was saved by {shown(config.tower_class)}, a subclass of TimmModel that changes how "
            f"it is built or run. Load it with the from_pretrained(...) of that class, not of {cls.__name__}."
        )


def _without_classifier(
    weights: Mapping[str, torch.Tensor], folder: str | os.PathLike[str]
) -> Mapping[str, torch.Tensor]:
    """The same but for the classifier of a `TimmTowerForImageClassification`, which a tower has no place for."""
    if not has_classifier(weights):
        return weights
    warnings.warn(
        f"{folder} holds a classifier on top of the tower, which is left out: this is the tower alone, its output the "
        "embedding. TimmTowerForImageClassification.from_pretrained loads both.",
        stacklevel=4,
    )
    return {key: tensor for key, tensor in weights.items() if not key.startswith(f"{CLASSIFIER}.")}


def _without_unexpected(weights: Mapping[str, torch.Tensor], tower: nn.Module, where: str) -> dict[str, torch.Tensor]:
    places = tower.state_dict().keys()
    if unexpected := sorted(set(weights) - set(places)):
        warnings.warn(
            f"{where}: strict=False ignores {len(unexpected)} weights that the tower has no place for: "
            f"{', '.join(shown(key)[1:-1] for key in unexpected[:5])}",
            stacklevel=5,
        )
    return {key: tensor for key, tensor in weights.items() if key in places}


def refuse_meta(place: object) -> None:
    """Refuse to load weights where the meta device is the default one: `ArgumentError`."""
    if torch.empty(0).is_meta:
        raise ArgumentError(
            f"{place}: weights cannot be loaded onto the meta device, which is the default here. Load outside of "
            "`with torch.device('meta')`; TimmModel.from_config builds without weights"
        )


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

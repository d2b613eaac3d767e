"""A whole tower to a folder and back: config, weights, fingerprint. Both faces save and load through here."""

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..hub.code_files import AUTO_MAP, write_code
from ..hub.download import Access
from ..hub.trunk_source import is_separable, merged, parse_trunk_source, read_trunk
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, HeadError, TowerError, WeightsError
from ..reader.head import check_stored, code_file
from ..reader.image_processing import check_preprocess
from ..reader.processor_config import check_processor, facts_in_tower, processor_dict
from ..reader.trunk import native_size
from .fingerprint import make_fingerprint, run_probe
from .json import write_json
from .names import CARD_NAME, CONFIG_NAME, FINGERPRINT_NAME, PREPROCESSOR_NAME
from .open_folder import OpenFolder, read_text
from .same_save import mismatch, tie_digests
from .sentence_transformers import write_sentence_files
from .staging import read_folder, staged_folder
from .ties import find_ties, same_bits
from .weights import read_weights, write_weights

# A config may ask for somewhat more than its weight files hold (buffers, tables); not for another order of size.
_BUDGET_FACTOR, _BUDGET_SLACK = 4, 2**30


def building_budget(held: int) -> int:
    """Most bytes that building a tower may ask for, whose weight files hold so many."""
    return _BUDGET_FACTOR * held + _BUDGET_SLACK


@dataclass(frozen=True)
class TowerFiles:
    """What a tower's folder holds, read at one moment.

    Attributes:
        config: The config, validated.
        weights: Key -> tensor on mapped memory; keys of a tie have one tensor object.
        fingerprint: The JSON of `fingerprint.json`, None where there is none.
        head_source: The text of a head that is stored as code, None for others and where it is not there.
    """

    config: TimmTowerConfig
    weights: Mapping[str, torch.Tensor]
    fingerprint: dict[str, Any] | None
    head_source: str | None = None

    def budget(self) -> int:
        """Most bytes that building the tower may ask for."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())
        return building_budget(held)


@dataclass(frozen=True)
class Beside:
    """What is saved beside a tower's config, weights and fingerprint.

    Attributes:
        card: The card that is there (None where there is none) -> the card to write; None writes none.
        include_code: The package's own core, so that stock transformers can load the tower.
        sources: File name -> text, for a head that is stored as code.
    """

    card: Callable[[str | None], str] | None = None
    include_code: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)


def read_tower(folder: str | os.PathLike[str], access: Access | None = None) -> TowerFiles:
    """Read a tower's folder: JSON and safetensors, nothing else.

    Args:
        folder: The folder.
        access: How to reach the repository of a trunk that lies elsewhere.

    Raises:
        FolderError: there is no folder or a file is missing.
        FormatError: a file is damaged, too large or of a newer version.
        ConfigError: the config does not describe a tower.
    """
    config, weights, fingerprint, processor, source, digests = read_folder(folder, _read)
    kind = config.get("model_type")
    if kind != TimmTowerConfig.model_type:
        raise ConfigError(
            f"{os.path.join(folder, CONFIG_NAME)}: model_type is {kind!r}, not {TimmTowerConfig.model_type!r}: "
            "this is not a tower saved by hf_timm_tower."
        )
    config.pop("auto_map", None)  # of the files, not of the tower: every save decides on it anew
    described = TimmTowerConfig(**config)
    check_stored(described.head, described.tower_class)
    if described.num_features is None or described.layout is None or described.image_size is None:
        raise ConfigError(f"{os.path.join(folder, CONFIG_NAME)}: num_features, layout and image_size must be there")
    check_preprocess(described.preprocess or {}, described.in_chans)
    _check_against_fingerprint(described, fingerprint or {})
    if processor is not None:
        check_processor(processor, described)
    if (words := mismatch(fingerprint, config, digests, os.fspath(folder))) is not None:
        warnings.warn(words, stacklevel=4)
    if described.trunk_source is not None:
        trunk = read_trunk(parse_trunk_source(described.trunk_source), access or Access())
        weights = merged(weights, trunk, str(folder))
    return TowerFiles(described, weights, fingerprint, source)


def _check_against_fingerprint(config: TimmTowerConfig, fingerprint: dict[str, Any]) -> None:
    """Widths and sizes are in both files; one that was edited by hand shows."""
    probe, outputs = fingerprint.get("probe"), fingerprint.get("outputs")
    described = [1, config.in_chans, *native_size(config)]
    if probe is not None and probe != described:
        raise ConfigError(
            f"image_size and in_chans of config.json describe images {described}, fingerprint.json was made with "
            f"{probe}: one of them was edited. Another size is taken with from_pretrained(..., image_size=...)."
        )
    shape = outputs[""].get("shape") if isinstance(outputs, dict) and isinstance(outputs.get(""), dict) else None
    if isinstance(shape, list) and len(shape) == 2 and config.embed_dim is not None and shape[1] != config.embed_dim:
        raise ConfigError(
            f"embed_dim={config.embed_dim}, but fingerprint.json holds an embedding of width {shape[1]}: one was edited"
        )


def _read(
    files: OpenFolder,
) -> tuple[
    dict[str, Any],
    dict[str, torch.Tensor],
    dict[str, Any] | None,
    dict[str, Any] | None,
    str | None,
    dict[str, str],
]:
    config = files.read_json(CONFIG_NAME)
    fingerprint, processor = (
        files.read_json(name) if files.has(name) else None for name in (FINGERPRINT_NAME, PREPROCESSOR_NAME)
    )
    name = code_file(config)
    source = files.read_text(name) if name and files.has(name) else None
    digests: dict[str, str] = {}
    weights = read_weights(files, digests=digests)
    return config, weights, fingerprint, processor, source, digests


def save_tower(
    tower: nn.Module,
    config: TimmTowerConfig,
    folder: str | os.PathLike[str],
    load: Callable[[Path], nn.Module],
    max_shard_size: int | str = "5GB",
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Write a tower beside the folder, load it back, compare the bits, and only then put it in place.

    Args:
        tower: has `trunk` and `head`; may be on any device, in any mode.
        config: A completed config whose `head` has its stored form.
        folder: Where the tower goes; what is there before survives an error and a kill.
        load: Loads a tower from a folder onto the CPU, in eval mode.
        max_shard_size: Largest weight file, in bytes or as `"5GB"`.
        beside: Card and code; None writes no card.

    Returns:
        The fingerprint that was written.

    Raises:
        TowerError: nothing was written: the folder cannot be written, or what was loaded back is not the same.
    """
    size = native_size(config)
    beside = beside or Beside()
    with staged_folder(folder) as staging:
        write_json(staging / CONFIG_NAME, _written(config, beside.include_code))
        write_json(staging / PREPROCESSOR_NAME, facts_in_tower(processor_dict(config)))
        for name, source in beside.sources.items():
            (staging / name).write_bytes(source.encode("utf-8"))
        if beside.include_code:
            write_code(staging)
        _write_weights(staging, tower, config, max_shard_size)
        again = load(staging)
        _compare_weights(tower, again)
        _compare_behaviour(tower, again)
        device = next(tower.parameters()).device
        outputs = run_probe(again.to(device), config.in_chans, size)
        here = run_probe(tower, config.in_chans, size)
        if device.type == "cpu" and not _same_outputs(here, outputs):
            # Weights in another memory format, or not aligned, may give other last bits than the same weights as a
            # file brings them: the comparison that counts is between equal layouts.
            here = run_probe(_plainly_laid_out(tower), config.in_chans, size)
        _compare_outputs(here, outputs, exact=device.type == "cpu")
        fingerprint = {**make_fingerprint(outputs, again, config.in_chans, size), **tie_digests(staging)}
        write_json(staging / FINGERPRINT_NAME, fingerprint)
        write_sentence_files(staging, Path(folder), outputs)
        if beside.card is not None:
            (staging / CARD_NAME).write_bytes(beside.card(read_text(Path(folder, CARD_NAME))).encode("utf-8"))
    return fingerprint


def _written(config: TimmTowerConfig, include_code: bool) -> dict[str, Any]:
    """What `config.json` holds; transformers finds its classes by `architectures` and `auto_map`."""
    written: dict[str, Any] = json.loads(config.to_json_string())
    written["architectures"] = written.get("architectures") or ["TimmTowerModel"]
    written.pop("auto_map", None)
    return {**written, "auto_map": AUTO_MAP} if include_code else written


def _write_weights(
    staging: Path, tower: nn.Module, config: TimmTowerConfig, max_shard_size: int | str
) -> None:
    if config.trunk_source is None:
        write_weights(staging, tower, max_shard_size)
        return
    state = tower.state_dict(keep_vars=True)
    ties = find_ties(tower, state)
    if not is_separable((*ties.tied, *ties.shared)):
        raise WeightsError("the head shares weights with the trunk, so it cannot be published without it")
    head = {key: tensor for key, tensor in state.items() if key.startswith("head.")}
    if not head:
        raise WeightsError("the head has no weights, so there is nothing to publish beside the trunk")
    write_weights(staging, tower, max_shard_size, state=head)


def _compare_weights(tower: nn.Module, again: nn.Module) -> None:
    ours, theirs = tower.state_dict(), again.state_dict()
    if set(ours) != set(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise WeightsError(
            f"the tower was not saved: built again from its config it has other weights ({len(odd)} keys differ, "
            f"{', '.join(odd[:4])}). The trunk or head was changed in a way that the config does not know; subclass "
            "TimmModel and override _create_trunk or _create_head."
        )
    changed = [key for key, tensor in ours.items() if not same_bits(tensor.detach().cpu(), theirs[key].detach())]
    if changed:
        raise WeightsError(
            f"the tower was not saved: {len(changed)} tensors came back with other bits ({', '.join(changed[:4])})"
        )


def _compare_behaviour(tower: nn.Module, again: nn.Module) -> None:
    """Rates and momenta act in training only, so that no output shows them."""
    for name, module in tower.trunk.named_modules():  # type: ignore[union-attr]
        twin = again.trunk.get_submodule(name)  # type: ignore[union-attr]
        ours, theirs = _rates(module), _rates(twin)
        if ours != theirs:
            raise TowerError(
                f"the tower was not saved: trunk.{name} ({type(module).__name__}) has {ours}, but built from the "
                f"config it has {theirs}. Give the value when the tower is built (drop_path=..., model_kwargs={{...}})."
            )


def _rates(module: nn.Module) -> dict[str, Any]:
    names = ("p", "drop_prob", "drop_rate", "momentum", "eps")
    return {name: value for name in names if isinstance(value := getattr(module, name, None), (int, float))}


def _plainly_laid_out(tower: nn.Module) -> nn.Module:
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
    return twin


def _same_outputs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(same_bits(tensor, theirs[path]) for path, tensor in ours.items())


def _compare_outputs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], exact: bool) -> None:
    if set(ours) != set(theirs):
        raise HeadError(f"the tower was not saved: loaded back it gives {sorted(theirs)}, not {sorted(ours)}")
    for path, tensor in ours.items():
        back = theirs[path]
        if same_bits(tensor, back):
            continue
        close = tensor.shape == back.shape and torch.allclose(tensor, back, rtol=1e-4, atol=1e-5, equal_nan=True)
        if exact or not close:
            difference = (tensor.double() - back.double()).abs().max().item() if tensor.shape == back.shape else "shape"
            raise TowerError(
                f"the tower was not saved: loaded back it gives other numbers at output {path or 'the embedding'} "
                f"(largest difference {difference}). The trunk or head holds something that neither its config nor its "
                "state dict knows; subclass TimmModel and override _create_trunk or _create_head."
            )

"""open_clip's models -> towers. The way back is in `to_open_clip.py`.

A repository or folder in open_clip's form, a checkpoint with a config, and a model in memory are all read without
open_clip itself; only a config that is given by its name in open_clip's list is looked up there.
"""

import copy
import importlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..files.open_folder import read_json
from ..files.ties import same_bits
from ..hub.download import Access, download_files
from ..reader.config import TimmTowerConfig, check_size
from ..reader.errors import ArgumentError, ConfigError, FolderError, FormatError, HubError, WeightsError, shown
from ..reader.image_processing import check_preprocess
from ..reader.skip_init import Budget, skip_init
from ..reader.trunk import eval_mode, has_fixed_size, native_cfg, own_pool
from ..reader.weights import assign_weights
from ..trunk_facts import shapes_of, trunk_arguments
from .eval_tower import EvalTower, relative_difference
from .open_clip_config import VISION_PREFIX, VisionArguments, preprocess_entries, vision_arguments
from .weight_source import WeightSource, from_mapping, open_weights

CONFIG_NAME = "open_clip_config.json"
# In the order in which open_clip 3.3 takes them. In a repository other names belong to other libraries.
SAFE_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
PICKLED_NAMES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
FURTHER_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

# What the training script of open_clip, DistributedDataParallel and torch.compile put before it.
_WRAPPERS = ("", "module.", "_orig_mod.", "state_dict.", "state_dict.module.", "state_dict._orig_mod.")

# Of the largest output: what casts and other kernels may do, and another layer does not stay within.
_SAME_OUTPUTS = 1e-2


@dataclass(frozen=True)
class Found:
    """What a source holds. `preprocess` is what a tower's preprocess block takes over."""

    vision: VisionArguments
    preprocess: dict[str, Any]
    weights: WeightSource
    model_kwargs: dict[str, Any] | None = None


def open_source(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model_config: str | Mapping[str, Any] | None,
    preprocess_cfg: Mapping[str, Any] | None,
    allow_pickle: bool,
    revision: str | None,
    access: Access,
) -> Found:
    """What a repository, a folder, a file of weights or a state dict holds; see `TimmModel.from_open_clip`.

    Raises:
        TowerError: by what is wrong with it.
    """
    if isinstance(source, Mapping) or Path(source).is_file():
        if model_config is None:
            raise ArgumentError(
                "weights alone do not say what model they are: pass model_config=..., open_clip's model_cfg or its name"
            )
        if isinstance(source, Mapping):
            weights = from_mapping(source, "the state dict")
        else:
            weights = open_weights(source, allow_pickle)
        config, where = _named_config(model_config), "model_config"
        if preprocess_cfg is None and "preprocess_cfg" not in config:
            raise ArgumentError(
                "neither weights nor model_config say how images are prepared: pass preprocess_cfg={'mean': ..., "
                "'std': ..., 'interpolation': ..., 'resize_mode': ...}, or {} for open_clip's defaults"
            )
    else:
        if model_config is not None:
            raise ArgumentError(f"{source}: has its own {CONFIG_NAME}; model_config is for a state dict or a file")
        folder, place = _folder(source, allow_pickle, revision, access)
        where = f"{folder / CONFIG_NAME}"
        if not (folder / CONFIG_NAME).is_file():
            raise FolderError(f"{where} is missing: {place} is not in open_clip's form")
        config = read_json(folder / CONFIG_NAME)
        if "model_cfg" not in config:
            raise FormatError(f"{where}: model_cfg is missing, expected as open_clip writes it")
        weights = open_weights(_weight_file(folder, place, place != str(folder), allow_pickle), allow_pickle)
    model_cfg = config.get("model_cfg", config)
    for name in ("model_cfg", "preprocess_cfg"):
        if not isinstance(config.get(name, {}), Mapping):
            raise FormatError(f"{where}: {name} must be an object, found {shown(config[name])}")
    prepared = {**(config.get("preprocess_cfg", {})), **(preprocess_cfg or {})}
    return Found(vision_arguments(model_cfg, where), preprocess_entries(prepared, where), weights)


def _named_config(model_config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(model_config, Mapping):
        return model_config
    try:
        found = importlib.import_module("open_clip").get_model_config(model_config)
    except ImportError as error:
        raise ArgumentError(
            f"model_config={model_config!r}: names are looked up in open_clip, which is not installed (pip install "
            "open_clip_torch); or pass the config itself"
        ) from error
    if found is None:
        raise ArgumentError(f"model_config={model_config!r} is not in open_clip.list_models()")
    return dict(found)


def _folder(
    source: str | os.PathLike[str], allow_pickle: bool, revision: str | None, access: Access
) -> tuple[Path, str]:
    """Where the files are on this machine, and the name to call it."""
    name = os.fspath(source)
    if name.startswith("local-dir:") or (not name.startswith("hf-hub:") and Path(name).is_dir()):
        folder = Path(name.removeprefix("local-dir:"))
        if not folder.is_dir():
            raise FolderError(f"{folder}: no such folder")
        return folder, str(folder)
    repo_id = name.removeprefix("hf-hub:")
    root = download_files(repo_id, [CONFIG_NAME], revision, access)
    if not (root / CONFIG_NAME).exists():
        raise HubError(f"{repo_id} at commit {root.name}: {CONFIG_NAME} is missing; it is not in open_clip's form")
    download_files(repo_id, SAFE_NAMES, root.name, access)
    if allow_pickle and not any((root / name).exists() for name in SAFE_NAMES):
        download_files(repo_id, PICKLED_NAMES, root.name, access)
    return root, repo_id


def _weight_file(folder: Path, place: str, is_repo: bool, allow_pickle: bool) -> Path:
    names: list[str] = [*SAFE_NAMES, *PICKLED_NAMES]
    if not is_repo:
        names += FURTHER_NAMES
    for name in names:
        if (folder / name).exists():
            return folder / name  # a pickle is refused when it is opened
    hint = ""
    if is_repo and not allow_pickle:
        hint = f"; pickled weights ({PICKLED_NAMES[0]}) are read with allow_pickle=True only"
    raise FolderError(f"{place} has no weights that are read here: expected one of {', '.join(names)}{hint}")


def tower_of_source(
    cls: type[nn.Module], found: Found, device: str | torch.device | None, dtype: torch.dtype | None
) -> Any:
    """The tower (`cls`, TimmModel or a subclass) of what `open_source` found.

    Raises:
        WeightsError: weights and config do not fit.
    """
    specs, names = _vision_specs(found.weights)
    held = sum(spec.numel() * spec.element_size() for spec in specs.values())
    arguments = found.vision.arguments
    with skip_init(Budget.for_weights(held)):
        tower: Any = cls(**arguments, model_kwargs=found.model_kwargs)
    declared, built = found.vision.declared_size, found.vision.built_size
    if declared != built and shapes_of(tower.state_dict()) == shapes_of(specs):
        warnings.warn(
            f"{found.weights.where}: the config names image_size={declared}, but open_clip builds "
            f"{arguments['model_name']} for {built}, and its weights are made for that: the tower takes {built}. "
            f"Pass image_size={declared} to have it resampled.",
            stacklevel=3,
        )
    elif declared != built:
        # Saved after its input size was changed; if that is not it either, the weights' names and shapes tell.
        with skip_init(Budget.for_weights(held)):
            tower = cls(**{**arguments, "image_size": declared}, model_kwargs=found.model_kwargs)
    _set_preprocess(tower, found.preprocess)
    weights = found.weights.read(list(names.values()))
    state = {key: weights[name] for key, name in names.items()}
    assign_weights(tower, state, source=found.weights.where, dtype=dtype, device=device)
    return tower


def _vision_specs(weights: WeightSource) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The vision tower's keys: key in the tower -> its spec, and -> its key in the source."""
    found = [wrapper for wrapper in _WRAPPERS if any(key.startswith(wrapper + VISION_PREFIX) for key in weights.specs)]
    if len(found) != 1:
        first = ", ".join(list(weights.specs)[:3])
        what = f"under several names ({', '.join(found)})" if found else f"missing (the first keys are {first})"
        raise WeightsError(f"{weights.where}: keys of a vision tower (visual.*) are {what}")
    prefix = found[0] + VISION_PREFIX
    names = {key.removeprefix(prefix): key for key in weights.specs if key.startswith(prefix)}
    return {key: weights.specs[name] for key, name in names.items()}, names


def _set_preprocess(tower: Any, entries: dict[str, Any]) -> None:
    block = {**(tower.config.preprocess or {}), **entries}
    check_preprocess(block, tower.config.in_chans)
    tower.config.preprocess = block


# A model in memory


def tower_of_model(cls: type[nn.Module], model: nn.Module, preprocess_cfg: Mapping[str, Any] | None) -> Any:
    """The tower (`cls`, TimmModel or a subclass) of an open_clip model in memory, on weights of its own.

    Raises:
        ConfigError: its vision tower is none of timm's, or was changed by hand.
        ArgumentError: nobody says how images are prepared.
    """
    visual = getattr(model, "visual", model)
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", None)
    if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Module):
        raise ConfigError(
            f"{type(model).__name__}: its vision tower is a {type(visual).__name__}, not a timm tower (with trunk and "
            "head); open_clip's own towers stay with open_clip"
        )
    attached = getattr(visual, "preprocess_cfg", None)
    if not attached and preprocess_cfg is None:
        raise ArgumentError(
            f"{type(model).__name__} does not say how images are prepared (no preprocess_cfg: it was not made by "
            "open_clip.create_model): pass preprocess_cfg={...}, or {} for open_clip's defaults"
        )
    prepared = {**(attached or {}), **(preprocess_cfg or {})}
    entries = preprocess_entries(prepared, type(model).__name__)
    if isinstance(getattr(visual, "config", None), TimmTowerConfig):
        if not isinstance(visual, cls):
            raise ConfigError(f"the vision tower is a {type(visual).__name__} already, which is no {cls.__name__}")
        tower = copy.deepcopy(visual)  # ours, standing in for open_clip's
        vars(tower).pop("_preprocess_cfg", None)  # outside of it from here on
        _set_preprocess(tower, entries)
        return tower
    state = {f"{VISION_PREFIX}{key}": tensor for key, tensor in visual.state_dict().items()}
    weights = from_mapping(state, type(model).__name__)
    described = trunk_arguments(trunk)
    args = {key: value for key, value in described["model_args"].items() if key not in ("num_classes", "global_pool")}
    # A trunk without a size of its own says what timm trains it at, not what open_clip gives it.
    name, size = described["architecture"], described["image_size"]
    if hasattr(visual, "image_size") and not has_fixed_size(native_cfg(name), args):
        size = check_size("image_size", visual.image_size)
    arguments = {"model_name": name, "image_size": size, **_head_arguments(trunk, head)}
    tower = tower_of_source(cls, Found(VisionArguments(arguments, size), entries, weights, args), None, None)
    _check_same_outputs(tower, visual)
    return tower


def _head_arguments(trunk: nn.Module, head: nn.Module) -> dict[str, Any]:
    """What open_clip's `TimmModel` was told, read off its head."""
    parts = dict(head.named_children())
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    pool = own_pool(trunk)
    found: dict[str, Any] = {"pool": {None: "default", "": "none"}.get(pool, pool), "proj": "none", "embed_dim": None}
    pools = {"AttentionPool2d": "abs_attn", "RotAttentionPool2d": "rot_attn"}
    if "pool" in parts and kinds["pool"] in pools:
        width = parts.pop("pool").proj.out_features  # type: ignore[union-attr]
        found |= {"pool": pools[kinds["pool"]], "proj": None, "embed_dim": width}
    if parts.keys() == {"drop", "proj"} and kinds["drop"] == "Dropout" and kinds["proj"] == "Linear":
        linear = parts["proj"]
        found |= {"proj": "linear", "embed_dim": linear.out_features, "proj_bias": linear.bias is not None}
        found["drop"] = parts["drop"].p
    elif parts.keys() == {"mlp"} and kinds["mlp"] == "Mlp":
        last = parts["mlp"].fc2
        found |= {"proj": "mlp", "embed_dim": last.out_features, "proj_bias": last.bias is not None}  # type: ignore[union-attr]
        found["drop"] = parts["mlp"].drop1.p  # type: ignore[union-attr]
    elif parts:
        raise ConfigError(f"the head {kinds} is not one that open_clip makes; wrap the trunk with TimmModel.from_trunk")
    elif getattr(trunk, "num_classes", 0) and found["proj"] == "none":
        found |= {"proj": None, "embed_dim": trunk.num_classes}
    return found


def _check_same_outputs(tower: Any, visual: nn.Module) -> None:
    """Keys and shapes may agree where layers were exchanged by hand: one image tells."""
    model, theirs = EvalTower(tower), next(visual.parameters())
    image = model.images(1)
    with torch.no_grad(), eval_mode(visual), eval_mode(model):
        expected, found = visual(image.to(theirs.device, theirs.dtype)), model(image)
    if not same_bits(found, expected) and not relative_difference([found], [expected]) <= _SAME_OUTPUTS:
        raise ConfigError(
            "the vision tower gives other outputs than one that is built from its own arguments: it was changed by "
            "hand. Wrap its trunk with TimmModel.from_trunk, or override TimmModel._create_trunk."
        )

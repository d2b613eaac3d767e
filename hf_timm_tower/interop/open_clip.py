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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ..files.open_folder import read_json
from ..hub.download import Access, download_files
from ..reader.config import TimmTowerConfig, check_size
from ..reader.errors import ArgumentError, ConfigError, FolderError, FormatError, HubError, WeightsError, shown
from ..reader.image_processing import check_preprocess
from ..reader.skip_init import Budget, skip_init
from ..reader.trunk import eval_mode, has_fixed_size, native_cfg, own_pool
from ..reader.weights import assign_weights
from ..trunk_facts import trunk_arguments
from .open_clip_config import VISION_PREFIX, VisionArguments, preprocess_entries, vision_arguments
from .weight_source import WeightSource, from_mapping, open_weights, shapes_of

if TYPE_CHECKING:
    from ..timm_model import TimmModel

T = TypeVar("T", bound="TimmModel")

CONFIG_NAME = "open_clip_config.json"
# In the order in which open_clip 3.3 takes them. In a repository other names belong to other libraries.
SAFE_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
PICKLED_NAMES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
FURTHER_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

# What the training script of open_clip, DistributedDataParallel and torch.compile put before it.
_WRAPPERS = ("", "module.", "_orig_mod.", "state_dict.", "state_dict.module.", "state_dict._orig_mod.")


@dataclass(frozen=True)
class _Found:
    """What a source holds. `preprocess` is what a tower's preprocess block takes over."""

    vision: VisionArguments
    preprocess: dict[str, Any]
    weights: WeightSource
    model_kwargs: dict[str, Any] | None = None


def tower_from_open_clip(
    cls: type[T],
    source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    *,
    model_config: str | Mapping[str, Any] | None = None,
    preprocess_cfg: Mapping[str, Any] | None = None,
    image_size: Any = None,
    allow_pickle: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    access: Access | None = None,
) -> T:
    """The vision tower of an open_clip model as a tower, in eval mode. Of the text tower nothing is read.

    Args:
        cls: TimmModel or a subclass.
        source: A repository's id (`hf-hub:` before it or not), a folder (`local-dir:` before it or not), a file of
            weights, a state dict, or a model of open_clip in memory, which is copied.
        model_config: For a file or a state dict: open_clip's `model_cfg`, the whole of an `open_clip_config.json`, or
            the name of a config that open_clip brings.
        preprocess_cfg: open_clip's; goes over what the source says. `{}` where the source says nothing and open_clip's
            own defaults are meant.
        image_size: Change the input size after loading, as open_clip's `force_image_size`.
        allow_pickle: Read pickled weights where there are no others, with `weights_only=True`.
        device: Where the weights go.
        dtype: Cast floating-point weights; None keeps what was saved (open_clip itself casts to float32).
        revision: Branch, tag or commit of the repository.
        access: Token, cache and so on.

    Raises:
        ConfigError: no timm tower inside, or one that cannot be built.
        WeightsError: weights and config do not fit.
        FolderError, HubError, FormatError: the source cannot be read.
        ArgumentError: `model_config` or `preprocess_cfg` is missing or has no meaning here.
    """
    if isinstance(source, nn.Module):
        if model_config is not None:
            raise ArgumentError("model_config is for a state dict or a file; a model in memory says itself what it is")
        tower = _from_model(cls, source, preprocess_cfg)
        tower.to(device=device, dtype=dtype)
    else:
        found = _find(source, model_config, preprocess_cfg, allow_pickle, revision, access or Access())
        tower = _build(cls, found, device, dtype)
    if image_size is not None:
        tower.set_input_size(image_size)
    return tower.eval()


def _find(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model_config: str | Mapping[str, Any] | None,
    preprocess_cfg: Mapping[str, Any] | None,
    allow_pickle: bool,
    revision: str | None,
    access: Access,
) -> _Found:
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
    return _Found(vision_arguments(model_cfg, where), preprocess_entries(prepared, where), weights)


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


def _build(cls: type[T], found: _Found, device: str | torch.device | None, dtype: torch.dtype | None) -> T:
    specs, names = _vision_specs(found.weights)
    held = sum(spec.numel() * spec.element_size() for spec in specs.values())
    arguments = found.vision.arguments
    with skip_init(Budget.for_weights(held)):
        tower = cls(**arguments, model_kwargs=found.model_kwargs)
    declared, built = found.vision.declared_size, found.vision.built_size
    if declared != built and shapes_of(tower.state_dict()) == shapes_of(specs):
        warnings.warn(
            f"{found.weights.where}: the config names image_size={declared}, but open_clip builds "
            f"{arguments['model_name']} for {built}, and its weights are made for that: the tower takes {built}. "
            f"Pass image_size={declared} to have it resampled.",
            stacklevel=4,
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


def _set_preprocess(tower: "TimmModel", entries: dict[str, Any]) -> None:
    block = {**(tower.config.preprocess or {}), **entries}
    check_preprocess(block, tower.config.in_chans)
    tower.config.preprocess = block


# A model in memory


def _from_model(cls: type[T], model: nn.Module, preprocess_cfg: Mapping[str, Any] | None) -> T:
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
    tower = _build(cls, _Found(VisionArguments(arguments, size), entries, weights, args), None, None)
    _check_same_numbers(tower, visual)
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


def _check_same_numbers(tower: "TimmModel", visual: nn.Module) -> None:
    """Keys and shapes may agree where layers were exchanged by hand: one image tells."""
    ours = next(tower.parameters())
    theirs = next(visual.parameters())
    image = torch.linspace(-1, 1, 3 * 64).repeat(1 + _pixels(tower) // 64)[: 3 * _pixels(tower)]
    image = image.reshape(1, 3, *(tower.config.image_size or ()))  # type: ignore[misc]
    with torch.no_grad(), eval_mode(visual), eval_mode(tower):
        expected = visual(image.to(theirs.device, theirs.dtype)).cpu()
        found = tower(image.to(ours.device, ours.dtype))
    atol = 1e-2 * float(expected.abs().max().nan_to_num())
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=atol, equal_nan=True):
        raise ConfigError(
            "the vision tower gives other outputs than one that is built from its own arguments: it was changed by "
            "hand. Wrap its trunk with TimmModel.from_trunk, or override TimmModel._create_trunk."
        )


def _pixels(tower: "TimmModel") -> int:
    height, width = tower.config.image_size  # type: ignore[misc]
    return int(height) * int(width)

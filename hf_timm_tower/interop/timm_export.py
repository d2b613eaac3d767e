"""A tower -> a folder that stock timm loads, and stock transformers as `TimmWrapperModel`, with the same bits out.

Neither reads what the other saves, for two reasons found in timm 1.0.31 and transformers 5.24. timm stores
`num_classes` among `model_args`, and `TimmWrapperModel` passes `num_classes=0` beside them: a TypeError. transformers
stores `model_args: null`, and timm asks null for its entries: an AttributeError. So what is written here has
`model_args`, without `num_classes`, which stands at the top level only, where timm takes it for the classifier and
transformers for the labels.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn as nn
from timm.layers.create_act import get_act_layer
from timm.layers.create_norm import get_norm_layer
from timm.models import get_model_args, get_model_traits
from torch import Tensor

from ..files.json import write_json
from ..files.names import CONFIG_NAME, SINGLE_NAME
from ..files.private_draws import private_draws
from ..files.safetensors_layout import write_aligned
from ..files.safetensors_read import read_aligned
from ..files.staging import staged_folder
from ..files.ties import same_bits
from ..reader.config import ATTENTION_POOLS, TimmTowerConfig
from ..reader.errors import ArgumentError, ConfigError, FolderError, HeadError, WeightsError
from ..reader.model_args import encode
from ..reader.skip_init import skip_init
from ..reader.trunk import BUILD_ERRORS, eval_mode, native_cfg, split_tag
from ..trunk_facts import shapes_of
from .eval_tower import EvalTower, relative_difference
from .timm_face import data_cfg, image_fields

# The classifier may be a convolution, or have a bias of zeros where the projection has none: kernels round otherwise.
FOLDED_TOLERANCE = 1e-5


@dataclass(frozen=True)
class TimmExport:
    """What was written.

    Attributes:
        folder: Where.
        architecture: timm's name of the trunk.
        model_args: What `config.json` says beside it.
        num_classes: Width of the projection that became timm's classifier; 0 where there is none.
        left_out: What of the tower is not in the folder, in words; empty where it is all there.
        difference: Largest difference of timm's output to the tower's, over the largest output. 0.0 means equal bits.
    """

    folder: Path
    architecture: str
    model_args: dict[str, Any]
    num_classes: int
    left_out: tuple[str, ...]
    difference: float


def export_timm(
    tower: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: Literal["fold", "drop"] = "fold",
    preprocess: Literal["exact", "nearest"] = "exact",
) -> TimmExport:
    """Write a tower as a timm checkpoint: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    So do transformers' `AutoModel` (the trunk, pooled) and, with a folded projection,
    `AutoModelForImageClassification` (its logits are the embedding). What was written is loaded by timm and compared
    with the tower before it appears under its name.

    Args:
        tower: A tower; it is not changed.
        folder: A new or empty folder, or one that an earlier export wrote.
        head: `fold`: a linear projection becomes timm's classifier, and any other head is refused. `drop`: only the
            trunk is written.
        preprocess: `exact`: padding, channel order and value range that timm has no words for are refused.
            `nearest`: they are left out, a value range becomes part of mean and std.

    Returns:
        What was written and what was left out.

    Raises:
        HeadError: the head is no linear layer on the trunk's pooled features, or not one that timm's classifier can be.
        ConfigError: timm cannot be told by a JSON file how to build this trunk or to prepare its images.
        WeightsError: timm loads the folder and gives another output.
        FolderError: the folder holds something else or cannot be written.
    """
    for name, value, choices in (("head", head, ("fold", "drop")), ("preprocess", preprocess, ("exact", "nearest"))):
        if value not in choices:
            raise ArgumentError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")
    model = EvalTower(tower)
    config, trunk = model.config, model.trunk
    _require_free(Path(folder))
    left_out: list[str] = []
    linear = _linear_of(model.head, config) if head == "fold" else None
    if head == "drop" and (dropped := _describe_head(model.head, config)):
        left_out.append(dropped)
    if preprocess == "exact":
        image = data_cfg(config, "preprocess='nearest' leaves that out, a value range becomes part of mean and std")
    else:
        image, lost = image_fields(config)
        left_out += lost

    num_classes = linear.out_features if linear is not None else int(get_model_traits(trunk).get("num_classes") or 0)
    arch, _ = split_tag(config.architecture)
    model_args = _find_arguments(arch, trunk, config, num_classes if linear is None else 0)
    state = dict(trunk.state_dict())
    if linear is not None:
        state |= _classifier_weights(arch, model_args, linear, state)
    with staged_folder(folder) as staged:
        write_aligned(staged / SINGLE_NAME, state)
        write_json(staged / CONFIG_NAME, _config_json(config, trunk, model_args, num_classes, image))
        difference = _check(staged, model, folded=linear is not None)
    return TimmExport(Path(folder), arch, model_args, num_classes, tuple(left_out), difference)


def _require_free(folder: Path) -> None:
    if folder.is_dir():
        if others := sorted(set(os.listdir(folder)) - {CONFIG_NAME, SINGLE_NAME}):
            raise FolderError(
                f"{folder} holds {', '.join(others[:4])}: a timm checkpoint goes into a new or empty folder"
            )


def _flat(head: nn.Module) -> list[nn.Module]:
    if type(head) is nn.Sequential:
        return [layer for part in head for layer in _flat(part)]
    return [head]


def _acting(head: nn.Module) -> list[nn.Module]:
    """The layers of a head that do something in eval mode."""
    return [layer for layer in _flat(head) if type(layer) not in (nn.Dropout, nn.Identity)]


def _describe_head(head: nn.Module, config: TimmTowerConfig) -> str:
    if config.pool in (*ATTENTION_POOLS, "token_avg"):
        return f"pool {config.pool} and head {type(head).__name__}"
    return f"head {type(head).__name__}" if _acting(head) else ""


def _linear_of(head: nn.Module, config: TimmTowerConfig) -> nn.Linear | None:
    """The head as one linear layer, None where it does nothing.

    Raises:
        HeadError: it is something else.
    """
    acting = _acting(head)
    drop = "head='drop' writes the trunk alone."
    if config.pool in (*ATTENTION_POOLS, "token_avg"):
        raise HeadError(f"timm has no pool {config.pool!r} in {config.architecture}: {drop}")
    if not acting:
        return None
    linear = acting[0]
    if len(acting) > 1 or type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        names = ", ".join(type(layer).__name__ for layer in acting[:5])
        raise HeadError(f"the head ({names}) is not one nn.Linear, as timm's classifier is: {drop}")
    if config.layout != "NC":
        raise HeadError(
            f"the head runs over what pool={config.pool!r} leaves ({config.layout}), timm's classifier over a pooled "
            f"vector: {drop}"
        )
    return linear


def _find_arguments(arch: str, trunk: nn.Module, config: TimmTowerConfig, num_classes: int) -> dict[str, Any]:
    """Arguments that JSON can hold, with which timm builds this very trunk.

    Raises:
        ConfigError: there are none.
    """
    args = {key: value for key, value in get_model_args(trunk).items() if key != "num_classes" and value is not None}
    stored = {key: _json_value(key, value, config) for key, value in args.items()}
    # A pool set after construction: timm's ViTs choose by their pool at construction where the last norm is.
    norm = getattr(trunk, "fc_norm", None)
    trials = [stored]
    if isinstance(norm, nn.Module):
        trials.append({**stored, "fc_norm": not isinstance(norm, nn.Identity)})
    trials.append({key: value for key, value in stored.items() if key != "global_pool"})
    wanted = shapes_of(trunk.state_dict())
    wanted_pool = stored.get("global_pool")
    reasons = []
    for trial in trials:
        try:
            with skip_init():
                built = timm.create_model(arch, num_classes=num_classes, **trial)
        except BUILD_ERRORS as error:
            reasons.append(str(error))
            continue
        found = shapes_of(built.state_dict())
        if found == wanted and get_model_args(built).get("global_pool") == wanted_pool:
            return trial
        odd = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        reasons.append(f"other weights, {', '.join(odd[:3])}" if odd else "another pool")
    raise ConfigError(
        f"timm cannot be told by arguments in a JSON file how to build this {arch}: tried {len(trials)}, "
        f"{'; '.join(reasons)}"
    )


def _json_value(name: str, value: Any, config: TimmTowerConfig) -> Any:
    """A value as JSON; a class by the name under which timm's own factories know it."""
    if isinstance(value, type):
        for factory in (get_act_layer, get_norm_layer):
            try:
                if factory(value.__name__.lower()) is value:
                    return value.__name__.lower()
            except (KeyError, AssertionError):
                continue
    stored = encode(value, f"model_args.{name}")
    if _has_class(stored):
        raise ConfigError(
            f"model_args.{name}={stored!r}: timm's config.json holds no classes and timm takes none by name here, so "
            f"stock timm and transformers cannot be told to build this {config.architecture}. Save it as a tower "
            "(save_pretrained), which stock transformers loads under trust_remote_code=True."
        )
    return stored


def _has_class(value: Any) -> bool:
    if isinstance(value, dict):
        return "class" in value or any(map(_has_class, value.values()))
    return isinstance(value, list) and any(map(_has_class, value))


def _classifier_weights(
    arch: str, model_args: Mapping[str, Any], linear: nn.Linear, trunk_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The projection under the keys of timm's classifier."""
    with skip_init():
        built = timm.create_model(arch, num_classes=linear.out_features, **model_args)
    added = {key for key in built.state_dict() if key not in trunk_state}
    layers = [
        (name, part)
        for name, part in built.named_modules()
        if {f"{name}.weight", f"{name}.bias"} == added
        and (isinstance(part, nn.Linear) or (type(part) is nn.Conv2d and part.kernel_size == (1, 1)))
    ]
    if len(layers) != 1 or trunk_state.keys() - built.state_dict().keys():
        raise HeadError(
            f"timm's classifier of {arch} is not one linear layer with a bias ({', '.join(sorted(added)[:6]) or 'none'}"
            "), so the projection cannot become it: head='drop' writes the trunk alone."
        )
    name, layer = layers[0]
    shape, weight = tuple(layer.weight.shape), linear.weight.detach()
    if shape[:2] != tuple(weight.shape):
        raise HeadError(
            f"timm's classifier of {arch} takes {shape[1]} features, the projection {linear.in_features}: "
            "head='drop' writes the trunk alone."
        )
    bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    return {f"{name}.weight": weight.reshape(shape), f"{name}.bias": bias}


def _config_json(
    config: TimmTowerConfig, trunk: nn.Module, model_args: Mapping[str, Any], num_classes: int, image: dict[str, Any]
) -> dict[str, Any]:
    arch, tag = split_tag(config.architecture)
    traits = get_model_traits(trunk)
    known = tag and config.architecture in timm.models.get_arch_pretrained_cfgs(arch)
    source = native_cfg(config.architecture if known else arch)
    cfg = {
        **({"tag": tag} if known else {}),
        **{key: source[key] for key in ("license", "origin_url", "paper_ids") if known and source.get(key)},
        **image,
        "fixed_input_size": bool(traits.get("fixed_input_size")),
        "custom_load": False,
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": traits.get("first_conv"),
        "classifier": source.get("classifier"),
    }
    written = {
        "architecture": arch,
        "model_type": "timm_wrapper",
        "num_classes": num_classes,
        "num_features": config.num_features,
        "model_args": dict(model_args),
        "pretrained_cfg": cfg,
    }
    if num_classes:
        # both libraries would otherwise take an embedding of 1000 numbers for the classes of ImageNet
        written["label_names"] = [f"LABEL_{index}" for index in range(num_classes)]
    return written


def _check(folder: Path, model: EvalTower, folded: bool) -> float:
    """Load the folder with stock timm and compare weights and output, the tower's where its head was folded.

    Returns:
        The output's difference, over its largest value.
    """
    images = model.images(2)
    with private_draws(0):
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    loaded = loaded.to(device=images.device, dtype=images.dtype).eval()
    written, state = read_aligned(folder / SINGLE_NAME), loaded.state_dict()
    if odd := [key for key in state if key not in written or not same_bits(state[key].cpu(), written[key])]:
        raise WeightsError(f"timm loads other weights than the tower's: {', '.join(odd[:5])}")
    with torch.no_grad(), eval_mode(model):
        expected, found = model(images) if folded else model.trunk(images), loaded(images)
    if same_bits(expected, found):
        return 0.0
    difference = relative_difference([found], [expected])
    if not folded or not difference <= FOLDED_TOLERANCE:
        raise WeightsError(f"timm loads the folder and gives another output (relative difference {difference:.1e})")
    return difference

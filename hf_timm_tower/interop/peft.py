"""LoRA on a tower, by peft: which layers to adapt, and the head trained and saved with them. Needs `peft`.

`get_peft_model(tower, LoraConfig(...))` works on both faces; this file saves from what it lets pass in silence. peft
trains what `target_modules` and `modules_to_save` name and no more: a head or classifier that is not named stays as it
is. It adapts layers that the trunk never calls (Swin V2 and BEiT take the weights of `qkv` and not the layer), which
then do nothing. And it saves no running statistics of the layers that it freezes, although training moves them.
"""

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers.utils.hub import cached_file

from ..files.json import write_json
from ..files.open_folder import read_json
from ..reader.errors import ArgumentError, ConfigError, WeightsError
from ..reader.freezing import freeze_statistics, keeps_statistics
from ..reader.trunk import float_dtype, native_size
from ..training.freezing import freeze, restore_frozen

TOWER_NAME = "adapter_tower.json"
"""File beside an adapter's own: of which tower it is, by a few of the trunk's weights."""

_SAMPLED_TENSORS, _SAMPLED_VALUES = 24, 16
# Of the sampled values' norm. A cast to bfloat16 moves each by 2**-9 of itself at most; other weights, all of it.
_SAME_WEIGHTS = 0.01

_MISSING = "Found missing adapter keys"
# What peft puts into the names of parameters of a module that it copies.
_COPY = re.compile(r"\.modules_to_save\.[^.]+")


def lora_config(
    tower: nn.Module,
    r: int = 8,
    *,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` that fits a tower.

    Args:
        tower: `TimmModel`, or one of the transformers faces; not changed.
        r: Rank of the adapters.
        lora_alpha: Their scale is `lora_alpha / r`; `2 * r` by default.
        lora_dropout: Probability.
        target_modules: As in peft, checked against the tower. None: all linear layers of the trunk, quantized ones
            too; in trunks without any, all convolutions that are not grouped.
        modules_to_save: Modules that train as a whole and are saved with the adapter. None: head and classifier.
            peft compares the ends of names, so `head` is also `trunk.head` (ConvNeXt's last norm) and
            `trunk.conv_head`; where a trunk has such, None stands for the head's parts, by name.
        options: Further arguments of `LoraConfig`.

    Raises:
        ArgumentError: `target_modules` names a layer that the trunk does not call, so that an adapter would do nothing.
        ConfigError: the trunk has no layers that can be adapted, or the head is quantized.
    """
    if modules_to_save is None:
        modules_to_save = [name for part in ("head", "classifier") for name in _names_to_save(tower, part)]
    if packed := [f"{name}.{key}" for name in modules_to_save for key in _packed(tower.get_submodule(name))]:
        raise ConfigError(
            f"{packed[0]} is quantized and cannot train: load the tower with its head left out of quantization, by "
            "llm_int8_skip_modules=['head'] of BitsAndBytesConfig"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules or ()),
        modules_to_save=list(modules_to_save) or None,
        **options,
    )
    called = _called(tower)
    if target_modules is None:
        config.target_modules = _targets(tower, called, config)
        return config
    idle = [
        name
        for name, module in tower.named_modules()
        if name.startswith("trunk.") and isinstance(module, (nn.Linear, nn.Conv2d)) and name not in called
        and check_target_module_exists(config, name)
    ]  # fmt: skip
    if idle:
        raise ArgumentError(
            f"target_modules={target_modules!r}: the trunk {tower.config.architecture} never calls "  # type: ignore[union-attr]
            f"{', '.join(idle[:4])} ({len(idle)} in all; it uses their weights in another way), so an adapter on them "
            "would do nothing. Leave target_modules out, or name other layers."
        )
    return config


def add_lora(tower: nn.Module, config: LoraConfig | None = None, *, adapter_name: str = "default") -> PeftModel:
    """Put LoRA adapters into a tower, in place; the tower is frozen, adapters and head train.

    The trunk's running statistics (BatchNorm) stay as they are, since an adapter does not save them. Parameters that
    the head was made with as not trainable stay so.

    Args:
        tower: As in `lora_config`; locked or not.
        config: By default `lora_config(tower)`.
        adapter_name: As in peft.

    Returns:
        peft's model: `save_pretrained` saves adapters and head, `load_lora` puts them onto the tower again, and
        `merge_lora` gives a tower.
    """
    config = config or lora_config(tower)
    _forget_folder(tower)
    if type(config) is LoraConfig:
        config = _TowerLoraConfig(**{each.name: getattr(config, each.name) for each in fields(config) if each.init})
        config.of_tower = _sample(tower)
    model: Any = get_peft_model(tower, config, adapter_name=adapter_name)
    _settle(tower)
    return model  # type: ignore[no-any-return]


def load_lora(
    tower: nn.Module, adapter: str | os.PathLike[str], *, is_trainable: bool = False, **options: Any
) -> PeftModel:
    """Put saved adapters and their head onto the tower that they were trained on.

    Args:
        tower: Loaded afresh; it is changed in place.
        adapter: A folder, or a repository's id.
        is_trainable: To train on.
        options: Further arguments of `PeftModel.from_pretrained`.

    Raises:
        WeightsError: the adapter does not have all the weights that its config asks for, or it was trained on a tower
            of other weights, as far as a few of them tell. peft itself puts it onto any tower of the same shapes.
    """
    _refuse_other_tower(tower, adapter, options)
    _forget_folder(tower)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_MISSING)
        try:
            model = PeftModel.from_pretrained(tower, adapter, is_trainable=is_trainable, **options)
        except (UserWarning, KeyError) as error:
            raise WeightsError(f"{adapter}: the adapter is incomplete or of another tower: {error}") from error
    _settle(tower)
    return model


def merge_lora(model: PeftModel) -> Any:
    """Merge the adapters into the weights: a plain tower again, the one that went in, which saves and loads as such.

    What is frozen is what was frozen before (`tower.lock`), and not all that peft froze.

    Args:
        model: From `add_lora`, `load_lora` or `get_peft_model`; not to be used any more.

    Returns:
        The tower.
    """
    tower: Any = model.merge_and_unload()
    for name, parameter in tower.named_parameters():
        if name in getattr(tower, "_fixed_in_head", ()):
            parameter.requires_grad_(False)
    if tower.config.frozen is None:
        freeze(tower, (), ())
    else:
        restore_frozen(tower, tower.config.frozen)
    return tower


class _TowerLoraConfig(LoraConfig):
    """peft's config, which writes beside its own file of which tower the adapter is."""

    of_tower: Mapping[str, Any]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_json(Path(save_directory, TOWER_NAME), self.of_tower)


def _forget_folder(tower: nn.Module) -> None:
    """peft writes where a model was loaded from into the adapter's files, also where that is a folder of somebody's."""
    if os.path.isdir(vars(tower).get("name_or_path") or ""):
        del tower.name_or_path


def _sample(tower: nn.Module) -> dict[str, Any]:
    """A few weights of the trunk, name -> values, spread over its depth; quantised ones are left out."""
    trunk: Any = tower.trunk
    named = [(name, each) for name, each in trunk.named_parameters() if each.ndim > 1 and each.is_floating_point()]
    taken = named[:: max(1, len(named) // _SAMPLED_TENSORS)]
    values = {name: each.detach().flatten()[:_SAMPLED_VALUES].float().cpu().tolist() for name, each in taken}
    return {"architecture": tower.config.architecture, "trunk": values}  # type: ignore[union-attr]


def _refuse_other_tower(tower: nn.Module, adapter: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    access = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    found = cached_file(os.fspath(adapter), TOWER_NAME, _raise_exceptions_for_missing_entries=False, **access)
    if found is None:
        return  # saved by peft alone, which does not say
    said = read_json(found)
    own, told = _sample(tower), said.get("trunk")
    weights: dict[str, Any] = told if isinstance(told, dict) else {}
    differ = [] if said.get("architecture") == own["architecture"] else [f"architecture {own['architecture']}"]
    for name in own["trunk"].keys() & weights.keys():
        ours, theirs = torch.tensor(own["trunk"][name]), torch.tensor(weights[name])
        if ours.shape != theirs.shape or not (ours - theirs).norm() <= _SAME_WEIGHTS * theirs.norm():
            differ.append(name)
    if differ:
        raise WeightsError(
            f"{adapter}: was trained on another tower ({said.get('architecture')}): {', '.join(sorted(differ)[:3])} "
            f"differ{'s' if len(differ) == 1 else ''} here. Load it onto the tower that it was trained on; where the "
            f"other one is meant, remove its {TOWER_NAME}."
        )


def _targets(tower: nn.Module, called: set[str], config: LoraConfig) -> list[str]:
    """The layers to adapt where nobody names any: plain ones, since of others the merged weight may not be the sum."""
    saved = tuple(config.modules_to_save or ())
    within = [f"{name}." for name, _ in tower.named_modules() if saved and name.endswith(saved)]
    layers = {
        name: module
        for name, module in tower.named_modules()
        if name in called and not f"{name}.".startswith(tuple(within))
    }
    # bitsandbytes' layers are of classes of their own
    linear = [
        name
        for name, layer in layers.items()
        if type(layer) is nn.Linear or (isinstance(layer, nn.Linear) and _packed(layer))
    ]
    dense = [name for name, layer in layers.items() if type(layer) is nn.Conv2d and layer.groups == 1]
    if not linear and not dense:
        raise ConfigError(
            f"{tower.config.architecture} has neither nn.Linear nor ungrouped nn.Conv2d "  # type: ignore[union-attr]
            "layers of its own; pass target_modules=..."
        )
    return linear or dense


def _packed(module: nn.Module) -> list[str]:
    """Names of the parameters that hold packed numbers and cannot train."""
    return [name for name, each in module.named_parameters() if not (each.is_floating_point() or each.is_complex())]


def _called(tower: nn.Module) -> set[str]:
    """Names of the trunk's modules that are called when it runs, and not only looked into."""
    trunk: Any = tower.trunk
    modes = [(module, module.training) for module in trunk.modules()]
    found: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: found.add(name))
        for name, module in trunk.named_modules(prefix="trunk")
    ]
    config: Any = tower.config
    anchor = next(trunk.parameters())
    try:
        trunk.eval()
        image = torch.zeros(1, config.in_chans, *native_size(config), dtype=float_dtype(trunk), device=anchor.device)
        # Where an input needs no gradient, bitsandbytes on CPUs packs 4-bit weights anew, in a form that cannot train.
        with torch.set_grad_enabled(bool(_packed(trunk))):
            trunk(image.requires_grad_(torch.is_grad_enabled()))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return found


def _settle(tower: nn.Module) -> None:
    """Keep the trunk's statistics, and fixed what the head was made with as fixed."""
    for module in tower.trunk.modules():  # type: ignore[union-attr]
        if keeps_statistics(module):
            freeze_statistics(module)
    fixed = getattr(tower, "_fixed_in_head", ())
    for name, parameter in tower.named_parameters():
        if _COPY.sub("", name) in fixed:
            parameter.requires_grad_(False)


def _names_to_save(tower: nn.Module, part: str) -> list[str]:
    """What to call a part of the tower for peft: by its name, or by those of its parts where others end like it."""
    module = getattr(tower, part, None)
    if module is None or not module.state_dict():
        return []
    modules = {name: each for name, each in tower.named_modules() if each.state_dict()}
    if not _ends_like(part, modules):
        return [part]
    children = {f"{part}.{name}": child for name, child in module.named_children() if child.state_dict()}
    apart = sum(len(list(child.parameters())) for child in children.values()) == len(list(module.parameters()))
    own = [*module._parameters, *module._buffers]
    return [part] if own or not apart or any(_ends_like(name, modules) for name in children) else list(children)


def _ends_like(name: str, modules: Collection[str]) -> list[str]:
    return [other for other in modules if other != name and other.endswith(name)]

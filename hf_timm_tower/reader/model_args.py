"""Arguments of `timm.create_model` as JSON, and back.

A class value (`act_layer=nn.SiLU`, `mlp_layer=timm.layers.SwiGLUPacked`) is stored by name and looked up in an
allow-list, the public classes of `torch.nn` and `timm.layers`; nothing is ever imported by name. A
`functools.partial` over such a class keeps its keyword arguments. A tower is always built from the decoded form,
so that what was built first is what is rebuilt later.
"""

import math
from collections.abc import Collection
from functools import lru_cache, partial
from typing import Any

import timm.layers
import torch.nn as nn

from .errors import ConfigError, shown

MAX_ARGUMENT_DEPTH = 8
MAX_ARGUMENT_ITEMS = 4096
MAX_INT = 2**31
CLASS_KEY = "class"

# What would read files, fetch weights, or change what kind of object comes back. The tower sets some of them itself.
FORBIDDEN = {
    "pretrained": "pass pretrained=True to TimmModel",
    "pretrained_cfg": "the tower keeps its preprocessing in config.preprocess",
    "pretrained_cfg_overlay": "the tower keeps its preprocessing in config.preprocess",
    "pretrained_model_args": "it describes a source checkpoint",
    "pretrained_strict": "it loosens the loading of weights",
    "pretrained_filter_fn": "it is code",
    "checkpoint_path": "load the weights into tower.trunk instead",
    "cache_dir": "pass it to the call that downloads",
    "file": "it names a file to read",
    "url": "it names a file to fetch",
    "hf_hub_id": "it names a repository to fetch",
    **dict.fromkeys("features_only out_indices feature_cls feature_cfg".split(), "use tower.forward_intermediates"),
    "model_cfg": "give the architecture's name and its arguments",
    "device": "move the tower with tower.to(device)",
    "dtype": "cast the tower with tower.to(dtype)",
    "num_classes": "the head follows embed_dim",
    "global_pool": "use the tower's pool argument",
    "img_size": "use the tower's image_size argument",
    "drop_path": "use the tower's drop_path argument, or drop_path_rate here",
}

# Arguments that a config records of a trunk, though nobody passes them: of one that existed before its tower
# (`TimmModel.from_trunk`), and of any.
FROM_TRUNK = ("num_classes", "global_pool")
RECORDED = ("img_size",)


@lru_cache(maxsize=1)
def allowed_classes() -> dict[str, type[nn.Module]]:
    """Full name -> class, for every public module class of `torch.nn` and `timm.layers`."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in (("torch.nn", nn), ("timm.layers", timm.layers))
        for name, value in sorted(vars(module).items())
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")
    }


@lru_cache(maxsize=1)
def _class_names() -> dict[type[nn.Module], str]:
    table = allowed_classes()
    first = {cls: name for name, cls in reversed(table.items())}
    return first | {cls: name for name, cls in table.items() if name.endswith(f".{cls.__name__}")}


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """A Python value -> JSON; `ConfigError` names a value that cannot be stored, and where it is."""
    if depth > MAX_ARGUMENT_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_ARGUMENT_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value}: expected a finite number")
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        if abs(value) >= MAX_INT:
            raise ConfigError(f"{where}={shown(value)}: integers must stay below 2**31")
        return value
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_ARGUMENT_ITEMS:
            raise ConfigError(f"{where}: {len(value)} items, at most {MAX_ARGUMENT_ITEMS} are read")
        return [encode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, dict):
        if CLASS_KEY in value:
            _lookup(value, where)  # already encoded: checked, then kept
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: keys must be strings, found {key!r}")
        return {key: encode(item, inner(where, key), depth + 1) for key, item in value.items()}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        encoded = encode(value.func, where, depth)
        encoded["kwargs"] = encode(dict(value.keywords), f"{where}.kwargs", depth + 1)
        return encoded
    if isinstance(value, type):
        name = _class_names().get(value)
        if name is not None:
            return {CLASS_KEY: name}
        raise ConfigError(
            f"{where}={value.__module__}.{value.__qualname__}: only public module classes of torch.nn and timm.layers "
            "can be stored by name. Build the trunk yourself and override TimmModel._create_trunk, or use one of those."
        )
    raise ConfigError(
        f"{where}={value!r} ({type(value).__name__}) cannot be stored in config.json: use None, bool, int, float, str, "
        "lists, dicts, or module classes of torch.nn and timm.layers (functools.partial with keywords too)."
    )


def decode(value: Any, where: str) -> Any:
    """What `encode` gave -> the value that `timm.create_model` is given; lists are tuples. `ConfigError` as there."""
    if isinstance(value, (list, tuple)):
        return tuple(decode(item, f"{where}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if CLASS_KEY not in value:
        return {key: decode(item, inner(where, key)) for key, item in value.items()}
    cls = _lookup(value, where)
    keywords = {key: decode(item, inner(f"{where}.kwargs", key)) for key, item in value.get("kwargs", {}).items()}
    return partial(cls, **keywords) if keywords else cls


def inner(where: str, key: str) -> str:
    """Where a value of a dict is, for messages."""
    return f"{where}.{shown(key)[1:-1]}"


def _lookup(value: dict[str, Any], where: str) -> type[nn.Module]:
    name = value[CLASS_KEY]
    extra = sorted(set(value) - {CLASS_KEY, "kwargs"})
    if extra or not isinstance(value.get("kwargs", {}), dict):
        found = shown(sorted(value))
        raise ConfigError(f"{where}: a class entry has 'class' and maybe 'kwargs' (a dict), found {found}")
    cls = allowed_classes().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ConfigError(f"{where}: class {shown(name)} is not a public module class of torch.nn or timm.layers")
    return cls


def check_names(model_args: dict[str, Any], *, recorded: Collection[str] = ()) -> None:
    """Refuse arguments that fetch, read files, or belong to another argument of the tower, and rates that are none.

    `recorded`: names of `FROM_TRUNK` and `RECORDED` that may be there. `ConfigError` says what to use instead.
    """
    for name, value in model_args.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"model_args: {shown(name)} is not the name of an argument")
        if value is None:
            raise ConfigError(f"model_args: {name}=None is dropped by timm, whose default then holds; leave it out")
        if name in FORBIDDEN and name not in recorded:
            raise ConfigError(f"model_args: {name!r} is not accepted here: {FORBIDDEN[name]}.")
        if name.endswith("drop_rate") or name == "drop_path_rate":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"model_args: {name}={shown(value)}: expected a rate, 0 <= {name} <= 1")

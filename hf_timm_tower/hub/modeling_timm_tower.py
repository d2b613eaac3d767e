"""Towers of hf_timm_tower in transformers, where that package is not installed.

This is the code that `trust_remote_code=True` runs, all of it: the modules of hf_timm_tower/reader, one after the other
in the order of their imports. It reads JSON and safetensors, builds a timm model and a head, and has no other business.
"""

import copy
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import reprlib
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypedDict, TypeVar

import numpy as np
import timm
import timm.layers
import torch
import torch.nn.functional as functional
from huggingface_hub import hf_hub_download
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio, center_crop_or_pad
from timm.data.transforms_factory import create_transform
from timm.layers import norm as timm_norm
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from torch import nn
from torch.distributions.dirichlet import _Dirichlet
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

# --- errors.py

"""Every error this package raises on purpose.

Each also inherits the builtin that fits, so that callers who catch `ValueError` or `OSError` need not know us::

    TowerError
    +- ConfigError      (ValueError)    a field of the config or an argument of the constructor is wrong
    +- ArgumentError    (TypeError)     an unknown or contradictory keyword
    +- HeadError        (ValueError)    a custom head cannot be stored, rebuilt or used
    |  +- GraphError                    a head cannot be traced to a graph, or a stored graph is refused
    +- FolderError      (OSError)       a tower's folder cannot be read or written
    |  +- HubError                      a repository of the Hub cannot be read or written
    +- FormatError      (ValueError)    a file of a tower is damaged, too large, or of an unknown format version
    +- WeightsError     (RuntimeError)  weights do not fit the tower: missing, unexpected or wrongly shaped keys
    +- ExportError      (RuntimeError)  an exporter cannot write the tower, or what it wrote gives another output

Messages say what was found, what was expected, where, and what to do. Text from a file or a repository goes into them
through `shown` alone.
"""


_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxlevel = 4


class TowerError(Exception):
    """Base of all errors of hf_timm_tower."""


class ConfigError(TowerError, ValueError):
    """A field of the config, or a constructor argument, has a value that cannot be used."""


class ArgumentError(TowerError, TypeError):
    """A keyword is unknown, or two arguments contradict each other."""


class HeadError(TowerError, ValueError):
    """A custom head cannot be stored, rebuilt or used."""


class GraphError(HeadError):
    """A head cannot be traced to a graph, or a stored graph is refused by the audit."""


class FolderError(TowerError, OSError):
    """A tower's folder cannot be read or written."""


class HubError(FolderError):
    """A repository of the Hub cannot be read or written."""


class FormatError(TowerError, ValueError):
    """A file of a tower is damaged, too large, or of an unknown format version."""


class WeightsError(TowerError, RuntimeError):
    """Weights do not fit the tower: missing, unexpected or wrongly shaped keys."""


class ExportError(TowerError, RuntimeError):
    """An exporter (ONNX, `torch.export`) cannot write the tower, or what it wrote gives another output."""


def shown(thing: object, limit: int = 80) -> str:
    """Something foreign (a key, a name, a value of a file) for a message: quoted, printable, on one line, short.

    What a terminal or Markdown would act on (escape sequences, line feeds, text direction marks) is escaped, as `repr`
    does it; the cost does not grow with what is shown.

    Args:
        thing: Text, a number, or lists and dicts of these.
        limit: Most characters of the result.
    """
    if isinstance(thing, int) and thing.bit_length() > 4 * limit:
        return f"a number of {thing.bit_length()} bits"
    _SHORT.maxstring = _SHORT.maxother = limit
    text = repr(thing[: limit + 1]) if isinstance(thing, str) else _SHORT.repr(thing)
    return text if len(text) <= limit else text[: limit - 3] + "..."

# --- model_args.py

"""Arguments of `timm.create_model` as JSON, and back.

A class value (`act_layer=nn.SiLU`, `mlp_layer=timm.layers.SwiGLUPacked`) is stored by name and looked up in an
allow-list, the public classes of `torch.nn` and `timm.layers`; nothing is ever imported by name. A
`functools.partial` over such a class keeps its keyword arguments. A tower is always built from the decoded form,
so that what was built first is what is rebuilt later.
"""


MAX_DEPTH = 8
MAX_ITEMS = 4096
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
    "features_only": "use tower.forward_intermediates",
    "out_indices": "use tower.forward_intermediates",
    "feature_cls": "use tower.forward_intermediates",
    "feature_cfg": "use tower.forward_intermediates",
    "model_cfg": "give the architecture's name and its arguments",
    "device": "move the tower with tower.to(device)",
    "dtype": "cast the tower with tower.to(dtype)",
    "num_classes": "the head follows embed_dim",
    "global_pool": "use the tower's pool argument",
    "img_size": "use the tower's image_size argument",
    "drop_path": "use the tower's drop_path argument, or drop_path_rate here",
}

# Arguments that say how a trunk that already exists was made. Only `TimmModel.from_trunk` records them.
FROM_TRUNK = ("num_classes", "global_pool")


@lru_cache(maxsize=1)
def allowed_classes() -> dict[str, type[nn.Module]]:
    """Full name -> class, for every public module class of `torch.nn` and `timm.layers`."""
    table: dict[str, type[nn.Module]] = {}
    for prefix, module in (("torch.nn", nn), ("timm.layers", timm.layers)):
        for name in dir(module):
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_"):
                table[f"{prefix}.{name}"] = value
    return table


@lru_cache(maxsize=1)
def _class_names() -> dict[type[nn.Module], str]:
    names: dict[type[nn.Module], str] = {}
    for name, cls in allowed_classes().items():
        if cls not in names or name.rsplit(".", 1)[1] == cls.__name__:
            names[cls] = name
    return names


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """A Python value -> JSON.

    Args:
        value: None, bool, int, float, str, an allowed class, a partial over one, or lists, tuples and dicts of these.
        where: name of the field, for messages.

    Raises:
        ConfigError: a value that cannot be stored, with its place.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value}: expected a finite number")
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        if abs(value) >= MAX_INT:
            raise ConfigError(f"{where}={value}: integers must stay below 2**31")
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, dict):
        if CLASS_KEY in value:
            _lookup(value, where)  # already encoded: checked, then kept
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: keys must be strings, found {key!r}")
        return {key: encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
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


def decode(value: Any, where: str, depth: int = 0) -> Any:
    """JSON -> the Python value that `timm.create_model` is given; lists become tuples.

    Raises:
        ConfigError: a class that is not on the allow-list, or a malformed entry.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            raise ConfigError(f"{where}: {len(value)} items, at most {MAX_ITEMS} are read")
        return tuple(decode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value))
    if isinstance(value, dict):
        if CLASS_KEY in value:
            cls = _lookup(value, where)
            keywords = value.get("kwargs")
            if keywords:
                return partial(cls, **{k: decode(v, f"{where}.kwargs.{k}", depth + 2) for k, v in keywords.items()})
            return cls
        return {key: decode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    return encode(value, where, depth)


def _lookup(value: dict[str, Any], where: str) -> type[nn.Module]:
    name = value[CLASS_KEY]
    extra = sorted(set(value) - {CLASS_KEY, "kwargs"})
    if extra or not isinstance(value.get("kwargs", {}), dict):
        raise ConfigError(f"{where}: a class entry has 'class' and maybe 'kwargs' (a dict), found {sorted(value)}")
    cls = allowed_classes().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ConfigError(f"{where}: class {name!r} is not a public module class of torch.nn or timm.layers")
    return cls


def check_names(model_args: dict[str, Any], *, from_trunk: bool) -> None:
    """Refuse arguments that fetch, read files, or belong to another argument of the tower.

    Raises:
        ConfigError: names the argument and what to use instead.
    """
    for name in model_args:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"model_args: {name!r} is not the name of an argument")
        if model_args[name] is None:
            raise ConfigError(f"model_args: {name}=None is dropped by timm, whose default then holds; leave it out")
        if name in FORBIDDEN and not (from_trunk and name in FROM_TRUNK):
            raise ConfigError(f"model_args: {name!r} is not accepted here: {FORBIDDEN[name]}.")

# --- freezing.py

"""What of a stored tower is frozen: applied to a tower that was just built.

A parameter is frozen by `requires_grad`. Running statistics are frozen by a hook on the module that has them, which puts
it into eval mode before every forward: so they stay after `.train()` on any part, in copies and pickles and in anybody's
training loop, and neither the module tree nor the state dict changes.
"""


_FROZEN_KEYS = ("parameters", "statistics")
_MOST_FROZEN = 100_000


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module itself has state that moves in train mode: running statistics, or spectral norm's vectors.

    Running statistics are buffers called `running_...` (`running_mean`; `running_std` in a BatchRenorm of somebody's
    own), as in torch and timm, or `moving_...`, as elsewhere. State under other names, such as a queue, is not known.
    """
    buffers = module._buffers
    return any(
        buffer is not None
        and (name.startswith(("running_", "moving_")) or (name.endswith("_u") and f"{name[:-1]}v" in buffers))
        for name, buffer in buffers.items()
    )


def hold_at_call(module: nn.Module, inputs: Any) -> None:
    """The hook."""
    module.training = False


def is_held(module: nn.Module) -> bool:
    """Whether the module's statistics are frozen."""
    return any(hook is hold_at_call for hook in module._forward_pre_hooks.values())


def hold(module: nn.Module) -> None:
    """Freeze the module's statistics."""
    if not is_held(module):
        # before other hooks: that of the old spectral norm looks at the mode too
        module.register_forward_pre_hook(hold_at_call, prepend=True)
    module.training = False


def keep_statistics(tower: nn.Module) -> None:
    """Put modules with frozen statistics into eval mode now; to be called at the end of a tower's `train`.

    They go there by themselves before each forward. But a module that took the place of another since (`SyncBatchNorm`
    for `BatchNorm`) has no hook yet; it gets one here.
    """
    names: tuple[str, ...] = getattr(tower, "_held_statistics", ())
    if not names:
        return
    modules = dict(tower.named_modules())
    for name in names:
        if name in modules and keeps_statistics(modules[name]):
            hold(modules[name])


def check_frozen(frozen: dict[str, Any] | None) -> None:
    """Refuse what is not a frozen state: `parameters` and `statistics`, each a list of names.

    Raises:
        ConfigError: with what was found.
    """
    for key, names in (frozen or {}).items():
        if key not in _FROZEN_KEYS:
            raise ConfigError(f"frozen: unknown key {shown(key)}; expected {' and '.join(_FROZEN_KEYS)}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"frozen[{key!r}]: expected a list of names, found {shown(names)}")
        if len(names) > _MOST_FROZEN:
            raise ConfigError(f"frozen[{key!r}]: {len(names)} names, expected at most {_MOST_FROZEN}")


def frozen_names(tower: nn.Module, frozen: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The parameters and the modules with statistics that a frozen state names, each for itself or by a module above it.

    Raises:
        ConfigError: not a frozen state, or it names what the tower does not have.
    """
    check_frozen(frozen)
    first_names = {id(parameter): name for name, parameter in tower.named_parameters()}
    every_name = dict(tower.named_parameters(remove_duplicate=False))
    parameters = _names_under(frozen.get("parameters", []), every_name, "parameters")
    keepers = [name for name, module in tower.named_modules() if keeps_statistics(module)]
    statistics = _names_under(frozen.get("statistics", []), keepers, "statistics")
    return {first_names[id(every_name[name])] for name in parameters}, statistics


def apply_frozen(tower: nn.Module, frozen: dict[str, Any] | None) -> None:
    """Freeze what a config says was frozen, in a tower that was just built from it; None leaves it as it was built.

    Raises:
        ConfigError: not a frozen state, or it names what the tower does not have.
    """
    if frozen is None:
        return
    parameters, statistics = frozen_names(tower, frozen)
    for name, parameter in tower.named_parameters():
        if name in parameters:
            parameter.requires_grad_(False)
    hold_all(tower, statistics)


def hold_all(tower: nn.Module, names: Collection[str]) -> None:
    """Freeze the statistics of the modules of these names in the tower."""
    for name, module in tower.named_modules():
        if name in names:
            hold(module)
    tower._held_statistics = tuple(sorted(names))  # type: ignore[assignment]


def _names_under(entries: Sequence[str], names: Iterable[str], key: str) -> set[str]:
    """The names that the entries stand for: each for itself and all under it."""
    under: dict[str, list[str]] = {}
    for name in names:
        at = len(name)
        while at >= 0:
            under.setdefault(name[:at], []).append(name)
            at = name.rfind(".", 0, at)
    missing = [entry for entry in entries if entry not in under]
    if missing:
        near = difflib.get_close_matches(missing[0][:80], list(under)[:10_000], n=3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise ConfigError(
            f"frozen[{key!r}]: the tower has no {shown(missing[0])}{hint}; the config is of another tower"
        )
    return {name for entry in entries for name in under[entry]}

# --- config.py

"""`TimmTowerConfig`: everything that rebuilds a tower with no network.

The config is validated once, when it is made: types by huggingface_hub's `@strict` (as transformers' own configs),
meaning by the checks below. `tower.complete` fills in what only the trunk can tell (its width, its layout, its own
pool), after which the config is a full description.
"""


FORMAT_VERSION = 1

MAX_EMBED_DIM = 2**20
MAX_IMAGE_SIZE = 2**14
MAX_IN_CHANS = 2**12
MAX_LABELS = 2**20

ATTENTION_POOLS = ("abs_attn", "rot_attn")
OUR_POOLS = ("token_avg", "default", "none")
PROJECTIONS = ("linear", "mlp", "none")

# Keys that transformers itself writes into or expects of any config; everything else that is not a field is refused.
_TRANSFORMERS_KEYS = frozenset(
    {
        "model_type",
        "transformers_version",
        "architectures",
        "auto_map",
        "custom_pipelines",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_return_dict",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "per_layer_config",
        "tie_last_hidden_states",
        "use_cache",  # Trainer sets it where gradients are checkpointed
        "hidden_size",
    }
)


@strict
class TimmTowerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What a tower is: trunk, pool, projection or head, input, preprocessing.

    Args:
        architecture: A name of timm's registry, with or without a pretrained tag (`resnet18`, `resnet18.a1_in1k`).
        model_args: Arguments of `timm.create_model`; classes by name, see `reader/model_args.py`.
        image_size: Height and width in pixels; an int means a square, None the trunk's native size.
        in_chans: Channels of the image.
        pool: What pools the trunk's features; after building, the resolved name.
        proj: `linear`, `mlp`, `none`, or None: the trunk's own classifier is the projection.
        proj_bias: Whether the last layer of the projection has a bias.
        drop: Dropout probability of the projection.
        embed_dim: Width of the embedding; None where it follows from the head.
        head: How the custom head comes back (`reader/head.py`), None for a built-in one.
        preprocess: size, crop, interpolation, mean, std and so on (`reader/image_processing.py`).
        classifier: How the trunk loses its own classifier: `construct` builds it without (open_clip's way for
            `proj="none"` and `proj=None`), `reset` calls `reset_classifier` afterwards (its way for `linear`, `mlp`).
        num_features: Width of what the trunk hands to the head; completed when the tower is built.
        layout: Form of what the trunk gives: `NC`, `NLC`, `NCHW` or `NHWC`; completed when the tower is built.
        feat_size: Height and width of the feature map, for attention pools; completed when the tower is built.
        tower_class: Name of the subclass of TimmModel that is needed to rebuild the tower, None for TimmModel itself.
        tower_kwargs: Arguments that such a subclass adds to the constructor.
        frozen: What of the tower is frozen (`reader/freezing.py`), None where everything trains.
        trunk_source: Where the trunk's weights lie, where not beside the head: repository, commit and digests.
        timm_version: The timm that the tower was built with.
        format_version: Version of this format.

    Raises:
        ConfigError: with the field's name and value.
        FormatError: the config was written by a newer format version.
    """

    model_type = "timm_tower"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "embed_dim"}

    architecture: str = "resnet50"
    model_args: dict[str, Any] | None = None
    image_size: int | list[int] | tuple[int, ...] | None = None
    in_chans: int = 3
    pool: str | None = "avg"
    proj: str | None = "linear"
    proj_bias: bool = False
    drop: int | float = 0.0
    embed_dim: int | None = None
    head: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    classifier: Literal["construct", "reset"] | None = None
    num_features: int | None = None
    layout: Literal["NC", "NLC", "NCHW", "NHWC"] | None = None
    feat_size: list[int] | tuple[int, ...] | None = None
    tower_class: str | None = None
    tower_kwargs: dict[str, Any] | None = None
    frozen: dict[str, Any] | None = None
    trunk_source: dict[str, Any] | None = None
    timm_version: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = {key: kwargs[key] for key in kwargs if key not in _TRANSFORMERS_KEYS}
        if unknown:
            raise ConfigError(_unknown_keys(unknown))
        if "hidden_size" in kwargs:
            hidden_size = kwargs.pop("hidden_size")
            if self.embed_dim is not None and hidden_size != self.embed_dim:
                raise ConfigError(f"hidden_size={hidden_size!r} is another name of embed_dim={self.embed_dim}")
            self.embed_dim = hidden_size
        kwargs.pop("model_type", None)
        _check(self)
        _check_labels(kwargs)
        self.timm_version = self.timm_version or timm.__version__
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: every field of ours, and of transformers' fields those that were set."""
        written: dict[str, Any] = super().to_diff_dict()
        everything = self.to_dict()
        for name in OUR_FIELDS:
            written[name] = everything[name]
        return written


OUR_FIELDS = tuple(name for name in TimmTowerConfig.__annotations__ if name != "attribute_map")


def _catch_strict_errors() -> None:
    """Let the constructor raise `ConfigError` where `@strict` would raise an error of its own."""
    validated = TimmTowerConfig.__init__

    def __init__(self: TimmTowerConfig, **kwargs: Any) -> None:
        _check_version(kwargs)
        try:
            validated(self, **kwargs)
        except StrictDataclassError as error:
            cause = str(error.__cause__ or error).replace("\n", " ").strip()
            raise ConfigError(f"TimmTowerConfig: {cause}") from error

    __init__.__wrapped__ = validated  # type: ignore[attr-defined]  # keeps inspect.signature as it was
    TimmTowerConfig.__init__ = __init__  # type: ignore[method-assign, assignment]


_catch_strict_errors()


def _check_version(kwargs: dict[str, Any]) -> None:
    version = kwargs.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatError(f"format_version={version!r}: expected a whole number from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"format_version={version}: this hf_timm_tower reads versions up to {FORMAT_VERSION}. "
            "Upgrade it: pip install -U hf_timm_tower"
        )


def _unknown_keys(unknown: dict[str, Any]) -> str:
    lines = []
    for key, value in sorted(unknown.items()):
        near = difflib.get_close_matches(key, OUR_FIELDS, n=2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        lines.append(f"{key}={_short(value)}{hint}")
    return f"TimmTowerConfig: unknown key{'s' if len(lines) > 1 else ''} {', '.join(lines)}"


def _check_labels(kwargs: dict[str, Any]) -> None:
    """Before transformers writes a name for each label."""
    count = kwargs.get("num_labels")
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_LABELS:
            raise ConfigError(f"num_labels={_short(count)}: expected a whole number from 0 to {MAX_LABELS}")
    for name in ("id2label", "label2id"):
        labels = kwargs.get(name)
        if labels is not None and (not isinstance(labels, dict) or len(labels) > MAX_LABELS):
            raise ConfigError(f"{name}={_short(labels)}: expected an object of at most {MAX_LABELS} labels")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(config: TimmTowerConfig) -> None:
    check_architecture(config.architecture, config.timm_version)
    _check_int("in_chans", config.in_chans, MAX_IN_CHANS)
    if config.embed_dim is not None:
        _check_int("embed_dim", config.embed_dim, MAX_EMBED_DIM)
    if config.num_features is not None:
        _check_int("num_features", config.num_features, MAX_EMBED_DIM)
    for name in ("image_size", "feat_size"):
        if getattr(config, name) is not None:
            setattr(config, name, check_size(name, getattr(config, name)))
    if isinstance(config.drop, bool) or not (math.isfinite(config.drop) and 0 <= config.drop < 1):
        raise ConfigError(f"drop={config.drop!r}: expected a probability, 0 <= drop < 1")
    if config.pool is not None and (len(config.pool) > 64 or not config.pool.isprintable()):
        raise ConfigError(f"pool={_short(config.pool)}: not the name of a pool")
    if config.proj == "":
        config.proj = None
    if config.proj is not None and config.proj not in PROJECTIONS:
        raise ConfigError(
            f"proj={config.proj!r}: expected one of {', '.join(PROJECTIONS)}, or None for the trunk's own classifier"
        )
    if config.classifier is None:
        attention = config.pool in ATTENTION_POOLS
        by_trunk = config.proj in (None, "none") and config.head is None and not attention
        config.classifier = "construct" if by_trunk and config.pool not in OUR_POOLS else "reset"
    model_args = dict(config.model_args or {})
    check_names(model_args, from_trunk=config.classifier == "reset")
    config.model_args = {key: encode(value, f"model_args.{key}") for key, value in sorted(model_args.items())}
    for key, value in config.model_args.items():
        decode(value, f"model_args.{key}")
    config.drop = float(config.drop)
    check_frozen(config.frozen)
    if config.tower_kwargs and config.tower_class is None:
        raise ConfigError(f"tower_kwargs={_short(config.tower_kwargs)}: only a subclass (tower_class) has any")


def _check_int(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name}={_short(value)}: expected a whole number from 1 to {most}")


def check_size(name: str, value: Any) -> list[int]:
    """An image size as `[height, width]` in pixels.

    Raises:
        ConfigError: not one or two whole numbers from 1 to 16384.
    """
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or any(
        isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_IMAGE_SIZE for side in pair
    ):
        raise ConfigError(
            f"{name}={_short(value)}: expected an int or (height, width), each from 1 to {MAX_IMAGE_SIZE} pixels"
        )
    return pair


def check_architecture(name: str, saved_with: str | None = None) -> None:
    """Refuse what this timm's registry does not have.

    Args:
        name: `arch` or `arch.tag`.
        saved_with: The timm version a config was saved with, to say which timm has the architecture.

    Raises:
        ConfigError: with near names, and the timm version that is known to have it.
    """
    if ":" in name or "/" in name:
        raise ConfigError(
            f"architecture={_short(name)}: expected a name of timm's registry (timm.list_models()), without a scheme "
            "or a path; weights of a repository or a folder are loaded with from_pretrained."
        )
    arch = name.split(".", 1)[0]
    if timm.is_model(arch):
        return
    near = difflib.get_close_matches(arch, timm.list_models(), n=4, cutoff=0.5)
    hint = f" Near names: {', '.join(near)}." if near else ""
    if saved_with and saved_with != timm.__version__:
        hint += f" The config was saved with timm {saved_with}, which has it: pip install timm=={saved_with}"
    raise ConfigError(f"architecture={_short(name)} is unknown to timm {timm.__version__}.{hint}")

# --- skip_init.py

"""Construct a module without initialising its parameters.

timm's constructors spend most of their time in random initialisation that a checkpoint overwrites at once. Inside
`no_init()` every in-place write into an `nn.Parameter` is left out, and nothing else: buffers and tensors computed
in the constructor are real, which the meta device cannot offer (relative position indices, rotary tables, attention
biases). Memory of the parameters is reserved, not touched.
"""


# These reserve memory without touching it, so that they may be counted after the fact; the others write at once.
_LAZY = {torch.empty, torch.zeros}
_EAGER = {torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange, torch.linspace}
# One tensor costs Python time even if it is tiny, so that a config with a million layers ends as well.
_LEAST_CHARGE = 2**18


class _SkipInit(TorchFunctionMode):
    def __init__(self, budget: int | None) -> None:
        super().__init__()
        self.budget = budget
        self.spent = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # functions of torch.nn.init pass their target by keyword when they come through here
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter):
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
                return target
        if self.budget is None:
            return func(*args, **kwargs)
        if func in _LAZY:
            try:
                made = func(*args, **kwargs)
            except RuntimeError:
                self._charge(func(*args, **{**kwargs, "device": "meta"}))  # more than the machine has
                raise
            self._charge(made)
            return made
        if func in _EAGER:
            self._charge(func(*args, **{**kwargs, "device": "meta"}))
        return func(*args, **kwargs)

    def _charge(self, made: torch.Tensor) -> None:
        self.spent += max(made.numel() * made.element_size(), _LEAST_CHARGE)
        if self.budget is not None and self.spent > self.budget:
            raise ConfigError(
                f"the config asks for a model of more than {self.budget / 2**30:.2f} GiB, which its weight files do "
                "not hold: refused before it is built. The config does not belong to these weights."
            )


@contextmanager
def no_init(budget: int | None = None) -> Iterator[None]:
    """Leave out every in-place write into a parameter, and leave torch's random state as it was.

    Args:
        budget: Most bytes that the constructor may ask for, None for no limit.

    Raises:
        ConfigError: the budget is exceeded.
    """
    with torch.random.fork_rng(devices=[]), _SkipInit(budget):
        yield


class Budget:
    """TEMPORARY shim until the counted budget arrives."""

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes

    @classmethod
    def default(cls) -> "Budget":
        return cls(None)

    @classmethod
    def for_weights(cls, nbytes: int) -> "Budget":
        return cls(4 * nbytes + 2**30)


@contextmanager
def skip_init(budget: Budget | None = None) -> Iterator[None]:
    with no_init(None if budget is None else budget.nbytes):
        yield

# --- trunk.py

"""Config -> timm trunk, and what the trunk really gives: width, layout, pools, input size.

Nothing here trusts a trunk's attributes where a shape can be had: the output is taken from a run on the meta device,
which costs no arithmetic.
"""


Layout = Literal["NC", "NLC", "NCHW", "NHWC"]

# What timm's constructors raise for arguments they cannot use.
BUILD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
                ValueError, ZeroDivisionError)  # fmt: skip


@dataclass(frozen=True)
class TrunkOutput:
    """What a trunk gives for one batch, without the batch dimension.

    Attributes:
        layout: `NC` a vector, `NLC` tokens, `NCHW` and `NHWC` maps.
        width: Channels C.
        size: Height and width of a map, number of tokens as `(L,)`, or `()`.
    """

    layout: Layout
    width: int
    size: tuple[int, ...]


def split_tag(architecture: str) -> tuple[str, str]:
    """`arch.tag` -> (arch, tag); the tag is empty where there is none."""
    arch, _, tag = architecture.partition(".")
    return arch, tag


def native_cfg(architecture: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of `arch` or `arch.tag`, with the defaults of timm where the registry has none.

    Raises:
        ConfigError: the tag is unknown to this timm.
    """
    arch, tag = split_tag(architecture)
    try:
        cfg = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        known = sorted(timm.models.get_arch_pretrained_cfgs(arch))
        raise ConfigError(
            f"architecture={architecture!r}: timm {timm.__version__} has no pretrained tag {tag!r} for {arch}. "
            f"It has: {', '.join(name.partition('.')[2] for name in known) or 'none'}"
        ) from error
    cfg = cfg or timm.models.PretrainedCfg()
    return dict(cfg.to_dict())  # type: ignore[no-untyped-call]


def create_trunk(config: TimmTowerConfig, *, pretrained: bool = False, initialise: bool = True) -> nn.Module:
    """Build the trunk that the config describes, its classifier removed (or made the projection, `proj=None`).

    Args:
        config: A fresh config (`preprocess` is None: `architecture` may name a pretrained tag), or a completed one.
        pretrained: Fetch timm's weights for the architecture.
        initialise: False leaves all parameters as uninitialised memory, to be assigned.

    Returns:
        The trunk, in train mode, on the CPU.

    Raises:
        ConfigError, ArgumentError: timm cannot build it; says which argument, and which pools there are.
    """
    arch, tag = split_tag(config.architecture)
    name = config.architecture
    kwargs = {key: decode(value, f"model_args.{key}") for key, value in (config.model_args or {}).items()}
    cfg = native_cfg(arch if config.preprocess is not None else config.architecture)
    if config.preprocess is not None:
        # Rebuilding: everything is in the config, so that the tag need not be known to this timm.
        name = arch
        kwargs["pretrained_cfg_overlay"] = _overlay(config, tag)
    if config.in_chans != cfg["input_size"][0]:
        kwargs["in_chans"] = config.in_chans
    if config.image_size is not None and takes_img_size(cfg, kwargs):
        kwargs["img_size"] = tuple(config.image_size)  # type: ignore[arg-type]
    if config.classifier == "construct":
        kwargs["num_classes"] = 0 if config.proj == "none" else config.embed_dim
        if config.pool != "default":
            kwargs["global_pool"] = "" if config.pool == "none" else config.pool
    try:
        if initialise:
            trunk = timm.create_model(name, pretrained=pretrained, **kwargs)
        else:
            with no_init():
                trunk = timm.create_model(name, **kwargs)
    except BUILD_ERRORS as error:
        raise _build_error(config, kwargs, error) from error
    remove_classifier(trunk, config)
    return trunk


def takes_img_size(cfg: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether this trunk is built for one input size, as timm itself decides it."""
    return bool(
        cfg.get("fixed_input_size") and not kwargs.get("dynamic_img_size") and kwargs.get("strict_img_size", True)
    )


def _overlay(config: TimmTowerConfig, tag: str) -> dict[str, Any]:
    preprocess = config.preprocess or {}
    overlay = {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key)}
    overlay.update({key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess.get(key)})
    if tag:
        overlay["tag"] = tag
    return overlay


def remove_classifier(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """Take the trunk's own classifier off and set its pool, by timm's `reset_classifier`.

    Raises:
        ConfigError: the trunk cannot do it.
    """
    if config.classifier == "construct":
        return
    pool = trunk_pool(config.pool)
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        # A trunk that came with its classifier keeps it as the projection; another pool would need another classifier.
        if pool is not None and pool != own_pool(trunk):
            raise PoolRefused(config, f"the classifier that is kept was made for pool {own_pool(trunk)!r}")
        return
    if not hasattr(trunk, "reset_classifier"):
        # Encoders (features only) have nothing to remove and nothing to set.
        if pool:
            raise ConfigError(
                f"pool={config.pool!r}: {config.architecture} has no pooling of its own (timm gives it no "
                "reset_classifier); use pool='default' or 'none'."
            )
        return
    try:
        if pool is None or pool == own_pool(trunk):
            trunk.reset_classifier(0)  # type: ignore[operator]
        else:
            trunk.reset_classifier(0, global_pool=pool)  # type: ignore[operator]
    except BUILD_ERRORS as error:
        raise PoolRefused(config, str(error)) from error


def trunk_output(trunk: nn.Module, in_chans: int, image_size: list[int]) -> TrunkOutput:
    """Run the trunk once without arithmetic and say what it gives.

    Args:
        trunk: A trunk without a classifier.
        in_chans: Channels of the image.
        image_size: Height and width in pixels.

    Raises:
        ConfigError: it does not run at this size, or does not give one tensor.
    """
    shape = (2, in_chans, *image_size)
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if isinstance(grid, tuple) and 0 in grid:
        # older torch runs this on meta without a word
        raise ConfigError(f"image_size={image_size}: smaller than one patch of {type(trunk).__name__}")
    twin = _meta_twin(trunk)
    try:
        with torch.no_grad():
            features = twin(torch.empty(shape, device="meta", dtype=float_dtype(trunk)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        # Not every model runs on meta (constants made on the CPU); whether it runs at all is settled for real.
        features = _run_for_real(trunk, shape)
    if not isinstance(features, torch.Tensor):
        raise ConfigError(
            f"{type(trunk).__name__} gives a {type(features).__name__}, not one tensor, with this pool; "
            "a tower needs one tensor. Use another pool, or forward_intermediates."
        )
    return describe_output(trunk, features.shape)


def describe_output(trunk: nn.Module, shape: torch.Size | tuple[int, ...]) -> TrunkOutput:
    """Shape of a batch of features -> its layout, width and size."""
    _, *rest = shape
    if len(rest) == 1:
        return TrunkOutput("NC", rest[0], ())
    if len(rest) == 2:
        return TrunkOutput("NLC", rest[1], (rest[0],))
    if len(rest) == 3:
        if getattr(trunk, "output_fmt", None) == "NHWC":
            return TrunkOutput("NHWC", rest[2], (rest[0], rest[1]))
        return TrunkOutput("NCHW", rest[0], (rest[1], rest[2]))
    raise ConfigError(f"{type(trunk).__name__} gives features of shape {tuple(shape)}: a tower takes rank 2 to 4")


def float_dtype(trunk: nn.Module) -> torch.dtype:
    """dtype of the images that the trunk takes: that of its first floating-point parameter."""
    return next((tensor.dtype for tensor in trunk.parameters() if tensor.is_floating_point()), torch.float32)


def _meta_twin(trunk: nn.Module) -> nn.Module:
    """A copy of the trunk in eval mode whose tensors have no memory. A copy, for models that cache by input size."""
    memo: dict[int, Any] = {}
    for parameter in trunk.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in trunk.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(trunk, memo).eval()


def _run_for_real(trunk: nn.Module, shape: tuple[int, ...]) -> Any:
    anchor = next(trunk.parameters())
    try:
        with torch.no_grad(), eval_mode(trunk):
            return trunk(torch.zeros(shape, device=anchor.device, dtype=anchor.dtype))
    except BUILD_ERRORS as error:
        raise ConfigError(
            f"{type(trunk).__name__} does not run on an image of shape {shape[1:]} (C, H, W): {error}"
        ) from error


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def native_size(config: TimmTowerConfig) -> list[int]:
    """The config's image size, or the architecture's own: `[height, width]` in pixels."""
    if config.image_size is not None:
        return list(config.image_size)  # type: ignore[arg-type]
    return list(native_cfg(config.architecture)["input_size"][1:])


def check_pool(trunk: nn.Module, config: TimmTowerConfig, output: TrunkOutput) -> None:
    """The pool that was asked for is the one that runs.

    A trunk that takes a name and then ignores it would give another vector without a word.

    Raises:
        ConfigError: lists the pools that the trunk offers.
    """
    wanted = trunk_pool(config.pool)
    has = own_pool(trunk)
    if wanted is not None and has is not None and has != wanted and hasattr(trunk, "reset_classifier"):
        raise PoolRefused(config, f"the trunk keeps its pool {has!r}")
    if wanted == "" and output.layout == "NC":
        raise PoolRefused(config, "the trunk still gives a vector")
    if wanted and output.layout != "NC":
        raise PoolRefused(config, f"the trunk gives {output.layout} features, not a vector")
    if config.pool in ATTENTION_POOLS and output.layout not in ("NCHW", "NHWC"):
        raise PoolRefused(config, f"attention pools need a feature map, the trunk gives {output.layout}")
    if config.pool in ATTENTION_POOLS and output.width % ATTENTION_HEAD_WIDTH:
        raise PoolRefused(
            config, f"attention heads are {ATTENTION_HEAD_WIDTH} wide, which does not divide the width {output.width}"
        )
    if config.pool == "token_avg" and (output.layout != "NLC" or class_and_patch_tokens(trunk) is None):
        raise PoolRefused(config, "it needs tokens with a class token first")


def offered_pools(config: TimmTowerConfig, among: Sequence[str] = ALL_POOLS) -> list[str]:
    """The pools that work for this architecture and projection, found by trying each on the meta device."""
    found = []
    for pool in among:
        trial = copy.deepcopy(config)
        trial.pool = pool
        try:
            trunk = create_trunk(trial, initialise=False)
            check_pool(trunk, trial, trunk_output(trunk, trial.in_chans, native_size(trial)))
        except ConfigError:
            continue
        found.append(pool)
    return found


def describe_trunk(trunk: nn.Module) -> dict[str, Any]:
    """How a timm model that exists was made, as it is now: fields of the config.

    Returns:
        `architecture`, `model_args`, `image_size` and `in_chans`.

    Raises:
        ConfigError: it is not a model of timm's registry.
    """
    cfg = getattr(trunk, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not timm.is_model(cfg.get("architecture") or ""):
        raise ConfigError(
            f"{type(trunk).__name__} is not a model that timm.create_model made (no known architecture in its "
            "pretrained_cfg): build the tower by name, or subclass TimmModel and override _create_trunk"
        )
    args = timm.models.get_model_args(trunk)
    # timm leaves the drop rates out, they matter only in training; a tower goes on training
    made = getattr(trunk, "_model_args", {})
    args |= {key: value for key, value in made.items() if "drop" in key and key.endswith("_rate")}
    args = {key: value for key, value in args.items() if value is not None}
    traits = timm.models.get_model_traits(trunk)
    size = args.pop("img_size", None) or cfg["input_size"][1:]
    in_chans = args.pop("in_chans", None) or traits.get("in_chans") or cfg["input_size"][0]
    tag = cfg.get("tag")
    return {
        "architecture": f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"],
        "model_args": args,
        "image_size": [size, size] if isinstance(size, int) else list(size),
        "in_chans": in_chans,
    }


def check_made_again(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """A trunk that exists and the trunk that its config makes have the same weights by name and shape.

    Raises:
        ConfigError: they do not: the trunk was changed by hand.
    """
    keep = copy.deepcopy(config)
    keep.proj, keep.head, keep.pool = None, None, "default"  # the classifier stays on
    again = create_trunk(keep, initialise=False)
    ours = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in again.state_dict().items()}
    if ours != theirs:
        odd = sorted(key for key in set(ours) | set(theirs) if ours.get(key) != theirs.get(key))
        raise ConfigError(
            f"the trunk {config.architecture} cannot be built again as it is: with its own arguments "
            f"{config.model_args} timm makes other weights ({len(odd)} keys differ, {', '.join(odd[:4])}). It was "
            "changed by hand; subclass TimmModel and override _create_trunk."
        )


def _build_error(config: TimmTowerConfig, kwargs: dict[str, Any], error: BaseException) -> ConfigError | ArgumentError:
    text = str(error) or type(error).__name__
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        name = text.rsplit("'", 2)[-2]
        if name == "global_pool":
            return PoolRefused(config, text)
        if name in (config.model_args or {}):
            return ArgumentError(f"model_kwargs[{name!r}]: {config.architecture} does not take it ({text})")
    if kwargs.get("global_pool") and ("pool" in text.lower() or isinstance(error, AssertionError)):
        return PoolRefused(config, text)
    given = {key: value for key, value in kwargs.items() if key != "pretrained_cfg_overlay"}
    return ConfigError(f"timm cannot build {config.architecture} with {given}: {text}")


def buffers_as_timm(trunk: nn.Module) -> None:
    """TEMPORARY: buffers that no file holds get the dtype of the weights."""
    dtype = float_dtype(trunk)
    for part in trunk.modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None and buffer.dtype == torch.float32 and dtype != torch.float32:
                part._buffers[name] = buffer.to(dtype)

# --- graph_ops.py

"""The tensor operations a stored head may use: one table from a name in the file to a function of ours.

The reader of a graph looks names up here and nowhere else, so what is not listed cannot be called. Left out on purpose
is everything that reads or writes files, touches raw storage or pointers, calls back into Python, changes what a tensor
is (``set_``, ``resize_``), or moves values into Python. `OPS` maps a name such as ``"torch.cat"``, ``"Tensor.view"``
or ``"F.linear"`` to the callable; a name that the installed torch lacks is absent from it. Memory is never left
uninitialised: ``torch.empty`` and its kin are recorded as zeros, which is one of the things they may give.
"""


_TORCH = """
abs absolute acos acosh adaptive_avg_pool1d adaptive_max_pool1d add addbmm addcdiv addcmul addmm addmv addr adjoint
affine_grid_generator all alpha_dropout amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan arctan2
arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d baddbmm
batch_norm bernoulli bilinear binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat
cdist ceil celu celu_ chain_matmul channel_shuffle cholesky_inverse cholesky_solve chunk clamp clamp_ clamp_max
clamp_min clip clone column_stack combinations complex concat concatenate conj conj_physical constant_pad_nd conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copysign corrcoef cos cosh cosine_embedding_loss
cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum cumulative_trapezoid deg2rad det detach detach_
diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot dropout dropout_ dsplit dstack
einsum embedding embedding_bag eq erf erfc erfinv exp exp_ exp2 expm1 feature_alpha_dropout feature_dropout fix
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frexp frobenius_norm full_like gather ge
geqrf greater greater_equal grid_sampler grid_sampler_2d group_norm gru gru_cell gt hardshrink heaviside
hinge_embedding_loss histc hsplit hstack hypot i0 imag index_add index_copy index_fill index_put index_reduce
index_select inner instance_norm inverse isclose isfinite isin isinf isnan isneginf isposinf isreal kl_div kron
kthvalue layer_norm ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2
logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lstm lstm_cell lt
margin_ranking_loss masked_fill masked_scatter masked_select matmul matrix_exp matrix_power max max_pool1d max_pool2d
max_pool3d maximum mean median meshgrid min minimum mm mode moveaxis movedim msort mul multinomial multiply mv
mvlgamma nan_to_num nanmean nanmedian nanquantile nansum narrow native_group_norm native_layer_norm ne neg negative
nextafter nonzero norm norm_except_dim not_equal nuclear_norm ones_like orgqr ormqr outer pairwise_distance pdist
permute pinverse pixel_shuffle pixel_unshuffle poisson poisson_nll_loss polar polygamma positive pow prelu prod
quantile rad2deg rand_like randint_like randn_like ravel real reciprocal relu relu_ remainder renorm repeat_interleave
reshape resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round rrelu rsqrt
rsub scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sigmoid_ sign signbit sin
sinc sinh slice_scatter slogdet softmax sort split split_with_sizes sqrt square squeeze stack std std_mean sub
subtract sum svd swapaxes swapdims t take take_along_dim tan tanh tanh_ tensor_split tensordot threshold tile topk
trace transpose trapezoid trapz tril triplet_margin_loss triu true_divide trunc unbind unflatten unique_consecutive
unsqueeze var var_mean vdot view_as_complex view_as_real vsplit vstack where xlogy zeros_like _weight_norm arange
as_tensor asarray bartlett_window blackman_window eye full hamming_window hann_window linspace logspace normal ones
rand randint randn randperm scalar_tensor tensor tril_indices triu_indices zeros _standard_gamma _sample_dirichlet
binomial
"""

_TENSOR = """
__add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __iand__ __idiv__ __ifloordiv__ __imod__
__imul__ __invert__ __ior__ __ipow__ __isub__ __itruediv__ __ixor__ __le__ __lt__ __matmul__ __mod__ __mul__ __ne__
__neg__ __or__ __pow__ __radd__ __rand__ __rdiv__ __reversed__ __rfloordiv__ __rmatmul__ __rmod__ __rmul__ __ror__
__rpow__ __rsub__ __rtruediv__ __rxor__ __setitem__ __sub__ __truediv__ __xor__ abs abs_ absolute absolute_ acos acos_
acosh acosh_ add add_ addbmm addbmm_ addcdiv addcdiv_ addcmul addcmul_ addmm addmm_ addmv addmv_ addr addr_ adjoint
all amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere
asin asin_ asinh asinh_ atan atan2 atan2_ atan_ atanh atanh_ baddbmm baddbmm_ bernoulli bernoulli_ bfloat16 bincount
bitwise_and bitwise_and_ bitwise_left_shift bitwise_not bitwise_not_ bitwise_or bitwise_or_ bitwise_right_shift
bitwise_xor bitwise_xor_ bmm bool broadcast_to byte cauchy_ cdouble ceil ceil_ cfloat char cholesky_inverse chunk
clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clip_ clone conj conj_physical contiguous copy_ copysign
copysign_ corrcoef cos cos_ cosh cosh_ count_nonzero cov cross cummax cummin cumprod cumprod_ cumsum cumsum_ deg2rad
deg2rad_ det detach detach_ diag diag_embed diagflat diagonal diagonal_scatter diff digamma digamma_ dist div div_
divide divide_ dot double dsplit eq eq_ erf erf_ erfc erfc_ erfinv erfinv_ exp exp2 exp2_ exp_ expand expand_as expm1
expm1_ exponential_ fill_ fill_diagonal_ fix flatten flip fliplr flipud float float_power floor floor_ floor_divide
floor_divide_ fmax fmin fmod fmod_ frac frac_ frexp gather ge ge_ geometric_ ger greater greater_equal gt gt_ half
hardshrink heaviside histc hsplit hypot i0 index_add index_add_ index_copy index_copy_ index_fill index_fill_
index_put index_put_ index_reduce index_select inner int inverse isclose isfinite isinf isnan isneginf isposinf isreal
kron kthvalue ldexp le le_ lerp lerp_ less less_equal lgamma lgamma_ log log10 log10_ log1p log1p_ log2 log2_ log_
log_normal_ log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_and_ logical_not logical_not_
logical_or logical_or_ logical_xor logit logit_ logsumexp long lt lt_ masked_fill masked_fill_ masked_scatter
masked_scatter_ masked_select matmul matrix_exp matrix_power max maximum mean median min minimum mm mode moveaxis
movedim msort mul mul_ multinomial multiply multiply_ mv mvlgamma nan_to_num nan_to_num_ nanmean nanmedian nanquantile
nansum narrow ne ne_ neg neg_ negative negative_ new_full new_ones new_tensor new_zeros nextafter nonzero norm normal_
not_equal outer permute pinverse polygamma positive pow pow_ prelu prod quantile rad2deg random_ ravel reciprocal
reciprocal_ relu relu_ remainder remainder_ renorm renorm_ repeat repeat_interleave requires_grad_ reshape reshape_as
resolve_conj resolve_neg roll rot90 round round_ rsqrt rsqrt_ scatter scatter_ scatter_add scatter_add_ scatter_reduce
scatter_reduce_ select select_scatter sgn sgn_ short sigmoid sigmoid_ sign sign_ signbit sin sin_ sinc sinc_ sinh
sinh_ slice_scatter slogdet softmax sort split split_with_sizes sqrt sqrt_ square square_ squeeze squeeze_ std sub
sub_ subtract subtract_ sum sum_to_size svd swapaxes swapdims t t_ take take_along_dim tan tan_ tanh tanh_
tensor_split tile to topk trace transpose transpose_ tril tril_ triu triu_ true_divide true_divide_ trunc trunc_ type
type_as unbind unflatten unfold uniform_ unique unique_consecutive unsqueeze unsqueeze_ var vdot view view_as vsplit
where xlogy xlogy_ zero_ cpu cuda
"""

_FUNCTIONAL = """
_threshold adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d
adaptive_max_pool3d_with_indices affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear
binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d cosine_embedding_loss cosine_similarity cross_entropy dropout dropout1d dropout2d dropout3d elu elu_
embedding embedding_bag feature_alpha_dropout fold gaussian_nll_loss gelu glu grid_sample group_norm gumbel_softmax
hardshrink hardsigmoid hardswish hardtanh hardtanh_ hinge_embedding_loss huber_loss instance_norm interpolate kl_div
l1_loss layer_norm leaky_relu leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d
margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices max_unpool1d max_unpool2d mish mse_loss multi_head_attention_forward multi_margin_loss
multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad pairwise_distance pdist
pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 relu_ rms_norm rrelu scaled_dot_product_attention selu
selu_ sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink
threshold threshold_ triplet_margin_loss unfold upsample
"""

_LINALG = """
cond cross det diagonal eigh eigvalsh householder_product inv lu_factor lstsq matmul matrix_rank matrix_exp
matrix_norm matrix_power multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals tensorinv tensorsolve
vander vecdot vector_norm cholesky
"""

_SPECIAL = (
    "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 log1p log_softmax logit logsumexp "
    "multigammaln ndtr ndtri psi round sinc softmax xlog1py xlogy"
)

_FFT = "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn fftshift ifftshift fftfreq rfftfreq"

_PROPERTIES = "T mT H mH real imag data"

RANDOM_NAMES = frozenset(
    """
    torch.alpha_dropout torch.bernoulli torch.dropout torch.dropout_ torch.feature_alpha_dropout torch.feature_dropout
    torch.multinomial torch.normal torch.poisson torch.rand torch.rand_like torch.randint torch.randint_like torch.randn
    torch.randn_like torch.randperm torch.rrelu torch._standard_gamma torch.binomial
    torch._sample_dirichlet torch.draw_dirichlet torch.gru torch.lstm torch.rnn_relu torch.rnn_tanh
    Tensor.bernoulli Tensor.bernoulli_ Tensor.cauchy_ Tensor.exponential_ Tensor.geometric_ Tensor.log_normal_
    Tensor.multinomial Tensor.normal_ Tensor.random_ Tensor.uniform_
    F.alpha_dropout F.dropout F.dropout1d F.dropout2d F.dropout3d F.feature_alpha_dropout F.gumbel_softmax
    F.multi_head_attention_forward F.rrelu F.scaled_dot_product_attention
    """.split()
)
"""Operations whose result is not fixed by their arguments: they draw numbers."""


def _property_reader(name: str) -> Callable[[torch.Tensor], Any]:
    getter = getattr(torch.Tensor, name).__get__

    def read(tensor: torch.Tensor) -> Any:
        return getter(tensor)

    read.__name__ = name
    return read


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, as momentum encoders write it; only with a tensor of the same shape, dtype and device."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        raise ValueError(f"data of shape {list(value.shape)} cannot replace that of a tensor {list(tensor.shape)}")
    tensor.data = value


def _draw_dirichlet(concentration: torch.Tensor) -> torch.Tensor:
    """What `torch.distributions.Dirichlet` and `Beta` draw with, gradient included."""
    return _Dirichlet.apply(concentration)  # type: ignore[no-any-return]


def _function_key(function: Any) -> Any:
    """What identifies a function that torch hands to a function mode; getters and setters by their property."""
    if getattr(function, "__name__", None) == "__get__":
        return ("get", id(function.__self__))
    if getattr(function, "__name__", None) == "__set__":
        return ("set", id(function.__self__))
    return function


def _build_tables() -> tuple[dict[str, Callable[..., Any]], dict[Any, str]]:
    ops: dict[str, Callable[..., Any]] = {}
    names: dict[Any, str] = {}
    spaces: list[tuple[str, Any, str]] = [
        ("torch", torch, _TORCH),
        ("Tensor", torch.Tensor, _TENSOR),
        ("F", functional, _FUNCTIONAL),
        ("linalg", torch.linalg, _LINALG),
        ("special", torch.special, _SPECIAL),
        ("fft", torch.fft, _FFT),
    ]
    for prefix, space, listed in spaces:
        for name in listed.split():
            function = getattr(space, name, None)  # a name from the lists above, never from a file
            if function is not None:
                ops[f"{prefix}.{name}"] = function
                names.setdefault(_function_key(function), f"{prefix}.{name}")
    for name in _PROPERTIES.split():
        ops[f"Tensor.{name}"] = _property_reader(name)
        names[("get", id(getattr(torch.Tensor, name)))] = f"Tensor.{name}"
    for empty, zeros in (("torch.empty", "torch.zeros"), ("torch.empty_like", "torch.zeros_like")):
        names[getattr(torch, empty.split(".")[1])] = zeros
    names[torch.Tensor.new_empty] = "Tensor.new_zeros"
    ops["Tensor.set_data_"] = _set_data
    names[("set", id(torch.Tensor.data))] = "Tensor.set_data_"
    ops["torch.draw_dirichlet"] = _draw_dirichlet
    return ops, names


OPS, _NAMES = _build_tables()


def name_of(function: Any) -> str | None:
    """The table's name for a function as torch's function protocol reports it, or None if it is not in the table."""
    try:
        return _NAMES.get(_function_key(function))
    except TypeError:  # unhashable callables are never ours
        return None


TORCH_FUNCTIONS: dict[type, str] = {_Dirichlet: "torch.draw_dirichlet"}
"""Autograd functions of torch itself that stand in the table."""

METADATA = frozenset(
    """
    shape size dim ndim ndimension dtype device is_cuda is_cpu is_floating_point is_complex is_contiguous stride numel
    nelement __len__ requires_grad is_leaf layout is_sparse is_quantized is_meta is_mps is_xpu storage_offset
    element_size itemsize nbytes get_device is_nested is_inference is_conj is_neg is_signed is_same_size __hash__
    __repr__ __format__ __str__ names has_names is_distributed _is_view is_sparse_csr is_mkldnn
    """.split()
)
"""Questions about a tensor that its values do not decide: answered natively while tracing, never recorded."""

VALUE_READERS = frozenset(
    """
    __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ __nonzero__ __long__ item tolist numpy
    is_nonzero equal allclose __dlpack__ __array_interface__
    """.split()
)
"""Calls that turn tensor values into Python values; data only where the tensor is the same in every run."""


def plain_name(function: Any) -> str:
    """The bare name of a torch function or property getter, for messages and the sets above."""
    name = str(getattr(function, "__name__", function))
    if name in {"__get__", "__set__", "__delete__"}:
        owner = function.__self__
        bare = getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", "property")
        return str(bare) if name == "__get__" else f"{bare}.{name}"
    return name


def is_random(op: str) -> bool:
    """Whether the operation's result is not fixed by its arguments."""
    return op in RANDOM_NAMES


_WRITES_STATISTICS = frozenset(
    "F.batch_norm torch.batch_norm F.instance_norm torch.instance_norm F.embedding F.embedding_bag".split()
)


def writes_in_place(op: str, keywords: Iterable[str] = ()) -> bool:
    """Whether the operation may change an argument: ``add_``, ``__iadd__``, ``__setitem__``, ``out=``, ``inplace=``."""
    name = op.split(".", 1)[1]
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_") or not {"out", "inplace"}.isdisjoint(keywords)


def has_effect(op: str, keywords: Iterable[str] = ()) -> bool:
    """Whether the operation matters even if nobody uses its result: it draws numbers, writes, or keeps statistics."""
    return is_random(op) or op in _WRITES_STATISTICS or writes_in_place(op, keywords)

# --- graph_layers.py

"""The layers a stored head may name: classes of `torch.nn` and `timm.layers` with arguments that can be read back.

A layer is stored as its table name and constructor arguments only if it is exactly that class, carries no hooks, and a
fresh one built from the arguments read back agrees with it in every attribute and tensor shape. Anything else (a
subclass, a parametrized layer, a patched method) is not a layer here: it becomes a plain part, its forward is traced.
"""


Reader = Callable[[nn.Module], Any]
ReadArgs = Mapping[str, Any]

_MAX_STACKED = 64
"""Most layers a recurrent network or a transformer stack may have: constructing is linear in it."""

_MAX_INT = 2**31
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid none tanh relu gelu nearest linear bilinear bicubic trilinear area "
    "nearest-exact".split()
)


@dataclass(frozen=True)
class Layer:
    """One row of the table: a class and how its constructor arguments are read from an instance."""

    cls: type[nn.Module]
    readers: Mapping[str, Reader]


def _attribute(name: str) -> Reader:
    return lambda module: getattr(module, name)  # names from the table below, never from a file


def _has(name: str) -> Reader:
    return lambda module: getattr(module, name) is not None


def _first_size(module: nn.Module) -> Any:
    shape: Any = module.normalized_shape
    return shape[0]


def _length(name: str) -> Reader:
    return lambda module: getattr(module, name).numel()


_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias? padding_mode"
_DECONV = "in_channels out_channels kernel_size stride padding output_padding groups bias? dilation padding_mode"
_BATCH = "num_features eps momentum affine track_running_stats"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_MAX = "kernel_size stride padding dilation return_indices ceil_mode"

_NN = {
    "Linear": "in_features out_features bias?",
    "Bilinear": "in1_features in2_features out_features bias?",
    "Identity": "",
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Conv1d": _CONV, "Conv2d": _CONV, "Conv3d": _CONV,
    "ConvTranspose1d": _DECONV, "ConvTranspose2d": _DECONV, "ConvTranspose3d": _DECONV,
    "BatchNorm1d": _BATCH, "BatchNorm2d": _BATCH, "BatchNorm3d": _BATCH,
    "InstanceNorm1d": _BATCH, "InstanceNorm2d": _BATCH, "InstanceNorm3d": _BATCH,
    "LayerNorm": "normalized_shape eps elementwise_affine",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine",
    "LocalResponseNorm": "size alpha beta k",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "Dropout": "p inplace", "Dropout1d": "p inplace", "Dropout2d": "p inplace", "Dropout3d": "p inplace",
    "AlphaDropout": "p inplace", "FeatureAlphaDropout": "p inplace",
    "ReLU": "inplace", "ReLU6": "inplace", "SiLU": "inplace", "Mish": "inplace", "SELU": "inplace",
    "Hardswish": "inplace", "Hardsigmoid": "inplace", "GELU": "approximate",
    "ELU": "alpha inplace", "CELU": "alpha inplace", "LeakyReLU": "negative_slope inplace",
    "RReLU": "lower upper inplace", "Hardtanh": "min_val max_val inplace", "Threshold": "threshold value inplace",
    "Softplus": "beta threshold", "Softshrink": "lambd", "Hardshrink": "lambd", "GLU": "dim",
    "Sigmoid": "", "Tanh": "", "Tanhshrink": "", "Softsign": "", "LogSigmoid": "", "Softmax2d": "",
    "Softmax": "dim", "LogSoftmax": "dim", "Softmin": "dim",
    "PReLU": "num_parameters init",
    "AdaptiveAvgPool1d": "output_size", "AdaptiveAvgPool2d": "output_size", "AdaptiveAvgPool3d": "output_size",
    "AdaptiveMaxPool1d": "output_size return_indices", "AdaptiveMaxPool2d": "output_size return_indices",
    "AdaptiveMaxPool3d": "output_size return_indices",
    "AvgPool1d": "kernel_size stride padding ceil_mode count_include_pad",
    "AvgPool2d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "AvgPool3d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "MaxPool1d": _MAX, "MaxPool2d": _MAX, "MaxPool3d": _MAX,
    "LPPool1d": "norm_type kernel_size stride ceil_mode", "LPPool2d": "norm_type kernel_size stride ceil_mode",
    "ZeroPad1d": "padding", "ZeroPad2d": "padding", "ReflectionPad1d": "padding", "ReflectionPad2d": "padding",
    "ReplicationPad1d": "padding", "ReplicationPad2d": "padding",
    "ConstantPad1d": "padding value", "ConstantPad2d": "padding value",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "PixelShuffle": "upscale_factor", "PixelUnshuffle": "downscale_factor", "ChannelShuffle": "groups",
    "Fold": "output_size kernel_size dilation padding stride", "Unfold": "kernel_size dilation padding stride",
    "CosineSimilarity": "dim eps", "PairwiseDistance": "norm eps keepdim",
    "RNN": _RNN + " nonlinearity", "GRU": _RNN, "LSTM": _RNN + " proj_size",
    "RNNCell": "input_size hidden_size bias nonlinearity", "GRUCell": "input_size hidden_size bias",
    "LSTMCell": "input_size hidden_size bias",
}  # fmt: skip
"""Argument names of each `torch.nn` layer. Attributes have the same names; ``bias?`` reads `bias is not None`."""


def _plain(cls: type[nn.Module], names: str) -> Layer:
    readers = {}
    for name in names.split():
        bare = name.rstrip("?")
        readers[bare] = _has(bare) if name.endswith("?") else _attribute(bare)
    return Layer(cls, readers)


def _transformer_layer_readers() -> dict[str, Reader]:
    return {
        "d_model": lambda m: m.linear1.in_features,
        "nhead": lambda m: m.self_attn.num_heads,
        "dim_feedforward": lambda m: m.linear1.out_features,
        "dropout": lambda m: m.dropout.p,
        "activation": lambda m: _activation_name(m.activation),
        "layer_norm_eps": lambda m: m.norm1.eps,
        "batch_first": lambda m: m.self_attn.batch_first,
        "norm_first": lambda m: m.norm_first,
        "bias": lambda m: m.linear1.bias is not None,
    }


def _activation_name(function: Any) -> str:
    for name in ("relu", "gelu"):
        if function is getattr(nn.functional, name):
            return name
    raise AttributeError(f"activation {function!r} is neither relu nor gelu")


def _stack_readers(**more: Reader) -> dict[str, Reader]:
    return {
        "layer": lambda m: read_layer(m.layers[0], stacked=True),
        "num_layers": lambda m: m.num_layers,
        "norm": lambda m: None if m.norm is None else read_layer(m.norm, stacked=True),
        **more,
    }


def _make_table() -> dict[str, Layer]:
    table = {name: _plain(getattr(nn, name), names) for name, names in _NN.items() if hasattr(nn, name)}
    table["LayerNorm"] = Layer(
        nn.LayerNorm,
        {**table["LayerNorm"].readers, "bias": lambda m: not m.elementwise_affine or m.bias is not None},
    )
    table["MultiheadAttention"] = Layer(
        nn.MultiheadAttention,
        {
            **_plain(nn.Module, "embed_dim num_heads dropout add_zero_attn kdim vdim batch_first").readers,
            "bias": _has("in_proj_bias"),
            "add_bias_kv": _has("bias_k"),
        },
    )
    table["TransformerEncoderLayer"] = Layer(nn.TransformerEncoderLayer, _transformer_layer_readers())
    table["TransformerDecoderLayer"] = Layer(nn.TransformerDecoderLayer, _transformer_layer_readers())
    table["TransformerEncoder"] = Layer(
        nn.TransformerEncoder,
        _stack_readers(enable_nested_tensor=_attribute("enable_nested_tensor"), mask_check=_attribute("mask_check")),
    )
    table["TransformerDecoder"] = Layer(nn.TransformerDecoder, _stack_readers())
    table["timm.DropPath"] = _plain(DropPath, "drop_prob scale_by_keep")
    table["timm.LayerScale"] = Layer(LayerScale, {"dim": _length("gamma"), "inplace": _attribute("inplace")})
    for name in ("LayerNorm", "LayerNorm2d", "RmsNorm", "RmsNorm2d"):
        cls = getattr(timm_norm, name, None)
        if cls is not None:
            table[f"timm.{name}"] = Layer(
                cls,
                {
                    "num_channels" if "Layer" in name else "channels": _first_size,
                    "eps": _attribute("eps"),
                    "affine": _attribute("elementwise_affine"),
                },
            )
    return table


LAYERS = _make_table()
_NAMES = {layer.cls: name for name, layer in LAYERS.items()}

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_IGNORED = frozenset(
    {
        *("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        *("_flat_weights", "_flat_weight_refs", "_all_weights"),
        *(name for name in vars(nn.Module())),
    }
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on `module` itself."""
    return any(getattr(module, name, None) for name in _HOOKS)


def read_layer(module: nn.Module, *, stacked: bool = False) -> list[Any] | None:
    """`[name, {argument: value}]` if `module` is exactly a layer of the table and a fresh one equals it, else None.

    With `stacked` (a layer inside a transformer stack) not being one raises AttributeError instead of giving None.
    """
    name = _NAMES.get(type(module))
    if name is not None:
        try:
            args = {key: _to_json(reader(module)) for key, reader in LAYERS[name].readers.items()}
            with torch.device("meta"):
                fresh = build_layer(name, args)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, GraphError):
            fresh = None  # someone took the layer apart: trace through it instead
        if fresh is not None and _same_layer(module, fresh):
            return [name, args]
    if stacked:
        raise AttributeError(f"{type(module).__name__} is not a plain layer")
    return None


def build_layer(name: str, args: ReadArgs) -> nn.Module:
    """Construct a layer of the table from audited arguments, on the ambient default device.

    Raises GraphError for an unknown name, wrong argument names, or values that no layer takes.
    """
    layer = LAYERS.get(name) if isinstance(name, str) else None
    if layer is None:
        raise GraphError(f"the stored head names a layer {name!r} that is not in the table of layers")
    if not isinstance(args, Mapping) or set(args) != set(layer.readers):
        found = sorted(args) if isinstance(args, Mapping) else args
        raise GraphError(f"layer {name}: found arguments {found!r}, expected exactly {sorted(layer.readers)}")
    values = {key: _from_json(value, f"{name}.{key}") for key, value in args.items()}
    _check_sizes(name, values)
    depth = values.get("num_layers", 1)
    if type(depth) is not int or not 1 <= depth <= _MAX_STACKED:
        raise GraphError(f"layer {name}: num_layers is {depth!r}, expected 1 to {_MAX_STACKED}")
    if "layer" in values:
        return _build_stack(name, values)
    try:
        return layer.cls(**values)
    except GraphError:
        raise
    except Exception as error:  # whatever torch says of impossible arguments is one refusal for the caller
        raise GraphError(f"layer {name}{dict(args)!r} cannot be constructed: {error}") from error


_GROWING = frozenset(
    "output_size padding stride dilation output_padding scale_factor size upscale_factor kernel_size".split()
)


def _check_sizes(name: str, values: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a layer without weights answer with enormous tensors."""
    total = 1.0
    for key, value in values.items():
        if key in _GROWING:
            for number in value if isinstance(value, tuple) else (value,):
                total *= max(abs(number), 1) if isinstance(number, (int, float)) else 1
    if not total <= 2**31:
        raise GraphError(f"layer {name}: sizes {dict(values)!r:.200} are beyond what a layer can need")


def _build_stack(name: str, values: dict[str, Any]) -> nn.Module:
    single: Any = {"TransformerEncoder": nn.TransformerEncoderLayer, "TransformerDecoder": nn.TransformerDecoderLayer}[
        name
    ]
    layer: Any = values["layer"]
    if not isinstance(layer, single):
        raise GraphError(f"layer {name}: expected a {single.__name__} to stack")
    if values["norm"] is not None and not isinstance(values["norm"], (nn.LayerNorm, nn.RMSNorm)):
        raise GraphError(f"layer {name}: the final norm must be LayerNorm or RMSNorm")
    try:
        if name == "TransformerDecoder":
            return nn.TransformerDecoder(layer, values["num_layers"], values["norm"])
        return nn.TransformerEncoder(
            layer,
            values["num_layers"],
            values["norm"],
            enable_nested_tensor=values["enable_nested_tensor"],
            mask_check=values["mask_check"],
        )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise GraphError(f"layer {name} cannot be constructed: {error}") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
            return value  # an inner layer, already read
        return [_to_json(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if abs(value) < float("inf") else {"f": str(float(value))}
    raise AttributeError(f"argument {value!r} is not plain data")


def _from_json(value: Any, where: str, depth: int = 0) -> Any:
    """Constructor argument from JSON: plain numbers, words of the list above, tuples of them, or an inner layer."""
    if value is None or isinstance(value, bool) or (type(value) is float):
        return value
    if type(value) is int and abs(value) <= _MAX_INT:
        return value
    if isinstance(value, str) and value in _STRINGS:
        return value
    if isinstance(value, dict) and set(value) == {"f"} and value["f"] in ("inf", "-inf", "nan"):
        return float(value["f"])
    if isinstance(value, list) and len(value) <= 8 and depth < 3:
        if len(value) == 2 and isinstance(value[1], dict) and isinstance(value[0], str):
            if depth or where.split(".")[-1] not in ("layer", "norm") or value[0].endswith(("coder", "coder.")):
                raise GraphError(f"{where}: a layer cannot stand here")
            return build_layer(value[0], value[1])
        return tuple(_from_json(item, where, depth + 1) for item in value)
    raise GraphError(f"{where}: {value!r} is not an argument that a layer can take")


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    for kind in (module._parameters, module._buffers):
        yield from kind.items()


def _same_layer(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether `module` behaves like `fresh`: class, attributes, tensor names and shapes, children; and no hooks."""
    if type(module) is not type(fresh) or has_hooks(module):
        return False
    ours, theirs = dict(_tensors(module)), dict(_tensors(fresh))
    if list(ours) != list(theirs) or module._non_persistent_buffers_set or fresh._non_persistent_buffers_set:
        return False
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor is None) != (other is None):
            return False
        if tensor is not None and other is not None and (type(tensor), tensor.shape) != (type(other), other.shape):
            return False
    if list(module._modules) != list(fresh._modules):
        return False
    return _same_attributes(module, fresh) and all(
        (child is None and fresh._modules[name] is None)
        or (child is not None and fresh._modules[name] is not None and _same_layer(child, fresh._modules[name]))  # type: ignore[arg-type]
        for name, child in module._modules.items()
    )


def _same_attributes(module: nn.Module, fresh: nn.Module) -> bool:
    expected = {name: value for name, value in vars(fresh).items() if name not in _IGNORED}
    for name, value in vars(module).items():
        if name in _IGNORED:
            continue
        if name not in expected:
            if hasattr(type(module), name):
                return False  # an instance attribute that replaces a method or a class attribute
            continue  # a remark somebody left on the layer; its class does not know it
        if not _same_value(value, expected[name]):
            return False
    return all(hasattr(module, name) for name in expected)


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float, str, bool, type(None))) and isinstance(other, (int, float, str, bool, type(None))):
        return type(one) is type(other) and (one == other or (one != one and other != other))
    return one is other

# --- graph_head.py

"""Phase three of reading a stored head: build the module of an audited graph, and run it.

`GraphHead` is an ordinary module: its layers are real `torch.nn` and `timm.layers` layers under their old names, so
state dicts, `.to()`, freezing, optimizers and adapters see what they saw in the original. Its forward is an interpreter
over the audited nodes; no text is ever turned into code.
"""


_CONTAINERS: dict[str, type[nn.Module]] = {
    "Sequential": nn.Sequential,
    "ModuleList": nn.ModuleList,
    "ModuleDict": nn.ModuleDict,
}


class HeadPart(nn.Module):
    """A module of the user's own, reduced to what it holds: parameters, buffers, children."""


class GraphHead(nn.Module):
    """A head rebuilt from a graph. `forward` takes a tensor of the recorded shape, any batch, and returns what the
    original returned. Raises HeadError for an input of another shape.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.__graph = graph
        self.__constants = list(graph.constants)
        if graph.ties or graph.layouts:
            self.register_load_state_dict_post_hook(_settle_after_load)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> Any:
        """Input [B, ...] of the recorded shape; the output is the original head's, nested containers included."""
        self.__check_input(x)
        program = self.__graph.programs[self.training]
        run = _Run(self, x, self.__constants)
        for region in _regions(program):
            with ExitStack() as stack:
                _enter(stack, region[0], x)
                for node in region:
                    run.step(node)
        return run.resolve(program.output)

    def __check_input(self, x: torch.Tensor) -> None:
        shape = self.__graph.shape
        fits = x.dim() == len(shape) and all(
            size is None or size == found for size, found in zip(shape, x.shape, strict=True)
        )
        if not fits:
            expected = ["B" if i == 0 else "any" if size is None else str(size) for i, size in enumerate(shape)]
            raise HeadError(
                f"this head was stored for inputs of shape [{', '.join(expected)}], found {list(x.shape)}; "
                "use the tower's own image size and pool"
            )

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """The shape of the inputs that the head takes; None where any size will do."""
        return self.__graph.shape

    def settle(self) -> None:
        """Share again what the original shared, and lay out again in memory what it laid out in another order.

        Loading with ``assign=True`` puts separate, contiguous tensors in place. `load_state_dict` ends with this call;
        who puts tensors in by other means makes it afterwards.
        """
        for alias, first in self.__graph.ties:
            owner, key = _owner(self, first)
            shared = owner._parameters[key] if key in owner._parameters else owner._buffers[key]
            assert shared is not None
            _replace(self, alias, shared)
        for name, order in self.__graph.layouts:
            owner, key = _owner(self, name)
            tensor = owner._parameters.get(key)
            if tensor is not None:
                tensor.data = _lay_out(tensor.data, order)
            else:
                buffer = owner._buffers[key]
                assert buffer is not None
                owner._buffers[key] = _lay_out(buffer, order)

    def train(self, mode: bool = True) -> "GraphHead":
        """Switch modes; modules that the original kept in one mode (frozen BatchNorm) stay in it."""
        super().train(mode)
        for name, in_train, in_eval in self.__graph.held:
            submodule(self, name).training = in_train if mode else in_eval
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GraphHead":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for index, constant in enumerate(self.__constants):
            # Only the device is taken from `fn`: constants keep dtype and values, whatever `.half()` or `.to_empty()`
            # do to weights, just as a tensor that the original held outside its buffers would.
            device = fn(torch.empty(0, device=constant.device)).device
            if device.type != "meta":
                self.__constants[index] = constant.to(device)
        return self


def _settle_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, GraphHead):
        module.settle()


def _lay_out(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values, contiguous in memory when the dimensions are taken in `order`."""
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def _regions(program: Program) -> Iterator[list[Node]]:
    region: list[Node] = []
    for node in program.nodes:
        if region and (node.no_grad, node.autocast) != (region[0].no_grad, region[0].autocast):
            yield region
            region = []
        region.append(node)
    if region:
        yield region


def _enter(stack: ExitStack, node: Node, x: torch.Tensor) -> None:
    if node.no_grad:
        stack.enter_context(torch.no_grad())
    for device, enabled, dtype in node.autocast:
        kind = x.device.type if device == "input" else device
        stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=DTYPES[dtype] if dtype else None))


class _Run:
    """One forward: the results so far."""

    def __init__(self, head: nn.Module, x: torch.Tensor, constants: list[torch.Tensor]) -> None:
        self.head = head
        self.x = x
        self.batch = x.shape[0]
        self.constants = constants
        self.results: list[Any] = []

    def step(self, node: Node) -> None:
        args = [self.resolve(value) for value in node.args]
        kwargs = {key: self.resolve(value) for key, value in node.kwargs}
        if node.kind == "op":
            if may_grow(node.target):
                check_growth(node.target, (args, kwargs), "forward")
            self.results.append(OPS[node.target](*args, **kwargs))
        elif node.kind == "call":
            self.results.append(submodule(self.head, node.target)(*args, **kwargs))
        else:
            owner, key = _owner(self.head, node.target)
            owner._buffers[key] = args[0]
            self.results.append(None)

    def resolve(self, value: Any) -> Any:
        if isinstance(value, Reference):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self.resolve(item) for item in value])
        if isinstance(value, Formula):
            return evaluate(value.expr, self.batch)
        if isinstance(value, FromInput):
            return self.x.device if value.what == "device" else self.x.dtype
        if isinstance(value, DtypeOf):
            return self._tensor(value.tensor).dtype
        if isinstance(value, Slice):
            return slice(self.resolve(value.start), self.resolve(value.stop), self.resolve(value.step))
        if isinstance(value, Pairs):
            pairs = [(key, self.resolve(item)) for key, item in value.items]
            return dict(pairs) if value.kind == "d" else OrderedDict(pairs)
        return value

    def _tensor(self, reference: Reference) -> Any:
        if reference.kind == "input":
            return self.x
        if reference.kind == "constant":
            return self.constants[reference.index]
        if reference.kind == "tensor":
            owner, key = _owner(self.head, reference.name)
            for held in (owner._parameters, owner._buffers):
                found = held.get(key)
                if found is not None:
                    return found
            return getattr(owner, key)  # declared by the graph; somebody parametrized it since
        result = self.results[reference.index]
        for step in reference.path:
            result = result[step]
        return result


def _owner(head: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return submodule(head, parent), key


def build(graph: Graph, max_bytes: int) -> nn.Module:
    """Construct the module of an audited graph on the ambient default device; weights are arbitrary.

    Raises GraphError where the modules do not fit together, or would take more than `max_bytes`.
    """
    with torch.device("meta"):
        _assemble(graph, max_bytes)
    return _assemble(graph, max_bytes)


def _assemble(graph: Graph, max_bytes: int) -> nn.Module:
    left = max_bytes
    built: dict[str, nn.Module] = {}
    for spec in graph.modules:
        module = built[spec.same] if spec.kind == "same" else _construct(graph, spec)
        if spec.kind != "same":
            left -= _bytes_of(module)
            if left < 0:
                raise GraphError(f"the stored head asks for more than {max_bytes} bytes of weights (at {spec.name!r})")
        built[spec.name] = module
        if spec.name:
            parent, _, key = spec.name.rpartition(".")
            built[parent]._modules[key] = module
    root = built[""]
    _finish(graph, root)
    return root


def _construct(graph: Graph, spec: ModuleSpec) -> nn.Module:
    if spec.kind == "layer":
        return build_layer(spec.layer, spec.args)
    if spec.kind == "container":
        return _CONTAINERS[spec.layer]()
    module = GraphHead(graph) if spec.name == "" else HeadPart()
    for tensor in spec.params:
        try:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
        except RuntimeError as error:
            raise GraphError(f"module {spec.name!r}: parameter {tensor.name!r} cannot be made: {error}") from None
        grad = empty.is_floating_point() or empty.is_complex()
        module._parameters[tensor.name] = nn.Parameter(value, requires_grad=grad)
    for tensor in spec.buffers:
        try:
            module._buffers[tensor.name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        except RuntimeError as error:
            raise GraphError(f"module {spec.name!r}: buffer {tensor.name!r} cannot be made: {error}") from None
    for name, value in spec.values:
        module._buffers[name] = value.clone()
        module._non_persistent_buffers_set.add(name)
    return module


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _finish(graph: Graph, root: nn.Module) -> None:
    """Dtypes, ties, frozen parameters and held modes, by names that must exist."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(root.named_buffers(remove_duplicate=False))}
    dtypes = dict(graph.dtypes)
    _all_known(dtypes, tensors, "dtypes")
    declared = {
        f"{spec.name}.{item.name}".lstrip(".") for spec in graph.modules for item in (*spec.params, *spec.buffers)
    }
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if tensor.dtype != dtype and name not in declared:
            _replace(root, name, tensor.detach().to(dtype))
    for name, order in graph.layouts:
        _all_known([name], tensors, "layouts")
        if tensors[name].dim() != len(order):
            raise GraphError(f"layouts: {name!r} has {tensors[name].dim()} dimensions, not {len(order)}")
    if (graph.ties or graph.layouts) and not isinstance(root, GraphHead):
        raise GraphError("ties and layouts need a head with a forward of its own")
    for alias, first in graph.ties:
        _all_known([alias, first], tensors, "ties")
        owner, key = _owner(root, first)
        target = owner._parameters.get(key)
        shared = target if target is not None else owner._buffers[key]
        if shared is None or shared.shape != tensors[alias].shape or (alias in parameters) != (first in parameters):
            raise GraphError(f"ties: {alias!r} and {first!r} are not alike")
        _replace(root, alias, shared)
    if isinstance(root, GraphHead):
        root.settle()
    parameters = dict(root.named_parameters(remove_duplicate=False))
    _all_known(graph.frozen, parameters, "frozen")
    for name in graph.frozen:
        parameters[name].requires_grad_(False)
    modules = dict(root.named_modules(remove_duplicate=False))
    _all_known([name for name, _, _ in graph.held], modules, "held")
    _check_references(graph, tensors, root)


def _check_references(graph: Graph, tensors: dict[str, torch.Tensor], root: nn.Module) -> None:
    buffers = dict(root.named_buffers(remove_duplicate=False))

    def check(value: Any) -> None:
        if isinstance(value, Reference) and value.kind == "tensor" and value.name not in tensors:
            raise GraphError(f"the forward uses a tensor {value.name!r:.80} that the head does not have")
        if isinstance(value, DtypeOf):
            check(value.tensor)
        if isinstance(value, Pairs):
            value = [item for _, item in value.items]
        if isinstance(value, Slice):
            value = [value.start, value.stop, value.step]
        if isinstance(value, (tuple, list)):
            for item in value:
                check(item)

    for program in {id(program): program for program in graph.programs.values()}.values():
        for node in program.nodes:
            check(node.args)
            check([item for _, item in node.kwargs])
            if node.kind == "write" and node.target not in buffers:
                raise GraphError(f"the forward writes a buffer {node.target!r:.80} that the head does not have")
        check(program.output)


def _all_known(names: Any, known: dict[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            raise GraphError(f"{where}: the head has no {name!r:.80}")


def _replace(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put another tensor under a name that exists; recurrent layers notice only an ordinary assignment."""
    owner, key = _owner(root, name)
    if key in owner._parameters:
        old = owner._parameters[key]
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=bool(old is not None and old.requires_grad))
        if isinstance(owner, nn.RNNBase):
            setattr(owner, key, value)  # a name that torch itself gave the parameter
        else:
            owner._parameters[key] = value
    else:
        owner._buffers[key] = value

# --- head.py

"""Heads: the built-in pools and projections, the registry, and which form a custom head is stored in.

A custom head is stored in the first form that works, is verified, and otherwise refused with the reason against
each form: as data (`heads/to_graph.py`), by a registered name.
"""


HeadFactory = Callable[..., nn.Module]
CustomHead = nn.Module | HeadFactory | str
F = TypeVar("F", bound=HeadFactory)

# `config.head["form"]` of heads that are not stored: one that lives in memory only, until saving finds a form for it,
# and one that a subclass of the tower makes itself.
LIVE = "live"
SUBCLASS = "subclass"
# The source of the head's class lies beside the weights (`heads/head_code.py`).
CODE = "code"

_REGISTRY: dict[str, HeadFactory] = {}
_STAMP = "_hf_timm_tower_registered"


def builtin_head(config: TimmTowerConfig) -> nn.Sequential:
    """The head that pool and proj name; weight keys are open_clip's (`pool.*`, `proj.weight`, `mlp.fc1.weight`).

    Args:
        config: with `num_features` (the trunk's width), and `feat_size` where the pool is `abs_attn`.

    Returns:
        `[B, num_features]` -> `[B, embed_dim]`; tokens and channels-last maps keep their other dimensions.

    Raises:
        ConfigError: `embed_dim` is missing where it does not follow.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    attention = config.pool in ("abs_attn", "rot_attn")
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; build a tower from it first")
    width, embed_dim = config.num_features, config.embed_dim or 0
    if not embed_dim and (attention or config.proj in ("linear", "mlp")):
        raise ConfigError(
            f"embed_dim=None: pool={config.pool!r} with proj={config.proj!r} needs a width of the embedding"
        )
    if config.pool == "abs_attn":
        layers["pool"] = AttentionPool2d(width, feat_size=_pair(config.feat_size), out_features=embed_dim)
        width = embed_dim
    elif config.pool == "rot_attn":
        layers["pool"] = RotAttentionPool2d(width, out_features=embed_dim)
        width = embed_dim
    if config.proj == "linear":
        layers["drop"] = nn.Dropout(config.drop)
        layers["proj"] = nn.Linear(width, embed_dim, bias=config.proj_bias)
    elif config.proj == "mlp":
        hidden = 2 * embed_dim
        layers["mlp"] = Mlp(width, hidden, embed_dim, drop=(config.drop, 0), bias=(True, config.proj_bias))
    return nn.Sequential(layers)


def _pair(size: Any) -> tuple[int, int]:
    if size is None:
        raise ConfigError("feat_size=None: pool='abs_attn' needs the height and width of the feature map")
    return size[0], size[1]


def register_head(name: str) -> Callable[[F], F]:
    """Class decorator: heads of this class are stored by name where they cannot be stored as data.

    The class (or a function that returns a module) is called with the keyword arguments it was made with, which
    must be JSON. At load the same name must be registered: import the module that does it.

    Args:
        name: Unique in the process; letters, digits, `_`, `-`, `.` and `/`.

    Raises:
        ArgumentError: the name is malformed or taken by another class.
    """
    if not isinstance(name, str) or not name or not all(char.isalnum() or char in "_-./" for char in name):
        raise ArgumentError(f"register_head({name!r}): expected a name of letters, digits, '_', '-', '.' and '/'")

    def register(factory: F) -> F:
        taken = _REGISTRY.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ArgumentError(
                f"register_head({name!r}): the name belongs to {taken.__module__}.{taken.__qualname__}, "
                f"it cannot be given to {factory.__module__}.{factory.__qualname__} too"
            )
        made = _stamp_class(name, factory) if isinstance(factory, type) else _stamp_function(name, factory)
        _REGISTRY[name] = made
        return made  # type: ignore[return-value]

    return register


def _stamp_class(name: str, cls: type[nn.Module]) -> type[nn.Module]:
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if type(self) is cls:  # a subclass is another head
            object.__setattr__(self, _STAMP, (name, _bind(plain_init, (self, *args), kwargs, skip=1)))

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _stamp_function(name: str, function: HeadFactory) -> HeadFactory:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        module = function(*args, **kwargs)
        object.__setattr__(module, _STAMP, (name, _bind(function, args, kwargs, skip=0)))
        return module

    return make


def _bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], skip: int) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    parameters = list(bound.signature.parameters.values())
    values: dict[str, Any] = {}
    for parameter in parameters[skip:]:
        if parameter.name not in bound.arguments:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            values["*" + parameter.name] = value  # cannot be passed by keyword: refused when saved
        else:
            values[parameter.name] = value
    return values


def registered_factory(name: str) -> HeadFactory:
    """The class or function registered under a name.

    Raises:
        HeadError: nothing is; says what to do.
    """
    factory = _REGISTRY.get(name)
    if factory is None:
        known = ", ".join(sorted(_REGISTRY)) or "none"
        raise HeadError(
            f"no head is registered as {name!r} in this process (registered: {known}). Import the module that holds "
            f"the class under @register_head({name!r}) first, or pass custom_head=... to from_pretrained."
        )
    return factory


def make_custom_head(custom_head: CustomHead, in_features: int, embed_dim: int | None) -> nn.Module:
    """A head given as a module, class, callable or registered name -> a module.

    Args:
        custom_head: A module is taken as it is; anything else is called with `(in_features, embed_dim)`.
        in_features: Channels of what the pool leaves.
        embed_dim: As the user gave it.

    Raises:
        HeadError: the call fails or does not give a module.
        ArgumentError: not something a head can be made of.
    """
    if isinstance(custom_head, nn.Module):
        return custom_head
    factory = registered_factory(custom_head) if isinstance(custom_head, str) else custom_head
    if not callable(factory):
        raise ArgumentError(
            f"custom_head={custom_head!r}: expected an nn.Module, a class or callable taking "
            "(in_features, embed_dim), or the name of a registered head"
        )
    name = custom_head if isinstance(custom_head, str) else getattr(factory, "__name__", repr(factory))
    try:
        head = factory(in_features, embed_dim)
    except TypeError as error:
        raise HeadError(
            f"custom_head={name} was called with (in_features={in_features}, embed_dim={embed_dim}) and failed: {error}"
        ) from error
    if not isinstance(head, nn.Module):
        raise HeadError(f"custom_head={name} gave a {type(head).__name__}, expected an nn.Module")
    return head


def output_of(head: nn.Module, example: torch.Tensor, where: str) -> Any:
    """What a head gives for an example, run on a copy in eval mode, the random state untouched.

    Args:
        head: Any head.
        example: `[2, C]`, `[2, N, C]` or `[2, C, H, W]`.
        where: What the example is, for the message.

    Raises:
        HeadError: the head fails on it.
    """
    anchor = next(head.parameters(), None)
    if anchor is not None:
        example = example.to(anchor.device)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return copy.deepcopy(head).eval()(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            raise HeadError(
                f"custom_head={type(head).__name__} fails on {where} of shape {tuple(example.shape)}: {error}"
            ) from error


def width_of(output: Any) -> int | None:
    """Width of an embedding: D of `[B, D]` and `[B, N, D]`, C of `[B, C, H, W]`, None for tuples and dicts."""
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 3, 4):
        return None
    return int(output.shape[1] if output.ndim == 4 else output.shape[-1])


def store_head(head: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """The form in which a custom head comes back, verified.

    Args:
        head: The head, on the CPU; its weights, modes and the random state stay as they are.
        example: The head's input `[2, ...]`, float.

    Returns:
        JSON for `config.head`: `{"form": "graph" | "registered", ...}`.

    Raises:
        HeadError: no form works, with the reason against each and the remedies.
    """
    reasons = []
    try:
        graph = json.loads(json.dumps(describe(head, example)))
        with no_init():
            rebuilt = construct(graph)
        _copy_weights(head, rebuilt)
        verify_head(head, rebuilt, example)
    except HeadError as error:
        reasons.append(f"as data: {error}")
    else:
        return {"form": "graph", "graph": graph}
    try:
        spec = _registered_spec(head)
        with no_init():
            rebuilt = rebuild_head(spec)
        _copy_weights(head, rebuilt)
        verify_head(head, rebuilt, example)
    except HeadError as error:
        reasons.append(f"by registered name: {error}")
    else:
        return spec
    reasons.append("as code in the repository: only with include_code=True, and loading then needs trust")
    raise HeadError(
        f"the head {type(head).__name__} cannot be stored so that it comes back. Nothing was written.\n"
        + "\n".join(f"  - {reason}" for reason in reasons)
        + "\nRemedies: put @register_head('a-name') on its class and make it with JSON arguments; or rewrite its "
        "forward with torch functions only, without branches on values; or replace it before saving."
    )


def known_arguments(head: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments that a registered head was made with, None for others."""
    stamp = getattr(head, _STAMP, None)
    return None if stamp is None else dict(stamp[1])


def _registered_spec(head: nn.Module) -> dict[str, Any]:
    stamp = getattr(head, _STAMP, None)
    if stamp is None:
        raise HeadError(f"{type(head).__name__} is not registered (no @register_head on its class)")
    name, kwargs = stamp
    try:
        plain = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise HeadError(f"the arguments of {name!r} are not JSON: {error}") from error
    if any(key.startswith("*") for key in plain):
        raise HeadError(f"{name!r} was made with positional-only or *args arguments, which have no names to store")
    return {"form": "registered", "name": name, "kwargs": plain}


def check_stored(spec: Any, tower_class: str | None) -> None:
    """Refuse a `head` entry of a file that no save writes.

    Args:
        spec: `config.head`.
        tower_class: `config.tower_class`.

    Raises:
        HeadError: names the form.
    """
    if spec is None:
        return
    form = spec.get("form")
    if form not in ("graph", "registered", CODE, SUBCLASS) or (form == SUBCLASS and tower_class is None):
        raise HeadError(
            f"config.head: form {form!r} is not one of a saved tower (graph, registered, code, or subclass with "
            "tower_class)"
        )


def code_file(config: dict[str, Any]) -> str | None:
    """Name of the source file of a head that is stored as code, None for every other head.

    Raises:
        FormatError: it is not the plain name of a Python file.
    """
    head = config.get("head")
    if not isinstance(head, dict) or head.get("form") != CODE:
        return None
    name = head.get("file")
    if not isinstance(name, str) or not name.endswith(".py"):
        raise FormatError(f"config.head.file={name!r}: expected the name of a Python file")
    require_plain_name(name, "config.head.file")
    return name


def rebuild_head(spec: dict[str, Any]) -> nn.Module:
    """`config.head` -> a head whose weights are still to come. The spec may be a stranger's: no code of it runs.

    Raises:
        HeadError: an unknown form, a graph that the audit refuses, a name that is not registered.
    """
    form = spec.get("form")
    if form == "graph":
        return construct(spec.get("graph"))
    if form == "registered":
        name, kwargs = spec.get("name"), spec.get("kwargs", {})
        if not isinstance(name, str) or not isinstance(kwargs, dict):
            raise HeadError("config.head: a registered head has a 'name' and 'kwargs'")
        try:
            head: nn.Module = registered_factory(name)(**kwargs)
        except TypeError as error:
            raise HeadError(f"the head registered as {name!r} does not take {kwargs}: {error}") from error
        return head
    if form == CODE:
        raise HeadError("the head is stored as code, which runs only under trust_remote_code=True")
    raise HeadError(f"config.head: unknown form {form!r}; this version reads 'graph', 'registered' and 'code'")


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    missing, unexpected = [], []
    theirs, ours = source.state_dict(), target.state_dict()
    missing, unexpected = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unexpected:
        raise HeadError(f"rebuilt with other weight names: lacks {unexpected[:4]}, has {missing[:4]}")
    try:
        target.load_state_dict({key: value.detach().clone() for key, value in theirs.items()})
    except RuntimeError as error:
        raise HeadError(f"rebuilt with other weight shapes: {error}") from error


def refuse_code(spec: dict[str, Any], *, repo: str, revision: str | None) -> HeadError:
    """The error for a head of code that nobody said to trust."""
    file = code_file({"head": spec}) or ""
    at = f" at revision {shown(revision)[1:-1]}" if revision else ""
    again = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    return HeadError(
        f"the head of {repo}{at} is the class {shown(spec.get('class'))}, stored as code in {file}. Code of a repository "
        f"is not run unless you say so, and nothing was run. Read {file}{at} first; then either\n"
        f"  - from_pretrained({again}, trust_remote_code=True) runs it, or\n"
        f"  - from_pretrained({again}, custom_head=...) takes a head of your own, checked against the weights"
    )


def make_code_head(spec: dict[str, Any], place: str, **download: Any) -> nn.Module:
    """STUB: a head that is stored as code, which runs here: to be called where it is trusted."""
    from pathlib import Path

    from transformers.utils.hub import cached_file

    from ..heads.head_code import construct_code
    file = code_file({"head": spec}) or ""
    path = Path(cached_file(place, file, **download) or file)
    return construct_code(spec, path.read_text(encoding="utf-8"), where=str(path))

# --- image_processing.py

"""The preprocess block of the config, and timm's own transform made from it.

The block holds what timm's `pretrained_cfg` says of preprocessing, and three facts that some models need beside it:

- `padding`: None, or `{"mode": "square", "color": [255, 255, 255]}`: the image is laid in the middle of a square of its
  longer side before it is resized. One number from 0 to 255 for each channel.
- `value_range`: `[lo, hi]`, what black and white are before mean and std are applied; `[0, 1]` is timm's own.
- `channel_order`: `RGB`, or `BGR`: the channels are reversed last. `mean`, `std` and `color` are in the order R, G, B
  in either case.

Where these have their defaults, the transform is timm's and nothing else. The size is not in the block:
`config.image_size` is its only owner, so that trunk, config and transform cannot disagree.
"""


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
CHANNEL_ORDERS = ("RGB", "BGR")

_WHITE_IS_ONE = [0.0, 1.0]
_KEYS = {"interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range"}


def preprocess_from_timm(pretrained_cfg: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """timm's `pretrained_cfg` -> the preprocess block.

    Args:
        pretrained_cfg: of the trunk as it was built.
        in_chans: Channels of the image; where they are not as many as timm has means for, each channel gets the
            average of timm's means and standard deviations, as timm's first convolution is averaged over channels.
    """
    data = resolve_data_config(pretrained_cfg=pretrained_cfg)  # type: ignore[no-untyped-call]
    mean, std = list(data["mean"]), list(data["std"])
    if len(mean) != in_chans:
        mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
    return {
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        "crop_mode": data["crop_mode"],
        "mean": mean,
        "std": std,
        "padding": None,
        "channel_order": "RGB",
        "value_range": list(_WHITE_IS_ONE),
    }


def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used.

    Raises:
        ConfigError: names the entry and its value.
    """
    if set(block) != _KEYS:
        raise ConfigError(f"preprocess: missing {sorted(_KEYS - set(block))}, unknown {sorted(set(block) - _KEYS)}")
    for key, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if block[key] not in choices:
            raise ConfigError(f"preprocess.{key}={block[key]!r}: expected one of {', '.join(choices)}")
    crop = block["crop_pct"]
    if not _is_number(crop) or not 0.05 <= crop <= 2:
        raise ConfigError(f"preprocess.crop_pct={crop!r}: expected a number from 0.05 to 2")
    for key in ("mean", "std"):
        if not _are_numbers(block[key], in_chans):
            raise ConfigError(f"preprocess.{key}={block[key]!r}: expected {in_chans} numbers")
    if not all(value > 0 for value in block["std"]):
        raise ConfigError(f"preprocess.std={block['std']!r}: expected positive numbers")
    padding = block["padding"]
    if padding is not None and not _is_padding(padding, in_chans):
        raise ConfigError(
            f"preprocess.padding={padding!r}: expected None or {{'mode': 'square', 'color': [...]}} with {in_chans} "
            "whole numbers from 0 to 255"
        )
    order = block["channel_order"]
    if order not in CHANNEL_ORDERS:
        raise ConfigError(f"preprocess.channel_order={order!r}: expected one of {', '.join(CHANNEL_ORDERS)}")
    if order == "BGR" and in_chans != 3:
        raise ConfigError(f"preprocess.channel_order='BGR': an image with in_chans={in_chans} has no red and blue")
    bounds = block["value_range"]
    if not _are_numbers(bounds, 2) or not bounds[0] < bounds[1]:
        raise ConfigError(
            f"preprocess.value_range={bounds!r}: expected [lo, hi] with lo < hi, what black and white are before mean "
            "and std are applied ([0, 1] is timm's own)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(_is_number(value) for value in values)


def _is_padding(padding: Any, in_chans: int) -> bool:
    if not isinstance(padding, dict) or set(padding) != {"mode", "color"} or padding["mode"] != "square":
        return False
    color = padding["color"]
    return _are_numbers(color, in_chans) and all(isinstance(value, int) and 0 <= value <= 255 for value in color)


class PadToSquare:
    """PIL image -> the same in the middle of a square of its longer side.

    Args:
        color: of what is around it, one number from 0 to 255 for each channel.
    """

    def __init__(self, color: Sequence[int]) -> None:
        self.color = tuple(color)

    def __call__(self, image: Image.Image) -> Image.Image:
        if len(image.getbands()) != len(self.color):
            raise ArgumentError(
                f"transform: an image of mode {image.mode}, but the tower pads in {len(self.color)} channels: "
                f"image.convert({'L' if len(self.color) == 1 else 'RGB'!r}) first"
            )
        side = max(image.size)
        canvas = Image.new(image.mode, (side, side), self.color if len(self.color) > 1 else self.color[0])
        canvas.paste(image, self.corner(image.width, image.height))
        return canvas

    @staticmethod
    def corner(width: int, height: int) -> tuple[int, int]:
        """Where the image's left upper pixel goes: (x, y)."""
        side = max(width, height)
        return (side - width) // 2, (side - height) // 2

    def __repr__(self) -> str:
        return f"PadToSquare(color={self.color})"


class ScaleValues:
    """Float tensor in [0, 1] -> [lo, hi]."""

    def __init__(self, lo: float, hi: float) -> None:
        self.lo, self.hi = lo, hi

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images * (self.hi - self.lo) + self.lo

    def __repr__(self) -> str:
        return f"ScaleValues(lo={self.lo}, hi={self.hi})"


class ReverseChannels:
    """`[..., 3, H, W]` -> the same with red and blue exchanged."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., [2, 1, 0], :, :]

    def __repr__(self) -> str:
        return "ReverseChannels()"


def make_transform(config: TimmTowerConfig, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
    """timm's own transform for a tower, from the config alone.

    It pads first, and scales to `value_range` and reverses the channels around the normalisation, where the preprocess
    block says so; otherwise it is what `timm.data.create_transform` gives.

    Args:
        config: A completed config.
        is_training: The random transform for training instead of the one for evaluation.
        kwargs: Further arguments of `timm.data.create_transform` (augmentation).

    Returns:
        PIL image -> float tensor `[in_chans, height, width]`, normalised.

    Raises:
        ConfigError: the config is not completed.
        ArgumentError: an argument that the config decides, or that timm does not know, or with which the transform
            does not normalise although the tower needs what is done there.
    """
    block, size = completed_preprocess(config)
    transform: Callable[[Any], Any] = transform_of(block, size, is_training, **kwargs)
    return transform


def transform_of(block: dict[str, Any], size: Sequence[int], is_training: bool = False, **kwargs: Any) -> Any:
    """`make_transform` from a checked preprocess block and `[height, width]`."""
    lo, hi = block["value_range"]
    scaled = [lo, hi] != _WHITE_IS_ONE
    # timm also makes colours of the mean (of borders, and in augmentation), which it takes to be in [0, 1].
    mean = [(value - lo) / (hi - lo) for value in block["mean"]] if scaled else block["mean"]
    std = [value / (hi - lo) for value in block["std"]] if scaled else block["std"]
    decided = {
        "input_size": (len(mean), *size),
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple(mean),
        "std": tuple(std),
    }
    if twice := sorted(set(decided) & set(kwargs)):
        raise ArgumentError(f"transform: {', '.join(twice)} come from the tower's config; change them there")
    try:
        transform = create_transform(is_training=is_training, **decided, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"transform: timm.data.create_transform refuses: {error}") from error
    reverse = block["channel_order"] == "BGR"
    if block["padding"] is None and not scaled and not reverse:
        return transform
    steps = list(transform.transforms) if isinstance(transform, Compose) else []
    places = [place for place, step in enumerate(steps) if isinstance(step, Normalize)]
    if len(places) != 1:
        raise ArgumentError(
            f"transform: with {kwargs} timm does not normalise within one transform, and this tower's padding, "
            "value_range or channel_order would get lost; leave such arguments out"
        )
    place = places[0]
    if scaled:
        normalise = Normalize(mean=torch.tensor(block["mean"]), std=torch.tensor(block["std"]))
        steps[place : place + 1] = [ScaleValues(lo, hi), normalise]
        place += 1
    if reverse:
        steps.insert(place + 1, ReverseChannels())
    if block["padding"] is not None:
        steps.insert(0, PadToSquare(block["padding"]["color"]))
    return Compose(steps)


def completed_preprocess(config: TimmTowerConfig) -> tuple[dict[str, Any], list[int]]:
    """The preprocess block and `[height, width]` of a config.

    Raises:
        ConfigError: the config is not completed.
    """
    if config.preprocess is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    return config.preprocess, check_size("image_size", config.image_size)

# --- tensor_transform.py

"""timm's transform on tensors: whole batches, on any device, close to the exact one and not equal to it.

timm's steps say what happens; only the resizing is done by torch instead of PIL. How far the two are apart before mean
and std, in steps of an 8-bit pixel (of 255), from a fifth to three times the size, is measured by
`scripts/bench_image_processor.py`. With the aspect kept, on an x86-64 CPU with torch 2.14.1, torchvision 0.29.1 and
Pillow 13.0:

    interpolation        uint8: max, mean      uint8 without a kernel of its own      float: max, mean
    nearest              0, 0                  0, 0                                   0, 0
    bilinear             2, 0.024              2, 0.25                                1.0, 0.35
    bicubic, lanczos     2, 0.010              2, 0.027                               1.2, 0.32

The means are the largest of all sizes. torch has uint8 kernels on CPUs with AVX2 or NEON, not on GPUs. Floats are not
rounded to whole steps, which is what their mean comes from. Where an image loses much height and little width (say a
portrait that is squashed to a square), this Pillow resizes the columns before the rows, and we do not: then the maximum
is 11 and the mean of uint8 0.30.
"""


def transform_tensor(images: torch.Tensor, block: dict[str, Any], size: Sequence[int]) -> torch.Tensor:
    """Preprocess a batch of tensors.

    Args:
        images: `[B, C, H, W]`, uint8, or floating point in [0, 1]; one channel counts as grey where three are needed.
        block: A checked preprocess block.
        size: Height and width of the result in pixels.

    Returns:
        `[B, C, height, width]`, float32, on the device of `images`; differentiable where `images` are floats.

    Raises:
        ArgumentError: channels, dtype or values are not those of images, or torch has no such interpolation.
    """
    images = _checked(images, len(block["mean"]))
    for step in transform_of(block, size).transforms:
        if isinstance(step, PadToSquare):
            images = _pad_to_square(images, step)
        elif isinstance(step, Resize):
            images = _resize(images, _target(images, step.size), step.interpolation)
        elif isinstance(step, ResizeKeepRatio):
            target = step.get_params(images, step.size, step.longest)  # type: ignore[no-untyped-call]
            images = _resize(images, target, step.interpolation)
        elif isinstance(step, CenterCropOrPad):
            images = _crop_or_pad(images, step)
        elif isinstance(step, MaybeToTensor):
            images = images if images.is_floating_point() else images.float().div(255)
        else:
            images = step(images)  # cropping, normalising and our own steps take both kinds
    return images


def _checked(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.ndim != 4 or 0 in images.shape:
        raise ArgumentError(f"a tensor of shape {list(images.shape)}: expected [C, H, W] or [B, C, H, W], not empty")
    if images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1) if channels == 3 else images
    if images.shape[1] != channels:
        raise ArgumentError(
            f"a tensor of shape {list(images.shape)}: expected {channels} channels first, [B, {channels}, H, W]; with "
            "channels last pass input_data_format='channels_last'"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ArgumentError(f"a tensor of {images.dtype}: expected uint8, or floating point in [0, 1]")
    images = images.float()
    least, most = (bound.item() for bound in images.detach().aminmax())
    if not (least >= 0 and most <= 1):
        raise ArgumentError(
            f"a floating point tensor with values from {least:.4g} to {most:.4g}: expected [0, 1], before mean and "
            "std. Divide by 255 what goes to 255; what is normalised already goes to the model as it is."
        )
    return images


def _target(images: torch.Tensor, size: int | Sequence[int]) -> list[int]:
    """Height and width that torchvision's `Resize` gives: a single number is the shorter side."""
    if not isinstance(size, int):
        return list(size)
    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    return [size, longer] if height <= width else [longer, size]


def _resize(images: torch.Tensor, size: Sequence[int], mode: InterpolationMode) -> torch.Tensor:
    height, width = size
    if mode == InterpolationMode.NEAREST:
        rows, columns = _nearest(images.shape[-2], height), _nearest(images.shape[-1], width)
        return images[..., rows, :][..., columns]
    try:
        # As PIL does: rows first, then columns, and what bicubic and lanczos overshoot is cut after each of them. uint8
        # is also rounded in between, as PIL's is, where torch has no kernel of its own for it.
        for target in ([images.shape[-2], width], [height, width]):
            images = F.resize(images, target, interpolation=mode, antialias=True)
            images = images.clamp(0, 1) if images.is_floating_point() else images
    except (NotImplementedError, ValueError) as error:
        raise ArgumentError(
            f"this torch and torchvision cannot resize tensors with interpolation {mode.value!r}; pass PIL images or "
            "uint8 numpy arrays"
        ) from error
    return images


def _nearest(before: int, after: int) -> list[int]:
    """The pixels that PIL takes: it adds up the step in double precision, where torch's modes multiply in single."""
    step = before / after
    position, taken = step * 0.5, []
    for _ in range(after):
        taken.append(min(int(position), before - 1))
        position += step
    return taken


def _fill(images: torch.Tensor, color: Sequence[int]) -> torch.Tensor:
    fill = torch.tensor(color, device=images.device)
    return (fill / 255 if images.is_floating_point() else fill).to(images.dtype)


def _pad_to_square(images: torch.Tensor, step: PadToSquare) -> torch.Tensor:
    batch, channels, height, width = images.shape
    side = max(height, width)
    left, top = step.corner(width, height)
    canvas = _fill(images, step.color).view(1, channels, 1, 1).repeat(batch, 1, side, side)
    canvas[..., top : top + height, left : left + width] = images
    return canvas


def _crop_or_pad(images: torch.Tensor, step: CenterCropOrPad) -> torch.Tensor:
    """timm's own, channel by channel: torchvision pads tensors with one number only."""
    color: Any = step.fill
    fill = _fill(images, color).tolist()
    parts = [center_crop_or_pad(images[:, i : i + 1], step.size, fill=value) for i, value in enumerate(fill)]
    return torch.cat(parts, 1)

# --- processor_config.py

"""`preprocessor_config.json`: what it holds, made from a tower's config, and held against it.

It repeats the preprocess block and the size for transformers, under transformers' names. Here and not beside the
processor's class, so that saving and loading a tower need not import transformers' image processing.
"""


PROCESSOR_TYPE = "TimmTowerImageProcessor"
# Where transformers finds the class in a tower's folder, under trust_remote_code. A list: of a plain name transformers
# makes a video processor's, and asks every pipeline's user to trust its code.
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": [f"modeling_timm_tower.{PROCESSOR_TYPE}", None]}
# Keys that transformers itself writes into a processor's file.
PROCESSOR_FOREIGN_KEYS = frozenset({"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"})

# Entry of the preprocess block -> its name in the file.
_NAMES = {
    "interpolation": "interpolation",
    "crop_pct": "crop_pct",
    "crop_mode": "crop_mode",
    "mean": "image_mean",
    "std": "image_std",
    "padding": "padding",
    "channel_order": "channel_order",
    "value_range": "value_range",
}
PROCESSOR_FACTS = ("size", *_NAMES.values())


def facts_of(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocess block and `[height, width]` under their names in `preprocessor_config.json`."""
    height, width = size
    named = {name: block[key] for key, name in _NAMES.items()}
    return {"size": {"height": height, "width": width}, **_plain(named)}


def block_of(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]` from the facts of `preprocessor_config.json`.

    Raises:
        ConfigError: a fact is missing or wrong; names it.
    """
    if missing := [name for name in PROCESSOR_FACTS if name not in facts]:
        raise ConfigError(f"{PROCESSOR_TYPE}: {', '.join(missing)} missing")
    block = _plain({key: facts[name] for key, name in _NAMES.items()})
    size = facts["size"]
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise ConfigError(f"size={dict(size)!r}: expected {{'height': ..., 'width': ...}} in pixels")
        size = [size["height"], size["width"]]
    if not isinstance(block["mean"], list) or not block["mean"]:
        raise ConfigError(f"image_mean={block['mean']!r}: expected a list with a number for each channel")
    check_preprocess(block, len(block["mean"]))
    return block, check_size("size", size)


def _plain(value: Any) -> Any:
    """What JSON gives back: lists for tuples, and nothing shared with the config."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def processor_dict(config: TimmTowerConfig) -> dict[str, Any]:
    """What `preprocessor_config.json` of a tower holds, from its config alone.

    Written with `json.dumps(..., indent=2, sort_keys=True)` and a newline it is, byte for byte, what
    `TimmTowerImageProcessor.save_pretrained` writes.

    Raises:
        ConfigError: the config is not completed, or its preprocess block cannot be used.
    """
    block, size = completed_preprocess(config)
    check_preprocess(block, config.in_chans)
    return {
        **facts_of(block, size),
        "image_processor_type": PROCESSOR_TYPE,
        "auto_map": dict(PROCESSOR_AUTO_MAP),
    }


def facts_in_tower(processor: dict[str, Any]) -> dict[str, Any]:
    """What `preprocessor_config.json` holds beside a tower's `config.json`, which names the class.

    Here the class's name and `auto_map` would make transformers look for a video processor too, and ask every user of a
    pipeline whether to trust the code, although the class is registered.
    """
    return {name: value for name, value in processor.items() if name not in ("image_processor_type", "auto_map")}


def check_processor(found: Mapping[str, Any], config: TimmTowerConfig) -> None:
    """Refuse a `preprocessor_config.json` that would prepare other pixels than the tower's config says.

    Args:
        found: The parsed file.
        config: The completed config of the same folder, before any override.

    Raises:
        ConfigError: names every fact that differs, with both values.
    """
    expected = processor_dict(config)
    kind = found.get("image_processor_type")  # not beside a tower, but whoever saved the processor alone wrote it
    if kind not in (None, PROCESSOR_TYPE):
        raise ConfigError(
            f"preprocessor_config.json: image_processor_type is {kind!r}, not {PROCESSOR_TYPE!r}: it would prepare "
            "other pixels than this tower was made for. Save the tower again to write its own."
        )
    differ = [
        f"{name} is {found.get(name, 'missing')!r} there and {expected[name]!r} in config.json"
        for name in PROCESSOR_FACTS
        if name not in found or found[name] != expected[name]
    ]
    differ += [f"{name} is unknown" for name in sorted(set(found) - set(expected) - PROCESSOR_FOREIGN_KEYS)]
    if differ:
        raise ConfigError(
            f"preprocessor_config.json and config.json disagree: {'; '.join(differ)}. One of them was edited; save the "
            "tower again to write both."
        )

# --- image_processor.py

"""`TimmTowerImageProcessor`: timm's eval transform as transformers' image processor.

- PIL images, uint8 numpy arrays and paths give, bit for bit, what timm's transform gives for `image.convert("RGB")`
  (`"L"` for towers of one channel). So transparency is dropped and not blended, and PIL clips what 16-bit images hold
  above 255.
- Tensors and floating point arrays take the path of `tensor_transform.py`, which is close and not equal.
- EXIF rotation: paths and URLs are read by transformers' `load_image`, as in pipelines, which turns the image upright.
  A PIL image is taken as it is, as timm takes it: `PIL.ImageOps.exif_transpose` is the caller's.

In a file of its own: importing transformers' image processing is not free, and `TimmModel` does without.
"""


# From a folder, transformers 5.4 copies the files that a remote file imports, and not those that these import in turn:
# so all that are needed are imported above.

_PIL_MODES = {1: "L", 3: "RGB"}


class TimmTowerImagesKwargs(TypedDict, total=False):
    """What a call takes beside the images. transformers' processors sort their keywords by these names."""

    return_tensors: str | None
    device: str | torch.device | None
    input_data_format: str | None


class TimmTowerImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` for a tower, as timm's eval transform makes them.

    The attributes are the arguments; they may be set, and hold from the next call on.

    Args:
        size: Height and width of the result in pixels: `{"height": ..., "width": ...}`, a pair, or an int for a square.
        interpolation: `nearest`, `bilinear`, `bicubic`, `box`, `hamming` or `lanczos`.
        crop_pct: Side of the crop divided by the side resized to.
        crop_mode: `center`, `squash` or `border`.
        image_mean: A number for each channel; how many there are is the tower's `in_chans`.
        image_std: Likewise.
        padding: None, or `{"mode": "square", "color": [...]}`.
        channel_order: `RGB` or `BGR`.
        value_range: `[lo, hi]`, what black and white are before mean and std are applied.

    Raises:
        ConfigError: an argument is wrong, missing or unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' declaration
    valid_kwargs = TimmTowerImagesKwargs  # type: ignore[assignment]  # narrower than the base's on purpose

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        # transformers sets this on the class of remote code and would then, at each save, copy the code into the
        # folder's top and point `auto_map` there. `save_pretrained` below keeps it in core/.
        self._auto_class = None
        if unknown := sorted(set(facts) - set(PROCESSOR_FACTS) - PROCESSOR_FOREIGN_KEYS):
            raise ConfigError(f"{type(self).__name__}: unknown {', '.join(map(_with_near_names, unknown))}")
        defaults = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0]}
        for name, value in facts_of(*block_of({**defaults, **facts})).items():
            setattr(self, name, value)

    @classmethod
    def from_tower_config(cls, config: TimmTowerConfig) -> "TimmTowerImageProcessor":
        """The processor of a tower.

        Raises:
            ConfigError: the config is not completed: build a tower from it first.
        """
        return cls(**processor_dict(config))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': keywords that are facts override the file's, others are what `pipeline` hands to everyone.

        `image_size`, the config's name for it, is taken for `size`: `pipeline(..., model_kwargs={"image_size": 384})`
        hands it to the model and to us, and both follow.

        Raises:
            ArgumentError: a keyword looks like a fact misspelt.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in PROCESSOR_FACTS if name in kwargs}
        if "image_size" in kwargs:
            if "size" in given:
                raise ArgumentError(f"{cls.__name__}: image_size is another name of size; give one of them")
            given["size"] = kwargs.pop("image_size")
        for name in kwargs:
            if name in ("mean", "std") or difflib.get_close_matches(name, PROCESSOR_FACTS, n=1, cutoff=0.75):
                raise ArgumentError(f"{cls.__name__}: unknown {_with_near_names(name)}")
        processor = cls(**{**image_processor_dict, **given})
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        kind, auto_map = type(self).__name__, dict(PROCESSOR_AUTO_MAP)
        return {**self._facts(), "image_processor_type": kind, "auto_map": auto_map}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write `preprocessor_config.json`, and for remote code `core/` with the code, unless the folder has one."""
        code = Path(save_directory) / "core"
        if type(self)._auto_class is not None and not code.exists():
            code.mkdir(parents=True)
            for file in {__file__, *get_relative_import_files(__file__)}:
                shutil.copyfile(file, code / Path(file).name)
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        path, config = (Path(save_directory, name) for name in ("preprocessor_config.json", "config.json"))
        if config.is_file() and json.loads(config.read_text()).get("model_type") == TimmTowerConfig.model_type:
            facts = facts_in_tower(json.loads(path.read_text()))  # as the tower itself writes it
            path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        return saved

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        input_data_format: str | None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Preprocess one image or a list of them.

        Args:
            images: PIL images; numpy arrays `[H, W]`, `[H, W, C]`, `[C, H, W]` or a batch of these, uint8 or floats
                in [0, 1]; tensors `[C, H, W]` or `[B, C, H, W]`, likewise; paths and URLs; or a flat list of these.
            return_tensors: `"pt"` or `"np"`: one array of the batch; None: a list of tensors `[C, height, width]`.
            device: Where the tensor path runs and where the result lies; by default each image's own.
            input_data_format: `channels_first` or `channels_last` of arrays and tensors. By default tensors have their
                channels first, and arrays where their shape shows them.

        Returns:
            `pixel_values`: `[B, C, height, width]`, float32.

        Raises:
            ArgumentError: an image, or a keyword, that cannot be used.
            ConfigError: an attribute has been set to what cannot be used.
        """
        if unknown:
            raise ArgumentError(
                f"{type(self).__name__}: unknown {', '.join(sorted(unknown))}. A call takes return_tensors, device and "
                "input_data_format; the steps are the tower's (size, interpolation, ...) and none is left out."
            )
        if return_tensors not in (None, "pt", "np"):
            raise ArgumentError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ArgumentError(f"input_data_format={input_data_format!r}: not 'channels_first' or 'channels_last'")
        prepared = _Call(self._facts(), device, input_data_format)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        done = [made for image in images for made in prepared(image)]
        if not done:
            raise ArgumentError("no images: expected one at least")
        if return_tensors is None:
            return BatchFeature({"pixel_values": done})
        batch = torch.stack(done)
        return BatchFeature({"pixel_values": batch if return_tensors == "pt" else batch.cpu().numpy()})

    def _facts(self) -> dict[str, Any]:
        """The attributes as they are now, checked again: they may have been set."""
        return facts_of(*block_of({name: getattr(self, name) for name in PROCESSOR_FACTS}))


class _Call:
    """One call of the processor: image -> its `[C, height, width]` tensors."""

    def __init__(self, facts: dict[str, Any], device: Any, data_format: str | None) -> None:
        self.block, self.size = block_of(facts)
        self.channels = len(self.block["mean"])
        self.transform = transform_of(self.block, self.size)
        self.device, self.data_format = device, data_format

    def __call__(self, image: Any) -> Iterator[torch.Tensor]:
        if isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        if isinstance(image, Image.Image):
            yield self._exact(image)
        elif isinstance(image, np.ndarray):
            for array in image if image.ndim == 4 else [image]:
                yield self._from_array(array)
        elif isinstance(image, torch.Tensor):
            yield from self._from_tensor(image, self.data_format or "channels_first")
        elif isinstance(image, (list, tuple)):
            raise ArgumentError("a list within the list of images: expected a flat list, one image after the other")
        else:
            raise ArgumentError(
                f"an image of type {type(image).__name__}: expected a PIL image, a numpy array, a torch tensor, a path "
                "or a URL"
            )

    def _exact(self, image: Image.Image) -> torch.Tensor:
        mode = _PIL_MODES.get(self.channels)
        if mode is None:
            raise ArgumentError(
                f"a PIL image (mode {image.mode}), but the tower takes {self.channels} channels: pass arrays or tensors"
            )
        if image.mode != mode:
            _warn_of_clipping(image)
            image = image.convert(mode)
        made: torch.Tensor = self.transform(image)
        return made if self.device is None else made.to(self.device)

    def _from_array(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """One image; uint8 of one, three or four channels through PIL, all else through torch."""
        if array.ndim == 2:
            array = array[:, :, None]
        elif array.ndim != 3:
            raise ArgumentError(f"an array of shape {array.shape}: expected [H, W], [H, W, C] or [C, H, W]")
        elif self._data_format(array.shape) == "channels_first":
            array = array.transpose(1, 2, 0)
        if array.dtype == np.uint8 and self.channels in _PIL_MODES and array.shape[-1] in (1, 3, 4):
            pixels = array[:, :, 0] if array.shape[-1] == 1 else array
            return self._exact(Image.fromarray(np.ascontiguousarray(pixels)))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ArgumentError(f"an array of {array.dtype}: expected uint8, or floating point in [0, 1]")
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        return next(self._from_tensor(tensor, "channels_first"))

    def _data_format(self, shape: tuple[int, ...]) -> str:
        if self.data_format is not None:
            return self.data_format
        counts = {1, 3, 4} if self.channels in _PIL_MODES else {1, self.channels}
        first, last = shape[0] in counts, shape[-1] in counts
        if first == last:
            raise ArgumentError(
                f"an array of shape {shape}: its channels could be first or last. Pass input_data_format="
                "'channels_first' or 'channels_last'"
                if first
                else f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W] with C of {sorted(counts)}"
            )
        return "channels_first" if first else "channels_last"

    def _from_tensor(self, tensor: torch.Tensor, data_format: str) -> Iterator[torch.Tensor]:
        batch = tensor[None] if tensor.ndim == 3 else tensor
        if data_format == "channels_last" and batch.ndim == 4:
            batch = batch.permute(0, 3, 1, 2)
        if self.device is not None:
            batch = batch.to(self.device)
        yield from transform_tensor(batch, self.block, self.size)


def _with_near_names(name: str) -> str:
    near = difflib.get_close_matches(name, PROCESSOR_FACTS, n=2)
    return f"{name} (did you mean {' or '.join(near)}?)" if near else name


def _warn_of_clipping(image: Image.Image) -> None:
    if not image.mode.startswith(("I", "F")):
        return
    extrema: Any = image.getextrema()
    least, most = extrema
    if least < 0 or most > 255 or (image.mode == "F" and most <= 1):
        warnings.warn(
            f"an image of mode {image.mode} with values from {least} to {most}: PIL's convert takes white for 255 and "
            "clips what is not from 0 to 255, and timm has the same. Scale it to 8 bits first.",
            stacklevel=2,
        )

# --- tower.py

"""A completed config -> a tower, and the one forward that every class of a tower uses."""


CLASSIFIER = "classifier"
"""Name of the classifier that an image classification model has on top of its tower, in modules and weight keys."""


@dataclass(frozen=True)
class HeadInput:
    """How the trunk's features become the head's input.

    Attributes:
        prefix: Number of prefix tokens for `token_avg`, else None.
        to_nchw: The trunk gives `[B, H, W, C]` and the head takes `[B, C, H, W]`.
        per_position: The projection runs over the channels of every position of a `[B, C, H, W]` map.
    """

    prefix: int | None = None
    to_nchw: bool = False
    per_position: bool = False

    @classmethod
    def of(cls, config: TimmTowerConfig, trunk: nn.Module) -> "HeadInput":
        """What a completed config asks for."""
        if config.pool == "token_avg":
            return cls(prefix=class_and_patch_tokens(trunk))
        wants_map = config.head is not None or config.pool in ATTENTION_POOLS
        return cls(
            to_nchw=wants_map and config.layout == "NHWC",
            per_position=not wants_map and config.layout == "NCHW" and config.proj in ("linear", "mlp"),
        )

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the trunk gives them -> the head's input."""
        if self.prefix is not None:
            patches = features[:, self.prefix :]
            return torch.cat([features[:, 0], patches.mean(dim=1)], dim=1)
        if self.to_nchw:
            return features.permute(0, 3, 1, 2).contiguous()
        return features


def run_head(head: nn.Module, head_input: HeadInput, features: torch.Tensor) -> Any:
    """Pooled or unpooled features of the trunk -> the embedding (whatever the head returns)."""
    inputs = head_input(features)
    if head_input.per_position:
        return head(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return head(inputs)


class Tower(nn.Module):
    """Trunk and head, and nothing else: what a folder holds and what a save compares.

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
        self.head_input = HeadInput.of(config, trunk)

    def forward(self, images: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]` -> the embedding `[B, embed_dim]`, or whatever a custom head returns."""
        return run_head(self.head, self.head_input, self.trunk(images))


def build_tower(
    config: TimmTowerConfig, *, with_classifier: bool = False, make_head: Callable[[], nn.Module] | None = None
) -> Tower:
    """A tower with fresh weights, in train mode, from a completed config alone.

    Args:
        config: Completed; it is not changed.
        with_classifier: Add the classifier of `config.num_labels` classes.
        make_head: Makes a head that is stored as code, and trusted; None refuses such heads.

    Raises:
        ConfigError: the config is not completed, needs a subclass of TimmModel, or describes no tower.
        HeadError: the head cannot be rebuilt in this process.
    """
    check_buildable(config)
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; hf_timm_tower.TimmModel completes it")
    config = copy.deepcopy(config)
    trunk = create_trunk(config)
    head = builtin_head(config) if config.head is None else rebuild_head(config.head) if make_head is None else make_head()
    return Tower(config, trunk, head, make_classifier(config) if with_classifier else None)


def check_buildable(config: TimmTowerConfig) -> None:
    """Refuse a config that no code but that of its own class can build.

    Raises:
        ConfigError, HeadError: says what is needed.
    """
    if config.tower_class is not None:
        raise ConfigError(
            f"this tower was saved by {config.tower_class}, a subclass of TimmModel that changes how it is built or "
            f"run; transformers' classes cannot build it. Load it with {config.tower_class}.from_pretrained(...)."
        )
    if config.head is not None and config.head.get("form") in (LIVE, SUBCLASS):
        raise HeadError("the config says that there is a custom head, but not which: save the tower with its head")


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


def has_classifier(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether among these weights there are those of a classifier."""
    return any(key.startswith(f"{CLASSIFIER}.") for key in weights)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 on the CPU for what is made inside, whatever the process has set as its default dtype and device.

    What a constructor computes (relative positions, rotary tables) is then the same everywhere.
    """
    wanted = torch.get_default_dtype()
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(wanted)

# --- weights.py

"""Weights from a tower's files into a module: every key fits or nothing is touched; ties stay ties."""


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_INDEX_BYTES = 32 * 1024**2
_ALIGNMENT = 64  # bytes; what torch's CPU allocator aligns to


@dataclass(frozen=True)
class StoredTower:
    """What a tower's folder holds, as far as loading needs it.

    Attributes:
        config: The config, validated.
        weights: Key -> tensor on mapped memory; keys of a tie have one tensor object.
        fingerprint: The JSON of `fingerprint.json`, None where there is none or it was not read.
    """

    config: TimmTowerConfig
    weights: Mapping[str, torch.Tensor]
    fingerprint: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.weights.values())


def read_weight_files(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Key -> tensor of a tower's weight files, which lie in one folder with their index.

    Tensors are mapped; those at odd addresses are copied, since kernels may give other last bits for them. Keys that the
    index calls tied or shared hold one tensor.

    Raises:
        FormatError: a file is damaged, or the index does not fit the files.
    """
    index = _read_index(files[0].with_name(INDEX_FILE))
    weight_map = index.get("weight_map")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file}: not a safetensors file that can be read: {error}") from error
        if isinstance(weight_map, dict):
            listed = {key for key, name in weight_map.items() if name == file.name}
            if odd := sorted(listed ^ tensors.keys()):
                raise FormatError(f"{file}: the index and the file disagree on {len(odd)} keys, such as {shown(odd[0])}")
        found.update(tensors)
    found = {key: tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for key, tensor in found.items()}
    metadata = index.get("metadata")
    for kind in ("tied", "shared"):
        groups = metadata.get(kind, []) if isinstance(metadata, dict) else []
        for group in groups if isinstance(groups, list) else []:
            if not isinstance(group, list) or any(key not in found for key in group):
                raise FormatError(f"{files[0].with_name(INDEX_FILE)}: metadata.{kind} names unknown keys: {shown(group)}")
            first = found[group[0]]
            if odd := [key for key in group if not same_bytes_of(found[key], first)]:
                raise FormatError(f"{files[0].with_name(INDEX_FILE)}: {shown(odd[0])} is {kind} to another key but differs")
            found.update((key, first if kind == "tied" else first.view(first.shape)) for key in group[1:])
    return found


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_INDEX_BYTES} are read")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    return index if isinstance(index, dict) else {}


def fetch_pinned_trunk(source: Mapping[str, Any], **access: Any) -> dict[str, torch.Tensor]:
    """`trunk.*` -> tensor of a trunk in another repository, at the pinned commit and with the pinned digests.

    Args:
        source: `config.trunk_source`, checked.
        access: `token`, `cache_dir`, `local_files_only`, `force_download` of huggingface_hub.

    Raises:
        HubError: the repository cannot be read.
        WeightsError: a file there is not the one that was pinned.
    """
    repo_id, commit = source["repo_id"], source["commit"]
    found: dict[str, torch.Tensor] = {}
    for name, digest in source["files"].items():
        try:
            path = Path(hf_hub_download(repo_id, name, revision=commit, **access))
        except (OSError, ValueError, RuntimeError) as error:
            raise HubError(
                f"only the head is stored here; its trunk is stored in {repo_id} at commit {commit}, and {shown(name)} "
                f"could not be fetched: {error}"
            ) from error
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            raise WeightsError(
                f"{shown(name)} of {repo_id} at commit {commit} has SHA-256 {actual}, the head was published for "
                f"{digest}: it is another trunk, and the embedding would be another one"
            )
        found.update(load_file(path))
    aligned = {key: tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for key, tensor in found.items()}
    if source["layout"] == "tower":
        return {key: tensor for key, tensor in aligned.items() if key.startswith("trunk.")}
    return {f"trunk.{key}": tensor for key, tensor in aligned.items() if key not in source["unused"]}


def same_bytes_of(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes (NaN equals the same NaN; -0.0 is not 0.0)."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8).to("cpu") for t in (a, b)))


def assign_weights(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    allow_missing: Collection[str] = (),
) -> None:
    """Make `tensors` the parameters and persistent buffers of `module`, without copying. All or nothing.

    Each parameter is replaced by a new one on the given tensor, with the old one's `requires_grad`. Keys that hold the
    same tensor object become one parameter. A tie that the module itself has stays, and keys that only repeat it may be
    missing. Buffers that no file holds go to `device` too, unless they are on meta.

    Args:
        module: Built on any device, `meta` included; its values are not looked at.
        tensors: Key -> tensor.
        source: Where they come from, for the error's text.
        dtype: Floating tensors are cast to it; None keeps each tensor's own.
        device: Where everything goes; None leaves it where it is.
        allow_missing: Keys that may be missing: those stay what they are.

    Raises:
        WeightsError: missing, unexpected or wrongly shaped keys, or tied keys that differ: one error that lists them.
    """
    state = module.state_dict(keep_vars=True)
    own_ties: dict[int, list[str]] = {}
    for key, tensor in state.items():
        own_ties.setdefault(id(tensor), []).append(key)
    full, differing = dict(tensors), list[str]()
    for keys in own_ties.values():
        if len(keys) > 1 and (given := [key for key in keys if key in full]):
            differing += [key for key in given[1:] if not same_bytes_of(full[key], full[given[0]])]
            full.update((key, full[given[0]]) for key in keys)
    if problems := _misfits(state, full, allow_missing, differing):
        raise WeightsError(
            f"{source}: the weights do not fit, nothing was loaded.\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nThe config that builds this tower and the weights must come from the same save."
        )
    memory: dict[Any, torch.Tensor] = {}  # one memory for one memory
    moved: dict[tuple[int, bool], torch.Tensor] = {}  # one parameter for one tensor object
    values: dict[str, torch.Tensor] = {}
    for key, tensor in full.items():
        old = state[key]
        name = (id(tensor), isinstance(old, nn.Parameter))
        if name not in moved:
            view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
            cast = dtype if tensor.is_floating_point() else None
            new = memory.setdefault(view, tensor.detach().to(device=device, dtype=cast))
            moved[name] = nn.Parameter(new, requires_grad=old.requires_grad) if name[1] else new.view(new.shape)
        values[key] = moved[name]
    module.load_state_dict(values, strict=False, assign=True)
    after = module.state_dict(keep_vars=True)
    if refused := [key for key, value in values.items() if after[key] is not value]:
        raise WeightsError(
            f"{source}: {_listed(refused)} did not reach the module: it overrides how attributes are set or a state dict "
            "is loaded, which a tower cannot use"
        )
    if device is not None:
        _move_computed_buffers(module, device)


def _move_computed_buffers(module: nn.Module, device: torch.device | str | int) -> None:
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None and not buffer.is_meta:
                # One buffer that several modules hold stays one.
                part._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def _misfits(
    state: Mapping[str, Any], given: Mapping[str, torch.Tensor], allowed: Collection[str], differing: list[str]
) -> list[str]:
    """One line for each kind of misfit."""
    shapes, kinds = [], []
    for key in state.keys() & given.keys():
        expected, found = state[key], given[key]
        if not isinstance(expected, torch.Tensor):
            kinds.append(f"{key}: the module wants a {type(expected).__name__}, only tensors are stored")
        elif isinstance(expected, (UninitializedParameter, UninitializedBuffer)):
            continue  # a lazy module, which takes the shape it is given
        elif expected.shape != found.shape:
            shapes.append(f"{key}: found {list(found.shape)}, expected {list(expected.shape)}")
        elif _number_kind(expected) != _number_kind(found):
            kinds.append(f"{key}: found {found.dtype}, expected {expected.dtype}")
    lines = [
        ("missing", [key for key in state if key not in given and key not in allowed]),
        ("unexpected", [key for key in given if key not in state]),
        ("of another shape", shapes),
        ("of another kind of number", kinds),
        ("one parameter in the tower but different in the file", differing),
    ]
    return [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in lines if keys]


def _number_kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "real"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"


def _listed(keys: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(keys)
    return ", ".join(shown(key)[1:-1] for key in ordered[:limit]) + (", ..." if len(ordered) > limit else "")


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
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

# --- modeling.py

"""Towers as transformers models: `TimmTowerModel`, and `TimmTowerForImageClassification` with a classifier on top.

`from_pretrained` is transformers' own, with all it takes (revisions, device maps, quantization, adapters). Two steps of
it are ours. *Building*: transformers builds on the meta device and fills what the checkpoint holds. Buffers outside the
state dict (relative positions, rotary tables, attention biases) are in no checkpoint and would come back as
uninitialised memory. So trunk and head are always built for real, with initialisation left out, their computed buffers
set aside, and then moved to meta; `_initialize_weights` puts the buffers back. transformers calls it on every model
inside a model, so that it works nested in another model's `from_pretrained` too. *Tensors*: they are checked against
the index and the folder's config, and put in strictly.
"""


HiddenStates = bool | int | Sequence[int] | None

MODEL_TAGS = ("timm",)
"""Tags of every tower, as transformers' `model_tags`."""

# Keywords of `from_pretrained` that say how files are found.
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")


@dataclass
class TimmTowerModelOutput(ModelOutput):
    """What `TimmTowerModel` gives.

    Args:
        last_hidden_state: The trunk's unpooled features, as timm's `forward_features` gives them: tokens
            `[B, N, C]` or a map in the trunk's own order; a list for CoaT, CrossViT and EfficientViM.
        pooler_output: The embedding `[B, embed_dim]`; the whole tuple or dict where a custom head gives one.
        hidden_states: Features of inner layers, as timm's `forward_intermediates` gives them: `[B, C, H, W]` each.
    """

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class TowerLoading:
    """What a `from_pretrained` that is under way tells the steps inside it, and what they tell it.

    Attributes:
        place: Folder or repository.
        download: How its files are found: `revision`, `token`, `cache_dir`, `subfolder`, ...
        trusts: Code of the place may run.
        keeps_dtypes: No dtype was asked for: every tensor keeps its own.
        fresh: Keys that are not in the files, and need not be.
        left_out: Keys in the files that this model has no place for, and need not have.
        stored: What was read.
    """

    place: str
    download: Mapping[str, Any]
    trusts: bool
    keeps_dtypes: bool
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stored: Any = None

    def budget(self) -> Budget:
        """What building may cost, by the size of the weight files where these are known."""
        folder = os.path.join(self.place, self.download.get("subfolder") or "")
        if not os.path.isdir(folder):
            return Budget.default()
        return Budget.for_weights(sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors")))

    def access(self) -> dict[str, Any]:
        """How to reach another repository, where the trunk is stored in one."""
        names = ("token", "cache_dir", "force_download", "local_files_only")
        return {name: self.download[name] for name in names if name in self.download}

    def make_head(self, spec: dict[str, Any]) -> nn.Module:
        """A head that is stored as code, where that is trusted.

        Raises:
            HeadError: it is not, or the code fails.
        """
        if not self.trusts:
            raise refuse_code(spec, repo=self.place, revision=self.download.get("revision"))
        return make_code_head(spec, self.place, **self.download)

    def refuse_stale(self, files: Sequence[str]) -> None:
        """Refuse a `model.safetensors` that an index of other files is beside, as a folder with both is refused.

        transformers takes the former and does not fetch the latter. `Trainer` makes such repositories: it uploads a
        tower over an older model and takes nothing away.

        Raises:
            FormatError: there are both.
        """
        if Path(files[0]).name != SINGLE_FILE:
            return
        if cached_file(self.place, INDEX_FILE, _raise_exceptions_for_missing_entries=False, **self.download):
            raise FormatError(
                f"{self.place}: holds both {SINGLE_FILE} and {INDEX_FILE} of other files; transformers would load the "
                f"first. Remove the stale one; push_to_hub of a tower removes an old {SINGLE_FILE} by itself."
            )


class TimmTowerPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the transformers models of a tower share.

    Args:
        config: Completed, as every folder has it; the model's own `config` is a copy.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    config: TimmTowerConfig
    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    model_tags = list(MODEL_TAGS)  # noqa: RUF012
    accepts_loss_kwargs = False
    supports_gradient_checkpointing: bool
    _supports_sdpa = True
    _has_classifier = False

    trunk: nn.Module
    head: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None) -> None:
        on_meta, wanted = torch.empty(0).is_meta, torch.get_default_dtype()
        make_head = None
        if _loading is not None and config.head is not None and config.head.get("form") == CODE:
            make_head = partial(_loading.make_head, config.head)
        budget = Budget.default() if _loading is None or config.trunk_source is not None else _loading.budget()
        # Everything is computed in float32 and then cast, as for a tower that is loaded and cast.
        with plain_defaults(), skip_init(budget) if on_meta else nullcontext():
            tower = self._build(config, self._has_classifier, make_head)
        if not on_meta and wanted != torch.float32:
            tower.to(wanted)
        super().__init__(tower.config)
        self.model_tags = list(MODEL_TAGS)  # its own: `add_model_tags` appends to it
        self._loading = _loading
        self._head_input = tower.head_input
        for name, part in tower.named_children():
            self.add_module(name, part)
        # Buffers that no checkpoint holds, until they are back in their places; None where they never left.
        self._computed: dict[str, torch.Tensor] | None = None
        if on_meta:
            self._computed = _computed_buffers(self)
            _move_to_meta(self, wanted)
        self.steps = _steps_of(self.trunk)
        self._no_split_modules = [type(self.trunk).__name__]
        self._checkpoints = False
        self.supports_gradient_checkpointing = _can_checkpoint(self.trunk)
        if self.config._attn_implementation == "eager":
            for module in self.trunk.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]

    # --- steps that hf_timm_tower's own classes replace

    @staticmethod
    def _build(config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:
        return build_tower(config, with_classifier=with_classifier, make_head=make_head)

    @staticmethod
    def _read(files: Sequence[str], loading: TowerLoading) -> StoredTower:
        described = json.loads(Path(files[0]).with_name("config.json").read_bytes())
        described.pop("auto_map", None)  # of the files, not of the tower
        config = TimmTowerConfig(**described)
        weights = read_weight_files([Path(file) for file in files])
        if config.trunk_source is not None:
            weights = {**weights, **fetch_pinned_trunk(config.trunk_source, **loading.access())}
        return StoredTower(config, weights)

    # --- what transformers asks of a model

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """One black image `[1, in_chans, H, W]`."""
        size = (1, self.config.in_chans, *native_size(self.config))
        return {"pixel_values": torch.zeros(size, dtype=self.dtype, device=self.device)}

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None: images have no table of embeddings."""
        return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused, see `get_input_embeddings`."""
        raise ArgumentError(f"{type(self).__name__} takes images and has no input embeddings to set")

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the trunk recomputes activations in the backward pass. Setting it passes it on to timm."""
        return self._checkpoints

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        if enable and not self.supports_gradient_checkpointing:
            raise ConfigError(f"{type(self.trunk).__name__} does not support gradient checkpointing in timm")
        if self.supports_gradient_checkpointing:
            self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]
        self._checkpoints = enable

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        how = getattr(gradient_checkpointing_func, "keywords", {})
        plain = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is checkpoint
        if enable and (every_n_layers != 1 or not plain or how.get("use_reentrant")):
            raise ArgumentError(
                "gradient checkpointing: timm checkpoints every block of the trunk, not reentrant and without "
                f"offloading; every_n_layers={every_n_layers} and {how or 'another function'} cannot be honoured"
            )
        self.gradient_checkpointing = enable

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that modules with frozen statistics stay in eval mode."""
        super().train(mode)
        keep_statistics(self)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: timm and the head have initialised what was built; see `_initialize_weights`."""

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Called for every module inside and last for the model itself, also when it is nested in another model.
        if module is not self or self._computed is None:
            return
        if any(self.get_buffer(name).is_meta for name in self._computed):
            return  # nothing is loaded yet
        _put_buffers(self, self._computed)
        self._computed = None
        buffers_as_timm(self.trunk)
        # What is on meta is on the disk: transformers loads it when it runs.
        state = {key: tensor for key, tensor in self.state_dict(keep_vars=True).items() if not tensor.is_meta}
        if fresh := [key for key, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]:
            self._fill(fresh)
        _align(self)
        if self._loading is None:
            apply_frozen(self, self.config.frozen)  # nested: nobody else does

    @torch.no_grad()
    def _fill(self, keys: list[str]) -> None:
        """Give fresh values to what a checkpoint did not hold, those that a new model has."""
        if all(key.startswith(f"{CLASSIFIER}.") for key in keys):
            init_classifier(self.get_submodule(CLASSIFIER))  # type: ignore[arg-type]
            return
        with plain_defaults():
            twin = self._build(self.config, self._has_classifier, None).state_dict()
        state = self.state_dict(keep_vars=True)
        for key in keys:
            state[key].copy_(twin[key])

    # --- loading

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        frozen: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Load a tower from a folder or a repository, in eval mode; reads what `TimmModel.from_pretrained` reads.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's id.
            config: A config that was loaded already, or where to load it from.
            dtype: Cast floating-point weights; None and `"auto"` keep every tensor's own, which transformers
                otherwise makes one for all.
            torch_dtype: The old name of `dtype`.
            ignore_mismatched_sizes: Weights that are missing, unexpected or of another shape are no error: they get
                fresh values or are left out, and a warning lists them.
            output_loading_info: Return `(model, info)`, info with the lists of such keys.
            frozen: Freeze what was frozen when the tower was saved; False or None: everything trains. `AutoModel`
                takes None alone, since it reads this into the config first.
            kwargs: As `PreTrainedModel.from_pretrained`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `subfolder`, `device_map`, `attn_implementation`, ...

        Raises:
            WeightsError: weights are missing, unexpected or of another shape.
            ConfigError: the config that was given is not that of the folder.
            TowerError: by what is wrong with the folder.
        """
        wanted = torch_dtype if dtype is None else dtype
        loading = TowerLoading(
            place=str(pretrained_model_name_or_path),
            download={key: kwargs[key] for key in _DOWNLOAD if kwargs.get(key) is not None},
            trusts=bool(kwargs.get("trust_remote_code")),
            keeps_dtypes=wanted in (None, "auto"),
        )
        found: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            config=config,
            dtype=wanted,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
            _loading=loading,
            **kwargs,
        )
        model, info = found
        model._loading = None
        if not ignore_mismatched_sizes:
            _refuse_misfits(loading.place, info, allowed=loading.fresh)
        _warn_of_changes(loading, info)
        if frozen:
            apply_frozen(model, model.config.frozen)
        else:
            model.config.frozen = None
        model._after_loading(loading)
        return (model, info) if output_loading_info else model

    def _after_loading(self, loading: TowerLoading) -> None:
        """What is left to check once everything is in place."""

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A step of `PreTrainedModel.from_pretrained`: the files are found, the model is on meta."""
        stock = PreTrainedModel._load_pretrained_model
        loading = model._loading
        if loading is not None and state_dict is None and checkpoint_files:
            loading.refuse_stale(checkpoint_files)
        devices = {str(place) for place in (load_config.device_map or {"": "cpu"}).values()}
        if state_dict is not None or not checkpoint_files or "disk" in devices or loading is None:
            return stock(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        stored = loading.stored = model._read(checkpoint_files, loading)
        folder = Path(checkpoint_files[0]).parent
        _refuse_changed(stored.config, model.config, folder)
        weights = dict(stored.weights)
        saved_with_one = type(model).__name__ in (stored.config.architectures or ())
        if model._has_classifier and not has_classifier(weights) and not saved_with_one:
            loading.fresh += [f"{CLASSIFIER}.{name}" for name in model.classifier.state_dict()]
        if not model._has_classifier:
            loading.left_out += [key for key in weights if key.startswith(f"{CLASSIFIER}.")]
            weights = {key: tensor for key, tensor in weights.items() if key not in loading.left_out}
        if load_config.hf_quantizer is not None or load_config.ignore_mismatched_sizes or len(devices) > 1:
            return stock(model, weights, None, load_config, *args, **kwargs)
        keeps = loading.keeps_dtypes and stored.config.dtype is None
        assign_weights(
            model,
            weights,
            source=str(folder),
            dtype=None if keeps else floating_dtype(load_config.dtype),
            device=devices.pop(),
            allow_missing=loading.fresh,
        )
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor._is_hf_initialized = key in weights
        return _loading_report(missing_keys=set(loading.fresh)), None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does: this class has no card, no fingerprint and no proof (hf_timm_tower has).

        Raises:
            HeadError: the head is not the one that was loaded.
            FolderError: the folder holds a tower's own files, which would stay beside the new ones.
        """
        wanted, (trunk_source, here) = self.config.head, (self.config.trunk_source, Path(save_directory))
        with plain_defaults(), skip_init(Budget.default()):
            same = wanted is not None and wanted.get("form") == CODE
            built = self.head if same else self._build(self.config, False, None).head
        if repr(built) != repr(self.head) or type(built) is not type(self.head) or trunk_source is not None:
            raise HeadError(
                "the head was replaced, or its trunk is stored in another repository: only hf_timm_tower can save this "
                "tower so that it comes back; install it (pip install hf_timm_tower)"
            )
        if any((here / name).exists() for name in (INDEX_FILE, "trunk.safetensors", "fingerprint.json")):
            raise FolderError(f"{here}: holds a tower saved by hf_timm_tower; save into another folder, or install it")
        super().save_pretrained(save_directory, *args, **kwargs)


class TimmTowerModel(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower as a transformers model: images in, features and embedding out.

    Its `pooler_output` has the bits of `TimmModel.forward`. Both read and write the same folders.

    Args:
        config: The model's own `config` is a completed copy.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TimmTowerModelOutput | tuple[Any, ...]:
        """Run the tower.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: True for all inner layers, a list of indices for those, an int for the last n.
            return_dict: False gives a tuple of the fields that are there.
            output_attentions: Refused: timm gives none.

        Raises:
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        features, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        output = TimmTowerModelOutput(features, embedding, inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


class TimmTowerForImageClassification(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower with a linear classifier on its embedding.

    Starts from a plain tower (`num_labels=...` or `id2label=...` give a fresh classifier, and a warning says so) and
    saves with its labels; `classifier.safetensors` is stored beside the tower's files.

    Args:
        config: With `id2label` or `num_labels`, and `problem_type` (single label, multi label, regression; None
            follows from the labels' dtype, as everywhere in transformers).

    Raises:
        ConfigError: the tower's embedding is not one vector of a known width.
    """

    _has_classifier = True

    classifier: nn.Linear

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None) -> None:
        super().__init__(config, _loading)
        self.num_labels = self.config.num_labels
        names = self.config.id2label or {}
        if set(names.values()) != set(self.config.label2id or ()):
            # given alone, id2label leaves transformers' default labels in the other table
            self.config.label2id = {str(label): int(index) for index, label in names.items()}

    @property
    def base_model(self) -> nn.Module:
        """Trunk and head without the classifier, as one module on the same parameters."""
        return Tower(self.config, self.trunk, self.head)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Run tower and classifier.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            labels: `[B]` integers for one label each, `[B, num_labels]` floats for several, floats for regression;
                the loss follows `config.problem_type`.
            output_hidden_states: As `TimmTowerModel.forward`.
            return_dict: As `TimmTowerModel.forward`.
            output_attentions: Refused: timm gives none.

        Raises:
            HeadError: the embedding is not `[B, embed_dim]`.
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        _, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            found = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
            raise HeadError(f"a classifier needs an embedding [B, embed_dim], this tower gives {found}; choose a pool")
        logits = self.classifier(embedding)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


def _run(
    model: Any, images: torch.Tensor, wanted: HiddenStates, attentions: bool | None
) -> tuple[Any, Any, tuple[torch.Tensor, ...] | None]:
    """The trunk's features, the embedding, and features of inner layers where asked for."""
    trunk = model.trunk
    if model.config.output_attentions if attentions is None else attentions:
        raise ConfigError("output_attentions: timm's models do not give their attentions")
    if not images.is_floating_point():
        raise ArgumentError(
            f"pixel_values are {images.dtype}: expected floats as the image processor gives them, scaled and normalised"
        )
    images = images.to(model.dtype)
    wanted = model.config.output_hidden_states if wanted is None else wanted
    inner = None
    # An empty list or 0 asks for none; True, and no number, for all.
    if wanted:
        if not hasattr(trunk, "forward_intermediates"):
            raise ConfigError(f"{type(trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
        indices = None if wanted is True else wanted if isinstance(wanted, int) else list(wanted)
        features, found = trunk.forward_intermediates(images, indices=indices)
        inner = tuple(found)
    else:
        features = trunk.forward_features(images)
    if model.steps == "features":
        pooled = features
    else:
        # Where the trunk's forward is more than these two steps, it runs whole: the embedding is what it gives.
        pooled = trunk.forward_head(features) if model.steps == "features, head" else trunk(images)
    return features, run_head(model.head, model._head_input, pooled), inner


def _wants_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


# --- how the trunk runs


def _steps_of(trunk: nn.Module) -> str:
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


def _can_checkpoint(trunk: nn.Module) -> bool:
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        trunk.set_grad_checkpointing(False)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True


# --- building as transformers builds


def _computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that are not in the state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}"] = buffer
    return found


def _put_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put buffers into the places of uninitialised ones, on the device of those."""
    moved: dict[int, torch.Tensor] = {}
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        device = owner._buffers[leaf].device  # type: ignore[union-attr]
        # One buffer that several modules hold stays one.
        owner._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device=device))


def _align(module: nn.Module) -> None:
    """Copy what begins at odd places in memory to places that are multiples of 64 bytes.

    Another model's checkpoint is mapped by transformers as it is; kernels may give other last bits for such tensors.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.detach().clone()


def _move_to_meta(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to("meta", dtype)`, except that tied parameters stay tied."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    twin = tensor.detach().to("meta", dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                setattr(part, name, moved[id(tensor)])


# --- what loading refuses or says


def _refuse_changed(stored: TimmTowerConfig, given: TimmTowerConfig, folder: Path) -> None:
    """Refuse a config that is not the folder's own; only what was frozen may be left out of it.

    Raises:
        ConfigError: names the fields.
    """
    opened = {"frozen"} if given.frozen is None else set()
    odd = [name for name in OUR_FIELDS if getattr(stored, name) != getattr(given, name) and name not in opened]
    if odd:
        changes = ", ".join(
            f"{name}={shown(getattr(given, name))} (stored {shown(getattr(stored, name))})" for name in odd[:4]
        )
        raise ConfigError(
            f"{folder}: a tower is loaded as it was saved; {changes} would make another one of the same weights. Load "
            "it without, change it (TimmModel.from_pretrained takes image_size=...), and save it."
        )


def _refuse_misfits(name: str, info: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse a model whose weights did not all come from the files, and the other way round.

    Raises:
        WeightsError: lists the keys.
    """
    misfits = {
        "missing": sorted(set(info["missing_keys"]) - set(allowed)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    lines = [f"{len(keys)} {what}: {', '.join(map(shown, keys[:5]))}" for what, keys in misfits.items() if keys]
    if lines:
        raise WeightsError(
            f"{name}: the weights do not fit, the model is not returned: {'; '.join(lines)}. Where that is wanted, "
            "pass ignore_mismatched_sizes=True"
        )


def _warn_of_changes(loading: TowerLoading, info: Mapping[str, Any]) -> None:
    """List fresh weights, and those in the files that the model leaves out."""
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    left_out = sorted({*loading.left_out, *info["unexpected_keys"]})
    for keys, what in ((fresh, "fresh random weights, to be trained"), (left_out, "weights that this model leaves out")):
        if keys:
            warnings.warn(f"{loading.place}: {what}: {', '.join(shown(key)[1:-1] for key in keys)}", stacklevel=4)


def _loading_report(missing_keys: set[str]) -> LoadStateDictInfo:
    """transformers' record of a loading without other events; its fields differ between versions."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = LoadStateDictInfo(**{each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)})
    info.missing_keys = missing_keys
    return info

# --- dual_encoder.py

"""A tower and a text model as one, where hf_timm_tower is not installed.

transformers finds the code of a model by `auto_map` at the top of a config and never in the config of a part: these two
classes are what `auto_map` of such a pair names (see `hf_timm_tower.make_self_contained`).
"""


@strict
class TowerTextConfig(VisionTextDualEncoderConfig):  # type: ignore[no-untyped-call]
    """transformers' config of two models; reading one makes towers known to transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:
            AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig)
            AutoModel.register(TimmTowerConfig, TimmTowerModel)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class TowerTextModel(VisionTextDualEncoderModel):  # type: ignore[no-untyped-call]
    """transformers' model of a vision and a text model, with a tower for the former."""

    config_class = TowerTextConfig

"""Towers of hf_timm_tower in transformers, where that package is not installed.

This is the code that `trust_remote_code=True` runs, all of it: the modules of hf_timm_tower/reader, one after the other
in the order of their imports. It reads JSON and safetensors, builds a timm model and a head, and has no other business.
"""

from PIL import Image, ImageOps
import base64
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
import copy
from dataclasses import asdict, dataclass, field, fields, replace
import difflib
from functools import lru_cache, partial, wraps
import hashlib
from huggingface_hub import hf_hub_download
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj
import inspect
from io import BytesIO
from itertools import accumulate, groupby, repeat
import json
import math
import numpy as np
from operator import attrgetter
import os
from pathlib import Path
import re
import reprlib
from safetensors import SafetensorError
from safetensors.torch import load_file
from threading import get_ident
import timm
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio
from timm.data.transforms_factory import create_transform
import timm.layers
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp
from timm.layers.norm_act import BatchNormAct2d
from timm.utils.attention_extract import AttentionExtract
import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional as tv_functional
from transformers import AutoConfig, CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo
from typing import Any, ClassVar, Literal, TypedDict
from typing_extensions import Self
from urllib.request import Request, urlopen
import warnings
import weakref

# --- errors.py

"""Every error this package raises on purpose.

Each also inherits the builtin that fits, so that callers who catch `ValueError` or `OSError` need not know us.
Messages say what was found, what was expected, where, and what to do. Text from a file or a repository goes into them
through `shown` alone.
"""

_SHORT = reprlib.Repr()
_MOST_LETTERS = 8000  # of an error; that of a head which cannot be stored gives a reason against every form
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxlevel = 4

class TowerError(Exception):
    """Base of all errors of hf_timm_tower.

    Its text has nothing that a terminal acts on and is no book, wherever a part of it came from.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _MOST_LETTERS else f"{text[:-1000][: _MOST_LETTERS - 1000]} ... {text[-1000:]}"
        return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)

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

@contextmanager
def file_errors() -> Iterator[None]:
    """Turn what transformers raises where a file of JSON is missing or holds no object into errors of ours."""
    try:
        yield
    except OSError as error:
        raise FolderError(one_line(error, 600)) from error
    except (AttributeError, KeyError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise FormatError(f"not a file of JSON that holds an object: {one_line(error)}") from error

def shown(thing: object, limit: int = 80) -> str:
    """Something foreign (a key, a name, a value of a file) for a message: quoted, printable, on one line, short.

    What a terminal or Markdown would act on (escape sequences, line feeds, text direction marks) is escaped, as `repr`
    does it; the cost does not grow with what is shown.
    """
    if isinstance(thing, int) and thing.bit_length() > 4 * limit:
        return f"a number of {thing.bit_length()} bits"
    _SHORT.maxstring = _SHORT.maxother = limit
    text = repr(thing[: limit + 1]) if isinstance(thing, str) else _SHORT.repr(thing)
    return text if len(text) <= limit else text[: limit - 3] + "..."

def one_line(text: object, limit: int = 300) -> str:
    """What a library said, which may quote something foreign, for a message: on one line, short."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."

def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """` (did you mean ...?)`, or nothing where no known name is like this one."""
    near = difflib.get_close_matches(name[:64], known, n=2, cutoff=cutoff)
    return f" (did you mean {' or '.join(near)}?)" if near else ""

# --- model_args.py

"""Arguments of `timm.create_model` as JSON, and back.

A class value (`act_layer=nn.SiLU`, `mlp_layer=timm.layers.SwiGLUPacked`) is stored by name and looked up in an
allow-list, the public classes of `torch.nn` and `timm.layers`; nothing is ever imported by name. A
`functools.partial` over such a class keeps its keyword arguments. A tower is always built from the decoded form,
so that what was built first is what is rebuilt later.
"""

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

# --- freezing.py

"""What of a stored tower is frozen: applied to a tower that was just built.

A parameter is frozen by `requires_grad`. Running statistics are frozen by a hook on the module that has them, which
puts it into eval mode before every forward: so they stay after `.train()` on any part, in copies and pickles and in
anybody's training loop, and neither the module tree nor the state dict changes.
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

def eval_before_forward(module: nn.Module, inputs: Any) -> None:
    """The hook."""
    module.training = False

def has_frozen_statistics(module: nn.Module) -> bool:
    """Whether the module's statistics are frozen."""
    return any(hook is eval_before_forward for hook in module._forward_pre_hooks.values())

def freeze_statistics(module: nn.Module) -> None:
    """Freeze the module's statistics."""
    if not has_frozen_statistics(module):
        # before other hooks: that of the old spectral norm looks at the mode too
        module.register_forward_pre_hook(eval_before_forward, prepend=True)
    module.training = False

def keep_statistics(tower: nn.Module) -> None:
    """Put modules with frozen statistics into eval mode now; to be called at the end of a tower's `train`.

    They go there by themselves before each forward. But a module that took the place of another since (`SyncBatchNorm`
    for `BatchNorm`) has no hook yet; it gets one here.
    """
    names: tuple[str, ...] = getattr(tower, "_frozen_statistics", ())
    if not names:
        return
    modules = dict(tower.named_modules())
    for name in names:
        if name in modules and keeps_statistics(modules[name]):
            freeze_statistics(modules[name])

def check_frozen(frozen: dict[str, Any] | None) -> None:
    """Refuse, by `ConfigError`, what is not a frozen state: `parameters` and `statistics`, each a list of names."""
    for key, names in (frozen or {}).items():
        if key not in _FROZEN_KEYS:
            raise ConfigError(f"frozen: unknown key {shown(key)}; expected {' and '.join(_FROZEN_KEYS)}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"frozen[{key!r}]: expected a list of names, found {shown(names)}")
        if len(names) > _MOST_FROZEN:
            raise ConfigError(f"frozen[{key!r}]: {len(names)} names, expected at most {_MOST_FROZEN}")

def frozen_names(tower: nn.Module, frozen: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The parameters, and modules with statistics, that a frozen state names, each by itself or by a module above.

    `ConfigError` where it is none, or names what the tower does not have.
    """
    check_frozen(frozen)
    first_names = {id(parameter): name for name, parameter in tower.named_parameters()}
    every_name = dict(tower.named_parameters(remove_duplicate=False))
    # DETR has norms whose weight and bias are buffers in the place of BatchNorm: what was frozen there still is.
    fixed = [name for name, _ in tower.named_buffers() if name.endswith((".weight", ".bias"))]
    parameters = _names_under(frozen.get("parameters", []), [*every_name, *fixed], "parameters") - set(fixed)
    with_statistics = [name for name, module in tower.named_modules() if keeps_statistics(module)]
    statistics = _names_under(frozen.get("statistics", []), with_statistics, "statistics")
    return {first_names[id(every_name[name])] for name in parameters}, statistics

def apply_frozen(tower: nn.Module, frozen: dict[str, Any] | None) -> None:
    """Freeze what a config says was frozen, in a tower that was just built from it; `ConfigError` as `frozen_names`."""
    if frozen is None:
        return
    parameters, statistics = frozen_names(tower, frozen)
    for name, parameter in tower.named_parameters():
        if name in parameters:
            parameter.requires_grad_(False)
    freeze_statistics_of(tower, statistics)

def freeze_statistics_of(tower: nn.Module, names: Collection[str]) -> None:
    """Freeze the statistics of the modules of these names in the tower."""
    for name, module in tower.named_modules():
        if name in names:
            freeze_statistics(module)
    tower._frozen_statistics = tuple(sorted(names))  # type: ignore[assignment]

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
            f"frozen[{key!r}]: the tower has no {shown(missing[0])[1:-1]}{hint}; the config is of another tower"
        )
    return {name for entry in entries for name in under[entry]}

# --- config.py

"""`TimmTowerConfig`: everything that rebuilds a tower with no network.

The config is validated once, when it is made: types by huggingface_hub's `@strict` (as transformers' own configs),
meaning by the checks below. `build.resolve_config` fills in what only the trunk can tell (its width, its layout, its
own pool), after which the config is a full description.
"""

FORMAT_VERSION = 1

MAX_EMBED_DIM = 2**20
MAX_IMAGE_SIZE = 2**14
MAX_IN_CHANS = 2**12
MAX_LABELS = 2**20

# The first key of a config.json: timm.create_model names the first one that it does not know, and stops there.
FOR_TIMM = "_not a timm checkpoint, load it with hf_timm_tower.TimmModel.from_pretrained"

_LABELS = ("num_labels", "id2label", "label2id")
_OUTPUTS = ("out_indices", "out_features")

ATTENTION_POOLS = ("abs_attn", "rot_attn")
OUR_POOLS = ("token_avg", "default", "none")
PROJECTIONS = ("linear", "mlp", "none")

# Keys that transformers itself writes into or expects of any config; everything else that is not a field is refused
# when a config is read, and dropped with a warning when a tower is saved. `custom_pipelines` names code: never written;
# `use_cache` is set by Trainer where gradients are checkpointed.
_TRANSFORMERS_KEYS = frozenset(
    """
    model_type transformers_version architectures auto_map custom_pipelines dtype torch_dtype quantization_config
    name_or_path _name_or_path _commit_hash num_labels id2label label2id problem_type output_hidden_states
    output_attentions return_dict use_return_dict attn_implementation _attn_implementation experts_implementation
    _experts_implementation chunk_size_feed_forward is_encoder_decoder per_layer_config tie_last_hidden_states
    use_cache hidden_size out_indices out_features
    """.split()
)

# Chosen by whoever loads a model. In a tower's file the classes of transformers alone would obey it.
_NOT_STORED = {"attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"}

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

def _is_whole(value: Any, most: int, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

def _are_labels(value: Any) -> bool:
    pairs = value.items() if isinstance(value, dict) and len(value) <= MAX_LABELS else [(None, None)]
    return all(isinstance(each, (str, int)) for pair in pairs for each in pair)

_WIDTH = (f"a whole number from 1 to {MAX_EMBED_DIM}", lambda value: _is_whole(value, MAX_EMBED_DIM))
_TABLE = (f"an object of at most {MAX_LABELS} labels", _are_labels)
_DTYPE = (f"one of {', '.join(FLOAT_DTYPES)}", lambda value: isinstance(value, torch.dtype) or value in FLOAT_DTYPES)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "embed_dim": _WIDTH,
    "num_features": _WIDTH,
    "in_chans": (f"a whole number from 1 to {MAX_IN_CHANS}", lambda value: _is_whole(value, MAX_IN_CHANS)),
    "drop": ("a probability, 0 <= drop < 1", lambda value: not isinstance(value, bool) and 0 <= value < 1),
    "pool": ("the name of a pool", lambda value: len(value) <= 64 and value.isprintable()),
    "proj": (f"one of {', '.join(PROJECTIONS)}, or None for the trunk's own classifier", PROJECTIONS.__contains__),
    "num_labels": (f"a whole number from 0 to {MAX_LABELS}", lambda value: _is_whole(value, MAX_LABELS, 0)),
    # Before transformers writes a name for each label, and looks up a dtype in torch by its name.
    "id2label": _TABLE,
    "label2id": _TABLE,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "problem_type": (f"one of {', '.join(_PROBLEMS)}", _PROBLEMS.__contains__),
    "architectures": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
    "output_hidden_states": (
        "true or false, or numbers of layers",
        lambda value: all(isinstance(each, int) for each in (value if isinstance(value, (list, tuple)) else [value])),
    ),
}
"""What a value must be where it is not None: in words, and its test."""

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
        trunk_source: Where the trunk's weights are stored, if not beside the head: repository, commit and digests.
        timm_version: The timm that the tower was built with.
        format_version: Version of this format.
        out_indices: Of a backbone: which of timm's feature maps it gives (`reader/backbone.py`).
        out_features: The same by timm's names. Whichever is set last holds.

    Raises:
        ConfigError: with the field's name and value.
        FormatError: the config was written by a newer format version.
    """

    model_type = "timm_tower"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "embed_dim", "num_channels": "in_chans"}

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
    out_indices: list[int] | tuple[int, ...] | None = None
    out_features: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop(FOR_TIMM, None)
        kind = kwargs.pop("model_type", self.model_type)
        if kind != self.model_type:
            hint = ": load it with TimmModel.from_timm, or from_timm of this class" if kind == "timm_wrapper" else ""
            raise ConfigError(f"model_type is {shown(kind)}, not {self.model_type!r}{hint}")
        if unknown := sorted(kwargs.keys() - _TRANSFORMERS_KEYS):
            lines = [f"{shown(key)[1:-1]}={shown(kwargs[key])}{did_you_mean(key, OUR_FIELDS)}" for key in unknown[:5]]
            raise ConfigError(f"TimmTowerConfig: {len(unknown)} unknown keys: {', '.join(lines)}")
        width = kwargs.pop("hidden_size", self.embed_dim)
        if self.embed_dim not in (None, width):
            raise ConfigError(f"hidden_size={shown(width)} is another name of embed_dim={self.embed_dim}")
        self.embed_dim = width
        self.proj = self.proj or None
        values = {**kwargs, **vars(self)}
        for name in _misfits_of(values):
            raise ConfigError(f"{name}={shown(values[name])}: expected {_RULES[name][0]}")
        _check(self)
        self.timm_version = self.timm_version or timm.__version__
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        # transformers gives every config two labels; whether somebody gave these is not seen afterwards
        self.__dict__["_labels_given"] = any(kwargs.get(name) is not None for name in _LABELS)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `FolderError`, `FormatError` where the file is missing or damaged."""
        with file_errors():
            found, rest = super().get_config_dict(*args, **kwargs)
            return dict(**found), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own; `ConfigError` also where the file holds what only its reader may choose."""
        if chosen := sorted(_NOT_STORED & config_dict.keys()):
            raise ConfigError(
                f"config.json: {chosen[0]}={shown(config_dict[chosen[0]])} is for whoever loads the tower to choose, "
                "and would make two models of one file. Remove it there, and pass it to AutoModel.from_pretrained"
            )
        if not kwargs:  # transformers' words every config for its log, whether somebody reads that or not
            return cls(**config_dict)
        found = super().from_dict(config_dict, **kwargs)
        # AutoModel asks for a dtype here, and before transformers 5.12 here alone.
        asked = kwargs.get("dtype") or kwargs.get("torch_dtype")
        (found[0] if isinstance(found, tuple) else found).__dict__["_dtype_asked"] = asked
        return found

    @property
    def is_classifier(self) -> bool:
        """Whether the embedding is the scores of the trunk's own classifier, and the labels (if any) are theirs."""
        own = self.proj is None and self.head is None and self.pool not in ATTENTION_POOLS
        return own and (not self.__dict__["_labels_given"] or self.num_labels == self.embed_dim)

    def dict_dtype_to_str(self, d: dict[str, Any]) -> None:
        """As transformers', of the config's own dtype alone: what is deeper is JSON already, and anybody's."""
        if isinstance(d.get("dtype"), torch.dtype):
            d["dtype"] = str(d["dtype"]).removeprefix("torch.")

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without what only this object knows, or this machine, or a backbone alone has."""
        # `_name_or_path` says where it was loaded from: a folder of somebody's
        left_out = {"_labels_given", "_dtype_asked", "_name_or_path", "attribute_map", "hidden_size"}
        left_out |= {name for name in _OUTPUTS if getattr(self, name) is None}
        return {name: value for name, value in super().to_dict().items() if name not in left_out}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: every field of ours, and of transformers' fields those that were set.

        Attributes that somebody put onto the config are no part of a tower: they are dropped with a warning.
        """
        written: dict[str, Any] = super().to_diff_dict()
        everything = self.to_dict()
        for name in OUR_FIELDS:
            written[name] = everything[name]
        for name in ("custom_pipelines", *_NOT_STORED):
            written.pop(name, None)
        dropped = sorted(set(written) - set(OUR_FIELDS) - _TRANSFORMERS_KEYS)
        dropped += _misfits_of({name: value for name, value in written.items() if name not in OUR_FIELDS})
        if dropped:
            warnings.warn(f"not stored: a tower has no such fields: {', '.join(map(shown, dropped))}", stacklevel=2)
        return {name: value for name, value in written.items() if name not in dropped}

OUR_FIELDS = tuple(name for name in TimmTowerConfig.__annotations__ if name not in ("attribute_map", *_OUTPUTS))

@wraps(TimmTowerConfig.__init__)  # keeps inspect.signature as it was
def _checked_init(self: TimmTowerConfig, /, **kwargs: Any) -> None:
    """The constructor: `ConfigError` where `@strict`, or transformers on its own keys, would raise another."""
    version = kwargs.get("format_version", FORMAT_VERSION)
    if not _is_whole(version, FORMAT_VERSION):
        raise FormatError(
            f"format_version={shown(version)}: expected a whole number from 1 to {FORMAT_VERSION}; a later version "
            "needs a newer hf_timm_tower. Upgrade it: pip install -U hf_timm_tower"
        )
    try:
        _checked_init.__wrapped__(self, **kwargs)
    except TowerError:
        raise
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"TimmTowerConfig: {one_line(error.__cause__ or error)}") from error

TimmTowerConfig.__init__ = _checked_init  # type: ignore[method-assign, assignment]

@wraps(TimmTowerConfig.__setattr__)
def _checked_setattr(self: TimmTowerConfig, name: str, value: Any) -> None:
    """As `AutoModel.from_pretrained(..., name=value)` sets it: `ConfigError` where `@strict` would raise another."""
    if name == "image_size" and value is not None:
        value = check_size(name, value)
    try:
        _checked_setattr.__wrapped__(self, name, value)
    except StrictDataclassError as error:
        raise ConfigError(f"TimmTowerConfig: {one_line(error.__cause__ or error)}") from error
    # A tower's own fields are looked at together, where it is built.
    if value is not None and name not in OUR_FIELDS and name in _RULES and not _RULES[name][1](value):
        raise ConfigError(f"{name}={shown(value)}: expected {_RULES[name][0]}")
    if name in _LABELS:
        self.__dict__["_labels_given"] = True
    if name in _OUTPUTS and value is not None:
        self.__dict__[_OUTPUTS[name == "out_indices"]] = None

TimmTowerConfig.__setattr__ = _checked_setattr  # type: ignore[method-assign, assignment]

def _misfits_of(values: dict[str, Any]) -> list[str]:
    """Names of values that do not keep their rule."""
    return [name for name, (_, fits) in _RULES.items() if values.get(name) is not None and not fits(values[name])]

def _check(config: TimmTowerConfig) -> None:
    check_architecture(config.architecture, config.timm_version)
    for name in ("image_size", "feat_size"):
        if getattr(config, name) is not None:
            setattr(config, name, check_size(name, getattr(config, name)))
    if config.classifier is None:
        attention = config.pool in ATTENTION_POOLS
        by_trunk = config.proj in (None, "none") and config.head is None and not attention
        own_classifier = config.proj is None and config.pool == "default"
        config.classifier = "construct" if by_trunk and (own_classifier or config.pool not in OUR_POOLS) else "reset"
    model_args = dict(config.model_args or {})
    check_names(model_args, recorded=(*RECORDED, *(FROM_TRUNK if config.classifier == "reset" else ())))
    config.model_args = {key: encode(value, inner("model_args", key)) for key, value in sorted(model_args.items())}
    config.drop = float(config.drop)
    check_frozen(config.frozen)
    if config.tower_kwargs and config.tower_class is None:
        raise ConfigError(f"tower_kwargs={shown(config.tower_kwargs)}: only a subclass (tower_class) has any")

def check_size(name: str, value: Any) -> list[int]:
    """An image size as `[height, width]` in pixels; `ConfigError` unless it is one or two whole numbers to 16384."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_whole(s, MAX_IMAGE_SIZE) for s in pair):
        raise ConfigError(
            f"{name}={shown(value)}: expected an int or (height, width), each from 1 to {MAX_IMAGE_SIZE} pixels"
        )
    return list(pair)

def check_architecture(name: str, saved_with: str | None = None) -> None:
    """Refuse `arch` or `arch.tag` that this timm's registry does not have, by a `ConfigError` with near names.

    It names the timm version that a config was saved with, which has the architecture.
    """
    if ":" in name or "/" in name or len(name) > 200 or not name.isprintable():
        raise ConfigError(
            f"architecture={shown(name)}: expected a name of timm's registry (timm.list_models()), without a scheme "
            "or a path; weights of a repository or a folder are loaded with from_pretrained."
        )
    arch = name.split(".", 1)[0]
    if timm.is_model(arch):
        return
    near = difflib.get_close_matches(arch[:80], timm.list_models(), n=4, cutoff=0.5)
    hint = f" Near names: {', '.join(near)}." if near else ""
    if saved_with and saved_with != timm.__version__:
        hint += f" The config was saved with timm {shown(saved_with)[1:-1]}, which has it: install that version"
    raise ConfigError(f"architecture={shown(name)} is unknown to timm {timm.__version__}.{hint}")

# --- skip_init.py

"""Construct a module without initialising its parameters, and within bounds.

timm's constructors spend most of their time in random initialisation that a checkpoint overwrites at once. Inside
`skip_init()` every in-place write into an `nn.Parameter`, a view of one or its `.data` is left out, and nothing else:
buffers and tensors computed in the constructor are real, which the meta device cannot offer (relative position indices,
rotary tables, attention biases). Memory of the parameters is reserved, not touched. Whatever is drawn inside comes from
a generator of its own, so that torch's global one is neither read nor set back.

A config may come from anybody, so what it costs to build is counted while it is built: a `Budget`.
"""

class Budget:
    """What building a model may cost, and what it cost so far. Time is bounded by these counts, not by a clock.

    The limits, and the most that one of timm 1.0.31's largest architectures needs:

    - `reserved`, 64 GiB: bytes of `torch.empty` and `torch.zeros`, which take no memory until they are written
      (vit_7b_patch16_dinov3, 25 GiB in float32).
    - `computed`, 8 GiB: bytes that are computed, copied or written for real, also those that are gone again
      (beit_large_patch16_512, 1.7 GiB).
    - `kept`, 512 MiB: those of them that are still there (swinv2_cr_giant_384, 70 MiB).
    - `tensors`, 100,000: calls of torch, a copy counted ten times for the module around it (maxvit_xlarge_tf_512,
      30,073).
    - `modules`, 10,000: modules put into another one (efficientnet_l2, 1,760).

    Where the size of the weight files is known, what is reserved and kept together is at most four times as much and
    1 GiB: there are buffers, tables and files in half precision, but not another order of size.

    Args:
        total: Most bytes reserved and kept together, None where only the limits above hold.
    """

    def __init__(self, total: int | None = None) -> None:
        self.limits = {"reserved": 2**36, "computed": 2**33, "kept": 2**29, "tensors": 100_000, "modules": 10_000}
        if total is not None:
            self.limits["bytes"] = total
        self.spent = dict.fromkeys((*self.limits, "bytes"), 0)

    @classmethod
    def default(cls) -> "Budget":
        """The absolute limits alone, for a config whose weight files nobody has seen."""
        return cls()

    @classmethod
    def for_weights(cls, nbytes: int) -> "Budget":
        """For a config whose weight files hold so many bytes."""
        budget = cls(4 * nbytes + 2**30)
        budget.limits["kept"] += nbytes  # layers that torch makes by copying one
        return budget

    def charge(self, kind: str, amount: int) -> None:
        """Count `amount` of one of `limits`, bytes together too; `ConfigError` where a limit is exceeded."""
        spent, limits = self.spent, self.limits
        spent[kind] += amount
        if spent[kind] > limits[kind]:
            raise _too_large(kind, limits[kind])
        if kind in ("reserved", "kept"):
            spent["bytes"] += amount
            if spent["bytes"] > limits.get("bytes", spent["bytes"]):
                raise _too_large("bytes", limits["bytes"])

    def charge_made(self, nbytes: int) -> None:
        """Count bytes that are computed and, for the moment, kept."""
        self.charge("computed", nbytes)
        self.charge("kept", nbytes)

    def release(self, nbytes: int) -> None:
        """Count bytes as no longer kept."""
        self.spent["kept"] -= nbytes
        self.spent["bytes"] -= nbytes

def _too_large(kind: str, limit: int) -> ConfigError:
    what = f"{limit} {kind}" if kind in ("tensors", "modules") else f"{limit / 2**30:.2f} GiB"
    return ConfigError(
        f"the config asks for a model of more than {what}"
        + (", which its weight files do not hold" if kind == "bytes" else "")
        + ": refused before it is built. The config does not belong to these weights, or is not one of timm"
    )

_ACTIVE: ContextVar[Budget | None] = ContextVar("budget", default=None)
_SIZED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_LAZY = frozenset({torch.empty, torch.zeros})
# Most of the calls that a constructor makes; the first one is `torch.no_grad`.
_MAKE_NOTHING = frozenset("_set_grad_enabled dim size numel is_floating_point".split())
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36
# Results of fewer elements than this are measured after they were made, larger ones on the meta device before.
_SMALL = 2**22
_DRAWS = frozenset(
    """
    rand randn randint randperm normal bernoulli poisson multinomial normal_ uniform_ random_ exponential_ geometric_
    cauchy_ log_normal_ bernoulli_
    """.split()
)

class _Construction(TorchFunctionMode):
    def __init__(self, budget: Budget | None, *, skip: bool) -> None:
        super().__init__()
        self.budget = budget
        self.skip = skip
        self.generators: dict[str, torch.Generator] = {}
        self.parameter_data: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAZY and "out" not in kwargs:  # what parameters are made of, most of the work of this mode
            if self.budget is not None:
                self.budget.charge("tensors", 1)
                self.budget.charge("reserved", _size_of(func, args, kwargs))
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # functions of torch.nn.init pass their target by keyword when they come through here
        target = args[0] if args else kwargs.get("tensor")
        if name in ("__get__", "__set__"):
            found = func(*args, **kwargs)
            if isinstance(found, torch.Tensor) and isinstance(target, torch.Tensor) and self._is_parameter(target):
                self.parameter_data[id(found)] = found  # kept, so that the id stays its own
            return found
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place and self.skip and isinstance(target, torch.Tensor) and self._is_parameter(target):
            return target
        draws = name in _DRAWS or name.endswith("_like") or getattr(func, "__module__", "") == "torch.nn.init"
        if draws and self.skip:  # where weights are initialised, the seed is the user's
            func, args, kwargs = self._with_generator(func, name, target, args, kwargs)
        if self.budget is None or name in _MAKE_NOTHING:
            return func(*args, **kwargs)
        self.budget.charge("tensors", 10 if name == "clone" else 1)
        return self._charged(self.budget, func, name, target if in_place else None, args, kwargs)

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        return (
            isinstance(tensor, nn.Parameter)
            or isinstance(tensor._base, nn.Parameter)
            or (id(tensor if tensor._base is None else tensor._base) in self.parameter_data)
        )

    def _charged(
        self, budget: Budget, func: Any, name: str, written: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function; what it makes is charged before it takes memory."""
        if written is not None:
            if self.skip:
                budget.charge("computed", written.nbytes)
            return func(*args, **kwargs)
        if func in _SIZED and "out" not in kwargs:
            made = _size_of(func, args, kwargs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        leaves = _leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not inputs and ("device" in kwargs or name in _FACTORIES):
            made = _size_of(func, args, kwargs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        numbers = [max(abs(leaf), 1) for leaf in leaves if type(leaf) is int]
        most = math.prod(max(tensor.numel(), 1) for tensor in inputs) * math.prod(numbers)
        if most * max(len(inputs), 1) > _SMALL:
            try:
                made = _bytes_on_meta(func, args, kwargs)
            except NotImplementedError:  # decided by values: at most as large as what it is made of, times its rank
                made = 8 * sum(tensor.nbytes for tensor in inputs)
            budget.charge_made(made)
            return _released(budget, func(*args, **kwargs), made)
        result = func(*args, **kwargs)
        made = _fresh(result, {tensor.untyped_storage()._cdata for tensor in inputs})
        budget.charge_made(made)
        return _released(budget, result, made)

    def _with_generator(
        self, func: Any, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The same call, drawing from a generator of this block."""
        place = target.device if isinstance(target, torch.Tensor) else kwargs.get("device")
        kind = torch.device(place or torch.get_default_device()).type
        if kind == "meta" or kwargs.get("generator") is not None:
            return func, args, kwargs
        if kind not in self.generators:
            self.generators[kind] = torch.Generator(kind).manual_seed(0)
        if name in ("rand_like", "randn_like"):
            draw = torch.Tensor.uniform_ if name == "rand_like" else torch.Tensor.normal_
            generator = self.generators[kind]
            return lambda *a, **k: draw(torch.empty_like(*a, **k), generator=generator), args, kwargs
        if name not in _DRAWS and not _takes_generator(func):
            return func, args, kwargs
        return func, args, {**kwargs, "generator": self.generators[kind]}

def _released(budget: Budget, result: Any, nbytes: int) -> Any:
    """A result whose bytes are taken off what is kept as soon as it is gone; not worth it for small ones."""
    if isinstance(result, torch.Tensor) and nbytes >= _SMALL // 4:
        weakref.finalize(result, budget.release, nbytes)
    return result

_FACTORIES = frozenset("arange linspace logspace eye randint randperm tensor tril_indices triu_indices".split())

_PLAIN = frozenset({int, float, bool, str, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device})

@lru_cache(maxsize=256)
def _takes_generator(func: Any) -> bool:
    try:
        return "generator" in inspect.signature(func).parameters
    except (ValueError, TypeError):  # of a function in C
        return False

def _leaves(value: Any) -> list[Any]:
    """What is in tuples, lists and dicts, however deep, in order."""
    # At the first sight of a type `isinstance(..., Mapping)` takes milliseconds.
    if type(value) in _PLAIN or not hasattr(value, "__iter__") or not isinstance(value, (tuple, list, Mapping)):
        return [value]
    found: list[Any] = []
    for item in value.values() if isinstance(value, Mapping) else value:
        found += [item] if type(item) in _PLAIN else _leaves(item)
    return found

def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in arguments or a result: one, or tuples, lists and dicts of them, however deep."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]

def _size_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that a factory function is asked for, found without making them."""
    if func not in _SIZED:
        if getattr(func, "__name__", "") == "tensor":
            return 0  # as large as the Python values that are there already
        made = func(*args, **{**kwargs, "device": "meta", **({"generator": None} if "generator" in kwargs else {})})
        return int(made.nbytes) if isinstance(made, torch.Tensor) else 0  # `.to(...)` parses its arguments by a call
    size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return math.prod(int(each) for each in size) * int(dtype.itemsize)

def _bytes_on_meta(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that a call would make, found without making them."""
    move = MetaTwins()
    args, kwargs = move(tuple(args)), {key: move(value) for key, value in kwargs.items() if key != "device"}
    with torch.device("meta"):
        made = func(*args, **kwargs)
    return _fresh(made, {twin.untyped_storage()._cdata for twin in move.memo.values()})

class MetaTwins:
    """Values as they are, but for tensors and modules, which become twins without memory; one twin for one tensor."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.memo:
                # with the strides of an expanded tensor, so that copying it counts
                twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                self.memo[id(value)] = twin
            return self.memo[id(value)]
        if isinstance(value, nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                twin = tensor.detach().to("meta")
                self.memo[id(tensor)] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
            return copy.deepcopy(value, self.memo)
        if isinstance(value, torch.device):
            return torch.device("meta")
        if isinstance(value, (tuple, list)):
            return type(value)(*map(self, value)) if hasattr(value, "_fields") else type(value)(map(self, value))
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return None if isinstance(value, torch.Generator) else value

def _fresh(made: Any, known: set[int]) -> int:
    """Bytes of the tensors of a result that are not on the memory of an argument."""
    return sum(tensor.nbytes for tensor in tensors_in(made) if tensor.untyped_storage()._cdata not in known)

_COUNTS_MODULES = [False]

def _count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
    budget = _ACTIVE.get()
    if budget is not None:
        budget.charge("modules", 1)

@contextmanager
def _construction(budget: Budget | None, *, skip: bool) -> Iterator[None]:
    if budget is not None and not _COUNTS_MODULES[0]:
        # Once for the process and never taken away: other threads walk torch's table of these hooks.
        _COUNTS_MODULES[0] = True
        register_module_module_registration_hook(_count_module)
    token = _ACTIVE.set(budget if budget is not None else _ACTIVE.get())
    try:
        with _Construction(budget, skip=skip):
            yield
    finally:
        _ACTIVE.reset(token)

@contextmanager
def skip_init(budget: Budget | None = None) -> Iterator[None]:
    """Leave out every in-place write into a parameter; `ConfigError` where more is built than a budget allows."""
    with _construction(budget, skip=True):
        yield

@contextmanager
def within_budget(budget: Budget) -> Iterator[None]:
    """Initialise as usual, but count, as in `skip_init`; nothing where one around it counts already."""
    if _ACTIVE.get() is not None:
        yield
        return
    if not torch.empty(0).is_meta:  # what is initialised takes memory
        budget.limits["reserved"] = min(budget.limits["reserved"], _MEMORY)
    with _construction(budget, skip=False):
        yield

# --- trunk.py

"""Config -> timm trunk: the model that a completed config describes, without its classifier."""

# What timm's constructors raise for arguments they cannot use.
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError,
                RuntimeError, TypeError, ValueError)  # fmt: skip

class UnsupportedPool(ConfigError):
    """The trunk does not have this pool, or not with this projection."""

    def __init__(self, config: TimmTowerConfig, reason: str) -> None:
        super().__init__(
            f"pool={config.pool!r} with proj={config.proj!r} is not supported by {config.architecture}: "
            f"{reason.rstrip('.')}."
        )

def split_tag(architecture: str) -> tuple[str, str]:
    """`arch.tag` -> (arch, tag); the tag is empty where there is none."""
    arch, _, tag = architecture.partition(".")
    return arch, tag

def native_cfg(architecture: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of `arch` or `arch.tag`, or its defaults; `ConfigError` for a tag it does not know."""
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

def native_size(config: TimmTowerConfig) -> list[int]:
    """The config's image size, or the architecture's own: `[height, width]` in pixels."""
    told = config.image_size if config.image_size is not None else (config.model_args or {}).get("img_size")
    if told is not None:
        return check_size("image_size", told)
    return list(native_cfg(config.architecture)["input_size"][1:])

def create_trunk(config: TimmTowerConfig, *, pretrained: bool = False, initialise: bool = True) -> nn.Module:
    """The trunk that a config describes, in train mode, its classifier removed (or made the projection, `proj=None`).

    Args:
        config: A fresh config (`preprocess` is None: `architecture` may name a pretrained tag), or a completed one.
        pretrained: Fetch timm's weights for the architecture.
        initialise: False leaves all parameters as uninitialised memory, to be assigned.

    Raises:
        ConfigError, ArgumentError: timm cannot build it; says which argument.
    """
    arch, tag = split_tag(config.architecture)
    name = config.architecture
    kwargs = {key: decode(value, f"model_args.{key}") for key, value in (config.model_args or {}).items()}
    cfg = native_cfg(arch if config.preprocess is not None else config.architecture)
    if config.preprocess is not None:
        # Rebuilding: everything is in the config, so that the tag need not be known to this timm.
        name = arch
        kwargs["pretrained_cfg_overlay"] = _preprocess_overlay(config, tag)
    if config.in_chans != cfg["input_size"][0]:
        kwargs["in_chans"] = config.in_chans
    if "img_size" in kwargs:
        kwargs["img_size"] = tuple(check_size("model_args.img_size", kwargs["img_size"]))
    elif config.image_size is not None and has_fixed_size(cfg, kwargs):
        kwargs["img_size"] = tuple(config.image_size)  # type: ignore[arg-type]
    if config.classifier == "construct":
        kwargs["num_classes"] = config.embed_dim if config.proj is None and config.head is None else 0
        if config.pool != "default":
            kwargs["global_pool"] = trunk_pool(config.pool)
    try:
        if initialise:
            trunk = timm.create_model(name, pretrained=pretrained, **kwargs)
        else:
            with skip_init():
                trunk = timm.create_model(name, **kwargs)
    except BUILD_ERRORS as error:
        raise _build_error(config, kwargs, error) from error
    remove_classifier(trunk, config)
    return trunk

def has_fixed_size(cfg: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether timm itself, by its `pretrained_cfg` and these arguments, builds a trunk for one input size: the config's

    For any other trunk `img_size` is what `config.model_args` holds: nothing, or the size that timm was told.
    """
    return bool(
        cfg.get("fixed_input_size") and not kwargs.get("dynamic_img_size") and kwargs.get("strict_img_size", True)
    )

def _preprocess_overlay(config: TimmTowerConfig, tag: str) -> dict[str, Any]:
    preprocess = config.preprocess or {}
    overlay = {key: preprocess[key] for key in ("interpolation", "crop_pct", "crop_mode") if preprocess.get(key)}
    overlay.update({key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess.get(key)})
    if tag:
        overlay["tag"] = tag
    return overlay

def remove_classifier(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """Take the trunk's own classifier off and set its pool by timm's `reset_classifier`, or raise `ConfigError`."""
    if config.classifier == "construct":
        return
    pool = trunk_pool(config.pool)
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        # A trunk that came with its classifier keeps it as the projection; another pool would need another classifier.
        if pool is not None and pool != own_pool(trunk):
            raise UnsupportedPool(config, f"the classifier that is kept was made for pool {own_pool(trunk)!r}")
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
        raise UnsupportedPool(config, one_line(error)) from error

def _build_error(config: TimmTowerConfig, kwargs: dict[str, Any], error: BaseException) -> ConfigError | ArgumentError:
    text = one_line(str(error) or type(error).__name__)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        name = text.rsplit("'", 2)[-2]
        if name == "global_pool":
            return UnsupportedPool(config, text)
        if name in (config.model_args or {}) and name not in RECORDED:
            return ArgumentError(f"model_kwargs[{shown(name)}]: {config.architecture} does not take it ({text})")
    if kwargs.get("global_pool") and ("pool" in text.lower() or isinstance(error, AssertionError)):
        return UnsupportedPool(config, text)
    given = {key: value for key, value in kwargs.items() if key != "pretrained_cfg_overlay"}
    return ConfigError(f"timm cannot build {config.architecture} with {shown(given, 300)}: {text}")

def trunk_pool(pool: str | None) -> str | None:
    """The tower's pool -> what the trunk is asked for: None leaves its own, `""` is unpooled."""
    if pool in (*ATTENTION_POOLS, "token_avg", "none"):
        return ""
    return None if pool == "default" else pool

def own_pool(trunk: nn.Module) -> str | None:
    """Name of the pool that the trunk has now, `""` for none, None if it does not say.

    Read from the module that pools before the attribute of the model, which some models leave at its first value.
    """
    head = getattr(trunk, "head", None)
    for holder in (
        getattr(head, "global_pool", None),
        getattr(head, "pool_type", None),
        getattr(trunk, "global_pool", None),
    ):
        name = getattr(holder, "pool_type", holder)
        if isinstance(name, str):
            return name
    return None

def class_and_patch_tokens(trunk: nn.Module) -> int | None:
    """Number of prefix tokens of a trunk with a class token first, None where there is no class token."""
    prefix = getattr(trunk, "num_prefix_tokens", None)
    tokens = (getattr(trunk, "cls_token", None), getattr(getattr(trunk, "embeds", None), "cls_token", None))
    if not isinstance(prefix, int) or prefix < 1 or all(token is None for token in tokens):
        return None
    return prefix

def float_dtype(trunk: nn.Module) -> torch.dtype:
    """dtype of the images that the trunk takes: that of its first floating-point parameter."""
    return next((tensor.dtype for tensor in trunk.parameters() if tensor.is_floating_point()), torch.float32)

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

def buffers_as_timm(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the buffers that no file holds the dtype that `module.to(dtype)` gives them, once the weights are in.

    timm keeps some tables in float32 (RoPE frequencies and periods), by an `_apply` of their modules. So it is asked:
    these modules are cast by their own `_apply`, everything but such buffers left as it is.
    """
    cast: dict[int, torch.Tensor] = {}
    for part in every_module(module):
        if not part._non_persistent_buffers_set:
            continue
        computed = {id(part._buffers.get(name)) for name in part._non_persistent_buffers_set}
        if any(id(each) in computed and each.is_floating_point() for each in part.buffers(recurse=False)):
            part._apply(  # type: ignore[no-untyped-call]
                lambda tensor, computed=computed: (
                    # One buffer that several modules hold stays one.
                    cast.setdefault(id(tensor), tensor.to(dtype))
                    if id(tensor) in computed and tensor.is_floating_point()
                    else tensor
                ),
                recurse=False,
            )

def every_module(module: nn.Module) -> list[nn.Module]:
    """As `modules()`, whose generators take several times as long."""
    found, known = [module], {id(module)}
    for part in found:  # it grows
        for child in part._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found

# --- graph_ops.py

"""The tensor operations a stored head may use: one table from a name in the file to a function of ours.

The reader of a graph looks names up here and nowhere else, so what is not listed cannot be called. Left out on purpose
is everything that reads or writes files, touches raw storage or pointers, calls back into Python, changes what a tensor
is (``set_``, ``resize_``), or moves values into Python. `OPS` maps a name such as ``"torch.cat"``, ``"Tensor.view"``
or ``"F.linear"`` to the callable; a name that the installed torch lacks is absent from it. Memory is never left
uninitialised: ``torch.empty`` and its kin are recorded as zeros, which is one of the things they may give.
"""

# An allow-list of names, by the prefixes under which a file has them.
_OP_NAMES = {
    "Tensor": """
__add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __iand__ __idiv__ __ifloordiv__ __imod__ __imul__
__invert__ __ior__ __ipow__ __isub__ __itruediv__ __ixor__ __le__ __lt__ __matmul__ __mod__ __mul__ __ne__ __neg__
__or__ __pow__ __radd__ __rand__ __rdiv__ __reversed__ __rfloordiv__ __rmatmul__ __rmod__ __rmul__ __ror__ __rpow__
__rsub__ __rtruediv__ __rxor__ __setitem__ __sub__ __truediv__ __xor__ abs_ absolute_ acos_ acosh_ add_ addbmm_ addcdiv_
addcmul_ addmm_ addmv_ addr_ asin_ asinh_ atan2_ atan_ atanh_ baddbmm_ bernoulli_ bfloat16 bitwise_and_ bitwise_not_
bitwise_or_ bitwise_xor_ bool byte cauchy_ cdouble ceil_ cfloat char clamp_max_ clamp_min_ clip_ contiguous copy_
copysign_ cos_ cosh_ cumprod_ cumsum_ deg2rad_ digamma_ div_ divide_ double eq_ erf_ erfc_ erfinv_ exp2_ expand
expand_as expm1_ exponential_ fill_ fill_diagonal_ float floor_ floor_divide_ fmod_ frac_ ge_ geometric_ ger gt_ half
index_add_ index_copy_ index_fill_ index_put_ int le_ lerp_ lgamma_ log10_ log1p_ log2_ log_ log_normal_ logical_and_
logical_not_ logical_or_ logit_ long lt_ masked_fill_ masked_scatter_ mul_ multiply_ nan_to_num_ ne_ neg_ negative_
new_full new_ones new_tensor new_zeros normal_ pow_ random_ reciprocal_ remainder_ renorm_ repeat requires_grad_
reshape_as round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sgn_ short sign_ sin_ sinc_ sinh_ sqrt_ square_ squeeze_
sub_ subtract_ sum_to_size t_ tan_ to transpose_ tril_ triu_ true_divide_ trunc_ type type_as unfold uniform_ unique
unsqueeze_ view view_as xlogy_ zero_ cpu cuda
""",
    "torch Tensor": """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all amax amin aminmax angle any arccos
arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm
bernoulli bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
broadcast_to ceil cholesky_inverse chunk clamp clamp_ clamp_max clamp_min clip clone conj conj_physical copysign
corrcoef cos cosh count_nonzero cov cross cummax cummin cumprod cumsum deg2rad det detach detach_ diag diag_embed
diagflat diagonal diagonal_scatter diff digamma dist div divide dot dsplit eq erf erfc erfinv exp exp_ exp2 expm1 fix
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frexp gather ge greater greater_equal gt
hardshrink heaviside histc hsplit hypot i0 index_add index_copy index_fill index_put index_reduce index_select inner
inverse isclose isfinite isinf isnan isneginf isposinf isreal kron kthvalue ldexp le lerp less less_equal lgamma log
log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor
logit logsumexp lt masked_fill masked_scatter masked_select matmul matrix_exp matrix_power max maximum mean median min
minimum mm mode moveaxis movedim msort mul multinomial multiply mv mvlgamma nan_to_num nanmean nanmedian nanquantile
nansum narrow ne neg negative nextafter nonzero norm not_equal outer permute pinverse polygamma positive pow prelu prod
quantile rad2deg ravel reciprocal relu relu_ remainder renorm repeat_interleave reshape resolve_conj resolve_neg roll
rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter sgn sigmoid sigmoid_ sign signbit sin sinc
sinh slice_scatter slogdet softmax sort split split_with_sizes sqrt square squeeze std sub subtract sum svd swapaxes
swapdims t take take_along_dim tan tanh tanh_ tensor_split tile topk trace transpose tril triu true_divide trunc unbind
unflatten unique_consecutive unsqueeze var vdot vsplit where xlogy
""",
    "torch": """
adaptive_avg_pool1d adaptive_max_pool1d affine_grid_generator alpha_dropout atleast_1d atleast_2d atleast_3d avg_pool1d
batch_norm bilinear binary_cross_entropy_with_logits block_diag broadcast_tensors bucketize cartesian_prod cat cdist
celu celu_ chain_matmul channel_shuffle cholesky_solve column_stack combinations complex concat concatenate
constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss
cosine_similarity cumulative_trapezoid dropout dropout_ dstack einsum embedding embedding_bag feature_alpha_dropout
feature_dropout frobenius_norm full_like geqrf grid_sampler grid_sampler_2d group_norm gru gru_cell hinge_embedding_loss
hstack imag instance_norm isin kl_div layer_norm lstm lstm_cell margin_ranking_loss max_pool1d max_pool2d max_pool3d
meshgrid native_group_norm native_layer_norm norm_except_dim nuclear_norm ones_like orgqr ormqr pairwise_distance pdist
pixel_shuffle pixel_unshuffle poisson poisson_nll_loss polar rand_like randint_like randn_like real rms_norm rnn_relu
rnn_relu_cell rnn_tanh rnn_tanh_cell rrelu rsub searchsorted selu stack std_mean tensordot threshold trapezoid trapz
triplet_margin_loss var_mean view_as_complex view_as_real vstack zeros_like _weight_norm arange as_tensor asarray
bartlett_window blackman_window eye full hamming_window hann_window linspace logspace normal ones rand randint randn
randperm scalar_tensor tensor tril_indices triu_indices zeros _standard_gamma _sample_dirichlet binomial
""",
    "F": """
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
""",
    "linalg": """
cond cross det diagonal eigh eigvalsh householder_product inv lu_factor lstsq matmul matrix_rank matrix_exp
matrix_norm matrix_power multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals tensorinv tensorsolve
vander vecdot vector_norm cholesky
""",
    "special": """
digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 log1p log_softmax logit logsumexp multigammaln
ndtr ndtri psi round sinc softmax xlog1py xlogy
""",
    "fft": "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn fftshift ifftshift fftfreq rfftfreq",
}
TENSOR_PROPERTIES = ("T", "mT", "H", "mH", "real", "imag", "data")

def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, as momentum encoders write it; only with a tensor of the same shape, dtype and device."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        raise ValueError(f"data of shape {list(value.shape)} cannot replace that of a tensor {list(tensor.shape)}")
    tensor.data = value

def _draw_dirichlet(concentration: torch.Tensor) -> torch.Tensor:
    """What `torch.distributions.Dirichlet` and `Beta` draw with, gradient included."""
    return torch.distributions.dirichlet._Dirichlet.apply(concentration)  # type: ignore[no-any-return]

_SPACES: dict[str, Any] = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": nn.functional,
    "linalg": torch.linalg,
    "special": torch.special,
    "fft": torch.fft,
}
OP_NAMES = tuple(
    (prefix, _SPACES[prefix], name)
    for prefixes, names in _OP_NAMES.items()
    for name in names.split()
    for prefix in prefixes.split()
    if hasattr(_SPACES[prefix], name)
)
"""A function's prefix, where torch has it, and its name there, of those that this torch has."""

OPS: dict[str, Callable[..., Any]] = {
    **{f"{prefix}.{name}": getattr(space, name) for prefix, space, name in OP_NAMES},  # names from above, no file
    **{f"Tensor.{name}": attrgetter(name) for name in TENSOR_PROPERTIES},
    "Tensor.set_data_": _set_data,
    "torch.draw_dirichlet": _draw_dirichlet,
}

# --- graph_program.py

"""A stored forward: its records, and its reading. Every node, argument and reference is checked as it is read.

An operation must stand in the table, a reference must point back to something that exists, a string must be a word that
operations take, and numbers that decide alone how large a result is are bounded.
"""

Json = Any

# The longest forward of the heads in this package's tests has 55 nodes; one that loops over 1,370 tokens has thousands.
MAX_NODES = 10_000
MAX_GRAPH_ITEMS = 10_000
MAX_ELEMENTS = 2**31
MAX_FORMULA_DEPTH = 6

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32 float64 float16 bfloat16 complex64 complex128 int8 int16 int32 int64 uint8 bool".split())
}
MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    "log": lambda a, b: math.log(a) * b,
    "max": max,
}
"""Operators of a formula in the batch size; powers are square roots only."""

_KEY = re.compile(r"[^.\x00-\x1f\x7f]{1,200}")
_KEYWORD = re.compile(r"[a-z][a-zA-Z0-9_]{0,40}")
_REFERENCE = re.compile(r"%(\d{1,6})((?:\.\d{1,4}){0,4})")
_CONSTANT = re.compile(r"#([0-9]{1,6})")
_EINSUM = re.compile(r"[A-Za-z.,>\- ]{1,200}")
_WORDS = frozenset(
    """
    mean sum none max min prod amax amin batchmean bilinear bicubic nearest nearest-exact linear trilinear area zeros
    border reflection constant reflect replicate circular tanh floor trunc ij xy fro nuc lower higher midpoint backward
    ortho forward same valid left right reduced complete r use_mm_for_euclid_dist_if_necessary use_mm_for_euclid_dist
    donot_use_mm_for_euclid_dist
    """.split()
)
MADE_OF_NUMBERS = frozenset(
    "torch.zeros torch.ones torch.full torch.rand torch.randn torch.randint torch.arange torch.eye torch.linspace "
    "torch.logspace torch.randperm torch.tril_indices torch.triu_indices".split()
)
"""Operations that make a tensor of numbers alone."""
_SIZED_BY_NUMBERS = MADE_OF_NUMBERS | frozenset(
    """
    torch.normal torch.tile torch.repeat_interleave torch.broadcast_to torch.tensor_split torch.chunk Tensor.new_full
    Tensor.new_ones Tensor.new_zeros Tensor.expand Tensor.repeat Tensor.tile Tensor.repeat_interleave
    Tensor.broadcast_to Tensor.tensor_split Tensor.chunk F.interpolate F.upsample F.one_hot F.pad
    F.adaptive_avg_pool2d F.adaptive_max_pool2d
    """.split()
)
"""Operations whose numbers alone say how large the result is. What sizes and numbers do together is counted when the
graph runs (`graph_sizes.Sizes`)."""

@dataclass(frozen=True)
class Late:
    """A value that is there only when the graph runs, or holds such values, by `kind` and what it is `of`.

    Tensors: "input"; "node", of its index and a path into its result; "tensor", of a parameter's or buffer's name;
    "constant", of an index. "formula", a number that follows the batch size. "device" and "dtype", of a tensor.
    "slice", of three parts. "d" and "ordered", a dict of pairs in order.
    """

    kind: str
    of: Any = None

_TENSORS = ("input", "node", "tensor", "constant")

@dataclass(frozen=True)
class Node:
    """One step of a program: ``kind`` is "op", "call" or "write", ``target`` the operation, module or buffer."""

    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    no_grad: bool
    autocast: tuple[tuple[str, bool, str | None], ...]

@dataclass(frozen=True)
class Program:
    """The forward of one mode; `tensors` are the parameters and buffers that it names."""

    nodes: tuple[Node, ...]
    output: Any
    tensors: frozenset[str]

# --- small pieces: each takes a value and where it stands, and gives it back checked

def _are_sizes(value: Json, least: int = 0, most: int = 2**40, *, may_vary: bool = False) -> bool:
    return (isinstance(value, list) and len(value) <= 8) and all(
        (size is None and may_vary) or (type(size) is int and least <= size <= most) for size in value
    )

def _is_key(value: Json) -> bool:
    return isinstance(value, str) and bool(_KEY.fullmatch(value)) and not value.startswith("__")

_KINDS: dict[str, tuple[str, Callable[[Json], bool]]] = {
    "value": ("anything", lambda value: True),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "flag": ("true or false", lambda value: type(value) is bool),
    "name": ("a name", lambda value: isinstance(value, str) and len(value) <= 2000),
    "key": ("a name for a module or tensor", _is_key),
    "dtype": (f"one of {sorted(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES),
    "shape": ("a shape", _are_sizes),
    "order": ("an order of dimensions", lambda value: _are_sizes(value) and sorted(value) == [*range(len(value))]),
    "input": (
        "a shape with null for the sizes that may vary",
        lambda value: value != [] and _are_sizes(value, 1, 2**31, may_vary=True),
    ),
    "device": ("'input' or 'cuda'", lambda value: value in ("input", "cuda")),
    "precision": ("null or a dtype", lambda value: value in (None, "float16", "bfloat16", "float32")),
}
"""What stands in a graph beside calls: its words in an error, and its test."""

def read_value(value: Json, kind: str, where: str) -> Any:
    """A value of one of these kinds; lists become tuples, names of dtypes these."""
    expected, fits = _KINDS[kind]
    if not fits(value):
        raise GraphError(f"{where}: expected {expected}, found {shown(value)}")
    return DTYPES[value] if kind == "dtype" else tuple(value) if kind in ("shape", "order", "input") else value

def read_list(value: Json, where: str, most: int = MAX_GRAPH_ITEMS) -> list[Json]:
    if not isinstance(value, list) or len(value) > most:
        raise GraphError(f"{where}: expected a list of at most {most} items, found {shown(value)}")
    return value

def read_rows(rows: Json, kinds: str, where: str, most: int = MAX_GRAPH_ITEMS) -> tuple[tuple[Any, ...], ...]:
    """A list of lists, each with one value of each of these kinds."""
    names = kinds.split()
    for row in read_list(rows, where, most):
        if not isinstance(row, list) or len(row) != len(names):
            raise GraphError(f"{where}: expected [{', '.join(names)}], found {shown(row)}")
    return tuple(tuple(map(read_value, row, names, [where] * len(row))) for row in rows)

def only(value: Json, known: Set[str], where: str) -> None:
    unknown = sorted(str(key) for key in read_value(value, "object", where) if key not in known)
    if unknown:
        raise GraphError(f"{where}: unknown keys {shown(unknown[:4])}; expected some of {sorted(known)}")

# --- programs

def read_program(value: Json, where: str, modules: set[str], constants: int) -> Program:
    """The forward of one mode; `modules` are the names it may call, `constants` how many tensors it may refer to."""
    only(value, {"nodes", "output"}, where)
    nodes: list[Node] = []
    names: set[str] = set()
    for index, item in enumerate(read_list(value.get("nodes"), f"{where}.nodes", MAX_NODES)):
        nodes.append(_node(item, _ValueReader(nodes, constants, names, f"{where}.nodes[{index}]"), modules))
    if "output" not in value:
        raise GraphError(f"{where}: has no output")
    output = _ValueReader(nodes, constants, names, f"{where}.output").read(value["output"])
    return Program(tuple(nodes), output, frozenset(names))

def _node(value: Json, reader: "_ValueReader", modules: set[str]) -> Node:
    where = reader.where
    only(value, {"op", "call", "write", "in", "kw", "no_grad", "autocast"}, where)
    kinds = [kind for kind in ("op", "call", "write") if kind in value]
    if len(kinds) != 1:
        raise GraphError(f"{where}: expected exactly one of op, call, write")
    kind, target = kinds[0], read_value(value[kinds[0]], "name", where)
    if kind == "op" and target not in OPS:
        raise GraphError(
            f"{where}: {shown(target)} is not an operation that a stored head may use (or this torch lacks it)"
        )
    if kind == "call" and target not in modules:
        raise GraphError(f"{where}: calls {shown(target)}, which is not a layer of the head")
    reader.op = target if kind == "op" else ""
    args = tuple(reader.items(value.get("in", [])))
    keywords = read_value(value.get("kw", {}), "object", where)
    if not all(isinstance(key, str) and _KEYWORD.fullmatch(key) for key in keywords):
        raise GraphError(f"{where}: keyword arguments {shown(keywords)} are not plain names")
    kwargs = tuple((key, reader.read(item)) for key, item in keywords.items())
    if kind == "write" and (kwargs or len(args) != 1 or getattr(args[0], "kind", None) not in _TENSORS):
        raise GraphError(f"{where}: a write takes exactly one tensor")
    if target in _SIZED_BY_NUMBERS and reader.product > MAX_ELEMENTS:
        raise GraphError(f"{where}: {target} asks for {reader.product:.3g} elements, more than {MAX_ELEMENTS}")
    autocast: Any = read_rows(value.get("autocast", []), "device flag precision", f"{where}.autocast", 8)
    return Node(kind, target, args, kwargs, read_value(value.get("no_grad", False), "flag", where), autocast)

class _ValueReader:
    """Reads the arguments of one node; references may only point to nodes before it. `names` takes those of tensors."""

    def __init__(self, nodes: Sequence[Node], constants: int, names: set[str], where: str) -> None:
        self.nodes, self.constants, self.names, self.where = nodes, constants, names, where
        self.op = ""
        self.product = 1.0

    def read(self, value: Json) -> Any:
        """Decode one JSON value; GraphError if it is not one that a save writes."""
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if abs(value) >= 2**63:
                raise GraphError(f"{self.where}: the number {shown(value)} is too large")
            self.product *= max(abs(value), 1)
            return value
        if isinstance(value, str):
            return self._reference(value)
        if isinstance(value, list):
            return self.items(value)
        if isinstance(value, dict) and len(value) == 1:
            return self._tagged(*next(iter(value.items())))
        raise GraphError(f"{self.where}: {shown(value)} is not an argument")

    def items(self, values: Json) -> list[Any]:
        """Each value of a list, decoded."""
        return [self.read(item) for item in read_list(values, self.where)]

    def _tagged(self, tag: str, inner: Json) -> Any:
        if tag == "t":
            return tuple(self.items(inner))
        if tag in ("d", "ordered"):
            pairs = read_rows(inner, "value value", self.where)
            return Late(tag, tuple((self._dict_key(key), self.read(item)) for key, item in pairs))
        if tag == "s":
            return self._string(inner)
        if tag == "slice" and isinstance(inner, list) and len(inner) == 3:
            return Late(tag, tuple(self.items(inner)))
        if tag == "..." and inner is True:
            return Ellipsis
        if tag == "f" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "complex" and isinstance(inner, list) and len(inner) == 2:
            parts = self.items(inner)
            if all(isinstance(part, (int, float)) for part in parts):
                return complex(*parts)
        if tag == "n":
            check_formula(inner)
            return Late("formula", inner)
        if tag in ("dtype", "device") and inner == "input":
            return Late(tag, Late("input"))
        if tag == "dtype" and isinstance(inner, str) and inner.startswith("$"):
            return Late(tag, self._reference(inner))
        if tag == "dtype":
            return read_value(inner, "dtype", self.where)
        if tag == "memory" and isinstance(inner, str) and inner in MEMORY_FORMATS:
            return MEMORY_FORMATS[inner]
        if tag == "layout" and inner == "strided":
            return torch.strided
        raise GraphError(f"{self.where}: {{{shown(tag)}: {shown(inner)}}} is not an argument")

    def _dict_key(self, value: Json) -> Any:
        if isinstance(value, dict) and set(value) == {"s"} and isinstance(value["s"], str) and len(value["s"]) <= 200:
            return value["s"]
        if value is None or type(value) in (bool, int):
            return value
        raise GraphError(f"{self.where}: {shown(value)} is not a key of a dict")

    def _string(self, value: Json) -> str:
        if isinstance(value, str) and (value in _WORDS or (self.op == "torch.einsum" and _EINSUM.fullmatch(value))):
            return value
        if isinstance(value, str) and self.where.endswith(".output") and len(value) <= 200:
            return value  # a label that the head returns beside its tensors
        raise GraphError(f"{self.where}: {shown(value)} is not a word that {self.op or 'a layer'} takes")

    def _reference(self, value: str) -> Late:
        if value == "x":
            return Late("input")
        if value.startswith("$"):
            self.names.add(value[1:])
            return Late("tensor", value[1:])
        if (constant := _CONSTANT.fullmatch(value)) and int(constant[1]) < self.constants:
            return Late("constant", int(constant[1]))
        match = _REFERENCE.fullmatch(value)
        if match and int(match[1]) < len(self.nodes) and self.nodes[int(match[1])].kind != "write":
            return Late("node", (int(match[1]), tuple(int(step) for step in match[2].split(".")[1:])))
        raise GraphError(f"{self.where}: {shown(value)} refers to nothing that exists before this point")

def check_formula(expr: Json, depth: int = 0) -> None:
    """Raise GraphError unless `expr` is a formula of the batch size: ``"B"``, a number, or ``[operator, a, b]``."""
    if expr == "B" or (type(expr) in (int, float) and abs(expr) <= 2**40):
        return
    known = isinstance(expr, list) and len(expr) == 3 and isinstance(expr[0], str) and expr[0] in FORMULAS
    if not known or depth >= MAX_FORMULA_DEPTH:
        raise GraphError(f"{shown(expr)} is not a formula of the batch size")
    if expr[0] == "**" and expr[2] not in (0.5, -0.5):
        raise GraphError(f"a formula of the batch size raises to the power {shown(expr[2])}; only 0.5 and -0.5 occur")
    check_formula(expr[1], depth + 1)
    check_formula(expr[2], depth + 1)

def evaluate(expr: Json, batch: int) -> int | float:
    """The value of an audited formula for a batch size. Raises GraphError where it has none (a division by zero)."""
    if expr == "B":
        return batch
    if isinstance(expr, list):
        try:
            return FORMULAS[expr[0]](evaluate(expr[1], batch), evaluate(expr[2], batch))  # type: ignore[no-any-return]
        except (ZeroDivisionError, ValueError, OverflowError) as error:
            raise GraphError(f"the head cannot take a batch of {batch}: {error}") from None
    return expr  # type: ignore[no-any-return]

# --- graph_schema.py

"""Phases one and two of reading a stored head: untrusted JSON to records, with every check that needs no module.

After `parse_graph` every name is known, every operation is one of the table, every reference points back to something
that exists, every string is one that an operation takes, and sizes are bounded. Each value is looked at once, so the
audit is linear in the text. docs/format.md describes the JSON.
"""

VERSION = 1
# Of the heads in this package's tests (147, as people write them) the largest graph has 54 KiB of text, most of it an
# embedded mask, 551 values and 38 modules.
MAX_TEXT = 1 << 20
MAX_VALUES = 200_000
MAX_MODULES = 2_000
MAX_MODULE_DEPTH = 32
MAX_GRAPH_DEPTH = 16
MAX_EMBEDDED_BYTES = 1 << 20

_HEAD = "the stored head"
_GRAPH_KEYS = frozenset("version input modules ties frozen dtypes layouts held constants forward train eval".split())
# Lists of a graph, and what stands in each of their rows; of `held`: module, its mode in train, in eval.
_ROWS = {"ties": "name name", "dtypes": "name dtype", "layouts": "name order", "held": "name flag flag"}
_MODULE_KEYS = {
    "layer": {"name", "layer", "args"},
    "container": {"name", "container"},
    "same": {"name", "same"},
    "part": {"name", "part", "params", "buffers", "values"},
}
CONTAINERS: dict[str, type[nn.Module]] = {each.__name__: each for each in (nn.Sequential, nn.ModuleList, nn.ModuleDict)}

# --- records: a stored head without any JSON left in it

TensorSpec = tuple[str, tuple[int, ...], torch.dtype]
"""A parameter or buffer that the weights bring: its name within its module, shape and dtype."""

@dataclass(frozen=True)
class ModuleSpec:
    """One module: a layer of the table, a torch container, a plain part, or another name of an earlier module.

    `of` is the layer's, container's or earlier module's name; `values` are buffers that are not in the state dict.
    """

    name: str
    kind: str
    of: str = ""
    args: Any = None
    params: tuple[TensorSpec, ...] = ()
    buffers: tuple[TensorSpec, ...] = ()
    values: tuple[tuple[str, torch.Tensor], ...] = ()

    def tensor_names(self) -> list[str]:
        """Names of all of its own tensors."""
        return [str(item[0]) for item in (*self.params, *self.buffers, *self.values)]

@dataclass(frozen=True)
class Graph:
    """An audited graph. ``programs`` is empty where the root is itself a layer and needs none."""

    shape: tuple[int | None, ...]
    modules: tuple[ModuleSpec, ...]
    ties: tuple[tuple[str, str], ...]
    frozen: frozenset[str]
    dtypes: tuple[tuple[str, torch.dtype], ...]
    layouts: tuple[tuple[str, tuple[int, ...]], ...]
    held: tuple[tuple[str, bool, bool], ...]
    constants: tuple[torch.Tensor, ...]
    programs: dict[bool, Program] = field(default_factory=dict)

# --- the whole graph

def parse_graph(graph: Json) -> Graph:
    """Turn untrusted JSON into an audited `Graph`. Raises GraphError naming what was found and what was expected."""
    version = read_value(graph, "object", _HEAD).get("version")
    if type(version) is not int or version != VERSION:
        raise GraphError(
            f"the stored head has graph version {shown(version)}; this package reads version {VERSION}. A newer one "
            "needs a newer hf_timm_tower"
        )
    check_extent(graph)
    only(graph, _GRAPH_KEYS, _HEAD)
    only(graph.get("input"), {"shape"}, "input")
    left = [MAX_EMBEDDED_BYTES]
    modules = tuple(_module(item, left) for item in read_list(graph.get("modules"), "modules", MAX_MODULES))
    _check_module_names(modules)
    embedded = enumerate(read_list(graph.get("constants", []), "constants"))
    constants = tuple(_tensor(item, left, f"constants[{index}]") for index, item in embedded)
    # What a call may name: what brings a forward of its own.
    names = {each.name for each in modules[1:] if (each.kind, each.of) == ("container", "Sequential")}
    names |= {each.name for each in modules[1:] if each.kind == "layer"}
    names |= {each.name for each in modules if each.kind == "same" and each.of in names}
    programs = _programs(graph, names, len(constants))
    if not programs and modules[0].kind not in ("layer", "container"):
        raise GraphError("the stored head has no forward, and its root is not a layer that brings its own")
    if programs and modules[0].kind != "part":
        raise GraphError("the stored head has a forward of its own, so its root must be a part")
    rows: Any = {key: read_rows(graph.get(key, []), kinds, key) for key, kinds in _ROWS.items()}
    frozen = frozenset(read_value(item, "name", "frozen") for item in read_list(graph.get("frozen", []), "frozen"))
    shape = read_value(graph["input"].get("shape"), "input", "input.shape")
    return Graph(shape=shape, modules=modules, frozen=frozen, constants=constants, programs=programs, **rows)

def check_extent(graph: Json) -> None:
    """Bound nesting, the number of values and the length of texts, without recursion and before anything else."""
    level, values, letters = [graph], 1, 0
    for _ in range(MAX_GRAPH_DEPTH):
        deeper: list[Json] = []
        for item in level:
            inner = item.values() if isinstance(item, dict) else item
            values += len(item)
            letters += sum(map(len, item)) if isinstance(item, dict) else 0
            letters += sum(len(part) for part in inner if isinstance(part, str))
            if isinstance(item, dict) and isinstance(data := item.get("data"), str):
                letters -= len(data)  # of an embedded tensor, which has a limit of its own
            deeper.extend(part for part in inner if isinstance(part, (dict, list)))
            if values > MAX_VALUES or letters > MAX_TEXT:
                raise GraphError(
                    f"the stored head has more than {MAX_VALUES} values or {MAX_TEXT} letters beside "
                    "its tensors: what makes so many calls is not stored as a graph"
                )
        level = deeper
        if not level:
            return
    raise GraphError(f"the stored head is nested deeper than {MAX_GRAPH_DEPTH} levels")

def _programs(graph: dict[str, Json], names: set[str], constants: int) -> dict[bool, Program]:
    keys = [key for key in ("forward", "train", "eval") if key in graph]
    if keys not in ([], ["forward"], ["train", "eval"]):
        raise GraphError(f"the stored head has {' and '.join(keys)}; expected `forward`, or both `train` and `eval`")
    read = [read_program(graph[key], key, names, constants) for key in keys]
    return {True: read[0], False: read[-1]} if read else {}

# --- modules

def _tensor(value: Json, left: list[int], where: str) -> torch.Tensor:
    """A tensor embedded in the graph; ``left`` holds the bytes that the graph may still embed and is reduced."""
    only(value, {"shape", "dtype", "data"}, where)
    shape, dtype = (read_value(value.get(kind), kind, where) for kind in ("shape", "dtype"))
    nbytes = math.prod(shape) * dtype.itemsize
    left[0] -= nbytes
    if left[0] < 0:
        raise GraphError(f"{where}: the tensors inside a stored head exceed {MAX_EMBEDDED_BYTES} bytes")
    try:
        data = base64.b64decode(value.get("data"), validate=True)
    except (TypeError, ValueError) as error:
        raise GraphError(f"{where}: data is not base64: {error}") from None
    if len(data) != nbytes:
        raise GraphError(f"{where}: {len(data)} bytes of data, expected {nbytes} for {shape} of {dtype}")
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if dtype is torch.bool and set(data) - {0, 1}:
        raise GraphError(f"{where}: a bool tensor holds only 0 and 1")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

def _module(value: Json, left: list[int]) -> ModuleSpec:
    name = read_value(read_value(value, "object", "modules").get("name"), "name", "modules.name")
    where = f"module {shown(name)}"
    kind = next((kind for kind in _MODULE_KEYS if kind in value), "part")
    only(value, _MODULE_KEYS[kind], where)
    of = "" if kind == "part" else read_value(value[kind], "name", where)
    if (kind == "part" and value.get("part") is not True) or (kind == "container" and of not in CONTAINERS):
        raise GraphError(f"{where}: is no layer, no part, not another name, and none of {', '.join(CONTAINERS)}")
    params, buffers = (read_rows(value.get(key, []), "key shape dtype", where) for key in ("params", "buffers"))
    rows = read_rows(value.get("values", []), "key value", where)
    values = tuple((key, _tensor(tensor, left, f"{where}, buffer {shown(key)}")) for key, tensor in rows)
    spec = ModuleSpec(name, kind, of, value.get("args"), params, buffers, values)
    if len(set(spec.tensor_names())) != len(spec.tensor_names()):
        raise GraphError(f"{where}: two tensors have the same name")
    return spec

def _check_module_names(modules: Sequence[ModuleSpec]) -> None:
    if not modules or modules[0].name != "" or modules[0].kind == "same":
        raise GraphError("modules: the first one must be the head itself, named ''")
    seen = {"": modules[0]}
    tensors = {"": set(modules[0].tensor_names())}
    sizes: dict[str, list[str]] = {"": []}
    for module in modules[1:]:
        name, same = module.name, module.of if module.kind == "same" else ""
        parent, _, key = name.rpartition(".")
        read_value(key, "key", f"module {shown(name)}")
        if name in seen:
            raise GraphError(f"modules: {shown(name)} is there twice")
        if name.count(".") >= MAX_MODULE_DEPTH:
            raise GraphError(f"modules: {shown(name)} is nested deeper than {MAX_MODULE_DEPTH} levels")
        if parent not in seen:
            raise GraphError(f"modules: {shown(name)} comes before its parent")
        if seen[parent].kind in ("layer", "same"):
            raise GraphError(f"modules: {shown(parent)} is a {seen[parent].kind}, it cannot hold {shown(key)}")
        if module.kind == "same" and (same not in seen or seen[same].kind == "same"):
            raise GraphError(f"modules: {shown(name)} is another name of {shown(same)}, which is not there before it")
        if module.kind == "same" and (name + ".").startswith(same + "." if same else ""):
            raise GraphError(f"modules: {shown(name)} cannot be the module {shown(same)} that holds it")
        if key in tensors[parent]:
            raise GraphError(f"modules: {shown(name)} has the name of a tensor")
        seen[name] = module
        tensors[name] = set(module.tensor_names())
        sizes.setdefault(parent, []).append(same or name)
    _check_paths(sizes)

def _check_paths(children: dict[str, list[str]]) -> None:
    """Refuse modules that hold each other, or so many names for the same ones that walking over them would not end."""
    sizes: dict[str, int] = {}
    unfinished: set[str] = set()

    def size(name: str) -> int:
        if name in unfinished:
            raise GraphError(f"modules: {shown(name)} holds itself")
        if name not in sizes:
            unfinished.add(name)
            sizes[name] = 1 + sum(map(size, children.get(name, ())))
            unfinished.remove(name)
        return sizes[name]

    if size("") > MAX_MODULES:
        raise GraphError(f"modules: shared modules have more than {MAX_MODULES} names")

# --- graph_sizes.py

"""How large the results of a stored head's calls become, known before each call is made.

Each call of a graph may be modest and their sequence not: ``cat([y, y])`` thirty times, an outer product, one call that
splits a tensor into millions, a product of two numbers that are expanded to matrices. So at the first input of a shape
each call is made on the meta device before it is made for real, and the bytes and the work that all of them ask for are
bounded. The same call on the same shapes is not looked at again.
"""

# What all calls of one forward may make together: 128 MiB, and 1024 times the input and 64 times the weights. Attention
# written by hand over 1,370 tokens of width 1024 and 16 heads makes 220 times its input; a margin loss over 100,000
# classes ten times the logits of its batch.
_LEAST, _PER_INPUT, _PER_WEIGHTS = 2**27, 1024, 64
# What they may compute together, in multiplications and the like: 2**36, as much for each number of the input as
# attention over 16,384 tokens, and 64 times what it takes to use every weight once at every position of the input.
_LEAST_WORK, _WORK_PER_INPUT, _WORK_PER_WEIGHT = 2**36, 2**14, 64
_MAX_TENSORS = 2**16
_MAX_KNOWN = 4096
_BY_VALUES = frozenset(
    "torch.nonzero torch.argwhere torch.masked_select torch.unique_consecutive Tensor.nonzero Tensor.argwhere "
    "Tensor.masked_select Tensor.unique Tensor.unique_consecutive Tensor.__getitem__ Tensor.__setitem__ torch.where "
    "Tensor.where torch.index_put Tensor.index_put Tensor.index_put_".split()
)
"""Values decide the size of the result, which is at most that of the largest argument times its rank."""
_DECOMPOSITIONS = frozenset(
    "_linalg_svd linalg_qr _linalg_eigh _linalg_det _linalg_slogdet linalg_inv_ex linalg_pinv _linalg_solve_ex ormqr "
    "linalg_matrix_exp linalg_lu_factor_ex linalg_cholesky_ex linalg_householder_product cholesky_inverse "
    "cholesky_solve linalg_solve_triangular".split()
)
"""Of aten, inside of norms and solvers too: work grows with the cube of a matrix's width, its bytes with the square."""
RECORDING: ContextVar[bool] = ContextVar("recording", default=False)
"""Set while a head of this process is recorded to be stored: looking at sizes would be recorded too."""

class Sizes:
    """What is known of the sizes in one head: which calls were looked at, and what they make."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[int, int, bool]] = {}

    def start(self, head: nn.Module, x: torch.Tensor) -> "_Counted | None":
        """The count of one forward; None where torch compiles or exports the head, which calls nothing for real."""
        if torch.compiler.is_compiling() or RECORDING.get() or torch._C._get_tracing_state() or x.is_meta:
            return None
        weights = sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers()))
        positions = x.numel() // max([1, *x.shape[1:]])
        work = _LEAST_WORK + _WORK_PER_INPUT * x.numel() + _WORK_PER_WEIGHT * weights * positions
        if len(self.known) > _MAX_KNOWN:
            self.known.clear()
        limit = _LEAST + _PER_INPUT * x.nbytes + _PER_WEIGHTS * weights
        return _Counted(self.known, (tuple(x.shape), x.dtype, head.training), limit, work)

class _Counted:
    """Bytes that one forward has made so far, and its work."""

    def __init__(self, known: dict[Any, Any], key: tuple[Any, ...], limit: int, most_work: int) -> None:
        self.known, self.key, self.limit, self.most_work = known, key, limit, most_work
        self.spent = self.worked = 0

    def check(self, index: int, name: str, function: Any, args: Any, kwargs: Any) -> None:
        """Count a call that is about to be made. Raises GraphError if the forward makes too much with it."""
        tensors = tensors_in((args, kwargs))
        key = (*self.key, index, *((tensor.shape, tensor.dtype) for tensor in tensors))
        made, work, lasting = self.known.get(key) or self._measure(name, function, args, kwargs, tensors)
        if lasting:
            self.known[key] = made, work, lasting
        self.spent += made
        self.worked += work
        if self.spent > self.limit:
            raise _too_much(name, self.spent, self.limit)
        if self.worked > self.most_work:
            raise GraphError(
                f"the stored head computes more than {self.most_work:.1e} products for this input (at {name}, "
                f"{self.worked:.1e} so far): it is refused before it takes the time"
            )

    def _measure(
        self, name: str, function: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]
    ) -> tuple[int, int, bool]:
        """Bytes that a call makes, its work, and whether that holds for all inputs of these shapes."""
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        if name in ("torch.bincount", "Tensor.bincount", "F.one_hot", "torch.repeat_interleave",
                    "Tensor.repeat_interleave") and (made := _by_counts(name, args, kwargs)) is not None:  # fmt: skip
            return made, 0, False
        failed: Exception | None = None
        for by_numbers in (False, True):  # a tensor of one number may say how large the result is
            count, move = _Count(self.limit), _Twins()
            first, move.keeps_numbers = move(args[:1]), by_numbers
            first = move(args[:1]) if name in MADE_OF_NUMBERS else first
            try:
                with torch.no_grad(), torch.device("meta"), count:
                    move(function)(*first, *move(args[1:]), **move(kwargs))
                return count.made, count.work, not by_numbers
            except GraphError:
                raise _too_much(name, self.spent + count.made, self.limit) from None
            except Exception as error:
                failed = failed or error
        # this call cannot be sized; a call that is wrong fails for real just after
        by_values = name in _BY_VALUES or isinstance(function, nn.Module)
        if not by_values and not isinstance(failed, NotImplementedError):
            return 0, 0, False
        rank = max((tensor.dim() for tensor in tensors), default=1)
        if by_values:
            return 8 * max(rank, 1) * largest, 0, True
        return min(8 * math.prod(max(tensor.numel(), 1) for tensor in tensors), self.limit + 1), 0, True

def _too_much(name: str, spent: int, limit: int) -> GraphError:
    return GraphError(
        f"the stored head makes more than {limit / 2**20:.0f} MiB of intermediate tensors for this input (at {name}, "
        f"{shown(spent)} bytes so far): it is refused before it takes the memory"
    )

class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that calls make and their work, and ends the run where bytes or tensors are too many."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.made, self.tensors, self.work = limit, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::unbind", "aten::split") and isinstance(args[0], torch.Tensor):
            dim = args[1] if name == "aten::unbind" and len(args) > 1 else args[2] if len(args) > 2 else 0
            size = 1 if name == "aten::unbind" else max(args[1], 1) if isinstance(args[1], int) else 1
            self._add(0, args[0].shape[dim] // size)
        given = tensors_in((args, kwargs))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        memory = [tensor.untyped_storage() for tensor in made]
        fresh = [each.nbytes() for each in memory if each._cdata not in known]
        if fresh or not made:  # no view: what is expanded is written out by many kernels
            fresh += [tensor.nbytes for tensor in given if tensor.nbytes > tensor.untyped_storage().nbytes()]
            self.work += _work_of(func, args, kwargs, result, given, made)
        self._add(sum(fresh), len(made))
        return result

    def _add(self, nbytes: int, tensors: int) -> None:
        self.made += nbytes
        self.tensors += tensors
        if self.made > self.limit or self.tensors > _MAX_TENSORS:
            raise GraphError("too much")

def _work_of(
    func: Any, args: Any, kwargs: Any, result: Any, given: list[torch.Tensor], made: list[torch.Tensor]
) -> int:
    """Multiplications of a call, or as many as it has numbers to read and to write."""
    name, work = func._schema.name, max(sum(each.numel() for each in tensors) for tensors in (given, made))
    if func._overloadpacket in flop_registry:
        return max(work, int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)) // 2)
    if name.removeprefix("aten::") in _DECOMPOSITIONS:
        return work * max(max(each.shape[-2:], default=1) for each in given)
    if "dist_forward" in name or name == "aten::addbmm":  # each row with each row
        return max(work, given[-2].numel() * given[-1].shape[-2 if "cdist" in name else -1])
    if "_pool" in name and "adaptive" not in name and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return max(work, sum(each.numel() for each in made) * math.prod(args[1] * (3 if len(args[1]) == 1 else 1)))
    return work

class _Twins(MetaTwins):
    """On request tensors of one number stay what they are."""

    keeps_numbers = False

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and self.keeps_numbers and value.dim() == 0:
            return value.detach().clone().cpu()
        return super().__call__(value)

def _by_counts(name: str, args: Any, kwargs: Any) -> int | None:
    """Bytes of a result that is as large as the numbers in a tensor say; None where none says it."""
    values = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if name.endswith("repeat_interleave"):
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", values)
        if not isinstance(repeats, torch.Tensor) or repeats.is_meta:
            return None
        row = 1 if values is None or values is repeats else max(values.numel() // max(values.shape[0], 1), 1)
        return 8 * int(repeats.sum()) * max(row, 1)
    if values is None or values.is_meta or not values.numel():
        return None
    width = int(values.max()) + 1
    return 8 * width * (values.numel() if name == "F.one_hot" else 1)

# --- graph_layers.py

"""The layers a stored head may name: classes of `torch.nn` and `timm.layers`, and the arguments each is made with.

A layer is stored as its name in this table and its constructor arguments (`heads/layers.py` reads them off a layer).
Anything else (a subclass, a parametrized layer, a patched method) is a plain part, whose forward is traced.
"""

_MAX_STACKED = 64
"""Most layers a recurrent network or a transformer stack may have; GPT-2 XL and ViT-22B have 48."""
_STRINGS = frozenset(
    "zeros reflect replicate circular same valid none tanh relu gelu nearest linear bilinear bicubic trilinear area "
    "nearest-exact".split()
)
_SIZES_RESULT = frozenset(
    "output_size padding stride dilation output_padding scale_factor size upscale_factor kernel_size".split()
)

LAYER_ARGUMENTS: dict[str, str] = {
    name: arguments
    for line in """
Bilinear: in1_features in2_features out_features bias?
Linear: in_features out_features bias?
Flatten: start_dim end_dim
Unflatten: dim unflattened_size
Identity Sigmoid Tanh Tanhshrink Softsign LogSigmoid Softmax2d:
ReLU ReLU6 SiLU Mish SELU Hardswish Hardsigmoid: inplace
ELU CELU: alpha inplace
GELU: approximate
LeakyReLU: negative_slope inplace
RReLU: lower upper inplace
Hardtanh: min_val max_val inplace
Threshold: threshold value inplace
Softplus: beta threshold
Softshrink Hardshrink: lambd
Softmax LogSoftmax Softmin GLU: dim
PReLU: num_parameters init
Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout: p inplace
Conv1d Conv2d Conv3d: in_channels out_channels kernel_size stride padding dilation groups bias? padding_mode
ConvTranspose1d ConvTranspose2d ConvTranspose3d: \
    in_channels out_channels kernel_size stride padding output_padding groups bias? dilation padding_mode
BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d: \
    num_features eps momentum affine track_running_stats
LayerNorm: normalized_shape eps elementwise_affine bias?
RMSNorm: normalized_shape eps elementwise_affine
GroupNorm: num_groups num_channels eps affine
LocalResponseNorm: size alpha beta k
Embedding: num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d: output_size
AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d: output_size return_indices
AvgPool1d: kernel_size stride padding ceil_mode count_include_pad
AvgPool2d AvgPool3d: kernel_size stride padding ceil_mode count_include_pad divisor_override
MaxPool1d MaxPool2d MaxPool3d: kernel_size stride padding dilation return_indices ceil_mode
LPPool1d LPPool2d: norm_type kernel_size stride ceil_mode
ZeroPad1d ZeroPad2d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d: padding
ConstantPad1d ConstantPad2d: padding value
Upsample: size scale_factor mode align_corners recompute_scale_factor
PixelShuffle: upscale_factor
PixelUnshuffle: downscale_factor
ChannelShuffle: groups
Fold: output_size kernel_size dilation padding stride
Unfold: kernel_size dilation padding stride
CosineSimilarity: dim eps
PairwiseDistance: norm eps keepdim
RNN: input_size hidden_size num_layers bias batch_first dropout bidirectional nonlinearity
GRU: input_size hidden_size num_layers bias batch_first dropout bidirectional
LSTM: input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size
RNNCell: input_size hidden_size bias nonlinearity
GRUCell LSTMCell: input_size hidden_size bias
MultiheadAttention: embed_dim num_heads dropout add_zero_attn kdim vdim batch_first bias add_bias_kv
TransformerEncoderLayer TransformerDecoderLayer: \
    d_model nhead dim_feedforward dropout activation layer_norm_eps batch_first norm_first bias
TransformerEncoder: layer num_layers norm enable_nested_tensor mask_check
TransformerDecoder: layer num_layers norm
timm.DropPath: drop_prob scale_by_keep
timm.LayerScale: dim inplace
timm.LayerNorm timm.LayerNorm2d: num_channels eps affine
timm.RmsNorm timm.RmsNorm2d: channels eps affine
""".strip().splitlines()
    for names, _, arguments in [line.partition(":")]
    for name in names.split()
}
"""Arguments of each layer. Attributes have the same names; ``bias?`` reads `bias is not None`."""

LAYERS: dict[str, tuple[type[nn.Module], frozenset[str]]] = {
    name: (cls, frozenset(arguments.replace("?", "").split()))
    for name, arguments in LAYER_ARGUMENTS.items()
    if (cls := getattr(timm.layers if "." in name else nn, name.removeprefix("timm."), None))  # older ones lack some
}
"""Name in a graph -> the class, and the arguments that must be there."""

def build_layer(name: Any, args: Any) -> nn.Module:
    """A layer of the table from JSON arguments; GraphError for an unknown name, or arguments that it does not take."""
    if not isinstance(name, str) or name not in LAYERS:
        raise GraphError(f"the stored head names a layer {shown(name)} that is not in the table of layers")
    cls, names = LAYERS[name]
    if not isinstance(args, Mapping) or set(args) != names:
        found = sorted(map(str, args)) if isinstance(args, Mapping) else args
        raise GraphError(f"layer {name}: found arguments {shown(found)}, expected exactly {sorted(names)}")
    values = {key: _argument(args[key], f"{name}.{key}") for key in sorted(names - {"layer", "norm"})}
    _check_growth(name, values)
    depth = values.get("num_layers", 1)
    if type(depth) is not int or not 1 <= depth <= _MAX_STACKED:
        raise GraphError(f"layer {name}: num_layers is {shown(depth)}, expected 1 to {_MAX_STACKED}")
    try:
        return _build_stack(cls, args, values) if "layer" in names else cls(**values)
    except (GraphError, ConfigError) as error:
        raise GraphError(f"layer {name}: {error}") from error
    except Exception as error:  # whatever torch says of impossible arguments is one refusal for the caller
        raise GraphError(f"layer {name} with {shown(dict(args))} cannot be constructed: {error}") from error

def _check_growth(name: str, values: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a layer without weights answer with enormous tensors."""
    total = 1.0
    for key in _SIZES_RESULT & values.keys():
        for number in values[key] if isinstance(values[key], tuple) else (values[key],):
            total *= max(abs(number), 1) if isinstance(number, (int, float)) else 1
    if not total <= MAX_ELEMENTS:
        raise GraphError(f"layer {name}: sizes {shown(dict(values))} are beyond what a layer can need")

def _build_stack(cls: Any, args: Mapping[str, Any], values: dict[str, Any]) -> nn.Module:
    """A transformer stack of equal layers, each made by itself: torch's own constructor copies one, weights and all."""
    depth = values.pop("num_layers")
    single = f"{cls.__name__}Layer"
    made = [_inner_layer(args["layer"], (single,)) for _ in range(depth)]
    norm = None if args["norm"] is None else _inner_layer(args["norm"], ("LayerNorm", "RMSNorm"))
    stack: nn.Module = cls(made[0], 0, norm, **values)
    stack.layers = nn.ModuleList(made)
    stack.num_layers = depth
    return stack

def _inner_layer(value: Any, names: tuple[str, ...]) -> nn.Module:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in names:
        raise GraphError(f"expected a layer {' or '.join(names)} inside, found {shown(value)}")
    return build_layer(value[0], value[1])

def _argument(value: Any, where: str, depth: int = 0) -> Any:
    """Constructor argument from JSON: plain numbers, words of the list above, or tuples of them."""
    if value is None or isinstance(value, bool) or (type(value) is float):
        return value
    if type(value) is int and abs(value) <= MAX_ELEMENTS:
        return value
    if isinstance(value, str) and value in _STRINGS:
        return value
    if isinstance(value, dict) and set(value) == {"f"} and value["f"] in ("inf", "-inf", "nan"):
        return float(value["f"])
    if isinstance(value, list) and len(value) <= 8 and depth < 3:
        return tuple(_argument(item, where, depth + 1) for item in value)
    raise GraphError(f"{where}: {shown(value)} is not an argument that a layer can take")

# --- graph_head.py

"""Phase three of reading a stored head: build the module of an audited graph, and run it.

`GraphHead` is an ordinary module: its layers are real `torch.nn` and `timm.layers` layers under their old names, so
state dicts, `.to()`, freezing, optimizers and adapters see what they saw in the original. Its forward is an interpreter
over the audited nodes; no text is ever turned into code.
"""

# A call of a layer runs all that is in it. The longest of the heads in this package's tests runs 102 modules and calls.
MAX_STEPS = 50_000

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
        self.__sizes = Sizes()
        if graph.ties or graph.layouts:
            self.register_load_state_dict_post_hook(_settle_after_load)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> Any:
        """Input [B, ...] of the recorded shape; the output is the original head's, nested containers included."""
        self.__check_input(x)
        program = self.__graph.programs[self.training]
        run = _Run(self, x, self.__constants, self.__sizes)
        for (no_grad, autocast), nodes in groupby(program.nodes, key=lambda node: (node.no_grad, node.autocast)):
            with ExitStack() as stack:
                if no_grad:
                    stack.enter_context(torch.no_grad())
                for device, enabled, dtype in autocast:
                    kind = x.device.type if device == "input" else device
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=DTYPES[dtype] if dtype else None))
                for node in nodes:
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
            _replace(self, alias, _tensor_of(self, first))
        for name, order in self.__graph.layouts:
            tensor = _tensor_of(self, name)
            back = [order.index(dim) for dim in range(len(order))]
            tensor.data = tensor.data.permute(order).contiguous().permute(back)

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

class _Run:
    """One forward: the results so far."""

    def __init__(self, head: nn.Module, x: torch.Tensor, constants: list[torch.Tensor], sizes: Sizes) -> None:
        self.head, self.x, self.batch, self.constants = head, x, x.shape[0], constants
        self.results: list[Any] = []
        self.counted = sizes.start(head, x)

    def step(self, node: Node) -> None:
        """Make one call, once it is known that its result is of a bearable size."""
        args = [self.resolve(value) for value in node.args]
        kwargs = {key: self.resolve(value) for key, value in node.kwargs}
        if node.kind == "write":
            owner, key = _owner(self.head, node.target)
            owner._buffers[key] = args[0]
            self.results.append(None)
            return
        function = OPS[node.target] if node.kind == "op" else submodule(self.head, node.target)
        if self.counted is not None:
            self.counted.check(len(self.results), node.target, function, args, kwargs)
        try:
            self.results.append(function(*args, **kwargs))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise GraphError(
                f"the stored head cannot make its call {shown(node.target)}: {shown(str(error), 200)}. The file is "
                "damaged or was edited; save the tower again"
            ) from error

    def resolve(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)([self.resolve(item) for item in value])
        if not isinstance(value, Late):
            return value
        kind, of = value.kind, value.of
        if kind == "input":
            return self.x
        if kind == "node":
            result = self.results[of[0]]
            for step in of[1]:
                result = result[step]
            return result
        if kind == "tensor":
            return _tensor_of(self.head, of)
        if kind == "constant":
            return self.constants[of]
        if kind == "formula":
            return evaluate(of, self.batch)
        if kind in ("device", "dtype"):
            return getattr(self.resolve(of), kind)
        if kind == "slice":
            return slice(*[self.resolve(part) for part in of])
        pairs = [(key, self.resolve(item)) for key, item in of]
        return dict(pairs) if kind == "d" else OrderedDict(pairs)

def _owner(head: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return submodule(head, parent), key

def _tensor_of(head: nn.Module, name: str) -> Any:
    owner, key = _owner(head, name)
    for table in (owner._parameters, owner._buffers):
        if (found := table.get(key)) is not None:
            return found
    return getattr(owner, key)  # declared by the graph; somebody parametrized it since

def submodule(head: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; unlike `get_submodule` also where a method has the name of a module (``half``)."""
    module: Any = head
    for key in name.split(".") if name else ():
        module = module._modules[key]
    return module  # type: ignore[no-any-return]

def construct(graph: Any, *, budget: Budget | None = None) -> nn.Module:
    """Build the head of an untrusted graph: parse, audit, construct; nothing of it is ever run as code.

    The result has the original's state-dict keys, shapes and dtypes; its weights are arbitrary until they are loaded.
    It is made on the ambient default device; embedded tensors are on the CPU and follow ``.to()``. `GraphError` for
    anything that a save would not have written, or more than the budget allows, where no `skip_init` around it counts.
    """
    parsed = parse_graph(graph)
    try:
        with within_budget(budget or Budget.default()):
            return _assemble(parsed)
    except ConfigError as error:
        raise GraphError(f"the stored head is refused: {error}") from error

def _assemble(graph: Graph) -> nn.Module:
    built: dict[str, nn.Module] = {}
    for spec in graph.modules:
        module = built[spec.of] if spec.kind == "same" else _construct(graph, spec)
        built[spec.name] = module
        if spec.name:
            parent, _, key = spec.name.rpartition(".")
            built[parent]._modules[key] = module
    root = built[""]
    _finish(graph, root)
    _check_steps(graph, root)
    return root

def _check_steps(graph: Graph, root: nn.Module) -> None:
    """Bound what one forward runs: calls of operations, and the modules inside the layers that are called."""
    weights: dict[str, int] = {}
    for mode, program in graph.programs.items():
        steps = 0
        for node in program.nodes:
            if node.kind == "call" and node.target not in weights:
                weights[node.target] = sum(1 for _ in submodule(root, node.target).modules())
            steps += weights[node.target] if node.kind == "call" else 1
        if steps > MAX_STEPS:
            where = "training" if mode else "evaluation"
            raise GraphError(f"the stored head runs {steps} calls and modules in {where}, more than {MAX_STEPS}")

def _construct(graph: Graph, spec: ModuleSpec) -> nn.Module:
    if spec.kind == "layer":
        return build_layer(spec.of, spec.args)
    if spec.kind == "container":
        return CONTAINERS[spec.of]()
    module = GraphHead(graph) if spec.name == "" else HeadPart()
    try:
        made = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in (*spec.params, *spec.buffers)}
    except RuntimeError as error:
        raise GraphError(f"module {shown(spec.name)}: its tensors cannot be made: {error}") from None
    for name, _, dtype in spec.params:
        grad = dtype.is_floating_point or dtype.is_complex
        module._parameters[name] = nn.Parameter(made.pop(name), requires_grad=grad)
    module._buffers.update(made)
    for name, value in spec.values:
        module._buffers[name] = value.clone()
        module._non_persistent_buffers_set.add(name)
    return module

def _finish(graph: Graph, root: nn.Module) -> None:
    """Dtypes, ties, frozen parameters and held modes, by names that must exist."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(root.named_buffers(remove_duplicate=False))}
    dtypes = dict(graph.dtypes)
    _all_known(dtypes, tensors, "dtypes")
    declared = {f"{spec.name}.{item[0]}".lstrip(".") for spec in graph.modules for item in spec.params + spec.buffers}
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if tensor.dtype != dtype and name not in declared:
            _replace(root, name, tensor.detach().to(dtype))
    for name, order in graph.layouts:
        _all_known([name], tensors, "layouts")
        if tensors[name].dim() != len(order):
            raise GraphError(f"layouts: {shown(name)} has {tensors[name].dim()} dimensions, not {len(order)}")
    if (graph.ties or graph.layouts) and not isinstance(root, GraphHead):
        raise GraphError("ties and layouts need a head with a forward of its own")
    for alias, first in graph.ties:
        _all_known([alias, first], tensors, "ties")
        if tensors[alias].shape != tensors[first].shape or (alias in parameters) != (first in parameters):
            raise GraphError(f"ties: {shown(alias)} and {shown(first)} are not alike")
    if isinstance(root, GraphHead):
        root.settle()
    parameters = dict(root.named_parameters(remove_duplicate=False))
    _all_known(graph.frozen, parameters, "frozen")
    for name in graph.frozen:
        parameters[name].requires_grad_(False)
    modules = dict(root.named_modules(remove_duplicate=False))
    _all_known([name for name, _, _ in graph.held], modules, "held")
    buffers = dict(root.named_buffers(remove_duplicate=False))
    for program in graph.programs.values():
        _all_known(program.tensors, tensors, "a call of the forward")
        _all_known([node.target for node in program.nodes if node.kind == "write"], buffers, "a write of the forward")

def _all_known(names: Any, known: dict[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            raise GraphError(f"{where}: the head has no {shown(name)}")

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

"""A tower's head: the built-in ones, and those that a config stores, built again."""

# `config.head["form"]` of heads that are not stored: one that lives in memory only, until saving finds a form for it,
# and one that a subclass of the tower makes itself.
LIVE = "live"
SUBCLASS = "subclass"
# The source of the head's class is stored beside the weights (`heads/source_file.py`).
CODE = "code"

HEAD_CODE_FILE = "head_code.py"

def builtin_head(config: TimmTowerConfig) -> nn.Sequential:
    """The head that pool and proj name: `[B, num_features]` -> `[B, embed_dim]`; tokens and maps keep their dimensions.

    Weight keys are open_clip's (`pool.*`, `proj.weight`, `mlp.fc1.weight`). `ConfigError` where a width is missing.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    attention = config.pool in ATTENTION_POOLS
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; build a tower from it first")
    width, embed_dim = config.num_features, config.embed_dim or 0
    if not embed_dim and (attention or config.proj in ("linear", "mlp")):
        raise ConfigError(
            f"embed_dim=None: pool={config.pool!r} with proj={config.proj!r} needs a width of the embedding"
        )
    if config.pool == "abs_attn":
        if config.feat_size is None:
            raise ConfigError("feat_size=None: pool='abs_attn' needs the height and width of the feature map")
        layers["pool"] = AttentionPool2d(width, feat_size=tuple(config.feat_size), out_features=embed_dim)  # type: ignore[arg-type]
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

def rebuild_head(spec: dict[str, Any]) -> nn.Module:
    """`config.head` -> a head whose weights are still to come. The spec may be anybody's: no code of it runs.

    `HeadError` for an unknown form, a graph that the audit refuses, a head that only its own code can make.
    """
    form = spec.get("form")
    if form == "graph":
        return construct(spec.get("graph"))
    if form == "registered":
        raise HeadError(
            f"the head is a class that was registered as {shown(spec.get('name'))}: install hf_timm_tower, and import "
            "the module that registers it"
        )
    if form == CODE:
        raise HeadError("the head is stored as code, which runs only under trust_remote_code=True")
    raise HeadError(f"config.head: unknown form {shown(form)}; this version reads 'graph', 'registered' and 'code'")

def code_file(config: dict[str, Any]) -> str | None:
    """Name of the source file of a head that is stored as code, None for every other; `FormatError` for other names."""
    head = config.get("head")
    if not isinstance(head, dict) or head.get("form") != CODE:
        return None
    name: Any = head.get("file")
    if name != HEAD_CODE_FILE:
        raise FormatError(f"config.head.file={shown(name)}: a head of code is stored in {HEAD_CODE_FILE}")
    return HEAD_CODE_FILE

# --- heads that are stored as code

def refuse_code(spec: dict[str, Any], *, repo: str, revision: str | None) -> HeadError:
    """The error for a head of code that is not trusted: `config.head` of a repository, or of a folder (no revision)."""
    file = code_file({"head": spec})
    at = f" at revision {shown(revision)[1:-1]}" if revision else ""
    again = f'"{shown(repo)[1:-1]}"' + (f', revision="{shown(revision)[1:-1]}"' if revision else "")
    return HeadError(
        f"the head of {shown(repo)[1:-1]}{at} is the class {shown(spec.get('class'))}, stored as code in {file}. "
        f"Code of a repository is not run unless you say so, and nothing was run. Read {file}{at} first; then either\n"
        f"  - from_pretrained({again}, trust_remote_code=True) runs it, or\n"
        f"  - from_pretrained({again}, custom_head=...) takes a head of your own, checked against the weights"
    )

def check_code_spec(spec: Any) -> None:
    """Refuse a `config.head` that is none of a head of code by a `HeadError` that says what it must have."""
    fits = (
        spec.get("file") == HEAD_CODE_FILE
        and isinstance(spec.get("class"), str)
        and spec["class"].isidentifier()
        and isinstance(spec.get("sha256"), str)
        and isinstance(spec.get("kwargs"), dict)
        and isinstance(spec.get("frozen", []), list)
        and spec.get("dtype", "float32") in FLOAT_DTYPES
    )
    if not fits:
        raise HeadError("config.head: a head of code has a file, class, kwargs and sha256")

def make_code_head(spec: dict[str, Any], place: str, **download: Any) -> nn.Module:
    """The head of code that `config.head` of a folder or repository stores: its file runs, where that is trusted.

    `HeadError` where it is not the file that was saved, or its code fails. `download`: `revision`, `token` and so on.
    """
    check_code_spec(spec)
    file = f"{shown(place)[1:-1]}: {HEAD_CODE_FILE}"
    path = cached_file(place, HEAD_CODE_FILE, **download)
    if path is None or hashlib.sha256(Path(path).read_bytes()).hexdigest() != spec["sha256"]:
        raise HeadError(f"{file} is not the code that this tower was saved with")
    cls: Any = get_class_from_dynamic_module(f"{Path(HEAD_CODE_FILE).stem}.{spec['class']}", place, **download)
    try:
        return head_of_class(cls, spec)
    except Exception as error:  # a constructor may raise anything
        raise HeadError(f"{file}: the head in it fails: {type(error).__name__}: {error}") from error

def head_of_class(cls: type[nn.Module], spec: Mapping[str, Any]) -> nn.Module:
    """A head of code from its class: constructor arguments, dtype, and which parameters were made not to train."""
    head = cls(**spec["kwargs"])
    if "dtype" in spec:
        head.to(DTYPES[spec["dtype"]])
    if "frozen" in spec:
        frozen = set(map(str, spec["frozen"]))
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return head

# --- image_processing.py

"""The preprocess block of a config, timm's evaluation steps made from it, and the facts of `preprocessor_config.json`.

The block is what timm's `pretrained_cfg` says of preprocessing, and `padding` (None, or `{"mode": "square", "color":
[...]}`: first the image is centred on a square of its longer side), `value_range` (`[lo, hi]`, what black and white are
before mean and std) and `channel_order` (`BGR`: reversed last; mean, std and color are R, G, B in either case).
"""

READER_MODULE = "modeling_timm_tower"  # which travels with a tower and holds the classes, for transformers' `auto_map`
PROCESSOR_TYPE = "TimmTowerImageProcessor"
# A list: of a plain name transformers makes a video processor's, and asks every pipeline's user to trust its code.
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": [f"{READER_MODULE}.{PROCESSOR_TYPE}", None]}

INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "lanczos": 1}  # PIL's numbers
CROP_MODES = ("center", "squash", "border")
PIL_MODES = {1: "L", 3: "RGB"}
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # PIL's, for damaged files
# Three channels of 8192 x 8192, 0.8 GB as float32; the largest size in timm is 1024. Padded are bytes.
MAX_RESIZED_VALUES = 3 * 2**26
MAX_PADDED_SIDE = 2**14
_BLOCK_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "padding", "channel_order", "value_range")
_FILE_NAMES = {key: {"mean": "image_mean", "std": "image_std"}.get(key, key) for key in _BLOCK_KEYS}
PROCESSOR_FACTS = ("size", *_FILE_NAMES.values())
# Keys that transformers itself writes into a processor's file.
PROCESSOR_KEYS = frozenset({"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"})
STANDARD_KEYS = tuple("do_resize resample do_center_crop do_rescale rescale_factor do_normalize do_convert_rgb".split())

def check_preprocess(block: dict[str, Any], in_chans: int) -> None:
    """Refuse a preprocess block that cannot be used by a `ConfigError` that names the entry and its value."""
    if set(block) != set(_BLOCK_KEYS):
        missing, unknown = set(_BLOCK_KEYS) - set(block), set(block) - set(_BLOCK_KEYS)
        raise ConfigError(f"preprocess: missing {sorted(missing)}, unknown {shown(sorted(unknown, key=str))}")
    order, padding, bounds = block["channel_order"], block["padding"], block["value_range"]
    square = isinstance(padding, dict) and set(padding) == {"mode", "color"} and padding["mode"] == "square"
    padded = padding is None or (square and _are_numbers(padding["color"], in_chans, 0, 255, int))
    rules = {
        "interpolation": (block["interpolation"] in tuple(INTERPOLATIONS), f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (block["crop_mode"] in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
        "crop_pct": (_are_numbers([block["crop_pct"]], 1, 0.05, 2), "a number from 0.05 to 2"),
        "mean": (_are_numbers(block["mean"], in_chans), f"{in_chans} numbers from -1e6 to 1e6"),
        "std": (_are_numbers(block["std"], in_chans, 1e-6), f"{in_chans} numbers from 1e-6 to 1e6"),
        "padding": (padded, f"None or {{'mode': 'square', 'color': [{in_chans} whole numbers from 0 to 255]}}"),
        "channel_order": (order == "RGB" or (order == "BGR" and in_chans == 3), f"RGB or BGR, with {in_chans=}"),
        "value_range": (_are_numbers(bounds, 2) and bounds[1] - bounds[0] >= 1e-6, "[lo, hi], lo < hi; timm's: [0, 1]"),
    }
    for key, (fits, expected) in rules.items():
        if not fits:
            raise ConfigError(f"preprocess.{key}={shown(block[key])}: expected {expected}")

# The bounds are those of mean, std and value_range: 16-bit images and Hounsfield units fit in.
def _are_numbers(values: Any, length: int, least: float = -1e6, most: float = 1e6, kind: Any = (int, float)) -> bool:
    return (isinstance(values, list) and len(values) == length) and all(
        isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most for value in values
    )

@dataclass(frozen=True)
class PadToSquare:
    """PIL image, or tensor `[..., C, H, W]` -> the same in the middle of a square of its longer side, in this color."""

    color: tuple[int, ...]

    def __call__(self, image: Any) -> Any:
        return _padded(image, _size_after(self, image), self.color)

@dataclass(frozen=True)
class NormalizeRange:
    """Float tensor `[..., C, H, W]` in [0, 1] -> scaled to [lo, hi] and normalised, and the channels reversed."""

    normalize: Normalize
    lo: float
    hi: float
    reverse: bool

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.normalize(images * (self.hi - self.lo) + self.lo)
        return made.flip(-3) if self.reverse else made

def timm_arguments(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """What `timm.data.create_transform` is told; `ConfigError` where that is images of too many pixels, or of none."""
    channels, (lo, hi) = len(block["mean"]), block["value_range"]
    resized = [math.floor(side / block["crop_pct"]) for side in size]
    if 0 in resized or channels * max(math.prod(resized), math.prod(size)) > MAX_RESIZED_VALUES:
        raise ConfigError(
            f"image_size={list(size)} with crop_pct={block['crop_pct']}: {channels} channels would be resized to "
            f"{resized[0]} x {resized[1]}; one pixel to {MAX_RESIZED_VALUES} values (8192 x 8192 in colour) are taken"
        )
    # timm makes colours of the mean (of borders, and in augmentation), which it takes to be in [0, 1].
    return {
        "input_size": (channels, *size),
        **{key: block[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": tuple((value - lo) / (hi - lo) for value in block["mean"]),
        "std": tuple(value / (hi - lo) for value in block["std"]),
    }

def with_tower_steps(steps: Sequence[Any], block: dict[str, Any]) -> list[Any]:
    """timm's steps, with padding, range and order of the channels where the block says other than timm."""
    (lo, hi), padding, reverse = block["value_range"], block["padding"], block["channel_order"] == "BGR"
    normalize = Normalize(mean=torch.tensor(block["mean"]), std=torch.tensor(block["std"]))
    own = NormalizeRange(normalize, lo, hi, reverse) if (lo, hi) != (0, 1) or reverse else normalize
    padded = [] if padding is None else [PadToSquare(tuple(padding["color"]))]
    return [*padded, *(own if isinstance(step, Normalize) else step for step in steps)]

def run_steps(steps: Sequence[Any], image: Any) -> Any:
    """timm's steps on a PIL image -> float32 `[C, height, width]`; on `[B, C, H, W]` torch resizes instead of PIL.

    `ArgumentError` where the image becomes too large, or nothing, on its way, or torch has no such interpolation.
    """
    for step in steps:
        size = _size_after(step, image)
        if size is not None:
            channels, height, width = tv_functional.get_dimensions(image)
            pads = isinstance(step, PadToSquare)
            if 0 in size or channels * math.prod(size) > (
                channels * MAX_PADDED_SIDE**2 if pads else MAX_RESIZED_VALUES
            ):
                made = f"it would be {'padded' if pads else 'resized'} to {size[0]} x {size[1]}"
                raise ArgumentError(f"an image of {height} x {width} pixels, too large or too unequal: {made}")
        if not isinstance(image, torch.Tensor):
            image = step(image)
        elif isinstance(step, MaybeToTensor):
            image = image if image.is_floating_point() else image.float().div(255)
        elif size is not None and isinstance(step, (Resize, ResizeKeepRatio)):
            image = _resized(image, size, step.interpolation)
        else:  # timm pads tensors with one number only
            image = step(_padded(image, size, step.fill) if isinstance(step, CenterCropOrPad) else image)
    return image

def _size_after(step: Any, image: Any) -> Any:
    """Height and width that a step resizes or pads an image to, None of other steps."""
    if not isinstance(step, (PadToSquare, Resize, ResizeKeepRatio, CenterCropOrPad)):
        return None
    _, height, width = tv_functional.get_dimensions(image)
    if isinstance(step, PadToSquare):
        return [max(height, width)] * 2
    if isinstance(step, CenterCropOrPad):
        return [max(height, step.size[0]), max(width, step.size[1])]
    if isinstance(step, ResizeKeepRatio):
        return step.get_params(image, step.size, step.longest)  # type: ignore[no-untyped-call]
    if not isinstance(step.size, int):
        return list(step.size)
    longer = int(step.size * max(height, width) / min(height, width))
    return [step.size, longer] if height <= width else [longer, step.size]

def _padded(image: Any, size: Any, color: Any) -> Any:
    """PIL image, or tensor `[..., C, H, W]`, in the middle of this height and width."""
    _, height, width = tv_functional.get_dimensions(image)
    high, wide, fill = size[0] - height, size[1] - width, list(color)
    if isinstance(image, torch.Tensor):
        fill = [min(max(value, 0), 255) / (255 if image.is_floating_point() else 1) for value in color]
    return tv_functional.pad(image, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=fill)

def _resized(images: torch.Tensor, size: Sequence[int], mode: InterpolationMode) -> torch.Tensor:
    (rows, columns), (height, width) = size, images.shape[-2:]
    if mode == InterpolationMode.NEAREST:
        return images[..., _nearest(height, rows), :][..., _nearest(width, columns)]
    try:
        # As PIL does: rows first, then columns, and what bicubic and lanczos overshoot is cut after each of them. uint8
        # is also rounded in between, as PIL's is, where torch has no kernel of its own for it.
        for target in ([height, columns], [rows, columns]):
            images = tv_functional.resize(images, target, interpolation=mode, antialias=True)
            images = images.clamp(0, 1) if images.is_floating_point() else images
    except (NotImplementedError, ValueError) as error:
        raise ArgumentError(f"torch cannot resize tensors by {mode.value!r}: pass images or uint8 arrays") from error
    return images

def _nearest(before: int, after: int) -> list[int]:
    """The pixels that PIL takes: it adds up the step in double precision, where torch's modes multiply in single."""
    positions = accumulate(repeat(before / after, after - 1), initial=before / after * 0.5)
    return [min(int(position), before - 1) for position in positions]

def load_pixels(image: Image.Image) -> None:
    """Read a PIL image to its end; `ArgumentError` where it has no pixels, or its file is damaged."""
    if 0 in image.size:
        raise ArgumentError(f"an empty image, of {image.height} x {image.width} pixels")
    try:
        image.load()
    except UNREADABLE as error:
        raise ArgumentError(f"the image cannot be read: {shown(str(error))}") from error

def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image in the mode of the tower, as timm's datasets have it: `image.convert("RGB")`, "L" for one channel.

    So transparency is dropped; 16-bit and floating point images are clipped to 255, with a warning where that shows.
    `ArgumentError` where no mode has so many channels, or the image is empty or damaged.
    """
    if channels not in PIL_MODES:
        raise ArgumentError(f"a PIL image, but the tower takes {channels} channels: pass arrays or tensors")
    load_pixels(image)
    try:
        if image.mode.startswith(("I", "F")):
            extrema: Any = image.getextrema()
            if not 0 <= extrema[0] <= extrema[1] <= 255 or (image.mode == "F" and extrema[1] <= 1):
                found = f"an image of mode {image.mode} with values from {extrema[0]} to {extrema[1]}"
                warnings.warn(
                    f"{found}: PIL's convert clips what is not from 0 to 255; scale it to 8 bits", stacklevel=2
                )
        return image if image.mode == PIL_MODES[channels] else image.convert(PIL_MODES[channels])
    except ValueError as error:  # 16 bits with the high byte first, as TIFF may have them
        raise ArgumentError(f"an image of mode {image.mode}, which PIL cannot convert; scale it to 8 bits") from error

def completed_preprocess(config: TimmTowerConfig) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]` of a config; `ConfigError` where it has none to use."""
    if config.preprocess is None or config.image_size is None:
        raise ConfigError("the config has no preprocess block yet: build a tower from it first")
    check_preprocess(config.preprocess, config.in_chans)
    return config.preprocess, check_size("image_size", config.image_size)

def facts_of(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocess block and `[height, width]` under their names in `preprocessor_config.json`."""
    named = {name: _plain_fact(block[key]) for key, name in _FILE_NAMES.items()}
    return {"size": {"height": size[0], "width": size[1]}, **named}

def block_of(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]`; `ConfigError` names the fact that is missing or wrong."""
    if missing := [name for name in PROCESSOR_FACTS if name not in facts]:
        raise ConfigError(f"{PROCESSOR_TYPE}: {', '.join(missing)} missing")
    block, size = {key: _plain_fact(facts[name]) for key, name in _FILE_NAMES.items()}, facts["size"]
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        size = [size["height"], size["width"]]
    if not isinstance(block["mean"], list) or not 1 <= len(block["mean"]) <= MAX_IN_CHANS:
        raise ConfigError(f"image_mean={shown(block['mean'])}: expected a list with a number for each channel")
    check_preprocess(block, len(block["mean"]))
    return block, check_size("size", size)

def _plain_fact(value: Any) -> Any:
    """What JSON gives back: lists for tuples, and nothing shared with the config."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return {key: _plain_fact(item) for key, item in value.items()} if hasattr(value, "items") else value

def standard_keys(block: dict[str, Any]) -> dict[str, Any]:
    """How others (transformers.js, ...) name steps, where that is exact; resizing only where it squashes to `size`."""
    lo, hi = block["value_range"]
    keys: dict[str, Any] = {"do_convert_rgb": True} if len(block["mean"]) == 3 else {}
    if block["channel_order"] == "RGB" and lo == 0:
        keys |= {"do_rescale": True, "rescale_factor": hi / 255, "do_normalize": True}
    if block["crop_mode"] == "squash" and block["crop_pct"] == 1 and block["padding"] is None:
        keys |= {"do_resize": True, "resample": INTERPOLATIONS[block["interpolation"]], "do_center_crop": False}
    return keys

# --- image_processor.py

"""`TimmTowerImageProcessor`: timm's evaluation transform as transformers' image processor.

PIL images, uint8 arrays, paths and URLs give, bit for bit, what timm's transform gives for `image.convert("RGB")` ("L"
for one channel). Tensors and floats are resized by torch: before mean and std at most 2 of 255 away from that (0 for
nearest; 11 where an image is squashed to less than a fifth of its height, as Pillow then resizes columns first), 0.36
in the mean, from a fifth to three times the size (`scripts/bench_image_processor.py`). Its imports take a second.
"""

# What a call takes beside the images. transformers' processors sort their keywords by these names.
class TimmTowerImagesKwargs(TypedDict, total=False):
    return_tensors: str | None
    device: str | torch.device | None
    input_data_format: str | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    do_convert_rgb: bool | None

class TimmTowerImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` for a tower. The attributes are the arguments; set, they hold from the next call on.

    `ConfigError` where an argument is wrong, missing or unknown.

    Args:
        size: Of the result in pixels: `{"height": ..., "width": ...}`, a pair, or an int for a square.
        interpolation, crop_pct, crop_mode, padding, channel_order, value_range: As in the config's preprocess block.
        image_mean, image_std: A number for each channel; how many there are is the tower's `in_chans`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' declaration
    valid_kwargs = TimmTowerImagesKwargs  # type: ignore[assignment]  # narrower than the base's on purpose

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        facts = {"padding": None, "channel_order": "RGB", "value_range": [0.0, 1.0], **facts}
        block, size = block_of(facts)
        checked, known = facts_of(block, size), standard_keys(block)
        for name in sorted(facts.keys() - checked.keys() - PROCESSOR_KEYS):
            if name not in known or facts[name] != known[name]:
                near = did_you_mean(name, PROCESSOR_FACTS)
                expected = f"should be {known[name]!r}" if name in known else f"is unknown{near}"
                raise ConfigError(f"{type(self).__name__}: {shown(name)}: {shown(facts[name])} {expected}")
        for name, value in checked.items():
            setattr(self, name, value)

    @classmethod
    def from_tower_config(cls, config: TimmTowerConfig) -> "TimmTowerImageProcessor":
        """The processor of a tower; `ConfigError` where the config is not completed: build a tower from it first."""
        return cls(**facts_of(*completed_preprocess(config)))

    @classmethod
    def get_image_processor_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `FolderError`, `FormatError` where the file is missing or damaged."""
        with file_errors():
            found, rest = super().get_image_processor_dict(*args, **kwargs)
            return dict(**found), rest

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': keywords that are facts override the file's, others are what `pipeline` hands to everyone.

        `size` may be named `image_size`, as `pipeline(..., model_kwargs={"image_size": 384})` names it to the model.
        `ArgumentError` where a keyword looks like a fact misspelt, or belongs into the call.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        if "image_size" in kwargs:
            if "size" in kwargs:
                raise ArgumentError(f"{cls.__name__}: image_size is another name of size; give one of them")
            kwargs["size"] = kwargs.pop("image_size")
        given = {name: kwargs.pop(name) for name in PROCESSOR_FACTS if name in kwargs}
        for name in kwargs:
            if name in ("mean", "std", *STANDARD_KEYS) or did_you_mean(name, PROCESSOR_FACTS, 0.75):
                near = did_you_mean(name, PROCESSOR_FACTS)
                raise ArgumentError(f"{cls.__name__}: unknown {name}{near}; steps are left out in the call")
        processor = cls(**image_processor_dict)
        processor = cls(**{**facts_of(*processor._block()), **given}) if given else processor
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds."""
        (block, size), kind = self._block(), type(self).__name__
        named = {"image_processor_type": kind, "auto_map": dict(PROCESSOR_AUTO_MAP)}
        return {**facts_of(block, size), **standard_keys(block), **named}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`; it names the class, except beside a tower that has no code."""
        path, content = Path(json_file_path), self.to_dict()
        with suppress(OSError, ValueError, RecursionError, TypeError, LookupError):  # no config, or not a tower's
            beside = json.loads(path.with_name("config.json").read_bytes())
            if beside["model_type"] == TimmTowerConfig.model_type and "auto_map" not in beside:
                del content["image_processor_type"], content["auto_map"]
        path.unlink(missing_ok=True)  # a link is replaced, what it points to stays
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        input_data_format: str | None = None,
        **steps: bool | None,
    ) -> BatchFeature:
        """Preprocess one image or a list of them, which may hold further lists.

        Args:
            images: PIL images; paths and URLs, turned upright by their EXIF data; numpy arrays `[H, W]`, `[H, W, C]`,
                `[C, H, W]` or a batch, uint8 or floats in [0, 1], and uint16 or int32 where they are grey; tensors
                `[C, H, W]` or `[B, C, H, W]`, uint8 or floats in [0, 1].
            return_tensors: `"pt"` or `"np"`: one array of the batch; None: a list of tensors `[C, height, width]`.
            device: Where the tensor path runs and where the result is; by default each image's own.
            input_data_format: `channels_first` or `channels_last`; by default tensors have their channels first, and
                arrays where their shape shows them.
            steps: transformers' names of steps, taken where they say what is done. `do_resize=False`: the images have
                the tower's size already. `do_rescale=False`: they are floats. `do_convert_rgb=False`: none need be.

        Returns:
            `pixel_values`: `[B, C, height, width]`, float32.

        Raises:
            ArgumentError: an image, or a keyword, that cannot be used.
            ConfigError: an attribute has been set to what cannot be used.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ArgumentError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ArgumentError(f"input_data_format={input_data_format!r}: not 'channels_first' or 'channels_last'")
        call = _Call(*self._block(), device, input_data_format, steps)
        done = [made for image in call.opened(images) for made in call.pixels(image)]
        if not done:
            raise ArgumentError("no images: expected one at least")
        batch: Any = done if return_tensors is None else torch.stack(done)
        return BatchFeature({"pixel_values": batch.cpu().numpy() if return_tensors == "np" else batch})

    def _block(self) -> tuple[dict[str, Any], list[int]]:
        """The attributes as they are now, checked again: they may have been set."""
        return block_of({name: getattr(self, name) for name in PROCESSOR_FACTS})

def _opened_source(source: str) -> Image.Image:
    """The image of a path, a URL or base64 text, upright and in its own mode: transformers' `load_image` clips it."""
    try:
        if source.startswith(("http://", "https://")):
            with urlopen(Request(source, headers={"User-Agent": "transformers"}), timeout=60) as response:
                image = Image.open(BytesIO(response.read()))
        elif os.path.isfile(source):
            image = Image.open(source)
        else:
            text = source.partition(",")[2] if source.startswith("data:image/") else source
            image = Image.open(BytesIO(base64.b64decode(text, validate=True)))
        return ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise ArgumentError(f"{shown(source)}: no path, URL or base64 text of an image: {shown(str(error))}") from error

class _Call:
    """One call of the processor: every way in -> PIL images and batches of tensors -> `[C, height, width]` tensors."""

    def __init__(self, block: Any, size: list[int], device: Any, layout: str | None, given: dict[str, Any]) -> None:
        self.size, self.channels, self.device, self.layout = size, len(block["mean"]), device, layout
        self.given = {name: value for name, value in given.items() if value is not None}
        self.steps = with_tower_steps(create_transform(**timm_arguments(block, size)).transforms, block)
        self.whole = standard_keys(block).get("do_center_crop") is False  # nothing is cropped
        if self.given.get("do_resize") is False:
            sized = [isinstance(step, MaybeToTensor) for step in self.steps].index(True)
            self.steps, self.whole = self.steps[sized:], True

    def opened(self, image: Any, depth: int = 0) -> Iterator[Image.Image | torch.Tensor]:
        """Whatever was given -> PIL images, and tensors `[B, C, H, W]` that are not yet checked."""
        if isinstance(image, (list, tuple)):
            if depth == 4:
                raise ArgumentError("images: lists within lists, more than 4 deep")
            for one in image:
                yield from self.opened(one, depth + 1)
        elif isinstance(image, (str, os.PathLike)):
            yield _opened_source(os.fspath(image))
        elif isinstance(image, Image.Image):
            yield image
        elif isinstance(image, np.ndarray):
            yield from map(self._of_array, image if image.ndim == 4 else [image])
        elif isinstance(image, torch.Tensor):
            batch = image[None] if image.ndim == 3 else image
            yield batch.permute(0, 3, 1, 2) if self.layout == "channels_last" and batch.ndim == 4 else batch
        else:
            expected = "a PIL image, a numpy array, a torch tensor, a path or a URL"
            raise ArgumentError(f"an image of type {type(image).__name__}: expected {expected}")

    def _of_array(self, array: np.ndarray[Any, Any]) -> Image.Image | torch.Tensor:
        """One image; uint8 of one, three or four channels and deeper grey as PIL's, all else as a tensor."""
        counts, shape = {1, 3, 4} if self.channels in PIL_MODES else {1, self.channels}, array.shape
        first, last = self.layout == "channels_first", self.layout == "channels_last"
        if array.ndim == 2:
            array, first, last = array[:, :, None], False, True
        elif array.ndim == 3 and self.layout is None:
            first, last = shape[0] in counts, shape[-1] in counts
        if array.ndim != 3 or 0 in shape or first == last:
            raise ArgumentError(
                f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W], not empty, with C of {counts}; "
                "where C could be either side, pass input_data_format='channels_first' or 'channels_last'"
            )
        array = array.transpose(1, 2, 0) if first else array
        depth = {"uint8": (1, 3, 4), "uint16": (1,), "int32": (1,)}.get(array.dtype.name, ())
        if self.channels in PIL_MODES and array.shape[-1] in depth:
            pixels = array[:, :, 0] if array.shape[-1] == 1 else array
            return Image.fromarray(np.array(pixels, array.dtype.newbyteorder("=")))
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ArgumentError(f"an array of {array.dtype}: expected uint8, or floating point in [0, 1]")
        kind = np.float32 if array.dtype.kind == "f" else np.uint8
        return torch.from_numpy(np.array(array.transpose(2, 0, 1), kind))[None]

    def pixels(self, image: Image.Image | torch.Tensor) -> Iterator[torch.Tensor]:
        """An image `[C, H, W]`, or a batch `[B, C, H, W]` -> `[C, height, width]` each."""
        if isinstance(image, Image.Image):
            ours = in_channels(image, self.channels)
            self._check_steps([image.height, image.width], True, image.mode if ours is not image else None)
            yield run_steps(self.steps, ours).to(self.device)
        else:
            batch = _checked_tensor(image if self.device is None else image.to(self.device), self.channels)
            self._check_steps(list(batch.shape[-2:]), not batch.is_floating_point())
            yield from run_steps(self.steps, batch)

    def _check_steps(self, size: list[int], rescales: bool, converted: str | None = None) -> None:
        """Refuse a step that was asked for, or out, where an image of this `[H, W]` is treated otherwise."""
        takes = f"a call takes {', '.join(TimmTowerImagesKwargs.__annotations__)}; no other step is left out"
        usable = {
            "do_resize": ((True, size != self.size), f"the image is {size}, but the tower takes {self.size}"),
            "do_center_crop": ((True, not self.whole), takes),
            "do_rescale": ((rescales,), "uint8 and PIL images are divided by 255, floats are in [0, 1] already"),
            "do_convert_rgb": ((True, converted is not None), f"the image has mode {converted}"),
            "do_normalize": ((True,), takes),
        }
        for name, value in self.given.items():
            values, reason = usable.get(name, ((), takes))
            if value not in values:
                raise ArgumentError(f"TimmTowerImageProcessor: {name}={shown(value)} cannot be had: {reason}")

def _checked_tensor(images: torch.Tensor, channels: int) -> torch.Tensor:
    """A batch `[B, channels, H, W]`, uint8 or float32 in [0, 1]; grey is repeated for three channels."""
    if images.ndim == 4 and images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, channels, -1, -1)
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape or images.is_meta:
        raise ArgumentError(
            f"a tensor of shape {list(images.shape)}: expected {channels} channels first, [C, H, W] or [B, C, H, W], "
            "not empty; with channels last pass input_data_format='channels_last'"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ArgumentError(f"a tensor of {images.dtype}: expected uint8, or floating point in [0, 1]")
    images = images.float()
    least, most = (bound.item() for bound in images.detach().aminmax())
    if not (least >= 0 and most <= 1):
        found = f"a floating point tensor with values from {least:.4g} to {most:.4g}"
        raise ArgumentError(f"{found}: expected [0, 1], not yet normalised. Divide by 255 what goes to 255.")
    return images

# --- tower.py

"""A completed config -> a tower, and the one forward that every class of a tower uses."""

CLASSIFIER = "classifier"
"""Name of the classifier that an image classification model has on top of its tower, in modules and weight keys."""

@dataclass(frozen=True)
class HeadInput:
    """How the trunk's features become the head's input."""

    prefix: int | None = None  # number of prefix tokens for `token_avg`
    to_nchw: bool = False  # the trunk gives `[B, H, W, C]` and the head takes `[B, C, H, W]`
    per_position: bool = False  # the projection runs over the channels of every position of a `[B, C, H, W]` map

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
    """Trunk and head of a completed config, and nothing else: what a folder holds and what a save compares.

    A classifier on top of the embedding is stored beside it; `forward` leaves it out.
    """

    _tp_plan = _pp_plan = None  # transformers asks a `base_model` for these

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
    """A tower with fresh weights, in train mode, from a completed config alone, which is not changed.

    Args:
        config: Completed.
        with_classifier: Add the classifier of `config.num_labels` classes.
        make_head: Makes a head that is stored as code, and trusted; None refuses such heads.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """
    check_buildable(config)
    if config.num_features is None:
        raise ConfigError("num_features=None: the config is not completed; hf_timm_tower.TimmModel completes it")
    config = copy.deepcopy(config)
    trunk = create_trunk(config)
    if config.head is None:
        head: nn.Module = builtin_head(config)
    else:
        head = rebuild_head(config.head) if make_head is None else make_head()
    return Tower(config, trunk, head, make_classifier(config) if with_classifier else None)

def check_buildable(config: TimmTowerConfig) -> None:
    """Refuse a config that only its own class can build: `ConfigError`, `HeadError` say what is needed."""
    if config.tower_class is not None:
        raise ConfigError(
            f"this tower was saved by {shown(config.tower_class)}, a subclass of TimmModel that changes how it is "
            "built or run; transformers' classes cannot build it. Load it with that class's from_pretrained(...)."
        )
    if config.preprocess is not None:
        check_preprocess(config.preprocess, config.in_chans)  # timm is told it, and would raise what it likes
    if config.head is not None and config.head.get("form") in (LIVE, SUBCLASS):
        raise HeadError("the config says that there is a custom head, but not which: save the tower with its head")

def without_head(config: TimmTowerConfig) -> TimmTowerConfig:
    """The same trunk without a head: the config of a tower that gives what its trunk pools."""
    bare = copy.deepcopy(config)
    if config.frozen is not None:
        bare.frozen = {
            key: [name for name in names if f"{name}.".startswith("trunk.")] for key, names in config.frozen.items()
        }
    if config.proj is None and config.head is None and config.pool not in ATTENTION_POOLS:
        return bare  # the head is the trunk's own classifier
    bare.head, bare.proj, bare.proj_bias, bare.drop = None, "none", False, 0.0
    if config.pool in (*ATTENTION_POOLS, "token_avg"):
        bare.pool = "none"
        if config.pool == "token_avg" and config.num_features is not None:
            bare.num_features = config.num_features // 2
    bare.embed_dim = bare.num_features
    return bare

def make_classifier(config: TimmTowerConfig) -> nn.Module:
    """A fresh classifier `[B, embed_dim]` -> `[B, num_labels]`; nothing where the trunk's own gives the scores.

    `ConfigError` where the embedding has no width, or there are no labels.
    """
    if config.embed_dim is None:
        raise ConfigError(
            "a classifier needs an embedding of a known width; this tower's head gives a tuple, a dict or another rank"
        )
    if config.is_classifier:
        if config.num_labels != config.embed_dim:
            config.num_labels = config.embed_dim
        return nn.Identity()
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

    What a constructor computes (relative positions, rotary tables) is then the same everywhere. Also a decorator.
    """
    wanted = torch.get_default_dtype()
    # Only where it is needed: under a device context torch goes through Python at every call.
    with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(wanted)

# --- weights.py

"""Weights from a tower's files into a module: every key fits or nothing is touched; ties stay ties."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_INDEX_BYTES = 4 * 1024**2
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_WEIGHT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")
_PINNED_FIELDS = {"repo_id", "commit", "layout", "files", "unused"}
_MOST_FILES = 1000
_ALIGNMENT = 64  # bytes; what torch's CPU allocator aligns to
_STATE_METHODS = ("__setattr__", "state_dict", "load_state_dict", "_save_to_state_dict", "get_extra_state")
_STATE_LOADERS = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)  # the second reads old files too

@dataclass(frozen=True)
class StoredTower:
    """What a tower's folder holds, as far as loading needs it."""

    config: TimmTowerConfig
    weights: Mapping[str, torch.Tensor]  # on mapped memory; keys of a tie have one tensor object
    fingerprint: dict[str, Any] | None = None  # the JSON of `fingerprint.json`, where it was read

def read_weight_files(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Key -> tensor of a tower's weight files, which are in one folder with their index.

    Tensors are mapped; those at odd addresses are copied, since kernels may give other last bits for them. Keys that
    the index calls tied or shared hold one tensor. `FormatError` where a file is damaged, or the index does not fit.
    """
    where = files[0].with_name(INDEX_FILE)
    weight_map, metadata = read_index(where) if where.is_file() else (None, {})
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file}: not a safetensors file that can be read: {error}") from error
        if weight_map is not None:
            listed = {key for key, name in weight_map.items() if name == file.name}
            if odd := sorted(listed ^ tensors.keys()):
                raise FormatError(f"{file}: {len(odd)} keys are not where the index puts them, such as {shown(odd[0])}")
        found.update(tensors)
    found = _aligned(found)
    share_ties(found, metadata, str(where))
    return found

def share_ties(tensors: dict[str, torch.Tensor], metadata: Mapping[str, Any], where: str) -> None:
    """Let keys that an index calls tied (one parameter) or shared (one memory) hold one tensor.

    `FormatError` where it has something else than groups of known keys, or what they hold differs.
    """
    for kind in ("tied", "shared"):
        groups = metadata.get(kind, [])
        if not isinstance(groups, list) or not all(
            isinstance(group, list) and len(group) > 1 and all(isinstance(key, str) for key in group)
            for group in groups
        ):
            raise FormatError(f"{where}: metadata.{kind} must hold lists of two or more keys, found {shown(groups)}")
        keys = [key for group in groups for key in group]
        if odd := [key for key in keys if key not in tensors or keys.count(key) > 1]:
            raise FormatError(f"{where}: metadata.{kind} names {shown(odd[0])}, which is unknown or named twice")
        for first, *others in groups:
            for key in others:
                if not same_bits(tensors[first], tensors[key]):
                    raise FormatError(f"{where}: {shown(first)} and {shown(key)} are {kind} but differ")
                tensors[key] = tensors[first] if kind == "tied" else tensors[first].view(tensors[first].shape)

def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """`check_index` of a file, which must be a small one."""
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_INDEX_BYTES} are read")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if isinstance(index, dict) and not isinstance(index.get("metadata"), dict):
        raise FormatError(f"{path}: has no metadata, an object, which transformers asks for")
    return check_index(index, str(path))

def check_index(index: Any, where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """`weight_map` and `metadata` of an index; `FormatError` where it does not map keys to plain file names."""
    names, metadata = (index.get("weight_map"), index.get("metadata", {})) if isinstance(index, dict) else (None, None)
    if not isinstance(names, dict) or not names:
        raise FormatError(f"{where}: weight_map must be an object that maps each key to a file name")
    for name in set(map(str, names.values())):
        if not _WEIGHT_NAME.fullmatch(name):
            raise FormatError(f"{where}: {shown(name)} is not the plain name of a .safetensors file")
    if not isinstance(metadata, dict):
        raise FormatError(f"{where}: metadata must be an object, found {shown(metadata)}")
    return names, metadata

@dataclass(frozen=True)
class TrunkSource:
    """Where a trunk's weights are stored."""

    repo_id: str
    commit: str
    layout: Literal["tower", "timm"]  # whose keys the files have
    files: dict[str, str]  # file name -> SHA-256 of its bytes
    unused: tuple[str, ...] = ()  # keys that the trunk has no place for

    def to_json(self) -> dict[str, Any]:
        """What `config.trunk_source` holds."""
        return {**asdict(self), "unused": list(self.unused)}

    def named(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the files hold -> `trunk.*` -> tensor."""
        if self.layout == "tower":
            return {key: tensor for key, tensor in tensors.items() if key.startswith("trunk.")}
        return {f"trunk.{key}": tensor for key, tensor in tensors.items() if key not in self.unused}

def parse_trunk_source(spec: Any) -> TrunkSource:
    """`config.trunk_source` of an untrusted file; `ConfigError` names what is wrong with it."""
    if not isinstance(spec, dict) or set(spec) != _PINNED_FIELDS:
        raise ConfigError(f"trunk_source: expected {', '.join(sorted(_PINNED_FIELDS))}, found {shown(spec, 200)}")
    repo_id, commit, layout, files, unused = (spec[name] for name in ("repo_id", "commit", "layout", "files", "unused"))
    if not isinstance(repo_id, str) or not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ConfigError(
            f"trunk_source: expected a repository's id and a commit, found {shown(repo_id)} and {shown(commit)}"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"trunk_source.repo_id={shown(repo_id)}: not the id of a repository") from error
    if layout not in ("tower", "timm"):
        raise ConfigError(f"trunk_source.layout={shown(layout)}: expected 'tower' or 'timm'")
    if not isinstance(files, dict) or not 1 <= len(files) <= _MOST_FILES:
        raise ConfigError(f"trunk_source.files: expected 1 to {_MOST_FILES} file names with their SHA-256")
    for name, digest in files.items():
        if not _WEIGHT_NAME.fullmatch(name) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ConfigError(f"trunk_source.files: {shown(name)} is not a .safetensors file with its SHA-256")
    if not isinstance(unused, list) or not all(isinstance(key, str) for key in unused):
        raise ConfigError("trunk_source.unused: expected a list of keys")
    return TrunkSource(repo_id, commit, layout, dict(files), tuple(unused))

def fetch_pinned_trunk(source: TrunkSource, **access: Any) -> dict[str, torch.Tensor]:
    """`trunk.*` -> tensor of a trunk in another repository, at the pinned commit and with the pinned digests.

    `access`: `token`, `cache_dir` and so on. `HubError` where the repository cannot be read, `WeightsError` where a
    file there is not the one that was pinned.
    """
    repo_id, commit = source.repo_id, source.commit
    found: dict[str, torch.Tensor] = {}
    for name, digest in source.files.items():
        try:
            path = Path(hf_hub_download(repo_id, name, revision=commit, **access))
        except (OSError, ValueError, RuntimeError) as error:
            raise HubError(
                f"only the head is stored here; its trunk is stored in {repo_id} at commit {commit}, and {shown(name)} "
                f"could not be fetched: {error}"
            ) from error
        with open(path, "rb") as file:
            actual = sha_fileobj(file).hex()
        if actual != digest:
            raise WeightsError(
                f"{shown(name)} of {repo_id} at commit {commit} has SHA-256 {actual}, the head was published for "
                f"{digest}: it is another trunk, and the embedding would be another one"
            )
        found.update(load_file(path))
    return source.named(_aligned(found))

def _aligned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for key, tensor in tensors.items()}

def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes (NaN equals the same NaN; -0.0 is not 0.0)."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8).to("cpu") for t in (a, b))
    if all(each.numel() % 8 == each.storage_offset() % 8 == 0 for each in (one, other)):
        one, other = one.view(torch.int64), other.view(torch.int64)  # an eighth of the steps
    return torch.equal(one, other)

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
        dtype: Floating tensors are cast to it, computed buffers as `module.to(dtype)` does; None keeps each one's own.
        device: Where everything goes; None leaves it where it is.
        allow_missing: Keys that may be missing: those stay what they are.

    Raises:
        WeightsError: lists keys that are missing, unexpected, of another shape, or tied and different.
    """
    places = _places(module)
    if places is None:
        state = module.state_dict(keep_vars=True)
    else:  # the same in a fifth of the time
        state = {key: table[name] for key, (table, name) in places.items()}
    own_ties: dict[int, list[str]] = {}
    for key, tensor in state.items():
        own_ties.setdefault(id(tensor), []).append(key)
    full, differing = dict(tensors), list[str]()
    for keys in own_ties.values():
        if len(keys) > 1 and (given := [key for key in keys if key in full]):
            odd = [key for key in given[1:] if not same_bits(full[key], full[given[0]])]
            differing += [f"{key} and {given[0]}" for key in odd]
            full.update((key, full[given[0]]) for key in keys)
    if problems := _misfits(state, full, allow_missing, differing):
        raise WeightsError(
            f"{source}: the weights do not fit, nothing was loaded.\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nThe config that builds this tower and the weights must come from the same save."
        )
    memory: dict[Any, torch.Tensor] = {}  # one memory for one memory, also where it is copied
    moved: dict[tuple[int, bool], torch.Tensor] = {}  # one parameter for one tensor object
    values: dict[str, torch.Tensor] = {}
    for key, tensor in full.items():
        old = state[key]
        name = (id(tensor), isinstance(old, nn.Parameter))
        if name not in moved:
            new = tensor
            if device is not None or dtype is not None:
                view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
                cast = dtype if tensor.is_floating_point() else None
                new = memory.setdefault(view, tensor.detach().to(device=device, dtype=cast))
            moved[name] = nn.Parameter(new, requires_grad=old.requires_grad) if name[1] else new.detach()
        values[key] = moved[name]
    if places is None:
        _load_strictly(module, values, source)
    else:
        for key, value in values.items():
            table, leaf = places[key]
            table[leaf] = value
    if dtype is not None:
        buffers_as_timm(module, dtype)
    if device is not None:
        _move_computed_buffers(module, device)

def _places(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]] | None:
    """Key of the state dict -> the table of a module where its tensor is, and its name there.

    None where a state dict is made or loaded in another way than from and to these tables. A tower's own
    `_load_from_state_dict` is for state dicts of other models.
    """
    found: dict[str, tuple[dict[str, Any], str]] = {}
    plain: dict[type, bool] = {}  # by class: a trunk has hundreds of modules of a few
    for prefix, part in module.named_modules(remove_duplicate=False):
        kind = type(part)
        if kind not in plain:
            plain[kind] = all(getattr(kind, name) is getattr(nn.Module, name) for name in _STATE_METHODS)
        is_tower = not prefix and not part._parameters and not part._buffers
        if not plain[kind] or not (is_tower or kind._load_from_state_dict in _STATE_LOADERS):
            return None
        hooks = (part._state_dict_hooks, part._state_dict_pre_hooks, part._load_state_dict_pre_hooks)
        if any((*hooks, part._load_state_dict_post_hooks)):
            return None
        start, computed = f"{prefix}." if prefix else "", part._non_persistent_buffers_set
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and name not in computed:
                    found[start + name] = (table, name)
    return found

def _load_strictly(module: nn.Module, values: dict[str, torch.Tensor], source: str) -> None:
    module.load_state_dict(values, strict=False, assign=True)
    after = module.state_dict(keep_vars=True)
    if refused := [key for key, value in values.items() if after[key] is not value]:
        raise WeightsError(
            f"{source}: {_listed(refused)} did not reach the module: it overrides how attributes are set or a state "
            "dict is loaded, which a tower cannot use"
        )

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
        if type(expected) in (nn.Parameter, torch.Tensor) and expected.dtype == found.dtype:
            if expected.shape == found.shape:
                continue
        if not isinstance(expected, torch.Tensor):
            kinds.append(f"{key}: the module wants a {type(expected).__name__}, only tensors are stored")
        elif isinstance(expected, (UninitializedParameter, UninitializedBuffer)):
            continue  # a lazy module, which takes the shape it is given
        elif expected.shape != found.shape:
            shapes.append(f"{key}: found {list(found.shape)}, expected {list(expected.shape)}")
        elif expected.dtype != found.dtype and _number_kind(expected) != _number_kind(found):
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
    """A floating-point dtype, given as such or by name; `ArgumentError` where it is none."""
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(f"dtype={dtype!r} is not a floating-point dtype of torch or the name of one")
    return found

# --- computed_buffers.py

"""Buffers that no checkpoint holds, and memory, where transformers builds on the meta device."""

def computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that are not in the state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}"] = buffer
    return found

def put_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put buffers into the places of uninitialised ones, on the device of those."""
    moved: dict[int, torch.Tensor] = {}
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        device = owner._buffers[leaf].device  # type: ignore[union-attr]
        # One buffer that several modules hold stays one.
        owner._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device=device))

def align(module: nn.Module) -> None:
    """Copy what begins at odd places in memory to places that are multiples of 64 bytes.

    Another model's checkpoint is mapped by transformers as it is; kernels may give other last bits for such tensors.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.detach().clone()

def move_to_meta(module: nn.Module, dtype: torch.dtype) -> None:
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

# --- hidden_states.py

"""What a trunk's inner layers give, in the form that transformers has for it: hidden states and attention maps."""

HiddenStates = bool | int | Sequence[int] | None

# Classes of timm that compute softmax(q k) as a matrix and hand it to `attn_drop`, where they do not run fused.
_ATTENTION = {"Attention", "AttentionRope", "EvaAttention", "RelPosAttention", "WindowAttention"}
# Trunks that give `[B, C, H, W]` or tokens, and run their blocks on `[B, H, W, C]`.
_NHWC_INSIDE = {"PyramidVisionTransformerV2", "VisionTransformerSAM", "VOLO"}

def forward_hidden(
    trunk: nn.Module, images: Any, wanted: bool | int | Sequence[int]
) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    """Run a trunk on images `[B, in_chans, H, W]`, or a dict of patches, and keep what its layers give.

    Returns the trunk's features, and a tuple: what its stem gives, then each block or stage as timm's
    `forward_intermediates` has it. Tokens `[B, N, C]`, prefix tokens first, where the features are tokens; maps
    `[B, C, H, W]` elsewhere. `wanted` is True for all, or an index, or several: all other places are None.

    `ConfigError` where timm has no intermediates of this trunk, `ArgumentError` where there is no such index.
    """
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(f"{type(trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
    layers: Any = trunk.feature_info
    first, thread, taken = first_block(trunk), get_ident(), list[torch.Tensor]()
    stems = 0 if first is None else 1
    length = len(layers) + stems
    places = _chosen(wanted, length)

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not taken and get_ident() == thread:
            taken.extend(tensors_in((args, kwargs)))

    run: Any = trunk.forward_intermediates
    taken_apart = "return_prefix_tokens" in inspect.signature(run).parameters
    has_prefix = taken_apart and bool(getattr(trunk, "num_prefix_tokens", 0))
    extra: dict[str, Any] = {"return_prefix_tokens": True} if has_prefix else {}
    if isinstance(images, dict):
        extra["output_fmt"] = "NLC"  # patches of any aspect make no map
    indices = sorted({max(place - stems, 0) for place in places})
    with nullcontext() if first is None else first.register_forward_pre_hook(take, with_kwargs=True):
        features, found = run(images, indices=indices, **extra)
    as_tokens = isinstance(features, torch.Tensor) and features.ndim == 3
    states = dict(zip((index + stems for index in indices), found, strict=True))
    if stems and 0 in places:
        nearest = states[1][0] if has_prefix else states[1]
        states[0] = _stem_output(trunk, taken, layers[0]["num_chs"], None if as_tokens else nearest.shape[2:])
    return features, tuple(_in_form(states[n], as_tokens) if n in places else None for n in range(length))

def _chosen(wanted: Any, length: int) -> set[int]:
    if wanted is True:
        return set(range(length))
    indices = list(wanted) if isinstance(wanted, Sequence) else [wanted]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -length <= i < length for i in indices):
        raise ArgumentError(
            f"output_hidden_states={shown(wanted)}: expected True, or indices of the {length} hidden states of this "
            f"trunk, from {-length} to {length - 1}"
        )
    return {index % length for index in indices}

def first_block(trunk: nn.Module) -> nn.Module | None:
    """The module that takes what the trunk's stem gives; None where timm's first intermediate is the stem's own."""
    layers: Any = trunk.feature_info
    # blocks.0, blocks.1, ... and stage1, stage2, ... are of one kind; a stem is named otherwise: stem, stages.0, ...
    names = [layer["module"] for layer in layers[:2]]
    if len({name.rstrip("0123456789") for name in names}) > 1:
        return None
    modules, name = dict(trunk.named_modules()), names[0]
    if name not in modules:  # some lists of timm name a module otherwise than the model does
        name = next(each for each in modules if each.endswith(("blocks.0", "stages.0")))
    # The list may name the last block of each stage.
    block: nn.Module = next(modules[name.rpartition(".")[0]].children()) if "." in name else modules[name]
    while isinstance(block, nn.ModuleList):
        block = next(block.children())
    # A sequence that begins with the stem takes the image.
    own = next(trunk.parameters())
    if any(parameter is own for parameter in block.parameters()):
        return None
    # Gradient checkpointing runs the parts of a sequence and not the sequence.
    while type(block) is nn.Sequential and len(block):
        block = next(block.children())
    return block

def _stem_output(trunk: nn.Module, taken: list[torch.Tensor], width: int, grid: Sequence[int] | None) -> torch.Tensor:
    """Of what the first block took, the features; as a map where there is a `grid` of the first layer's."""
    state = next((each for each in taken if each.ndim > 2 and width in (each.shape[1], each.shape[-1])), taken[0])
    if state.ndim == 4:
        inside = getattr(trunk, "output_fmt", None) == "NHWC" or type(trunk).__name__ in _NHWC_INSIDE
        return state.permute(0, 3, 1, 2) if inside else state
    if grid is not None:
        patches = state[:, state.shape[1] - grid[0] * grid[1] :]
        return patches.transpose(1, 2).reshape(*patches.shape[::2], *grid)
    return state

def _in_form(state: Any, as_tokens: bool) -> torch.Tensor:
    patches, prefix = state if isinstance(state, tuple) else (state, None)
    if as_tokens and patches.ndim == 4:
        patches = patches.flatten(2).transpose(1, 2)
    return patches if prefix is None else torch.cat([prefix, patches], dim=1)

@contextmanager
def attention_maps(trunk: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what the attention layers of a trunk compute in a forward inside: `[B, heads, N, N]` each, after softmax.

    The list is filled when the block is left. `ConfigError` where there are no such layers of timm, or they run fused.
    """
    layers = {
        name: part
        for name, part in trunk.named_modules()
        if type(part).__name__ in _ATTENTION and hasattr(part, "attn_drop")
    }
    if not layers:
        raise ConfigError(f"output_attentions: {type(trunk).__name__} has no attention layers whose maps timm can give")
    if any(getattr(part, "fused_attn", False) for part in layers.values()):
        raise ConfigError(
            "output_attentions: fused attention computes no maps. Load with attn_implementation='eager', or call "
            "set_attn_implementation('eager')"
        )
    with eval_mode(trunk):  # it sets a mode and leaves it so
        hooks: Any = AttentionExtract(trunk, [f"{name}.attn_drop" for name in layers], method="hook").hooks
    maps = list[torch.Tensor]()
    try:
        yield maps
        maps += hooks.get_output(next(trunk.parameters()).device).values()
    finally:
        for handle in hooks._handles:
            handle.remove()

# --- forward.py

"""One forward of a tower as transformers asks for it: features, embedding, inner layers."""

@dataclass
class TimmTowerModelOutput(ModelOutput):
    """What `TimmTowerModel` gives.

    Args:
        last_hidden_state: The trunk's unpooled features, as timm's `forward_features` gives them: tokens
            `[B, N, C]` or a map in the trunk's own order; a list for CoaT, CrossViT and EfficientViM.
        pooler_output: The embedding `[B, embed_dim]`; the whole tuple or dict where a custom head gives one.
        hidden_states: What the stem gives, then each block or stage as timm's `forward_intermediates` has it: tokens
            `[B, N, C]`, prefix tokens first, where `last_hidden_state` is tokens, maps `[B, C, H, W]` elsewhere. None
            in the place of a layer that was not asked for.
        attentions: Attention maps after softmax, `[B, heads, N, N]` of each attention layer.
    """

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

def run_tower(
    model: Any,
    images: torch.Tensor | None,
    hidden: HiddenStates,
    attentions: bool | None,
    other_size: bool | None,
    pools: bool | None = True,
    patches: tuple[Any, ...] = (),
) -> tuple[Any, Any, Any, Any]:
    """The trunk's features, the embedding, and hidden states and attention maps where asked for."""
    if not isinstance(images, torch.Tensor) or any(each is not None for each in patches):
        raise ArgumentError(
            "expected images as pixel_values, a tensor, and nothing else; patches (patches, patch_coord, patch_valid) "
            "are taken where hf_timm_tower is installed"
        )
    trunk, images = model.trunk, prepared(model, images, other_size)
    hidden = model.config.output_hidden_states if hidden is None else hidden
    attentions = model.config.output_attentions if attentions is None else attentions
    states = None
    embedding = None
    with weights_in_place(trunk):
        with attention_maps(trunk) if attentions else nullcontext() as maps:
            # As in transformers an empty list or 0 asks for none.
            if hidden:
                features, states = forward_hidden(trunk, images, hidden)
            else:
                features = trunk.forward_features(images)
        if pools or pools is None:
            if model.steps == "features":
                pooled = features
            else:
                # Where the trunk's forward is more than these two steps, it runs whole: the embedding is what it gives.
                pooled = trunk.forward_head(features) if model.steps == "features, head" else trunk(images)
    if pools or pools is None:
        embedding = run_head(model.head, model._head_input, pooled)
    return features, embedding, states, None if maps is None else tuple(maps)

@contextmanager
def _hooked(trunk: Any, hook: Any) -> Iterator[None]:
    hook.pre_forward(trunk)
    try:
        yield
    finally:
        hook.post_forward(trunk, None)

def weights_in_place(trunk: nn.Module) -> Any:
    """A context in which the trunk's own parameters (class token, positions) are there, where accelerate offloads them.

    Its hook brings them for `trunk(...)` alone, and most of what runs of a trunk are other methods.
    """
    hook = getattr(trunk, "_hf_hook", None)
    return nullcontext() if hook is None else _hooked(trunk, hook)

def prepared(model: Any, images: torch.Tensor, other_size: bool | None = None) -> torch.Tensor:
    """The images as the trunk takes them; `ArgumentError` for whole numbers, or a size that it does not take."""
    model.follow_attn_implementation()
    if not images.is_floating_point():
        raise ArgumentError(
            f"pixel_values are {images.dtype}: expected floats as the image processor gives them, scaled and normalised"
        )
    found, own = list(images.shape[-2:]), model.config.image_size
    traits_of = getattr(timm.models, "get_model_traits", None)  # from timm 1.0.31 on
    # The trunk first: of one that takes any size, an export may leave the size open.
    if traits_of is not None and traits_of(model.trunk).get("fixed_input_size") and found != own:
        asked = "interpolate_pos_encoding=True: " if other_size else ""
        raise ArgumentError(
            f"{asked}pixel_values are {found[0]} x {found[1]}, but {type(model.trunk).__name__} takes images of "
            f"{own[0]} x {own[1]} pixels only. Load model and image processor with the same image_size=..., or build "
            "the tower with model_kwargs={'dynamic_img_size': True} where timm's trunk has that"
        )
    return images.to(model.dtype)

def wants_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)

def steps_of(trunk: nn.Module) -> str:
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

def can_checkpoint(trunk: nn.Module) -> bool:
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        trunk.set_grad_checkpointing(False)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True

# --- loading.py

"""What a `from_pretrained` of a tower knows while it runs, refuses, and says."""

@dataclass
class TowerLoading:
    """What a `from_pretrained` that is under way tells the steps inside it, and what they tell it."""

    place: str  # folder or repository
    download: Mapping[str, Any]  # how its files are found: `revision`, `token`, `cache_dir`, `subfolder`, ...
    trusts: bool  # code of the place may run
    keeps_dtypes: bool  # no dtype was asked for: every tensor keeps its own
    run_code: Callable[..., nn.Module] = make_code_head
    fresh: list[str] = field(default_factory=list)  # keys that are not in the files, and need not be
    left_out: list[str] = field(default_factory=list)  # keys in the files that this model needs no place for
    index: str | None = None  # where its index of weights is, if it has one
    stored: Any = None  # what was read

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
        """A head that is stored as code; `HeadError` where that is not trusted, or the code fails."""
        if not self.trusts:
            raise refuse_code(spec, repo=self.place, revision=self.download.get("revision"))
        return self.run_code(spec, self.place, **self.download)

    def refuse_damaged_index(self, commit: str | None) -> None:
        """Refuse, by `FormatError`, an index that does not map keys to names of safetensors files.

        Of a `commit`, that of a config which was loaded already, what is cached is not asked for again.
        """
        found = {"_commit_hash": commit, "_raise_exceptions_for_missing_entries": False}
        self.index = cached_file(self.place, INDEX_FILE, **found, **self.download)
        if self.index is not None:
            read_index(Path(self.index))

    def refuse_stale(self, files: Sequence[str]) -> None:
        """Refuse, by `FormatError`, a `model.safetensors` that an index of other files is beside.

        transformers takes the former and does not fetch the latter. `Trainer` makes such repositories: it uploads a
        tower over an older model and takes nothing away.
        """
        if Path(files[0]).name == SINGLE_FILE and self.index is not None:
            raise FormatError(
                f"{self.place}: holds both {SINGLE_FILE} and {INDEX_FILE} of other files; transformers would load the "
                f"first. Remove the stale one; push_to_hub of a tower removes an old {SINGLE_FILE} by itself."
            )

def refuse_changed(stored: TimmTowerConfig, given: TimmTowerConfig, folder: Path) -> None:
    """Refuse, by `ConfigError`, a config that is not the folder's own; only what was frozen may be left out of it."""
    opened = {"frozen"} if given.frozen is None else set()
    odd = [name for name in OUR_FIELDS if getattr(stored, name) != getattr(given, name) and name not in opened]
    if odd:
        changes = ", ".join(
            f"{name}={shown(getattr(given, name))} (stored {shown(getattr(stored, name))})" for name in odd[:4]
        )
        raise ConfigError(
            f"{folder}: a tower is loaded as it was saved; {changes} would make another one of the same weights. Load "
            "it without, change it, and save it. With hf_timm_tower installed from_pretrained takes image_size=..."
        )

def refuse_misfits(name: str, info: Mapping[str, Any], allowed: list[str], left_out: tuple[str, ...]) -> None:
    """Refuse, by `WeightsError`, a model whose weights did not all come from the files, and the other way round."""
    misfits = {
        "missing": sorted(set(info["missing_keys"]) - set(allowed)),
        "unexpected": sorted(key for key in info["unexpected_keys"] if not key.startswith(left_out)),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    lines = [f"{len(keys)} {what}: {', '.join(map(shown, keys[:5]))}" for what, keys in misfits.items() if keys]
    if lines:
        raise WeightsError(
            f"{name}: the weights do not fit, the model is not returned: {'; '.join(lines)}. Where that is wanted, "
            "pass ignore_mismatched_sizes=True"
        )

def warn_of_changes(loading: TowerLoading, info: Mapping[str, Any]) -> None:
    """List fresh weights, and those in the files that the model leaves out."""
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    left_out = sorted({*loading.left_out, *info["unexpected_keys"]})
    found = {"fresh random weights, to be trained": fresh, "weights that this model leaves out": left_out}
    for what, keys in found.items():
        if keys:
            warnings.warn(f"{loading.place}: {what}: {', '.join(shown(key)[1:-1] for key in keys)}", stacklevel=4)

def loading_report(missing_keys: set[str]) -> LoadStateDictInfo:
    """transformers' record of a loading without other events; its fields differ between versions."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = LoadStateDictInfo(**{each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)})
    info.missing_keys = missing_keys
    return info

# --- pretrained.py

"""The transformers model that every face of a tower is: how transformers builds, fills and saves it.

`from_pretrained` is transformers' own, with all it takes (revisions, device maps, quantization, adapters). Two steps of
it are ours. *Building*: transformers builds on the meta device and fills what the checkpoint holds. Buffers outside the
state dict (relative positions, rotary tables, attention biases) are in no checkpoint and would come back as
uninitialised memory. So trunk and head are always built for real, with initialisation left out, their computed buffers
set aside, and then moved to meta; `_initialize_weights` puts the buffers back. transformers calls it on every model
inside a model, so that it works nested in another model's `from_pretrained` too. *Tensors*: they are checked against
the index and the folder's config, and put in strictly.
"""

MODEL_TAGS = ("timm",)
"""Tags of every tower, as transformers' `model_tags`."""

# Keywords of `from_pretrained` that say how files are found.
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")

class TimmTowerPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the transformers models of a tower share. They take a completed config, and have a copy of it."""

    config: TimmTowerConfig
    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    model_tags = list(MODEL_TAGS)  # noqa: RUF012
    accepts_loss_kwargs = False
    supports_gradient_checkpointing: bool
    _supports_sdpa = True
    _has_classifier = False
    _leaves_out: tuple[str, ...] = (f"{CLASSIFIER}.",)

    trunk: nn.Module
    head: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None, **unknown: Any) -> None:
        for name in unknown:  # what neither transformers' `from_pretrained` nor the config knew
            raise ArgumentError(
                f"{type(self).__name__}: unknown argument {shown(name)}{did_you_mean(name, OUR_FIELDS)}; of "
                "hf_timm_tower TimmModel.from_pretrained takes drop_path and patch_drop"
            )
        on_meta, wanted = torch.empty(0).is_meta, torch.get_default_dtype()
        make_head = None
        if _loading is not None and config.head is not None and config.head.get("form") == CODE:
            make_head = partial(_loading.make_head, config.head)
        budget = Budget.default() if _loading is None or config.trunk_source is not None else _loading.budget()
        # Everything is computed in float32 and then cast, as for a tower that is loaded and cast.
        with plain_defaults(), skip_init(budget) if on_meta else within_budget(budget):
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
        self._buffers_to: torch.dtype | None = wanted if on_meta else None
        self._keys = set(self.state_dict())  # quantized layers have others
        if on_meta:
            self._computed = computed_buffers(self)
            move_to_meta(self, wanted)
        self.steps = steps_of(self.trunk)
        self._no_split_modules = [type(self.trunk).__name__]
        self._checkpoints = False
        self.supports_gradient_checkpointing = can_checkpoint(self.trunk)
        self._runs_fused = True
        self._fused = [module for module in self.trunk.modules() if getattr(module, "fused_attn", False)]
        self.follow_attn_implementation()
        self.post_init()  # type: ignore[no-untyped-call]

    # --- steps that hf_timm_tower's own classes replace

    _make_code_head = staticmethod(make_code_head)
    _run = run_tower

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
            weights = {**weights, **fetch_pinned_trunk(parse_trunk_source(config.trunk_source), **loading.access())}
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

    def set_input_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, see `get_input_embeddings`."""
        raise ArgumentError(f"{type(self).__name__} takes images and has no input embeddings to set")

    resize_token_embeddings = set_input_embeddings

    def follow_attn_implementation(self) -> None:
        """Let timm's layers run fused or not as `config._attn_implementation` says, which others set too."""
        fused = self.config._attn_implementation != "eager"
        for module in self._fused if fused != self._runs_fused else ():
            module.fused_attn = fused
        self._runs_fused = fused

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`: "sdpa", where timm runs attention fused, or "eager"."""
        super().set_attn_implementation(*args, **kwargs)
        self.follow_attn_implementation()

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
        if enable and (every_n_layers != 1 or not plain):
            raise ArgumentError(
                "gradient checkpointing: timm checkpoints every block of the trunk, without offloading; "
                f"every_n_layers={every_n_layers} and {how or 'another function'} cannot be honoured"
            )
        if enable and how.get("use_reentrant"):
            warnings.warn(
                "gradient checkpointing: use_reentrant=True: timm checkpoints without it; the gradients are the same",
                stacklevel=2,
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
        put_buffers(self, self._computed)
        self._computed = None
        if self._buffers_to is not None:
            buffers_as_timm(self, self._buffers_to)
        else:
            buffers_as_timm(self.trunk, float_dtype(self.trunk))
        layer = self.get_submodule(CLASSIFIER) if self._has_classifier else None
        bias = getattr(layer, "bias", None)
        fresh_bias = bias is not None and not (bias.is_meta or getattr(bias, "_is_hf_initialized", False))
        # Before the state dict, which a quantized layer without its weights cannot give (transformers 5.4).
        if fresh_bias and type(layer) is not nn.Linear:
            raise ConfigError(
                f"a fresh classifier cannot be a quantized {type(layer).__name__}: leave it out of quantization, "
                f"by modules_to_not_convert=[{CLASSIFIER!r}] (llm_int8_skip_modules for bitsandbytes)"
            )
        # What is on meta is on the disk: transformers loads it when it runs.
        state = self.state_dict(keep_vars=True)
        state = {key: tensor for key, tensor in state.items() if key in self._keys and not tensor.is_meta}
        if fresh := [key for key, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]:
            self._fill(fresh)
        align(self)
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
        image_size: int | Sequence[int] | None = None,
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
            image_size: Change the input size after loading, an int or (height, width) in pixels: positions are
                resampled. By hf_timm_tower only.
            dtype: Cast floating-point weights; None and `"auto"` keep every tensor's own, whatever `dtype` of the
                config says.
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
        if image_size is not None and isinstance(config, TimmTowerConfig):
            config = copy.deepcopy(config)
            config.image_size = image_size  # which must be the stored one
        elif image_size is not None:
            kwargs["image_size"] = image_size  # of the config, as `AutoModel` has it
        wanted = torch_dtype if dtype is None else dtype
        wanted = getattr(config, "_dtype_asked", None) if wanted is None else wanted
        loading = TowerLoading(
            place=str(pretrained_model_name_or_path),
            download={key: kwargs[key] for key in DOWNLOAD if kwargs.get(key) is not None},
            trusts=bool(kwargs.get("trust_remote_code")),
            keeps_dtypes=wanted in (None, "auto"),
            run_code=cls._make_code_head,
        )
        if pretrained_model_name_or_path is not None:
            # transformers reads it unchecked, and what it names: a pickle too
            loading.refuse_damaged_index(getattr(config, "_commit_hash", None))
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
        vars(model.config).pop("_dtype_asked", None)  # it was for this load
        if not ignore_mismatched_sizes:
            refuse_misfits(loading.place, info, allowed=loading.fresh, left_out=model._leaves_out)
        warn_of_changes(loading, info)
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
        refuse_changed(stored.config, model.config, folder)
        saved_with_one = type(model).__name__.removeprefix("FSDP") in (stored.config.architectures or ())
        if model._has_classifier and not has_classifier(stored.weights) and not saved_with_one:
            loading.fresh += [f"{CLASSIFIER}.{name}" for name in model.classifier.state_dict()]
        loading.left_out += [key for key in stored.weights if key.startswith(model._leaves_out)]
        weights = {key: tensor for key, tensor in stored.weights.items() if key not in loading.left_out}
        if load_config.hf_quantizer is not None or load_config.ignore_mismatched_sizes or len(devices) > 1:
            return stock(model, weights, None, load_config, *args, **kwargs)
        model._buffers_to = None if loading.keeps_dtypes else floating_dtype(load_config.dtype)
        assign_weights(
            model,
            weights,
            source=str(folder),
            dtype=model._buffers_to,
            device=devices.pop(),
            allow_missing=loading.fresh,
        )
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor._is_hf_initialized = key in weights
        return loading_report(missing_keys=set(loading.fresh)), None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does: this class has no card, no fingerprint and no proof (hf_timm_tower has).

        Raises:
            HeadError: the head is not the one that was loaded.
            FolderError: the folder holds a tower's own files, which would stay beside the new ones.
        """
        config, here = self.config, Path(save_directory)
        is_code = config.head is not None and config.head.get("form") == CODE
        with plain_defaults(), skip_init(Budget.default()):
            built = self.head if is_code else self._build(config, False, None).head
        if repr(built) != repr(self.head) or type(built) is not type(self.head) or config.trunk_source is not None:
            raise HeadError(
                "the head was replaced, or its trunk is stored in another repository: only hf_timm_tower can save this "
                "tower so that it comes back; install it (pip install hf_timm_tower)"
            )
        if any((here / name).exists() for name in (INDEX_FILE, "trunk.safetensors", "fingerprint.json")):
            raise FolderError(f"{here}: holds a tower saved by hf_timm_tower; save into another folder, or install it")
        super().save_pretrained(save_directory, *args, **kwargs)

# --- backbone.py

"""A tower's trunk as a transformers backbone: the feature maps of its stages, for models of dense prediction."""

class TimmTowerBackbone(BackboneMixin, TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """The trunk of a tower as transformers' `AutoBackbone` gives it, for UperNet, DETR, Mask2Former and their kin.

    Stages are those of timm's `forward_intermediates`, under the names of its `feature_info`. Of a tower with a head
    the head is left out, and a warning lists the weights that are.

    Args:
        config: A tower's config; `out_indices` or `out_features` say which feature maps are given, the last one where
            both are None. The model's own `config` is a copy of it without the head.

    Raises:
        ConfigError: timm gives no feature maps of this trunk, or has none of these names or indices.
    """

    has_attentions = False
    _leaves_out = ("head.", f"{CLASSIFIER}.")

    def _init_transformers_backbone(self) -> None:
        if TimmTowerConfig.model_type not in CONFIG_MAPPING:
            # Where this package is absent: now a model with this backbone inside can be loaded in this process.
            AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig)
        stages: Any = getattr(self.trunk, "feature_info", None)
        if not stages or not hasattr(self.trunk, "forward_intermediates"):
            raise ConfigError(f"{type(self.trunk).__name__} gives no feature maps in timm {timm.__version__}")
        self.stage_names = [stage["module"] for stage in stages]
        self.num_features = [stage["num_chs"] for stage in stages]
        self._activated = [name for name, part in self.trunk.named_modules() if isinstance(part, BatchNormAct2d)]
        if self.config.out_features is not None:
            self.out_features = self.config.out_features
        else:
            self.out_indices = [-1] if self.config.out_indices is None else self.config.out_indices

    @property
    def out_indices(self) -> list[int]:
        """Which of the stages the model gives."""
        return list(self.config.out_indices or ())

    @out_indices.setter
    def out_indices(self, indices: Sequence[int]) -> None:
        count = len(self.stage_names)
        found = [index % count for index in indices if -count <= index < count]
        if not found or len(found) < len(indices) or found != sorted(set(found)):
            raise ConfigError(
                f"out_indices={shown(indices)}: {self.config.architecture} has stages 0 to {count - 1}; expected some "
                "of them, each once and in this order"
            )
        self.config.out_indices = found

    @property
    def out_features(self) -> list[str]:
        """The same by timm's names."""
        return [self.stage_names[index] for index in self.out_indices]

    @out_features.setter
    def out_features(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if self.stage_names.count(name) != 1]:
            raise ConfigError(f"out_features: no stage {shown(unknown[0])}; there are {', '.join(self.stage_names)}")
        self.out_indices = [self.stage_names.index(name) for name in names]

    @property
    def channels(self) -> list[int]:
        """Channels of each feature map that the model gives."""
        return [self.num_features[index] for index in self.out_indices]

    def _build(self, config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:  # type: ignore[override]
        return super()._build(without_head(config), False, None)

    def _read(self, files: Sequence[str], loading: TowerLoading) -> StoredTower:  # type: ignore[override]
        stored = super()._read(files, loading)
        return replace(stored, config=without_head(stored.config))

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """The feature maps of `out_indices`, `[B, C, H, W]` each, without class token and registers.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: Give the maps of all stages as well.
            output_attentions: Refused.
            return_dict: False gives a tuple of the fields that are there.

        Raises:
            ConfigError: attentions were asked for, or the trunk lost its activations.
            ArgumentError: whole numbers, or images of a size that the trunk does not take.
        """
        if bare := [name for name in self._activated if not hasattr(self.trunk.get_submodule(name), "act")]:
            raise ConfigError(
                f"the activation of trunk.{bare[0]} is gone with the norm that it is part of, as where DETR freezes "
                "norms; take a trunk that has the two apart (ResNet, ConvNeXt), or convert with timm.layers"
            )
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ConfigError("output_attentions: a backbone gives feature maps; TimmTowerModel gives attentions")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with weights_in_place(self.trunk):
            maps = self.trunk.forward_intermediates(  # type: ignore[operator]
                prepared(self, pixel_values),
                indices=None if wanted else self.out_indices,
                output_fmt="NCHW",
                intermediates_only=True,
                stop_early=True,
            )
        chosen = tuple(maps[index] for index in self.out_indices) if wanted else tuple(maps)
        output = BackboneOutput(feature_maps=chosen, hidden_states=tuple(maps) if wanted else None)
        return output if wants_dict(self, return_dict) else output.to_tuple()

# --- modeling.py

"""Towers as transformers models: `TimmTowerModel`, and `TimmTowerForImageClassification` with a classifier on top."""

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
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        do_pooling: bool | None = None,
        patches: torch.Tensor | None = None,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
    ) -> TimmTowerModelOutput | tuple[Any, ...]:
        """Run the tower.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: True for all; an index or a list of them for those, None in all other places.
            return_dict: False gives a tuple of the fields that are there.
            output_attentions: Of a trunk with timm's attention layers that runs with `attn_implementation="eager"`.
            interpolate_pos_encoding: True says that the images may have another size than `config.image_size`, which
                the trunk must be able to take.
            do_pooling: False leaves the embedding out.
            patches, patch_coord, patch_valid: In place of `pixel_values`, of `naflex`. By hf_timm_tower only.

        Raises:
            ConfigError: hidden states or attentions were asked for and timm does not give them.
            ArgumentError: an index of no hidden state, or images of a size that the trunk does not take.
        """
        wanted = (output_hidden_states, output_attentions, interpolate_pos_encoding, do_pooling)
        output = TimmTowerModelOutput(*self._run(pixel_values, *wanted, patches=(patches, patch_coord, patch_valid)))
        return output if wants_dict(self, return_dict) else output.to_tuple()

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
    _leaves_out = ()

    classifier: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None, **unknown: Any) -> None:
        super().__init__(config, _loading, **unknown)
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
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        patches: torch.Tensor | None = None,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Run tower and classifier.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            labels: `[B]` integers for one label each, `[B, num_labels]` floats for several, floats for regression;
                the loss follows `config.problem_type`.
            output_hidden_states, return_dict, output_attentions, interpolate_pos_encoding, patches, patch_coord,
                patch_valid: As `TimmTowerModel.forward`.

        Raises:
            HeadError: the embedding is not `[B, embed_dim]`.
            ConfigError, ArgumentError: as `TimmTowerModel.forward`.
        """
        wanted = (output_hidden_states, output_attentions, interpolate_pos_encoding)
        _, embedding, states, maps = self._run(pixel_values, *wanted, patches=(patches, patch_coord, patch_valid))
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            found = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
            raise HeadError(f"a classifier needs an embedding [B, embed_dim], this tower gives {found}; choose a pool")
        logits = self.classifier(embedding)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states, attentions=maps)
        return output if wants_dict(self, return_dict) else output.to_tuple()

"""`TimmTowerConfig`: everything that rebuilds a tower with no network.

The config is validated once, when it is made: types by huggingface_hub's `@strict` (as transformers' own configs),
meaning by the checks below. `build.resolve_config` fills in what only the trunk can tell (its width, its layout, its
own pool), after which the config is a full description.
"""

import difflib
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Literal

import timm
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .errors import ConfigError, FormatError, TowerError, did_you_mean, file_errors, one_line, shown
from .freezing import check_frozen
from .model_args import FROM_TRUNK, RECORDED, check_names, encode, inner

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

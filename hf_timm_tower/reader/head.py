"""A tower's head: the built-in ones, and those that a config stores, built again.

Making heads and finding the form in which one is stored is not needed for reading (`heads/` in the package).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import cached_file

from .config import TimmTowerConfig
from .errors import ConfigError, FormatError, HeadError, shown
from .graph_head import construct

HeadFactory = Callable[..., nn.Module]
CustomHead = nn.Module | HeadFactory | str

# `config.head["form"]` of heads that are not stored: one that lives in memory only, until saving finds a form for it,
# and one that a subclass of the tower makes itself.
LIVE = "live"
SUBCLASS = "subclass"
# The source of the head's class is stored beside the weights (`heads/source_file.py`).
CODE = "code"

HEAD_FACTORIES: dict[str, HeadFactory] = {}
"""Name -> class or function, filled by `register_head`."""

HEAD_CODE_FILE = "head_code.py"


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


def registered_factory(name: str) -> HeadFactory:
    """The class or function registered under a name; `HeadError` says what to do where none is."""
    factory = HEAD_FACTORIES.get(name)
    if factory is None:
        known = ", ".join(sorted(HEAD_FACTORIES)) or "none"
        raise HeadError(
            f"no head is registered as {shown(name)} in this process (registered: {known}). Import the module that "
            f"holds the class under @register_head({shown(name)}) first, or pass custom_head=... to TimmModel's "
            "from_pretrained. Where the package hf_timm_tower is not installed, install it: only it can register heads."
        )
    return factory


def rebuild_head(spec: dict[str, Any]) -> nn.Module:
    """`config.head` -> a head whose weights are still to come. The spec may be anybody's: no code of it runs.

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
            raise HeadError(f"the head registered as {name!r} does not take {shown(kwargs)}: {error}") from error
        return head
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

_CODE_DTYPES = {each: getattr(torch, each) for each in ("float16", "bfloat16", "float32", "float64")}


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
        and spec.get("dtype", "float32") in _CODE_DTYPES
    )
    if not fits:
        raise HeadError("config.head: a head of code has a file, class, kwargs and sha256")


def make_code_head(spec: dict[str, Any], place: str, **download: Any) -> nn.Module:
    """A head that is stored as code: its file runs here. To be called where that is trusted.

    Args:
        spec: `config.head`.
        place: The folder or repository.
        download: `revision`, `token`, `cache_dir` and so on, of transformers.

    Raises:
        HeadError: the file is not the one that was saved, or its code fails.
    """
    check_code_spec(spec)
    file = code_file({"head": spec}) or ""
    path = cached_file(place, file, **download)
    if path is None or hashlib.sha256(Path(path).read_bytes()).hexdigest() != spec["sha256"]:
        raise HeadError(f"{shown(place)[1:-1]}: {file} is not the code that this tower was saved with")
    cls: Any = get_class_from_dynamic_module(f"{file.removesuffix('.py')}.{spec['class']}", place, **download)
    try:
        return head_of_class(cls, spec)
    except Exception as error:  # a constructor may raise anything
        raise HeadError(f"{shown(place)[1:-1]}: the head in {file} fails: {type(error).__name__}: {error}") from error


def head_of_class(cls: type[nn.Module], spec: Mapping[str, Any]) -> nn.Module:
    """A head of code from its class: constructor arguments, dtype, and which parameters were made not to train."""
    head = cls(**spec["kwargs"])
    if "dtype" in spec:
        head.to(_CODE_DTYPES[spec["dtype"]])
    if "frozen" in spec:
        frozen = set(map(str, spec["frozen"]))
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return head

"""A tower's head: the built-in ones, and those that a config stores, built again."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import cached_file

from .config import ATTENTION_POOLS, FLOAT_DTYPES, TimmTowerConfig
from .errors import ConfigError, FormatError, HeadError, shown
from .graph_head import construct
from .graph_program import DTYPES

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

"""Weights in somebody's own key layout -> the trunk of a tower that exists, strictly, and a report of what went where.

Nothing is skipped in silence: a key of the checkpoint without a place, and a weight of the trunk that the checkpoint
lacks, are errors unless the caller lists them. All or nothing: after an error the tower is as it was.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..files.ties import find_ties, same_bits
from ..reader.errors import ArgumentError, WeightsError, shown
from ..reader.trunk import BUILD_ERRORS
from ..training.layer_groups import smallest_cover
from ..trunk_facts import shapes_of
from .positions import resample_positions
from .weight_source import SETS, WeightSource, choose_set, from_mapping, open_weights

# Names under which training code files a backbone: wrappers, teachers, towers. A prefix is any chain of them.
_WRAPPERS = frozenset(
    "state_dict model module _orig_mod model_state model_ema ema ema_model model_ema_state_dict state_dict_ema "
    "teacher student momentum_encoder target_encoder base_encoder online_network encoder encoder_q encoder_k backbone "
    "trunk visual image_encoder vision_encoder vision_model vision_tower net network base_model".split()
)
_SHOWN = 4


@dataclass(frozen=True)
class TrunkReport:
    """What `load_trunk` did; print it for a table.

    Attributes:
        source: Where the weights came from.
        prefix: What stood before the keys of the trunk.
        matched: Key of the trunk -> key of the checkpoint.
        left_over: Keys of the checkpoint that have no place in the trunk; each was listed in `ignore`.
        missing: Keys of the trunk that the checkpoint lacks and that stayed as they were; each was listed in `keep`.
        resampled: Key of the trunk -> shape in the checkpoint and in the trunk.
        converted: Keys of the trunk that timm's own filter computed from the checkpoint's.
        cast: Key of the trunk -> dtype in the checkpoint, where the trunk has another.
        not_weights: Entries of the checkpoint that are no tensors (an epoch, a learning rate).
    """

    source: str
    prefix: str
    matched: Mapping[str, str]
    left_over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    resampled: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    converted: tuple[str, ...] = ()
    cast: Mapping[str, torch.dtype] = field(default_factory=dict)
    not_weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        resampled = [f"{key} {list(old)} -> {list(new)}" for key, (old, new) in self.resampled.items()]
        cast = [f"{key} from {dtype}" for key, dtype in self.cast.items()]
        rows = [
            ("matched", list(self.matched)),
            ("left over", list(self.left_over)),
            ("missing", list(self.missing)),
            ("resampled", resampled),
            ("converted", list(self.converted)),
            ("cast", cast),
            ("not weights", list(self.not_weights)),
        ]
        lines = [f"{self.source}, keys under {self.prefix!r}" if self.prefix else f"{self.source}, keys as they are"]
        lines += [f"  {name:<12}{len(keys):>6}  {_some(keys)}".rstrip() for name, keys in rows]
        return "\n".join(lines)


def load_trunk(
    tower: Any,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    weights: str | None = None,
    prefix: str | None = None,
    remap: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    keep: Collection[str] = (),
    resample: bool | Sequence[int] = False,
    timm_filter: bool = False,
    allow_pickle: bool = False,
) -> TrunkReport:
    """Put the weights of a checkpoint into a tower's trunk, in place, whatever its keys are called.

    Args:
        tower: The tower; its head is not touched.
        source: A `.safetensors` file, a file of `torch.save`, or a state dict (dictionaries inside are looked into).
        weights: Which weights of a training checkpoint: `model`, `ema` (their running average), or the name of its
            entry (`teacher`); the rest of it, optimizer and all, is left aside. None looks at everything.
        prefix: What stands before the trunk's keys (`teacher.backbone.`, `visual.trunk.`, `""` for nothing); None
            finds it among the usual ones.
        remap: Key, or beginning of keys that ends in a dot -> what the trunk calls it; after the prefix is off.
        ignore: Patterns (`*` and `?`) of keys of the checkpoint that may be left over, with or without the prefix.
        keep: Patterns of keys of the trunk that the checkpoint may lack: they stay as they are.
        resample: Resample position embeddings that are made for another size, by timm: True for a square grid of
            patches, `(rows, columns)` of the checkpoint's grid for any other.
        timm_filter: Have the checkpoint converted by timm's own `checkpoint_filter_fn` for this architecture.
        allow_pickle: Read a file of `torch.save`, with `weights_only=True` (an `argparse.Namespace` inside is passed
            over; any other class is refused).

    Returns:
        What matched, what was left over, what is missing, what was resampled.

    Raises:
        WeightsError: something does not fit or is not accounted for; lists all of it. Nothing was loaded.
        ArgumentError: an entry of `remap` that fits no key, or a filter that timm does not have.
        FolderError, FormatError: the file cannot be read.
    """
    trunk: nn.Module = tower.trunk
    own = trunk.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in own.values()):
        raise WeightsError("the trunk is on the meta device: it has no memory to load into; build the tower for real")
    if isinstance(source, Mapping):
        found = from_mapping(source, "the state dict")
    else:
        found = open_weights(source, allow_pickle)
    if weights is not None:
        found = choose_set(found, weights)
    prefix = _find_prefix(found, trunk, remap or {}, timm_filter) if prefix is None else _with_dot(prefix)
    stripped = {key.removeprefix(prefix): key for key in found.specs if key.startswith(prefix)}
    if not stripped:
        raise WeightsError(f"{found.where}: no key begins with prefix={prefix!r}; the first are {_first(found)}")
    names = _remapped(stripped, remap or {}, found.where)

    wanted = names if timm_filter else {key: name for key, name in names.items() if key in own}
    read = found.read(list(wanted.values()))
    tensors = {key: read[name] for key, name in wanted.items()}
    made: dict[str, tuple[int, ...]] = {}
    if timm_filter:
        tensors, vanished, made = _filtered(trunk, tensors)
    else:
        vanished = [key for key in names if key not in own]
    unclear: list[str] = []
    if resample:
        resampled, unclear = resample_positions(trunk, tensors, None if resample is True else resample)
        made |= resampled

    outside = [key for key in found.specs if not key.startswith(prefix)]
    left_over = outside + [names[key] for key in vanished] + [names.get(key, key) for key in tensors if key not in own]
    missing = [key for key in own if key not in tensors]
    tensors = {key: tensor for key, tensor in tensors.items() if key in own}
    report = TrunkReport(
        source=found.where,
        prefix=prefix,
        matched={key: names.get(key, key) for key in tensors},
        left_over=tuple(left_over),
        missing=tuple(missing),
        resampled={key: (shape, tuple(own[key].shape)) for key, shape in made.items() if _differs(own, key, shape)},
        converted=tuple(key for key, shape in made.items() if key in own and not _differs(own, key, shape)),
        cast={key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype != own[key].dtype},
        not_weights=found.others,
    )
    problems = _problems(report, own, tensors, found.specs, ignore, keep, bool(resample))
    problems += unclear + _broken_ties(trunk, own, tensors)
    if problems:
        hints = _hints(trunk, timm_filter) if missing else []
        raise WeightsError(
            f"{found.where}: nothing was loaded.\n" + "\n".join(f"  {line}" for line in [*problems, *hints])
        )
    trunk.load_state_dict({**{key: own[key].detach() for key in missing}, **tensors}, strict=True)
    # What was known of the earlier weights is no longer true.
    tower.config.trunk_source = None
    tower._fingerprint = None
    return report


# Which keys are meant


def _find_prefix(weights: WeightSource, trunk: nn.Module, remap: Mapping[str, str], timm_filter: bool) -> str:
    own = trunk.state_dict(keep_vars=True)
    candidates = {""}
    for key in weights.specs:
        parts = key.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            if part not in _WRAPPERS:
                break
            candidates.add(".".join(parts[:depth]) + ".")
    scores = {}
    for candidate in candidates:
        stripped = (key.removeprefix(candidate) for key in weights.specs if key.startswith(candidate))
        scores[candidate] = sum(_remap(key, remap)[0] in own for key in stripped)
    best = max(scores.values())
    near = sorted(candidate for candidate, score in scores.items() if 2 * score > best)
    if best == 0 and timm_filter and len(candidates) == 1:
        return ""
    if best == 0:
        hints = "".join(f" {hint}." for hint in _hints(trunk, timm_filter))
        raise WeightsError(
            f"{weights.where}: no key is one of the trunk's, under any of the prefixes {shown(sorted(candidates))}. "
            f"The first keys are {_first(weights)}, the trunk's {_some(list(own)[:3])}: pass prefix=... and "
            f"remap=....{hints}"
        )
    if len(near) > 1:
        listed = ", ".join(f"{shown(candidate)} ({scores[candidate]} of {len(own)} keys)" for candidate in near)
        sets = [name for name, entries in SETS.items() if any(each.partition(".")[0] in entries for each in near)]
        or_set = f", or {' or '.join(f'weights={name!r}' for name in sets)}" if len(sets) > 1 else ""
        raise WeightsError(
            f"{weights.where}: the trunk could be under several prefixes, pass prefix=... of: {listed}{or_set}"
        )
    return near[0]


def _with_dot(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _remapped(stripped: Mapping[str, str], remap: Mapping[str, str], where: str) -> dict[str, str]:
    names: dict[str, str] = {}
    used: set[str] = set()
    for key, name in stripped.items():
        new, entry = _remap(key, remap)
        if entry is not None:
            used.add(entry)
        if new in names:
            raise WeightsError(
                f"{where}: {_some([names[new], name])} would both be {_some([new])}; one entry of remap is too many"
            )
        names[new] = name
    if idle := sorted(set(remap) - used):
        raise ArgumentError(f"remap: no key of {where} is or begins with {', '.join(idle)} (a beginning ends in a dot)")
    return names


def _remap(key: str, remap: Mapping[str, str]) -> tuple[str, str | None]:
    """The key's new name, and the entry of `remap` that gave it: the longest that fits."""
    fitting = [old for old in remap if key == old or (old.endswith(".") and key.startswith(old))]
    if not fitting:
        return key, None
    old = max(fitting, key=len)
    return remap[old] + key.removeprefix(old), old


# What is done to values


def _filtered(
    trunk: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], dict[str, tuple[int, ...]]]:
    """timm's filter over the weights: what it gives, keys that it dropped, keys it computed with old shapes."""
    function = _filter_of(trunk)
    if function is None:
        raise ArgumentError(f"timm_filter=True: timm has no checkpoint_filter_fn for {type(trunk).__name__}")
    try:
        with torch.no_grad():
            found = function(dict(tensors), trunk)
    except BUILD_ERRORS as error:
        raise WeightsError(
            f"timm's checkpoint_filter_fn for {type(trunk).__name__} cannot read these keys ({type(error).__name__}: "
            f"{error}); pass prefix=... so that they are as their authors published them"
        ) from error
    storages = {tensor.untyped_storage().data_ptr(): key for key, tensor in tensors.items() if tensor.numel()}
    same = {key: storages.get(value.untyped_storage().data_ptr()) for key, value in found.items()}
    kept = {source for source in same.values() if source is not None}
    made = {
        key: tuple(tensors[key].shape if key in tensors else found[key].shape)
        for key, source in same.items()
        if source is None
    }
    vanished = [key for key in tensors if key not in kept and key not in made]
    return dict(found), vanished, made


def _filter_of(trunk: nn.Module) -> Any:
    return getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)


# Judging


def _differs(own: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> bool:
    return key in own and tuple(own[key].shape) != shape


def _problems(
    report: TrunkReport,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    stored: Collection[str],
    ignore: Collection[str],
    keep: Collection[str],
    resample: bool,
) -> list[str]:
    lines = []
    left_over = [key for key in report.left_over if not _listed(key, report.prefix, ignore)]
    missing = [key for key in report.missing if not _listed(key, "", keep)]
    if left_over:
        covers = [key.removeprefix(report.prefix) for key in _patterns(left_over, [*stored, *left_over])]
        lines.append(
            f"{len(left_over)} of the checkpoint have no place in the trunk: {_some(left_over)}. Name what may be left "
            f"out: ignore={_listing(covers)}"
        )
    if missing:
        line = f"{len(missing)} of the trunk are not in the checkpoint: {_some(missing)}. "
        layers = [key for key in missing if own[key].ndim > 1 and own[key].is_floating_point()]
        if layers:
            line += (
                f"Among them are weights of layers, {_some(layers)}, which would stay random in a new trunk: they are "
                "called otherwise there (remap={...}), or it is the checkpoint of another model. `keep` takes names"
            )
        else:
            line += (
                f"Name what may stay as it is: keep={_listing(_patterns(missing, own))}; or what it is called there: "
                "remap={...}"
            )
        lines.append(line)
    shapes, ours = shapes_of(tensors), shapes_of(own)
    wrong = [key for key in tensors if shapes[key] != ours[key]]
    if wrong:
        both = [f"{key} {list(shapes[key])}, expected {list(ours[key])}" for key in wrong]
        hint = "" if resample or "pos_embed" not in wrong else ". Positions for another size: resample=True"
        lines.append(f"{len(wrong)} have another shape: {_some(both)}{hint}")
    if report.resampled and not resample:
        lines.append(f"timm's filter resampled {_some(list(report.resampled))}: say that you want it, resample=True")
    kinds = [key for key, dtype in report.cast.items() if dtype.is_floating_point != own[key].is_floating_point()]
    if kinds:
        lines.append(f"{len(kinds)} hold another kind of number (real, whole): {_some(kinds)}")
    return lines


def _broken_ties(trunk: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """One parameter under two names gets one value."""
    ties = find_ties(trunk, own)
    return [
        f"{key} and {group[0]} are one parameter of the trunk, but differ in the checkpoint"
        for group in (*ties.tied, *ties.shared)
        for key in group[1:]
        if key in tensors and group[0] in tensors and not same_bits(tensors[key], tensors[group[0]])
    ]


def _hints(trunk: nn.Module, timm_filter: bool) -> list[str]:
    if timm_filter or _filter_of(trunk) is None:
        return []
    return [f"timm itself converts some other layouts of {type(trunk).__name__}: timm_filter=True"]


def _listed(key: str, prefix: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key.removeprefix(prefix), pattern) for pattern in patterns)


def _patterns(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """The fewest patterns that fit the chosen keys and no other: kinds (`*.num_batches_tracked`), or modules."""
    last = {key: key.rpartition(".")[2] for key in everything}
    spared = {last[key] for key in everything if key not in set(chosen)}
    kinds = sorted({f"*.{last[key]}" for key in chosen if "." in key and last[key] not in spared})
    covers = smallest_cover(chosen, everything)
    found = sorted(cover if cover in last else f"{cover}.*" for cover in covers)
    if len(kinds) < len(found) and all(_listed(key, "", kinds) for key in chosen):
        return kinds
    return found


def _listing(patterns: list[str]) -> str:
    """For a message; a list that was cut short is none to copy."""
    if len(patterns) > 4 * _SHOWN:
        return f"[...], {len(patterns)} patterns, from {_some(patterns)}"
    return f"[{', '.join(shown(pattern) for pattern in patterns)}]"


def _first(weights: WeightSource) -> str:
    return _some(list(weights.specs)[:3]) or "none at all"


def _some(keys: Collection[str]) -> str:
    """A few of them, printable and short."""
    return ", ".join(shown(key, 160)[1:-1] for key in list(keys)[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")

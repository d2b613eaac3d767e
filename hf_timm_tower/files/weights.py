"""The weights of a tower's folder: which key is in which file, writing them, reading them, checking the index.

Two weight files because they live differently (the head changes, the trunk often does not), in the ecosystem's
standard form of several files and an index, so that transformers' own loader reads them too.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from ..reader.errors import ConfigError, FolderError, FormatError, WeightsError, shown
from ..reader.weights import check_index, share_ties
from .disk import folder_error
from .json import write_json
from .names import CLASSIFIER_NAME, HEAD_NAME, INDEX_NAME, SINGLE_NAME, TRUNK_NAME, is_weight_file
from .open_folder import OpenFolder
from .safetensors_layout import write_aligned
from .staging import read_folder
from .ties import find_ties

# Prefix of keys -> their file; all others are the trunk's.
_PARTS = {"head.": HEAD_NAME, "classifier.": CLASSIFIER_NAME}
_SIZE_TEXT = re.compile(r"(?=.*[1-9])\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)


@dataclass(frozen=True)
class WeightPlan:
    """Which weight file holds which keys.

    Attributes:
        files: file name -> its keys, sorted; trunk files first.
        total_bytes: bytes of all tensors, those of tied keys counted each.
    """

    files: Mapping[str, tuple[str, ...]]
    total_bytes: int

    @property
    def weight_map(self) -> dict[str, str]:
        """Key -> file name, sorted by key: what the index holds."""
        return dict(sorted((key, name) for name, keys in self.files.items() for key in keys))


def plan_weights(state: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> WeightPlan:
    """Decide which file holds which key: `head.*` the head's, `classifier.*` its own, everything else the trunk's.

    A part that is larger than `max_shard_size` is cut into shards by huggingface_hub, in the order of its keys; a
    tensor is never cut, so one larger than the limit gets a file of its own. A head or classifier without tensors gets
    no file.

    Args:
        state: key -> tensor; only shapes and dtypes are looked at.
        max_shard_size: bytes, or text such as "5GB" (10**9).

    Raises:
        ConfigError: `max_shard_size` is not a positive size.
    """
    is_text = isinstance(max_shard_size, str) and _SIZE_TEXT.fullmatch(max_shard_size)
    if not is_text and not (type(max_shard_size) is int and max_shard_size > 0):
        raise ConfigError(
            f"max_shard_size must be a positive number of bytes or a text such as '5GB', found {max_shard_size!r}"
        )
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in (TRUNK_NAME, *_PARTS.values())}
    for key in sorted(state):
        name = next((name for prefix, name in _PARTS.items() if key.startswith(prefix)), TRUNK_NAME)
        parts[name][key] = state[key]
    files: dict[str, tuple[str, ...]] = {}
    for name, part in parts.items():
        split = split_state_dict_into_shards_factory(
            part,
            get_storage_size=_size,
            filename_pattern=name.replace(".", "{suffix}."),
            max_shard_size=max_shard_size,
        )
        files |= {shard: tuple(keys) for shard, keys in split.filename_to_tensors.items()}
    # An index must name a file: the trunk's is written even if nothing is in it.
    return WeightPlan(files or {TRUNK_NAME: ()}, sum(map(_size, state.values())))


def write_weights(
    folder: str | os.PathLike[str],
    module: nn.Module,
    max_shard_size: int | str = "5GB",
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the weights of `module` and their index into `folder`, the same bytes for the same weights.

    All keys of a tied parameter are written, and the groups recorded in the index (`metadata.tied`: one parameter
    under several names; `metadata.shared`: several parameters on the same memory). Weight files of an earlier save
    that this one does not have are removed. To replace a tower that is in use, write into a `staged_folder`.

    Args:
        folder: an existing folder.
        module: what to save; ties are found in it.
        max_shard_size: see `plan_weights`.
        state: its state dict, where it had to be gathered from several devices or processes.

    Raises:
        WeightsError: a tensor that cannot be stored, or parameters that overlap in memory without being equal.
        FolderError: the folder cannot be written.
    """
    folder = Path(folder)
    state = module.state_dict(keep_vars=True) if state is None else state
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"{folder}: {key} of the state dict is a {type(value).__name__}; only tensors can be stored: keep it "
                "in a buffer"
            )
    ties = find_ties(module, state)
    plan = plan_weights(state, max_shard_size)
    for name, keys in plan.files.items():
        write_aligned(folder / name, {key: state[key] for key in keys})
    groups = {kind: list(map(list, found)) for kind, found in (("tied", ties.tied), ("shared", ties.shared)) if found}
    metadata = {"format": "pt", "total_size": plan.total_bytes, **groups}
    write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": plan.weight_map})
    try:
        for entry in os.listdir(folder):
            if is_weight_file(entry) and entry not in plan.files:
                os.unlink(folder / entry)
    except OSError as error:
        raise folder_error(f"{folder}: an earlier save's weights cannot be removed", error) from error


def read_weights(
    folder: str | os.PathLike[str] | OpenFolder, mmap: bool = True, digests: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Read all weights of a folder: those of its index, or of a plain `model.safetensors`.

    Args:
        folder: a path, which is read so that only one save is seen; or a folder that is open already.
        mmap: False reads into memory of its own; see `safetensors_read.read_aligned`.
        digests: takes the `file_digest` of each weight file.

    Returns:
        key -> tensor on the CPU, 64-byte aligned, mapped where the file allows it. Keys that the index calls tied
        hold the same tensor object, those it calls shared hold tensors on the same memory: `assign_weights` keeps
        both.

    Raises:
        FolderError: no weights, a missing or unreadable file.
        FormatError: a damaged file, or an index that does not fit its files.
    """
    if isinstance(folder, OpenFolder):
        return _read_weights(folder, mmap, digests)
    return read_folder(folder, lambda opened: _read_weights(opened, mmap, digests))


def _read_weights(folder: OpenFolder, mmap: bool, digests: dict[str, str] | None) -> dict[str, Tensor]:
    has_single = folder.has(SINGLE_NAME)
    if not folder.has(INDEX_NAME):
        if has_single:
            return folder.read_tensors(SINGLE_NAME, mmap, digests)
        raise FolderError(
            f"{folder.path}: no weights, neither {INDEX_NAME} nor {SINGLE_NAME}; the folder is incomplete or not a "
            "tower: download or save it again"
        )
    where = f"{folder.path / INDEX_NAME}"
    weight_map, metadata = check_index(folder.read_json(INDEX_NAME), where)
    if has_single and SINGLE_NAME not in weight_map.values():
        raise FormatError(
            f"{folder.path}: holds both {SINGLE_NAME} and an index of other files; transformers would load the first, "
            f"the index says the others. Remove the one that is stale ({SINGLE_NAME}, or {INDEX_NAME})"
        )
    listed: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        listed.setdefault(name, set()).add(key)
    tensors: dict[str, Tensor] = {}
    for name in sorted(listed):
        if not folder.has(name):
            raise FolderError(
                f"{folder.path / name} is missing, the index puts {_count(listed[name])} there; the folder is "
                "incomplete: download or save it again"
            )
        found = folder.read_tensors(name, mmap, digests)
        if lacking := listed[name] - found.keys():
            raise FormatError(f"{folder.path / name}: lacks {_count(lacking)} that the index puts there")
        if unlisted := found.keys() - listed[name]:
            elsewhere = [key for key in unlisted if key in weight_map]
            what = "the index puts into another file" if elsewhere else "the index does not list"
            raise FormatError(f"{folder.path / name}: holds {_count(elsewhere or unlisted)} that {what}")
        tensors.update(found)
    share_ties(tensors, metadata, where)
    return tensors


def _count(keys: Iterable[str], limit: int = 5) -> str:
    """Say how many keys and name the first few: "3 keys (a, b, c)"."""
    ordered = sorted(keys)
    first = ", ".join(shown(key)[1:-1] for key in ordered[:limit]) + (", ..." if len(ordered) > limit else "")
    return f"{len(ordered)} key{'' if len(ordered) == 1 else 's'} ({first})"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize

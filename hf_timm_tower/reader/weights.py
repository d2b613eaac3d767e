"""Weights from a tower's files into a module: every key fits or nothing is touched; ties stay ties."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError, FormatError, HubError, WeightsError, shown
from .trunk import buffers_as_timm

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

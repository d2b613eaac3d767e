"""Weights under somebody else's keys: what is there is known at once, values are read key by key when asked for.

So that of a checkpoint which also holds a text tower, an optimizer or a teacher, only the wanted part is in memory.
"""

import argparse
import os
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.disk import folder_error
from ..files.safetensors_read import read_aligned, read_specs
from ..reader.errors import FolderError, FormatError, WeightsError, shown

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".th", ".pyth")

SETS = {
    "model": ("state_dict", "model", "model_state", "model_state_dict"),
    "ema": ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model"),
}
"""What training scripts call the trained weights and their running average (timm, MAE, DeiT, detectron's heirs)."""

# What training scripts store beside the weights (the command line's arguments, a folder) and torch refuses by default.
# Making one of these again sets attributes and calls nothing of the file's choosing. Paths are stored under the
# module's name in the Python that wrote them.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
# A training checkpoint of a model of 3,000 tensors has some 15,000 entries, optimizer and running average included.
# Dictionaries that are stored once and named often cost nothing in the file.
_MAX_DEPTH, _MAX_ENTRIES = 16, 500_000


@dataclass(frozen=True)
class WeightSource:
    """Weights that are not in memory yet.

    Attributes:
        where: Where they come from, for messages.
        specs: Key -> a tensor on meta, with the shape and dtype of the stored one. Dictionaries inside dictionaries
            are one key with dots.
        others: Keys of entries that are no tensors (an epoch, a learning rate).
        read: Keys -> their tensors on the CPU, contiguous, 64-byte aligned, on memory of their own.
    """

    where: str
    specs: Mapping[str, Tensor]
    others: tuple[str, ...]
    read: Callable[[Collection[str]], dict[str, Tensor]]


def open_weights(path: str | os.PathLike[str], allow_pickle: bool = False) -> WeightSource:
    """A file of weights.

    Args:
        path: `.safetensors`, or a file of `torch.save`.
        allow_pickle: Read a file of `torch.save`, by `torch.load(weights_only=True)`.

    Raises:
        FolderError: it is missing or cannot be read.
        FormatError: it is damaged, of an unknown kind, pickled without permission, or holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FolderError(f"{path}: {'a folder, expected a file of weights' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        # Read, not mapped: pages of a mapping would count beside the tensors.
        specs = read_specs(path)
        return WeightSource(str(path), specs, (), lambda keys: read_aligned(path, mmap=False, keys=set(keys)))
    if path.suffix not in PICKLED:
        raise FormatError(f"{path}: expected a .safetensors file, or one of torch.save ({', '.join(PICKLED)})")
    if not allow_pickle:
        raise FormatError(
            f"{path} is a pickle, which can run code when it is read: it is not read unless asked for. Pass "
            "allow_pickle=True (it is then read with weights_only=True), or convert it to .safetensors."
        )
    return from_mapping(_load_pickle(path), str(path))


def from_mapping(state: Mapping[Any, Any], where: str) -> WeightSource:
    """A state dict in memory, or a checkpoint's dictionary that has some inside.

    Args:
        state: Key -> tensor, or further mappings. It is not changed and nothing of it is kept in what is read.
        where: For messages.

    Raises:
        FormatError: one key has two meanings, or it is nested too deep.
    """
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    _flatten(state, "", tensors, others, where, [_MAX_ENTRIES], 0)
    specs = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}

    def read(keys: Collection[str]) -> dict[str, Tensor]:
        return {key: _own_copy(tensors[key], f"{where}: {shown(key)}") for key in keys}

    return WeightSource(where, specs, tuple(others), read)


def choose_set(source: WeightSource, name: str) -> WeightSource:
    """One set of weights of a training checkpoint that holds several; the rest of it is left aside.

    Args:
        source: The checkpoint.
        name: An entry of it, or `model` or `ema` under whatever name (`SETS`) the checkpoint has them.

    Raises:
        WeightsError: there is no such entry, or several could be meant; names the entries there are.
    """
    entries = list(dict.fromkeys(key.partition(".")[0] for key in source.specs if "." in key))
    found = [name] if name in entries else [entry for entry in SETS.get(name, ()) if entry in entries]
    if len(found) != 1:
        among = f"it could be {' or '.join(found)}" if found else "no entry is called so"
        listed = ", ".join(shown(entry) for entry in entries[:8]) or "none"
        raise WeightsError(f"{source.where}: weights={name!r}: {among}; its entries with weights are {listed}")
    prefix = f"{found[0]}."
    full = {key.removeprefix(prefix): key for key in source.specs if key.startswith(prefix)}

    def read(keys: Collection[str]) -> dict[str, Tensor]:
        tensors = source.read([full[key] for key in keys])
        return {key: tensors[full[key]] for key in keys}

    return WeightSource(
        f"{source.where}[{found[0]!r}]",
        {key: source.specs[name] for key, name in full.items()},
        tuple(key.removeprefix(prefix) for key in source.others if key.startswith(prefix)),
        read,
    )


def _flatten(
    state: Mapping[Any, Any],
    prefix: str,
    tensors: dict[str, Tensor],
    others: list[str],
    where: str,
    left: list[int],
    depth: int,
) -> None:
    """`left` holds how many entries may still come and is reduced."""
    left[0] -= len(state)
    if depth > _MAX_DEPTH or left[0] < 0:
        raise FormatError(f"{where}: dictionaries nested more than {_MAX_DEPTH} deep, or over {_MAX_ENTRIES} entries")
    for name, value in state.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            _flatten(value, f"{key}.", tensors, others, where, left, depth + 1)
        elif not isinstance(value, Tensor):
            others.append(key)
        elif key in tensors:
            raise FormatError(f"{where}: {shown(key)} is there twice, as a key with dots and in a dictionary")
        else:
            tensors[key] = value


def _own_copy(tensor: Tensor, where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise FormatError(f"{where} has no plain values (layout {tensor.layout}, device {tensor.device})")
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _load_pickle(path: Path) -> Mapping[Any, Any]:
    try:
        # Mapped where the format allows it, so that what is not asked for does not come into memory.
        with torch.serialization.safe_globals(_HARMLESS):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = _REFUSED_CLASS.search(str(error))
        raise FormatError(
            f"{path} holds more than tensors ({shown(named[1]) if named else _first_line(error)}), which could run "
            "code when it is read. Save the weights alone where that class is known, "
            "torch.save(model.state_dict(), ...), best as .safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        raise FormatError(f"{path}: torch cannot read it: {_first_line(error)}") from error
    except OSError as error:
        raise folder_error(f"{path}: cannot be read", error) from error
    if not isinstance(found, Mapping):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected a dictionary of weights")
    return found


def _first_line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0], 300)

"""One safetensors file, laid out so that a mapped tensor is already aligned; and the strict parsing of any header.

The format: 8 bytes with the header's length, the header (JSON: key -> dtype, shape, data_offsets), then the data
(https://github.com/huggingface/safetensors#format). We pad the header with spaces to a multiple of 64 bytes and put
tensors whose size is a multiple of 64 first, so they are at addresses divisible by 64 once the file is mapped;
odd-sized ones follow. It stays a valid safetensors file for every other reader. Why alignment matters: CPU kernels may
choose another path, and so give other last bits, when a weight does not start at the address an allocator would give.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reader.errors import FolderError, FormatError, WeightsError, shown
from .disk import replaced_file
from .json import parse_json

ALIGNMENT = 64
"""Bytes; what torch's CPU allocator aligns to, and the width of the widest vector registers."""

MAX_HEADER_BYTES = 8 * 1024**2
"""Room for some 60,000 tensors. The reference reader takes 100 MB, which costs gigabytes once parsed."""

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_RANK = 64
_MAX_BYTES = 2**63 - 1
# safetensors' name -> torch's; some of torch's types are missing in older versions.
_TORCH_NAMES = dict(
    pair.split(":")
    for pair in """
    BOOL:bool U8:uint8 I8:int8 U16:uint16 I16:int16 U32:uint32 I32:int32 U64:uint64 I64:int64 F16:float16 BF16:bfloat16
    F32:float32 F64:float64 C64:complex64 F8_E4M3:float8_e4m3fn F8_E5M2:float8_e5m2 F8_E4M3FNUZ:float8_e4m3fnuz
    F8_E5M2FNUZ:float8_e5m2fnuz F8_E8M0:float8_e8m0fnu
    """.split()
)
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the data section."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Layout:
    """A file to be written.

    Attributes:
        head: the file's first bytes, length and padded header, a multiple of 64 long.
        order: the keys in the order of their data.
    """

    head: bytes
    order: tuple[str, ...]


def _lay_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> _Layout:
    """Order the tensors so that those with a size divisible by 64 lie at offsets divisible by 64.

    Raises:
        WeightsError: a tensor that no safetensors file can hold, an impossible key, or too many tensors.
    """
    sizes: dict[str, int] = {}
    for key, tensor in tensors.items():
        _check_storable(key, tensor, where)
        sizes[key] = tensor.numel() * tensor.dtype.itemsize

    def rank(key: str) -> tuple[int, str]:
        # By the power of two that divides the size, descending: multiples of 64 first, and each odd-sized tensor
        # still lies at a multiple of its own elements' size.
        return -min(sizes[key] & -sizes[key] or ALIGNMENT, ALIGNMENT), key

    order = sorted(tensors, key=rank)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in order:
        header[key] = {
            "dtype": _NAMES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, offset + sizes[key]],
        }
        offset += sizes[key]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise WeightsError(f"{where}: {len(order)} tensors need a header of {len(text)} bytes, over {MAX_HEADER_BYTES}")
    return _Layout(len(text).to_bytes(8, "little") + text, tuple(order))


def _check_storable(key: str, tensor: object, where: str) -> None:
    if not isinstance(key, str) or key == "__metadata__":
        raise WeightsError(f"{where}: {key!r} cannot be a tensor's key")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise WeightsError(f"{where}: the key {key!r} is not valid Unicode") from error
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"{where}: {key} is a {type(tensor).__name__}, only tensors can be stored")
    reason = None
    if tensor.dtype not in _NAMES:
        reason = f"safetensors has no dtype for {tensor.dtype}; convert it first (known: {', '.join(map(str, _NAMES))})"
    elif tensor.is_meta:
        reason = "it is on the meta device and has no values; load or initialise it first"
    elif hasattr(type(tensor), "__tensor_flatten__"):
        reason = f"it is a {type(tensor).__name__}, which wraps other tensors; gather or dequantize it first"
    elif tensor.layout != torch.strided:
        reason = f"its layout is {tensor.layout}; store tensor.to_dense()"
    elif len(tensor.shape) > _MAX_RANK:
        reason = f"it has {len(tensor.shape)} dimensions, at most {_MAX_RANK} are read"
    if reason is not None:
        raise WeightsError(f"{where}: {key} {list(tensor.shape)} cannot be stored: {reason}")


def write_aligned(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` as one safetensors file in the aligned layout, with the same bytes for the same tensors.

    The file appears under its name at once and complete (written beside, fsynced, renamed), so a tower that has the
    earlier file mapped keeps it. Its mode follows the umask. Tensors are written one by one: what is copied is at
    most one tensor (not contiguous, or on another device) at a time. Tensors that share memory are written each.

    Args:
        path: the file to write or replace.
        tensors: key -> tensor of any shape, device and strides.
        metadata: the header's text entries; by default `{"format": "pt"}`, which transformers asks for.

    Raises:
        WeightsError: a tensor that no safetensors file can hold (its dtype, sparse, on meta), or an impossible key.
        FolderError: the file cannot be written (disk full, read-only, no such folder).
    """
    path = Path(path)
    require_little_endian()
    layout = _lay_out(tensors, {"format": "pt"} if metadata is None else metadata, f"{path}")
    with replaced_file(path) as file:
        file.write(layout.head)
        for key in layout.order:
            file.write(bytes_of(tensors[key]))


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order: its own memory where it is contiguous on the CPU, else a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    # uint8 is what numpy can show of bfloat16 and float8 too.
    return plain.reshape(-1).view(torch.uint8).numpy().data


def require_little_endian() -> None:
    if sys.byteorder != "little":
        raise FolderError("safetensors files are little-endian; reading and writing them on this machine is untested")


def parse_header(text: bytes, data_size: int, where: str) -> list[Entry]:
    """Read a header of an untrusted file.

    Args:
        text: the header without its length.
        data_size: bytes that follow it in the file.
        where: the file, for the error's text.

    Returns:
        The entries in the order of their data. They lie end to end and fill the data exactly.

    Raises:
        FormatError: anything else.
    """
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: the header is not a JSON object; not a safetensors file?")
    header = parse_json(text, f"{where} (header)", max_depth=3)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FormatError(f"{where}: __metadata__ must map text to text")
    entries = [_entry(key, info, where) for key, info in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            what = "overlaps the tensor before it" if entry.begin < expected else "leaves a hole before it"
            raise FormatError(f"{where}: {shown(entry.key)} {what} (starts at {entry.begin}, expected {expected})")
        expected = entry.end
    if expected != data_size:
        what = "it was cut off; download or save it again" if expected > data_size else "bytes that nothing describes"
        raise FormatError(f"{where}: the header describes {expected} bytes of data, the file has {data_size}: {what}")
    return entries


def _entry(key: str, info: Any, where: str) -> Entry:
    """Check one tensor's description in itself: types, dtype, and that its size is what shape and dtype say."""
    if not isinstance(info, dict) or info.keys() != _ENTRY_KEYS:
        raise FormatError(f"{where}: {shown(key)} must be described by dtype, shape and data_offsets")
    name, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise FormatError(
            f"{where}: {shown(key)} has the dtype {shown(name)}, which torch {torch.__version__} cannot read "
            f"(known: {', '.join(_DTYPES)})"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise FormatError(f"{where}: {shown(key)} has an impossible shape: {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: {shown(key)} has impossible data_offsets: {shown(offsets)}")
    size = math.prod(shape) * dtype.itemsize
    # A zero among huge sizes gives no bytes, but strides that overflow.
    if (size or math.prod(max(n, 1) for n in shape) * dtype.itemsize) > _MAX_BYTES:
        raise FormatError(f"{where}: {shown(key)} has an impossible shape: {shown(shape)}")
    if size != offsets[1] - offsets[0]:
        raise FormatError(
            f"{where}: {shown(key)} needs {size} bytes ({name} {shape}), data_offsets give {offsets[1] - offsets[0]}"
        )
    return Entry(key, dtype, tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    # by types: True is an int to isinstance
    ints = isinstance(values, list) and set(map(type, values)) <= {int}
    return ints and (not values or (min(values) >= 0 and max(values) <= _MAX_BYTES))

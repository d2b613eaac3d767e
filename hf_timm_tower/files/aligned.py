"""One safetensors file, laid out so that a mapped tensor is already aligned.

The header is padded with spaces to a multiple of 64 bytes and tensors whose size is a multiple of 64 come first, so
they lie at addresses divisible by 64 once the file is mapped; odd-sized ones follow. It stays a valid safetensors
file for every other reader (https://github.com/huggingface/safetensors#format). Why alignment matters: CPU kernels
may choose another path, and so give other last bits, when a weight does not start at the address an allocator would
give it.
"""

import errno
import math
import mmap
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..reader.errors import FolderError, FormatError
from .safetensors_header import ALIGNMENT, MAX_HEADER_BYTES, Entry, lay_out, parse_header

_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it


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
    _require_little_endian()
    layout = lay_out(tensors, {"format": "pt"} if metadata is None else metadata, f"{path}")
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        # os.open applies the umask to 0666; tempfile and the reference writer would leave 0600.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                _write_all(descriptor, memoryview(layout.head))
                for key in layout.order:
                    _write_all(descriptor, _bytes_of(tensors[key]))
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise folder_error(f"{path}: cannot be written", error) from error


def read_aligned(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file into tensors on the CPU, each 64-byte aligned in memory.

    A file in the aligned layout is mapped and not copied: the tensors are its own pages, private (training and
    in-place edits never reach the file), and stay valid after the file is replaced or removed. Tensors that are not
    aligned in the file, so most of a file by another writer, are read into aligned memory.

    Returns:
        key -> tensor, in the order of the data; each owns its storage.

    Raises:
        FolderError: the file cannot be opened or read.
        FormatError: it is not a well-formed safetensors file (the message names file and key).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise folder_error(f"{os.fspath(path)}: cannot be opened", error) from error
    try:
        return read_aligned_descriptor(descriptor, os.fspath(path))
    finally:
        os.close(descriptor)


def read_aligned_descriptor(descriptor: int, where: str) -> dict[str, Tensor]:
    """`read_aligned` of a file that is open already; `where` names it in errors. The caller closes it, at any time."""
    _require_little_endian()
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{where}: not a regular file")
        entries, start = _read_header(descriptor, status.st_size, where)
        return _tensors(descriptor, entries, start, status.st_size, where)
    except OSError as error:
        if isinstance(error, FolderError):
            raise
        raise folder_error(f"{where}: cannot be read", error) from error


def folder_error(message: str, cause: OSError) -> FolderError:
    """A `FolderError` that says what the system said, and keeps its `errno`."""
    remedy = {
        errno.ENOSPC: "; free some space and save again",
        errno.EDQUOT: "; the disk quota is used up",
        errno.EACCES: "; check the permissions",
        errno.EROFS: "; choose a folder that can be written",
    }.get(cause.errno or 0, "")
    error = FolderError(f"{message}: {cause.strerror or cause}{remedy}")
    error.errno = cause.errno
    return error


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes (NaN equals the same NaN; -0.0 is not 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8).to("cpu") for t in (a, b)))


# Writing


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order: its own memory where it is contiguous on the CPU, else a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    # uint8 is what numpy can show of bfloat16 and float8 too.
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        # One write takes at most 2 GiB on Linux, less where a signal comes in.
        data = data[os.write(descriptor, data[: 2**30]) :]


# Reading


def _read_header(descriptor: int, file_size: int, where: str) -> tuple[list[Entry], int]:
    """The entries in order of their data, and the offset where the data starts."""
    prefix = _read_exactly(descriptor, min(8, file_size), 0)
    if len(prefix) != 8:
        raise FormatError(f"{where}: {file_size} bytes are too few for a safetensors file; it was cut off")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{where}: the header claims {length} bytes, at most {MAX_HEADER_BYTES} are read; not a safetensors file?"
        )
    if 8 + length > file_size:
        raise FormatError(
            f"{where}: the header claims {length} bytes but the file has {file_size}; it was cut off (download or "
            "save it again) or is not a safetensors file"
        )
    return parse_header(_read_exactly(descriptor, length, 8), file_size - 8 - length, where), 8 + length


def _tensors(descriptor: int, entries: list[Entry], start: int, file_size: int, where: str) -> dict[str, Tensor]:
    aligned = sum(e.end - e.begin for e in entries if (start + e.begin) % ALIGNMENT == 0)
    # Mapping brings the whole file into memory; where most of it must be copied anyway that is work done twice.
    pages = _map(descriptor) if 2 * aligned > file_size - start else None
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        count, offset = math.prod(entry.shape), start + entry.begin
        if count == 0:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        elif pages is not None and offset % ALIGNMENT == 0:
            # A storage for each tensor, not one for all: else every writer that looks for shared storage (torch.save,
            # the reference's save_file, transformers) would take the whole file for one tied tensor.
            tensor = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=offset).view(entry.shape)
        else:
            raw = _aligned_bytes(entry.end - entry.begin)
            _read_into(descriptor, raw.numpy().data, offset, where)
            tensor = raw.view(entry.dtype).view(entry.shape)
        tensors[entry.key] = tensor
    return tensors


def _map(descriptor: int) -> mmap.mmap | None:
    """Map the file copy-on-write with its page table filled; None where the system or file system cannot."""
    if os.name != "posix":
        return None  # Windows forbids to replace a file that is mapped: a loaded tower would block the next save.
    try:
        pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOTSUP):
            return None
        raise
    try:
        # Read-populate: write-populate would copy every page, and no populate would fault them in one by one.
        pages.madvise(_MADV_POPULATE_READ)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # An older kernel, or not Linux: pages come in when they are touched.
    return pages


def _aligned_bytes(size: int) -> Tensor:
    """uint8 `[size]` of uninitialised memory that starts at a multiple of 64."""
    raw = torch.empty(size, dtype=torch.uint8)
    if raw.data_ptr() % ALIGNMENT == 0:
        return raw
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]


def _read_into(descriptor: int, target: memoryview, offset: int, where: str) -> None:
    while target:
        got = _pread(descriptor, target[: 2**30], offset)
        if got == 0:
            raise FormatError(f"{where}: ends at byte {offset}; it was cut off while it was read")
        target, offset = target[got:], offset + got


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = _pread(descriptor, view[done:], offset + done)
        if got == 0:
            break
        done += got
    return bytes(data[:done])


def _pread(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(target))
    target[: len(data)] = data
    return len(data)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise FolderError("safetensors files are little-endian; reading and writing them on this machine is untested")

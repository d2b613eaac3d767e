"""Reading a safetensors file into tensors that are aligned in memory, mapped where its layout allows it."""

import errno
import hashlib
import math
import mmap as mapping
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..reader.errors import FolderError, FormatError, shown
from .disk import folder_error
from .safetensors_layout import ALIGNMENT, MAX_HEADER_BYTES, Entry, parse_header, require_little_endian

_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it
_LFS_POINTER = b"version https://git-lfs"
_BLOCKS, _BLOCK_BYTES = 64, 4096  # half a millisecond


def read_aligned(
    path: str | os.PathLike[str], mmap: bool = True, keys: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file into tensors on the CPU, each 64-byte aligned in memory.

    A file in the aligned layout is mapped and not copied: the tensors are its own pages, private (training and
    in-place edits never reach the file), and stay valid after the file is replaced or removed. Tensors that are not
    aligned in the file, so most of a file by another writer, are read into aligned memory.

    Args:
        path: The file.
        mmap: False reads every tensor into memory of its own, for files that somebody may change in place (`cp` over
            a file that is mapped changes the tensors, and truncating it kills the process).

    Returns:
        key -> tensor, in the order of the data; each owns its storage.

    Raises:
        FolderError: the file cannot be opened or read.
        FormatError: it is not a well-formed safetensors file (the message names file and key).
    """
    with _opened(path) as descriptor:
        return read_aligned_descriptor(descriptor, os.fspath(path), mmap, keys)


def read_specs(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Key -> a tensor on meta of the stored one's shape and dtype; only the header is read.

    Raises:
        FolderError, FormatError: as `read_aligned`.
    """
    where = os.fspath(path)
    with _opened(path) as descriptor:
        entries, _ = _read_header(descriptor, _size_of(descriptor, where), where)
    return {entry.key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise folder_error(f"{os.fspath(path)}: cannot be opened", error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_aligned_descriptor(
    descriptor: int, where: str, mmap: bool = True, keys: Collection[str] | None = None
) -> dict[str, Tensor]:
    """`read_aligned` of a file that is open already; `where` names it in errors. The caller closes it, at any time."""
    require_little_endian()
    try:
        size = _size_of(descriptor, where)
        entries, start = _read_header(descriptor, size, where)
        wanted = entries if keys is None else [entry for entry in entries if entry.key in keys]
        return _tensors(descriptor, wanted, start, size, where, mmap)
    except OSError as error:
        if isinstance(error, FolderError):
            raise
        raise folder_error(f"{where}: cannot be read", error) from error


def file_digest(descriptor: int, where: str) -> str:
    """SHA-256 of a file's size and of a sample of its bytes: all of a file up to 256 KiB, 64 blocks of a larger one.

    It tells files of two saves apart at a cost that does not grow with them. Training changes weights all over; a
    change that one of these blocks would have to show by chance is what the fingerprint's digests are for.
    """
    try:
        size = _size_of(descriptor, where)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        last = max(size - _BLOCK_BYTES, 0)
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(_read_at(descriptor, size, 0))
        else:
            for block in range(_BLOCKS):
                digest.update(_read_at(descriptor, _BLOCK_BYTES, last * block // (_BLOCKS - 1)))
    except OSError as error:
        raise folder_error(f"{where}: cannot be read", error) from error
    return digest.hexdigest()


def _size_of(descriptor: int, where: str) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{where}: not a regular file")
    return status.st_size


def _read_header(descriptor: int, file_size: int, where: str) -> tuple[list[Entry], int]:
    """The entries in order of their data, and the offset where the data starts."""
    prefix = _read_at(descriptor, min(8, file_size), 0)
    if len(prefix) != 8:
        raise FormatError(f"{where}: {file_size} bytes are too few for a safetensors file; it was cut off")
    if _LFS_POINTER.startswith(prefix):
        raise FormatError(f"{where}: a pointer of git-lfs in place of the file; fetch the file itself (git lfs pull)")
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
    return parse_header(_read_at(descriptor, length, 8), file_size - 8 - length, where), 8 + length


def _tensors(
    descriptor: int, entries: list[Entry], start: int, file_size: int, where: str, mmap: bool
) -> dict[str, Tensor]:
    aligned = sum(e.end - e.begin for e in entries if (start + e.begin) % ALIGNMENT == 0)
    # Mapping brings the whole file into memory; where most of it must be copied anyway that is work done twice.
    pages = _map(descriptor) if mmap and 2 * aligned > file_size - start else None
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        count, offset = math.prod(entry.shape), start + entry.begin
        if count == 0:
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        elif pages is not None and offset % ALIGNMENT == 0:
            # A storage for each tensor, not one for all: else every writer that looks for shared storage (torch.save,
            # the reference's save_file, transformers) would take the whole file for one tied tensor.
            tensor = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=offset)
            tensor = tensor if len(entry.shape) == 1 else tensor.view(entry.shape)
        else:
            raw = _aligned_bytes(entry.end - entry.begin)
            if _read(descriptor, raw.numpy().data, offset) < raw.numel():
                raise FormatError(f"{where}: ends within {shown(entry.key)}; it was cut off while it was read")
            tensor = raw.view(entry.dtype).view(entry.shape)
        tensors[entry.key] = tensor
    return tensors


def _map(descriptor: int) -> mapping.mmap | None:
    """Map the file copy-on-write with its page table filled; None where the system or file system cannot."""
    if os.name != "posix":
        return None  # Windows forbids to replace a file that is mapped: a loaded tower would block the next save.
    try:
        pages = mapping.mmap(descriptor, 0, access=mapping.ACCESS_COPY)
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
    raw = torch.empty(size, dtype=torch.uint8, device="cpu")
    if raw.data_ptr() % ALIGNMENT == 0:
        return raw
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """So many bytes, fewer at the file's end."""
    data = bytearray(size)
    return bytes(data[: _read(descriptor, memoryview(data), offset)])


def _read(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill the target from an offset on; how many bytes there were."""
    done = 0
    while done < len(target):
        part = target[done : done + 2**30]
        if hasattr(os, "preadv"):
            got = os.preadv(descriptor, [part], offset + done)
        else:
            os.lseek(descriptor, offset + done, os.SEEK_SET)
            data = os.read(descriptor, len(part))
            part[: len(data)] = data
            got = len(data)
        if got == 0:
            break
        done += got
    return done

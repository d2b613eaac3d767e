"""Image files below a folder, and in tar shards, in a fixed order."""

import os
import tarfile
from collections.abc import Iterator
from typing import Any

from ..reader.errors import ArgumentError, FolderError, shown

EXTENSIONS = frozenset(
    "apng avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpf jpg jpx mpo pbm pgm png pnm ppm qoi tga tif tiff webp".split()
)
"""Files that are taken from a folder; one that is named itself is tried whatever its extension."""


MAX_MEMBER_BYTES = 2**28
"""Largest image file in a tar shard: the whole of it is read into memory."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken from a folder."""
    return "." in name and name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith(".")


def printable(path: str) -> str:
    """A path as text: bytes that are not UTF-8 are written as escapes, `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def files_of_folder(folder: str) -> Iterator[tuple[str, Any]]:
    """(path below the folder, path) of its image files, and the images of its tar shards, sorted within each folder.

    Links are followed, and every folder is visited once, so that a loop ends. Only the names of one folder at a time
    are in memory. A folder below that cannot be listed is one item, an error.

    Raises:
        FolderError: the folder itself cannot be listed.
    """
    try:
        os.listdir(folder)
    except OSError as error:
        raise FolderError(f"{shown(folder)} cannot be listed: {error.strerror or error}") from error
    yield from _below(folder, "", set())


def _below(folder: str, prefix: str, visited: set[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    try:
        status = os.stat(folder)
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield printable(prefix), ArgumentError(f"the folder cannot be listed: {error.strerror or error}")
        return
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _below(path, f"{prefix}{name}/", visited)
        elif name.endswith(".tar"):
            yield from ((printable(prefix) + key, image) for key, image in members_of_tar(path))
        elif is_image_name(name):
            yield printable(prefix + name), path


def members_of_tar(path: str) -> Iterator[tuple[str, Any]]:
    """(shard/name, bytes) of the image files in a WebDataset shard, in its order; an error where it breaks off."""
    shard = os.path.basename(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and is_image_name(os.path.basename(member.name)):
                    yield printable(f"{shard}/{member.name}"), _content(archive, member)
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every member's header
            _check_end(archive)
    except (OSError, tarfile.TarError, EOFError) as error:
        yield printable(shard), ArgumentError(f"the shard cannot be read to its end: {shown(str(error))[1:-1]}")


def _check_end(archive: tarfile.TarFile) -> None:
    """Whether the end mark is there, and only zeros behind it: tarfile takes a header that is damaged for the end."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    part = file.read(tarfile.BLOCKSIZE)
    if len(part) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark")
    while part:
        if part.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset}, and more behind it")
        part = file.read(2**20)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    if member.size > MAX_MEMBER_BYTES:
        return ArgumentError(f"a file of {member.size} bytes in a shard; at most {MAX_MEMBER_BYTES} are read")
    data = archive.extractfile(member)
    return b"" if data is None else data.read()

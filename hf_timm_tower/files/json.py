"""JSON of untrusted files: bounded in size and depth, no duplicate keys, no NaN, one clear error. And writing it.

`json.loads` alone keeps the last of two equal keys (two readers of one file may then see two models), takes `NaN` and
`Infinity`, turns `1e999` into infinity, and recurses as deep as the text says.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from ..reader.errors import FormatError, shown
from .disk import replaced_file

MAX_JSON_BYTES = 4 * 1024**2
"""Ten times the largest honest file: an index of 3,000 keys has 0.3 MB. Empty objects cost 30 bytes of memory each."""

MAX_JSON_DEPTH = 64

# The closing quote is optional, so that the pattern never fails at a quote: text without an end stays linear to scan.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def parse_json(data: bytes, where: str, *, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """Parse one JSON document.

    Args:
        data: the whole document, UTF-8.
        where: what the document is, for the error's text ("folder/config.json").
        max_depth: how many arrays and objects may lie inside each other.

    Raises:
        FormatError: not UTF-8, not JSON, nested too deep, a key twice in one object, or a number JSON does not have.
    """
    # without escapes every second part between quotes is a string: found four times as fast
    plain = _STRING.sub(b"", data) if b"\\" in data else b"".join(data.split(b'"')[::2])
    brackets = plain.translate(None, _NOT_BRACKETS)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > max_depth:
        raise FormatError(f"{where}: nested {depth} levels deep, at most {max_depth} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the key {shown(twice)} stands twice in one object")
        return found

    def no_constant(name: str) -> NoReturn:
        raise FormatError(f"{where}: {name} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise FormatError(f"{where}: the number {shown(text)} is too large for a 64-bit float")
        return number

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise FormatError(f"{where}: nested too deep") from error
    except ValueError as error:  # JSONDecodeError, and integers past Python's limit of digits
        raise FormatError(f"{where}: not JSON: {error}") from error


def parse_object(data: bytes, where: str, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
    """`parse_json` of a document that must be an object."""
    parsed = parse_json(data, where, max_depth=max_depth)
    if not isinstance(parsed, dict):
        kind = {list: "an array", str: "a text", type(None): "null"}.get(type(parsed), "a number or truth value")
        raise FormatError(f"{where}: holds {kind}, expected a JSON object")
    return parsed


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, sorted by key, fsynced; replaces the file at once.

    Raises:
        FormatError: something in it that JSON cannot hold, NaN and infinity included, or more than we read.
        FolderError: the file cannot be written.
    """
    path = Path(path)
    try:
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        encoded = text.encode()
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: cannot be written as JSON: {error}") from error
    if len(encoded) > MAX_JSON_BYTES:
        raise FormatError(f"{path}: would have {len(encoded)} bytes, at most {MAX_JSON_BYTES} are read")
    with replaced_file(path) as file:
        file.write(encoded)

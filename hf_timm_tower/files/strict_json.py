"""JSON from files that nobody vouches for: bounded in size and depth, no duplicate keys, no NaN, one clear error.

`json.loads` alone keeps the last of two equal keys (two readers of one file may then see two models), takes `NaN` and
`Infinity`, turns `1e999` into infinity, and recurses as deep as the text says.
"""

import json
import math
import re
from itertools import accumulate
from typing import Any, NoReturn

from ..reader.errors import FormatError

MAX_JSON_BYTES = 32 * 1024**2
MAX_JSON_DEPTH = 64

# The closing quote is optional, so that the pattern never fails at a quote: text without an end stays linear to scan.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
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
    brackets = _STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > max_depth:
        raise FormatError(f"{where}: nested {depth} levels deep, at most {max_depth} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the key {shorten(twice)} stands twice in one object")
        return found

    def no_constant(name: str) -> NoReturn:
        raise FormatError(f"{where}: {name} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise FormatError(f"{where}: the number {shorten(text)} is too large for a 64-bit float")
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


def shorten(thing: object, limit: int = 80) -> str:
    """`repr` of something from a foreign file, cut to at most about `limit` characters."""
    text = repr(thing[: limit + 1] if isinstance(thing, str) else thing)
    return text if len(text) <= limit else text[: limit - 3] + "..."

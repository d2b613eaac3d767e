"""Names that clients choose. Only these are ever made into file names, and only after these checks."""

import re
import unicodedata
from urllib.parse import quote, unquote

from .errors import bad_request

KINDS = ("model", "dataset", "space")
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What `git check-ref-format` refuses, and room for the quoted name in one file name.
_BAD_IN_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|$)")
_LONGEST_REF = 200
_LONGEST_PATH = 1024


def is_commit_id(text: str) -> bool:
    return _SHA1.fullmatch(text) is not None


def check_sha256(text: object) -> str:
    """`text` if it is a sha256 in lower-case hexadecimal; else HubError 400."""
    if not isinstance(text, str) or _SHA256.fullmatch(text) is None:
        raise bad_request(f"expected a sha256 as 64 lower-case hexadecimal digits, found {text!r:.100}")
    return text


def check_repo_part(text: object) -> str:
    """`text` if it can be a namespace or the name of a repository; else HubError 400."""
    if (
        not isinstance(text, str)
        or _PART.fullmatch(text) is None
        or "--" in text
        or ".." in text
        or text.endswith(".git")
    ):
        raise bad_request(f"not a namespace or repository name: {text!r:.120}")
    return text


def check_ref_name(text: object) -> str:
    """`text` if it can be a branch or tag; else HubError 400."""
    if (
        not isinstance(text, str)
        or not text
        or text[0] in "/.-"
        or text[-1] in "/."
        or text == "@"
        or text == "HEAD"
        or text.startswith("refs/")
        or is_commit_id(text)
        or _BAD_IN_REF.search(text)
        or len(quote(text, safe="")) > _LONGEST_REF
    ):
        raise bad_request(f"Invalid reference for a branch or tag: {text!r:.250}")
    return text


def ref_to_file(name: str) -> str:
    """The file name of a checked ref: slashes are quoted, so that a ref never becomes a folder."""
    return quote(name, safe="") + ".ref"


def file_to_ref(file_name: str) -> str:
    return unquote(file_name.removesuffix(".ref"))


def check_path(text: object) -> str:
    """`text` if it can be a file of a repository: relative, no empty, `.`, `..` or `.git` part; else HubError 400.

    Paths are keys of a commit and never reach this machine's disk; clients that download the repository write them.
    """
    if not isinstance(text, str) or not text or len(text) > _LONGEST_PATH:
        raise bad_request(f"not a path of at most {_LONGEST_PATH} characters: {text!r:.120}")
    parts = text.split("/")
    if any(part in ("", ".", "..", ".git") or len(part) > 255 for part in parts):
        raise bad_request(f"not a path inside a repository: {text!r:.120}")
    if "\\" in text or any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise bad_request(f"backslash or control character in a path: {text!r:.120}")
    return text

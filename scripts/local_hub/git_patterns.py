"""The patterns of `.gitattributes` (which files are LFS) and `.gitignore` (which are left out)."""

import re
from functools import lru_cache

# What the Hub writes into a new model repository.
DEFAULT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        *"*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy".split(),
        *"*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/*".split(),
        *"*.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*".split(),
    )
)


# Clients send these files, so their cost is bounded. The Hub's own attributes have 35 lines, and a name in git has at
# most 255 characters.
MAX_LINES = 512
MAX_PATTERN = 1024

# What a token takes: characters of one kind any number of times, folders with their slash, or one character.
_STAR, _ANY, _FOLDERS = "*", "**", "**/"


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> tuple[str | frozenset[str] | re.Pattern[str], ...]:
    """A pattern's tokens: _STAR, _ANY, _FOLDERS, or what one character must be."""
    # A pattern with a slash (other than the last) is matched from the root, one without anywhere.
    tokens: list[str | frozenset[str] | re.Pattern[str]] = [] if "/" in pattern.rstrip("/") else [_FOLDERS]
    pattern, at = pattern.lstrip("/"), 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            tokens, at = [*tokens, _FOLDERS], at + 3
        elif pattern.startswith("**", at):
            tokens, at = [*tokens, _ANY], at + 2
        elif pattern[at] == "*":
            tokens, at = [*tokens, _STAR], at + 1
        elif pattern[at] == "?":
            tokens, at = [*tokens, _ONE], at + 1
        elif pattern[at] == "[" and "]" in pattern[at + 2 :]:
            end = pattern.index("]", at + 2)
            inside = re.sub(r"([\\\[&~|])", r"\\\1", pattern[at + 1 : end])
            try:
                tokens.append(re.compile("[" + re.sub(r"^!", "^", inside) + "]", re.DOTALL))
            except re.error:  # a range such as [z-a], of which git takes the first character
                tokens.append(frozenset(inside[:1]))
            at = end + 1
        else:
            at += pattern[at] == "\\" and at + 1 < len(pattern)
            tokens, at = [*tokens, frozenset(pattern[at])], at + 1
    return tuple(tokens)


_ONE = re.compile(".", re.DOTALL)


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches the whole of a path, in time of their lengths' product.

    All places in the pattern where a match may stand are followed at once, so that nothing is tried twice: as a
    regular expression `*a*a*a...b` goes back and forth for years.
    """
    tokens = _parse(pattern)
    # A place is the number of the token that comes next; ~number is inside the folders that this token takes.
    places = _skipping({0}, tokens)
    for character in path:
        following = set()
        for place in places:
            if place < 0:
                following |= {place, ~place + 1} if character == "/" else {place}
            elif place < len(tokens):
                token = tokens[place]
                if token == _FOLDERS:
                    following |= {~place, place + 1} if character == "/" else {~place}
                elif token == _ANY or (token == _STAR and character != "/"):
                    following.add(place)
                elif isinstance(token, frozenset):
                    if character in token:
                        following.add(place + 1)
                elif isinstance(token, re.Pattern) and character != "/" and token.match(character):
                    following.add(place + 1)
        places = _skipping(following, tokens)
        if not places:
            return False
    return len(tokens) in places


def _skipping(places: set[int], tokens: tuple[object, ...]) -> set[int]:
    """The places, and those behind tokens that may take nothing."""
    found = set(places)
    for place in places:
        while 0 <= place < len(tokens) and tokens[place] in (_STAR, _ANY, _FOLDERS):
            place += 1
            found.add(place)
    return found


def _lines(text: str) -> list[str]:
    lines = text.splitlines()
    if len(lines) > MAX_LINES or any(len(line) > MAX_PATTERN for line in lines):
        raise ValueError(f"patterns: at most {MAX_LINES} lines of {MAX_PATTERN} characters are read")
    return lines


def is_lfs(path: str, attributes: str) -> bool:
    """Whether the last line of `attributes` that speaks of a filter for `path` says `filter=lfs`.

    Raises:
        ValueError: it has more or longer lines than are read.
    """
    lfs = False
    for line in _lines(attributes):
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        filters = [word for word in words[1:] if word.lstrip("-!").partition("=")[0] == "filter"]
        if filters and _matches(words[0], path):
            lfs = filters[-1] == "filter=lfs"
    return lfs


def is_ignored(path: str, ignore: str) -> bool:
    """Whether `ignore`, the text of a `.gitignore` at the root, leaves `path` out. The last matching line decides.

    Raises:
        ValueError: it has more or longer lines than are read.
    """
    parts = path.split("/")
    folders = ["/".join(parts[:count]) for count in range(1, len(parts))]
    ignored = False
    for line in _lines(ignore):
        line = line.rstrip()
        negated = line.startswith("!")
        pattern = line[negated:]
        if not pattern or pattern.startswith("#"):
            continue
        candidates = folders if pattern.endswith("/") else [*folders, path]
        if any(_matches(pattern.rstrip("/"), candidate) for candidate in candidates):
            ignored = not negated
    return ignored

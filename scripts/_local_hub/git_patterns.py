"""The patterns of `.gitattributes` (which files are LFS) and `.gitignore` (which are left out)."""

import re

# What the Hub writes into a new model repository.
DEFAULT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        *"*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy".split(),
        *"*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/*".split(),
        *"*.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*".split(),
    )
)


def _to_regex(pattern: str) -> re.Pattern[str]:
    # A pattern with a slash (other than the last) is matched from the root, one without anywhere.
    anchored = "/" in pattern.rstrip("/")
    pattern = pattern.lstrip("/")
    out, at = "" if anchored else "(?:.*/)?", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and "]" in pattern[at + 2 :]:
            end = pattern.index("]", at + 2)
            inside = re.sub(r"([\\\[&~|])", r"\\\1", pattern[at + 1 : end])
            out, at = out + "[" + re.sub(r"^!", "^", inside) + "]", end + 1
        else:
            at += pattern[at] == "\\" and at + 1 < len(pattern)
            out, at = out + re.escape(pattern[at]), at + 1
    try:
        return re.compile(out, re.DOTALL)
    except re.error:  # a range such as [z-a], which matches nothing in git either
        return re.compile(r"(?!)")


def is_lfs(path: str, attributes: str) -> bool:
    """Whether the last line of `attributes` that speaks of a filter for `path` says `filter=lfs`."""
    lfs = False
    for line in attributes.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        filters = [word for word in words[1:] if word.lstrip("-!").partition("=")[0] == "filter"]
        if filters and _to_regex(words[0]).fullmatch(path):
            lfs = filters[-1] == "filter=lfs"
    return lfs


def is_ignored(path: str, ignore: str) -> bool:
    """Whether `ignore`, the text of a `.gitignore` at the root, leaves `path` out. The last matching line decides."""
    parts = path.split("/")
    folders = ["/".join(parts[:count]) for count in range(1, len(parts))]
    ignored = False
    for line in ignore.splitlines():
        line = line.rstrip()
        negated = line.startswith("!")
        pattern = line[negated:]
        if not pattern or pattern.startswith("#"):
            continue
        regex = _to_regex(pattern.rstrip("/"))
        candidates = folders if pattern.endswith("/") else [*folders, path]
        if any(regex.fullmatch(candidate) for candidate in candidates):
            ignored = not negated
    return ignored

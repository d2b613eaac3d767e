"""A model card that people have edited, and what a save wants to say in it -> one card.

What a person wrote stays. Of the text, only the parts between our marks are written again; of the metadata, only what
is still as we wrote it. To know that, a card keeps a record of what we wrote, in a comment, and every piece of
metadata (a key, a tag, one figure of the model-index) is merged three ways: as recorded, as found, as wanted now.
Metadata that does not change keeps its spelling, comments and order.
"""

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# The parser that ModelCard itself reads metadata with.
from huggingface_hub.repocard import REGEX_YAML_BLOCK, yaml, yaml_dump  # type: ignore[attr-defined]

from ..reader.errors import FormatError, shown

MAX_CARD_BYTES = 2**20
"""A longer card is not read. The longest of the Hub's own model cards have a tenth of it."""

# Metadata is parsed by PyYAML, at about 50 KB a second; a card with all languages and a hundred results has 20 KB. The
# nodes are counted as aliases write them out.
_MAX_METADATA_BYTES, _MAX_METADATA_NODES = 2**16, 2**15

MODEL_INDEX = "model-index"
_LISTS = ("tags", "datasets", "metrics")
_FIGURES = ("metrics", MODEL_INDEX)
_ABSENT = object()
# What taking metadata of another form apart raises: dates that do not exist and nesting without end among it.
_ODD = (ValueError, TypeError, AttributeError, KeyError, RecursionError)

# No mark can reach beyond the next `<`, so that looking for all of them takes one pass.
_OPENING = "<!-- hf_timm_tower: "
_MARK = re.compile(re.escape(_OPENING) + r"(?:(begin|end) ([\w-]{1,40})|record) ([^\n<>]*)-->")

Piece = tuple[str, ...]
"""Which piece of metadata: `("license",)`, `("tags", '"timm"')`, `("model-index", task, dataset, metric)`."""


@dataclass(frozen=True)
class Record:
    """What we wrote into a card, as the card itself keeps it.

    Attributes:
        own: Metadata that followed from the tower; what is no longer wanted is taken out again.
        given: Metadata that callers gave; what is not given this time stays as it is.
        sections: Names of the parts of the text.
        repo_id: The repository that the snippets name.
        weights: Digests of the weights, and of the form, that the metrics in `given` were measured with.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    sections: Sequence[str] = ()
    repo_id: str | None = None
    weights: Mapping[str, str] | None = None

    @classmethod
    def read(cls, text: str) -> "Record":
        """The record of a card's text; an empty one where there is none or somebody broke it."""
        found = [mark for mark in _MARK.finditer(text[:MAX_CARD_BYTES]) if not mark[1]]
        try:
            stored = cls(**json.loads(found[0][3])) if found else cls()
            names = isinstance(stored.sections, list) and isinstance(stored.repo_id, (str, type(None)))
            _check_metadata({**stored.own})
            _check_metadata({**stored.given})
        except _ODD:
            return cls()
        return stored if names else cls()

    def __str__(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        for char in "<>&":
            text = text.replace(char, f"\\u{ord(char):04x}")  # nothing in it can end the comment
        return f"{_OPENING}record {text} -->"


def merge_card(
    existing: str | None,
    record: Record,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    render: Callable[[dict[str, Any]], ModelCard],
    *,
    repo_id: str | None,
    weights: Mapping[str, str] | None,
) -> str:
    """A card from nothing, or an existing one, renewed.

    A card whose metadata or marks cannot be read is given back as it is, with a warning: a push after a night of
    training shall not fail for a typing error in its README, and guessing could cost somebody's text.

    Args:
        existing: The text of README.md; may be empty, with any line ends, without metadata, without marks.
        record: What it says that we wrote.
        own: Metadata that follows from the tower.
        given: Metadata that the caller gave.
        render: Metadata -> a new card of the tower.
        repo_id: The repository that the snippets name.
        weights: Digests of the tower's weights; metrics that were measured with others are taken out.

    Returns:
        The text, with the line ends that it had.
    """
    bom, text = ("\ufeff", existing[1:]) if existing and existing.startswith("\ufeff") else ("", existing or "")
    block = REGEX_YAML_BLOCK.search(text) if len(text) <= MAX_CARD_BYTES else None
    source, body = (block[2], text[block.end() :]) if block else ("", text)
    try:
        if len(text) > MAX_CARD_BYTES:
            raise FormatError(f"it has {len(text)} characters, at most {MAX_CARD_BYTES} are read")
        data, sections = _read_metadata(source), _find_sections(body)
    except FormatError as error:
        _warn(f"was left as it is: {error}. Mend that, and the next save renews it.")
        return existing or ""
    measured = record.weights
    if measured and weights and "form" not in measured:  # written by an earlier version
        measured = {**measured, "form": weights["form"]}
    is_stale = measured != weights
    merged, kept, refused = _merge(data, record, own, given, is_stale)
    drops = is_stale and any(record.given.get(key) for key in _FIGURES) and not given.get(MODEL_INDEX)
    if refused:
        keys = ", ".join(refused)
        _warn(f"keeps its own {keys}: edited since we wrote it, so what was given now is not written. Change it there.")
    if drops:
        _warn(
            "no longer shows metrics: they were measured with other weights, another form or preprocessing than those "
            "saved now. Give metrics=..."
        )
    newline = "\r\n" if "\r\n" in text else "\n"
    fresh = render(merged)
    written = Record(own, kept, record.sections, repo_id, weights)
    if body.strip():
        body = _renew(body, sections, fresh.text, written, drops, newline)
    else:  # nothing yet, or what a repository made on the website has: metadata alone
        names = [name for name, _, _ in _find_sections(fresh.text)]
        body = f"{fresh.text.rstrip()}\n\n{replace(written, sections=names)}\n".replace("\n", newline)
    if not data:
        source = fresh.data.to_yaml(line_break=newline)
    elif merged != data:
        source = str(yaml_dump(merged, sort_keys=False, line_break=newline)).rstrip("\r\n")
    opening, closing = (block[1], block[3]) if block else (f"---{newline}", f"{newline}---{newline}")
    return f"{bom}{opening}{source}{closing}{body}"


def _warn(what: str) -> None:
    warnings.warn(f"README.md {what}", stacklevel=5)


# The text


def _find_sections(body: str) -> list[tuple[str, int, int]]:
    """Name, start and end of each part between our marks.

    Raises:
        FormatError: the marks are not in order.
    """
    marks = list(_MARK.finditer(body))
    if len(marks) != body.count(_OPENING):
        raise FormatError(f"a mark {_OPENING}... --> in it is broken off")
    pairs = [mark for mark in marks if mark[1]]
    if len(pairs) < len(marks) - 1:
        raise FormatError(f"it holds the comment {_OPENING}record --> twice")
    names = [mark[2] for mark in pairs[::2]]
    expected = [(kind, name) for name in names for kind in ("begin", "end")]
    if [(mark[1], mark[2]) for mark in pairs] != expected or len(set(names)) != len(names):
        found = ", ".join(f"{mark[1]} {mark[2]}" for mark in pairs[:8])
        raise FormatError(f"its marks {_OPENING}begin/end --> are not in pairs, each name once ({shown(found)})")
    return [(begin[2], begin.start(), end.end()) for begin, end in zip(pairs[::2], pairs[1::2], strict=True)]


def _renew(
    body: str, found: list[tuple[str, int, int]], fresh: str, written: Record, drops_results: bool, newline: str
) -> str:
    old = [mark for mark in _MARK.finditer(body) if not mark[1]]
    if not found and not old and not written.given.get(MODEL_INDEX):
        return body  # a card of somebody's own; a record is needed only to take figures out again
    new = {name: fresh[start:end].replace("\n", newline) for name, start, end in _find_sections(fresh)}
    names = [name for name, _, _ in found]
    # Of the sections that are not there, those we never wrote are new, the others somebody took out.
    added = [name for name in new if found and name not in names and name not in written.sections]
    sections = dict.fromkeys([*written.sections, *names, *added])
    pieces, position = [], 0
    for name, start, end in found:
        text = new.get(name, body[start:end])
        if name == "results" and drops_results:
            text = ""
            sections.pop(name)
        pieces += [body[position:start] if text else body[position:start].removesuffix(newline * 2), text]
        position = end
    pieces += [newline * 2 + new[name] for name in added]
    written = replace(written, sections=list(sections))
    if not old:  # nobody can say what was ours before this record, so it claims what is written now
        return "".join([*pieces, body[position:]]).rstrip("\r\n") + f"{newline * 2}{written}{newline}"
    whole = "".join([*pieces, body[position:]])
    return _MARK.sub(lambda mark: mark[0] if mark[1] else str(written), whole)


# The metadata


def _read_metadata(source: str) -> dict[str, Any]:
    where = "the metadata at its top"
    size = len(source.encode(errors="replace"))
    if size > _MAX_METADATA_BYTES:
        raise FormatError(f"{where} has {size} bytes, at most {_MAX_METADATA_BYTES} are read")
    try:
        loader = yaml.SafeLoader(source)
        node = loader.get_single_node()
        if _count(node, {}) > _MAX_METADATA_NODES:
            raise FormatError(f"{where} says more than {_MAX_METADATA_NODES} things, aliases written out")
        data = {} if node is None else loader.construct_document(node)
        yaml_dump(data)
        if data is not None:
            _check_metadata(data)
    except FormatError:
        raise
    except (yaml.YAMLError, *_ODD) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FormatError(f"{where} is not that of a model card ({shown(what, 200)})") from error
    return data or {}


def _count(node: Any, seen: dict[int, int]) -> int:
    """Nodes of a YAML document, those of an alias as often as it is used; without end where one holds itself."""
    if id(node) not in seen:
        seen[id(node)] = _MAX_METADATA_NODES + 1
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
        seen[id(node)] = 1 + sum(_count(part, seen) for part in parts)
    return seen[id(node)]


def _check_metadata(data: dict[str, Any]) -> None:
    """Let huggingface_hub and what is below take the metadata apart; one of `_ODD` where they cannot."""
    if not all(isinstance(key, str) for key in data):
        raise TypeError("keys that are no words")
    ModelCardData(**copy.deepcopy(data))
    for key in _LISTS:
        value = data.get(key) or []
        if not isinstance(value, (str, list)) or any(isinstance(item, (dict, list)) for item in value):
            raise TypeError(f"{key} is not a list of words")
    _pieces(data)


def _merge(
    found: Mapping[str, Any], record: Record, own: Mapping[str, Any], given: Mapping[str, Any], is_stale: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The merged metadata, what of it callers gave, and the keys of what was given now but gave way to an edit."""
    there, ours, asked = _pieces(found), _pieces(own), _pieces(given)
    was_ours, was_asked = _pieces(record.own), _pieces(record.given)
    before = {**was_ours, **was_asked}
    stale = [piece for piece in was_asked if is_stale and piece[0] in _FIGURES]
    gone = [piece for piece in was_ours if piece not in was_asked] + stale
    changes = {piece: _ABSENT for piece in gone if there.get(piece, _ABSENT) == before[piece]}
    remembered = {piece: value for piece, value in was_asked.items() if piece in ours}
    refused = []
    for piece, value in {**ours, **remembered, **asked}.items():
        now = there.get(piece, _ABSENT)
        if now == value:
            changes.pop(piece, None)
        elif now == before.get(piece, _ABSENT):
            changes[piece] = value
        elif piece in asked:
            refused.append(piece[0])
    kept = _changed(record.given, {**dict.fromkeys(stale, _ABSENT), **asked}, given)
    return _changed(found, changes, given), kept, list(dict.fromkeys(refused))


def _pieces(data: Mapping[str, Any]) -> dict[Piece, Any]:
    pieces: dict[Piece, Any] = {}
    for key, value in data.items():
        if value is None:
            continue  # a key without a value says nothing yet
        if key == MODEL_INDEX:
            pieces |= {_name(result, metric): metric["value"] for _, result, metric in _figures(value)}
        elif key in _LISTS:
            pieces |= {(key, _json(item)): item for item in ([value] if isinstance(value, str) else value)}
        else:
            pieces[(key,)] = value
    return pieces


def _changed(data: Mapping[str, Any], changes: Mapping[Piece, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with some pieces set or taken out; `given` has the whole of the figures that are new."""
    merged = dict(data)
    figures = {piece: value for piece, value in changes.items() if piece[0] == MODEL_INDEX}
    if figures:
        merged[MODEL_INDEX] = _with_figures(data.get(MODEL_INDEX) or [], figures, given.get(MODEL_INDEX) or [])
    for piece, value in changes.items():
        key = piece[0]
        if len(piece) == 1:
            merged[key] = value
        elif len(piece) == 2:
            there = merged.get(key) or []
            rest = [item for item in ([there] if isinstance(there, str) else there) if _json(item) != piece[1]]
            merged[key] = rest if value is _ABSENT else [*rest, value]
    touched = {piece[0] for piece in changes}
    return {key: value for key, value in merged.items() if key not in touched or value not in (_ABSENT, [])}


def _with_figures(index: Any, changes: Mapping[Piece, Any], source: Any) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = []
    for model in index:
        results = []
        for result in model["results"]:
            values = ((metric, changes.get(_name(result, metric), metric["value"])) for metric in result["metrics"])
            changed = [_revalued(metric, value) for metric, value in values]
            if metrics := [metric for metric in changed if metric is not None]:
                results.append({**result, "metrics": metrics})
        models.append({**model, "results": results})
    there = {_name(result, metric) for _, result, metric in _figures(index)}
    for model, result, metric in _figures(source):
        if _name(result, metric) in there or changes.get(_name(result, metric), _ABSENT) is _ABSENT:
            continue
        models = models or [{**model, "results": []}]
        where = (result.get("task"), result.get("dataset"))
        alike = [other for other in models[0]["results"] if (other.get("task"), other.get("dataset")) == where]
        if alike:
            alike[0]["metrics"].append(metric)
        else:
            models[0]["results"].append({**result, "metrics": [metric]})
    return [model for model in models if model["results"]]


def _revalued(metric: dict[str, Any], value: Any) -> dict[str, Any] | None:
    if value is _ABSENT or value == metric["value"]:
        return None if value is _ABSENT else metric
    # `verified` is the Hub's seal on the value that was.
    return {**{key: metric[key] for key in metric if key not in ("verified", "verifyToken")}, "value": value}


def _figures(index: Any) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    for model in index:
        for result in model["results"]:
            for metric in result["metrics"]:
                yield model, result, metric


def _name(result: Any, metric: Mapping[str, Any]) -> Piece:
    named = {key: metric[key] for key in metric if key not in ("value", "verified", "verifyToken")}
    return (MODEL_INDEX, _json(result.get("task")), _json(result.get("dataset")), _json(named))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

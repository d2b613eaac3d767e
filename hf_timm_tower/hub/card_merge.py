"""A model card that people have edited, and what we want to say in it -> one card.

What a person wrote stays. Of the text, only the parts between our marks are written again; of the metadata, only what
is still as we wrote it. To know that, a card keeps a record of what we wrote, in a comment, and every piece of
metadata (a key, a tag, one figure of the model-index) is merged three ways: as recorded, as found, as wanted now.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

from ..reader.errors import FormatError
from .card_yaml import edit_yaml, read_yaml

MODEL_INDEX = "model-index"
_LISTS = ("tags", "datasets", "metrics")
_ABSENT = object()

_MARK = re.compile(r"<!--\s*hf_timm_tower:\s*(begin|end)\s+([\w-]+)[^\n]*?-->")
_RECORD = re.compile(r"<!--\s*hf_timm_tower:\s*record\s+([^\n]*?)\s*-->")
_ANY_MARK = re.compile(r"<!--\s*hf_timm_tower:\s*(?:begin|end|record)\b")

Piece = tuple[str, ...]
"""Where a piece of metadata lies: `("license",)`, `("tags", '"timm"')`, `("model-index", task, dataset, metric)`."""


@dataclass(frozen=True)
class Wanted:
    """What a card shall say.

    Attributes:
        own: Metadata that follows from the tower; what is no longer wanted is taken out again.
        given: Metadata that the caller gave; what is not given this time stays as it is.
        title: The heading of a new card; nobody's but the reader's afterwards.
        sections: Name -> Markdown, in order.
        repo_id: The repository that the snippets name.
    """

    own: Mapping[str, Any]
    given: Mapping[str, Any]
    title: str
    sections: Mapping[str, str]
    repo_id: str | None = None


@dataclass(frozen=True)
class Record:
    """What we wrote into a card, as the card itself keeps it."""

    own: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    repo_id: str | None = None

    @classmethod
    def read(cls, text: str) -> "Record":
        """The record of a card's text; an empty one where there is none or somebody broke it."""
        found = _RECORD.search(text)
        try:
            stored = json.loads(found[1]) if found else {}
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(stored, dict):
            return cls()
        own, given = stored.get("own"), stored.get("given")
        sections, repo_id = stored.get("sections"), stored.get("repo_id")
        if not isinstance(own, dict) or not isinstance(given, dict) or _fault_of_pieces(own) or _fault_of_pieces(given):
            return cls()
        return cls(
            own,
            given,
            tuple(map(str, sections)) if isinstance(sections, list) else (),
            repo_id if isinstance(repo_id, str) else None,
        )

    def __str__(self) -> str:
        stored = {"own": self.own, "given": self.given, "sections": self.sections, "repo_id": self.repo_id}
        text = json.dumps(stored, sort_keys=True, separators=(",", ":"))
        for char in "<>&":
            text = text.replace(char, f"\\u{ord(char):04x}")  # nothing in it can end the comment
        return f"<!-- hf_timm_tower: record {text} -->"


def new_card(wanted: Wanted) -> str:
    """A card from nothing."""
    data = ModelCardData(**_merge({}, Record(), wanted)[0])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{_new_body(wanted)}"))


def merge_card(existing: str, wanted: Wanted) -> str:
    """An existing card, renewed.

    A card whose metadata or marks cannot be read is given back as it is, with a warning: a push after a night of
    training shall not fail for a typing error in its README, and guessing could cost somebody's text.

    Args:
        existing: The text of README.md; may be empty, with any line ends, without metadata, without marks.
        wanted: What the card shall say.

    Returns:
        The text, with the line ends that it had.
    """
    bom, text = ("\ufeff", existing[1:]) if existing.startswith("\ufeff") else ("", existing)
    if not text.strip():
        return new_card(wanted)
    block = REGEX_YAML_BLOCK.search(text)
    body = text[block.end() :] if block else text
    source = block[2] if block else ""
    fault = _fault_of_metadata(source) or _fault_of_marks(body)
    if fault:
        warnings.warn(f"README.md was left as it is: {fault}. Mend that, and the next save renews it.", stacklevel=4)
        return existing
    record = Record.read(body)
    data = read_yaml(source) or {}
    merged, refused = _merge(data, record, wanted)
    if refused:
        warnings.warn(
            f"README.md keeps its own {', '.join(refused)}: edited since we wrote it, so what was given now is not "
            "written. Change it in README.md.",
            stacklevel=4,
        )
    newline = "\r\n" if "\r\n" in text else "\n"
    if body.strip():
        body = _renew_body(body, record, wanted, newline)
    else:
        # A repository made on the website has a card of nothing but a license.
        body = _new_body(wanted).replace("\n", newline)
    source = edit_yaml(source, data, merged, newline)
    if block is None and not source:
        return f"{bom}{body}"
    opening, closing = (block[1], block[3]) if block else (f"---{newline}", f"{newline}---{newline}{newline}")
    return f"{bom}{opening}{source}{closing}{body}"


def recorded_repo(existing: str) -> str | None:
    """The repository that a card's snippets name, None where it names none."""
    return Record.read(existing).repo_id


# The body


def _new_body(wanted: Wanted) -> str:
    record = Record(wanted.own, wanted.given, tuple(wanted.sections), wanted.repo_id)
    parts = [f"# {wanted.title}", *(_section(name, text) for name, text in wanted.sections.items()), str(record)]
    return "\n" + "\n\n".join(parts) + "\n"


def _section(name: str, text: str) -> str:
    opening = f"<!-- hf_timm_tower: begin {name} (every save writes this part again; your own text goes outside) -->"
    return f"{opening}\n\n{text.strip()}\n\n<!-- hf_timm_tower: end {name} -->"


def _sections_of(body: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of each marked part of a body whose marks are in order."""
    marks = list(_MARK.finditer(body))
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        yield begin[2], begin.start(), end.end()


def _fault_of_marks(body: str) -> str | None:
    marks = [(mark[1], mark[2]) for mark in _MARK.finditer(body)]
    names = [name for kind, name in marks if kind == "begin"]
    in_order = [mark for name in names for mark in (("begin", name), ("end", name))]
    if marks != in_order or len(set(names)) != len(names):
        found = ", ".join(f"{kind} {name}" for kind, name in marks[:8])
        return f"its marks <!-- hf_timm_tower: begin/end --> are not in pairs, each name once ({found})"
    if len(_ANY_MARK.findall(body)) != len(marks) + len(_RECORD.findall(body)):
        return "a mark <!-- hf_timm_tower: ... --> in it is broken off"
    if len(_RECORD.findall(body)) > 1:
        return "it holds the comment <!-- hf_timm_tower: record --> twice"
    return None


def _renew_body(body: str, record: Record, wanted: Wanted, newline: str) -> str:
    found = list(_sections_of(body))
    names = [name for name, _, _ in found]
    if not found and _RECORD.search(body) is None:
        return body  # a card of somebody's own
    pieces, position = [], 0
    for name, start, end in found:
        text = wanted.sections.get(name)
        pieces += [body[position:start], body[start:end] if text is None else _lines(_section(name, text), newline)]
        position = end
    if found:
        # Of the sections that are not there, those we never wrote are new, the others somebody took out.
        for name, text in wanted.sections.items():
            if name not in names and name not in record.sections:
                pieces.append(newline * 2 + _lines(_section(name, text), newline))
    tail = body[position:]
    written = Record(
        wanted.own,
        _dict_of({**_pieces(record.given), **_pieces(wanted.given)}, record.given, wanted.given),
        tuple(dict.fromkeys([*record.sections, *names, *(wanted.sections if found else ())])),
        wanted.repo_id,
    )
    whole = "".join(pieces) + tail
    if _RECORD.search(whole) is None:
        # Nobody can say what was ours before this record, so it claims what is written now.
        return whole.rstrip("\r\n") + newline * 2 + str(written) + newline
    return _RECORD.sub(lambda _: str(written), whole)


def _lines(text: str, newline: str) -> str:
    return text.replace("\n", newline)


# The metadata


def _fault_of_metadata(source: str) -> str | None:
    try:
        data = read_yaml(source)
    except FormatError as error:
        return f"the metadata at its top {error}"
    if data is None:
        return None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        return "the metadata at its top is not a list of keys and values"
    try:
        ModelCardData(**copy.deepcopy(data))
    except (ValueError, TypeError, AttributeError) as error:
        return f"huggingface_hub refuses the metadata at its top ({error})"
    return _fault_of_pieces(data)


def _fault_of_pieces(data: Mapping[str, Any]) -> str | None:
    for key in _LISTS:
        value = data.get(key) or []
        if not isinstance(value, (str, list)) or any(isinstance(item, (dict, list)) for item in value):
            return f"{key} in the metadata at its top is not a list of words"
    try:
        _pieces(data)
    except (KeyError, TypeError, AttributeError) as error:
        return f"the {MODEL_INDEX} at its top has not the form that the Hub gives it ({error!r})"
    return None


def _merge(theirs: Mapping[str, Any], record: Record, wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    """Metadata merged piece by piece, and the keys of what was given but gave way to an edit."""
    found, ours, given = _pieces(theirs), _pieces(wanted.own), _pieces(wanted.given)
    before_own, before_given = _pieces(record.own), _pieces(record.given)
    before = {**before_own, **before_given}
    merged = dict(found)
    for piece, value in before_own.items():
        if piece not in ours and piece not in given and piece not in before_given and found.get(piece) == value:
            del merged[piece]
    refused: list[str] = []
    kept = {piece: value for piece, value in before_given.items() if piece in ours}
    for piece, value in {**ours, **kept, **given}.items():
        there = found.get(piece, _ABSENT)
        if there == before.get(piece, _ABSENT):
            merged[piece] = value
        elif there != value and piece in given:
            refused.append(piece[0])
    return _dict_of(merged, theirs, wanted.given), list(dict.fromkeys(refused))


def _pieces(data: Mapping[str, Any]) -> dict[Piece, Any]:
    pieces: dict[Piece, Any] = {}
    for key, value in data.items():
        if value is None:
            continue  # a key without a value says nothing yet
        if key == MODEL_INDEX:
            for task, dataset, metric in _figures(value):
                pieces[_name_of(task, dataset, metric)] = metric["value"]
        elif key in _LISTS:
            for item in [value] if isinstance(value, str) else value:
                pieces[key, _json(item)] = item
        else:
            pieces[(key,)] = value
    return pieces


def _dict_of(pieces: Mapping[Piece, Any], *sources: Mapping[str, Any]) -> dict[str, Any]:
    """Pieces -> metadata. What the first source says with the same pieces is taken from it as it stands there."""
    data: dict[str, Any] = {}
    for piece, value in pieces.items():
        if len(piece) == 1:
            data[piece[0]] = value
        elif len(piece) == 2:
            data.setdefault(piece[0], []).append(value)
    figures = {piece: value for piece, value in pieces.items() if piece[0] == MODEL_INDEX}
    if figures:
        data[MODEL_INDEX] = _index_of(figures, [source[MODEL_INDEX] for source in sources if source.get(MODEL_INDEX)])
    for key, value in (sources[0] if sources else {}).items():
        before = _pieces({key: value})
        if before == {piece: pieces[piece] for piece in pieces if piece[0] == key}:
            data[key] = value
    return data


def _figures(index: Any) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    for model in index:
        for result in model["results"]:
            for metric in result["metrics"]:
                yield result.get("task"), result.get("dataset"), metric


def _name_of(task: Any, dataset: Any, metric: Mapping[str, Any]) -> Piece:
    metric = {key: metric[key] for key in metric if key not in ("value", "verified", "verifyToken")}
    return (MODEL_INDEX, _json(task), _json(dataset), _json(metric))


def _index_of(figures: Mapping[Piece, Any], sources: list[Any]) -> list[dict[str, Any]]:
    """The first source with the values of `figures`, and what it lacks from the others."""
    index: list[dict[str, Any]] = copy.deepcopy(sources[0])
    before = _pieces({MODEL_INDEX: index})
    for model in index:
        for result in model["results"]:
            for metric in result["metrics"]:
                name = _name_of(result.get("task"), result.get("dataset"), metric)
                if name in figures and before[name] != figures[name]:
                    metric["value"] = figures[name]
                    metric.pop("verified", None)  # the Hub's seal on the value that was
                    metric.pop("verifyToken", None)
            result["metrics"] = [
                metric
                for metric in result["metrics"]
                if _name_of(result.get("task"), result.get("dataset"), metric) in figures
            ]
        model["results"] = [result for result in model["results"] if result["metrics"]]
    there = set(before)
    for task, dataset, metric in [figure for other in sources[1:] for figure in _figures(other)]:
        name = _name_of(task, dataset, metric)
        if name in there or name not in figures:
            continue
        there.add(name)
        results = index[0]["results"]
        alike = [result for result in results if (result.get("task"), result.get("dataset")) == (task, dataset)]
        if not alike:
            alike = [{"task": task, "dataset": dataset, "metrics": []}]
            results += alike
        alike[0]["metrics"].append({**metric, "value": figures[name]})
    return index


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

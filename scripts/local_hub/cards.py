"""The YAML at the head of a README.md: read for what the Hub shows, and checked as the Hub checks it before a push."""

import re
from typing import Any

import yaml

_HEAD = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LONGEST = 1024 * 1024
_TEXT: tuple[type, ...] = (str,)
_TEXTS: tuple[type, ...] = (str, list)
# Key -> what may stand under it.
_FORMS: dict[str, tuple[type, ...]] = {
    "license": _TEXTS,
    "license_name": _TEXT,
    "license_link": _TEXT,
    "library_name": _TEXT,
    "pipeline_tag": _TEXT,
    "tags": (list,),
    "language": _TEXTS,
    "datasets": _TEXTS,
    "metrics": _TEXTS,
    "base_model": _TEXTS,
    "thumbnail": _TEXT,
    "model-index": (list,),
}


def parse(text: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none. Raises ValueError if it is not a YAML mapping."""
    head = _HEAD.match(text)
    if head is None:
        return {}
    if len(head[1]) > _LONGEST:
        raise ValueError(f"metadata of {len(head[1])} characters")
    try:
        found = yaml.safe_load(head[1])
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"metadata is not YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError("metadata is not a mapping with text keys")
    return found


def problems(metadata: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in the metadata, one sentence each."""
    found = []
    for key, forms in _FORMS.items():
        value = metadata.get(key)
        if value is not None and not isinstance(value, forms):
            found.append(f'"{key}" must be {" or ".join("a list" if form is list else "a string" for form in forms)}')
        elif isinstance(value, list) and key != "model-index":
            if not all(isinstance(item, str) for item in value):
                found.append(f'"{key}" must hold strings only')
    index = metadata.get("model-index")
    for at, entry in enumerate(index if isinstance(index, list) else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            found.append(f'"model-index[{at}].name" is required')
        if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
            found.append(f'"model-index[{at}].results" must be a list')
            continue
        for number, result in enumerate(entry["results"]):
            where = f"model-index[{at}].results[{number}]"
            for part, needed in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                inside = result.get(part) if isinstance(result, dict) else None
                if not isinstance(inside, dict) or not isinstance(inside.get(needed), str):
                    found.append(f'"{where}.{part}.{needed}" is required')
            metrics = result.get("metrics") if isinstance(result, dict) else None
            if not isinstance(metrics, list) or not all(
                isinstance(metric, dict) and isinstance(metric.get("type"), str) and "value" in metric
                for metric in metrics
            ):
                found.append(f'"{where}.metrics" must be a list of type and value')
    return found

"""The model card of a tower: metadata that the Hub understands, a table, and snippets that run.

`card_merge` keeps what people write into it afterwards.
"""

import html
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError
from ..reader.tower import CLASSIFIER
from .card_merge import MODEL_INDEX, Wanted, merge_card, new_card, recorded_repo
from .card_snippets import CLASSIFICATION_TAG, PIPELINE_TAG, image_size, use_section

# `transformers.pipeline(repo)` without a task refuses every repository whose library is neither `transformers` nor
# `timm`. Under `timm` the Hub would show a `timm.create_model("hf-hub:...")` that cannot read a tower; what it shows
# under `transformers`, `AutoModel.from_pretrained(...)`, can. That the tower is ours stands in the tags.
LIBRARY_NAME = "transformers"

# What the template of huggingface_hub's mixin takes beside the metadata.
_LINKS = {"repo_url": "Code", "paper_url": "Paper", "docs_url": "Documentation"}
# Metadata that the Hub documents beyond the arguments of ModelCardData.
_HUB_KEYS = frozenset(
    {
        "base_model_relation",
        "co2_eq_emissions",
        "extra_gated_button_content",
        "extra_gated_description",
        "extra_gated_fields",
        "extra_gated_heading",
        "extra_gated_prompt",
        "inference",
        "new_version",
        "thumbnail",
        "widget",
    }
)
_DATA_KEYS = frozenset(inspect.signature(ModelCardData).parameters) - {"ignore_metadata_errors", "kwargs"}
# Of the labels, a card lists the first ones.
_MOST_LABELS, _MOST_LETTERS = 10, 160
_PLAIN = re.compile(r"[\w./@+:,;=()\[\]{} %-]+")


@dataclass(frozen=True)
class TowerFacts:
    """What a card says of a tower and its config does not.

    Attributes:
        trunk: Name of the trunk's class.
        head: The head in words, Markdown.
        trunk_parameters: Number of parameters of the trunk.
        head_parameters: Number of parameters of the head.
        parameters: Number of parameters of all, shared ones counted once.
        trainable: How many of them take a gradient.
        dtype: Dtype of the parameters; all of them, the most frequent first, where there are several.
        classifier_parameters: Number of parameters of the classifier on top; None where there is none.
    """

    trunk: str
    head: str
    trunk_parameters: int
    head_parameters: int
    parameters: int
    trainable: int
    dtype: str
    classifier_parameters: int | None = None


def describe_tower(tower: nn.Module, config: TimmTowerConfig) -> TowerFacts:
    """The facts of a tower.

    Args:
        tower: has `trunk` and `head`, and may have `classifier`.
        config: Its config, with the head in its stored form.
    """
    parameters = list(tower.parameters())
    dtypes: Counter[str] = Counter()
    for parameter in parameters:
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    order = sorted(dtypes, key=lambda name: (-dtypes[name], name))
    trunk, head = tower.get_submodule("trunk"), tower.get_submodule("head")
    classifier: nn.Module | None = getattr(tower, CLASSIFIER, None)
    return TowerFacts(
        trunk=type(trunk).__name__,
        head=_head_in_words(config),
        trunk_parameters=_count(trunk),
        head_parameters=_count(head),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtype=", ".join(order) or "none",
        classifier_parameters=None if classifier is None else _count(classifier),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_card(
    config: TimmTowerConfig,
    facts: TowerFacts,
    *,
    existing: str | None = None,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str | None = None,
    evaluated_task: str | None = None,
    include_code: bool = True,
    model_card_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of a tower's README.md. Equal arguments give equal bytes.

    Args:
        config: A completed config, with the head in its stored form.
        facts: From `describe_tower`.
        existing: The card that is there: text outside our marks and metadata that somebody edited are kept, and so is
            what an earlier call was given and this one is not.
        repo_id: The repository (or folder) that the snippets load; None keeps what `existing` says.
        tags: Tags beside `timm_tower`, `timm` and the architecture.
        license: Identifier of the license. There is none in the card unless it is given.
        base_model: Repository of the model that this one began as; not guessed, the config cannot tell.
        datasets: Ids of the data sets it was trained on.
        metrics: Name of a metric -> figure, for a table and for `model-index`.
        evaluated_on: Id of the data set that the metrics were measured on.
        evaluated_task: The Hub's name of the task that they measure; by default what the tower is for.
        include_code: Whether `core/` travels with the tower, so that transformers can load it without this package.
        model_card_kwargs: Further metadata, as the Hub names it, and `repo_url`, `paper_url`, `docs_url`.

    Raises:
        ArgumentError: a keyword that no card has, two that contradict each other, or a metric that is no number.
    """
    if repo_id is None and existing is not None:
        repo_id = recorded_repo(existing)
    classifies = facts.classifier_parameters is not None
    task = CLASSIFICATION_TAG if classifies else PIPELINE_TAG
    name = repo_id.rstrip("/").rpartition("/")[2] if repo_id else config.architecture
    given: dict[str, Any] = {
        "tags": _words("tags", tags),
        "license": license,
        "base_model": base_model,
        "datasets": _words("datasets", datasets),
        "metrics": list(_checked_metrics(metrics or {})),
    }
    results = [
        EvalResult(
            task_type=evaluated_task or task,
            # As other libraries write it: the Hub wants a data set with every figure.
            dataset_type=evaluated_on or "unknown",
            dataset_name=evaluated_on or "Unknown",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _checked_metrics(metrics or {}).items()
    ]
    links = _take_kwargs(given, results, dict(model_card_kwargs or {}), name)
    sections = {"about": _about(config, facts), "use": use_section(config, repo_id, include_code, classifies)}
    if links:
        sections["links"] = "## Links\n\n" + "\n".join(f"- {what}: {link}" for what, link in links.items())
    if metrics:
        sections["results"] = _results(metrics, evaluated_on)
    wanted = Wanted(
        own={
            "library_name": LIBRARY_NAME,
            "pipeline_tag": task,
            "tags": ["timm_tower", "timm", config.architecture.partition(".")[0]],
        },
        given={key: value for key, value in given.items() if value not in (None, [], ())},
        title=_text(name),
        sections=sections,
        repo_id=repo_id,
    )
    return new_card(wanted) if existing is None else merge_card(existing, wanted)


# The arguments


def _words(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
        raise ArgumentError(f"{name}={values!r}: expected a list of words")
    return list(dict.fromkeys(values))


def _checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArgumentError(f"metrics[{name!r}]={value!r}: expected a finite Python number")
    return dict(metrics)


def _take_kwargs(
    given: dict[str, Any], results: list[EvalResult], kwargs: dict[str, Any], name: str
) -> dict[str, str]:
    """Put `model_card_kwargs` into `given`; what is left are the links."""
    unknown = sorted(set(kwargs) - _DATA_KEYS - _HUB_KEYS - set(_LINKS))
    if unknown:
        known = ", ".join(sorted(_DATA_KEYS | _HUB_KEYS | set(_LINKS)))
        raise ArgumentError(f"model_card_kwargs: a card has no place for {', '.join(unknown)}; it has for {known}")
    links = {_LINKS[key]: _link(key, kwargs.pop(key)) for key in _LINKS if key in kwargs}
    more = kwargs.pop("eval_results", None) or []
    results = [*results, *([more] if isinstance(more, EvalResult) else more)]
    name = kwargs.pop("model_name", None) or name
    try:
        if results:
            given[MODEL_INDEX] = eval_results_to_model_index(name, results)
        for key, value in kwargs.items():
            if key in ("tags", "datasets", "metrics"):
                given[key] = _words(key, [*given[key], *([value] if isinstance(value, str) else value or [])])
            elif given.get(key) not in (None, value):
                raise ArgumentError(
                    f"{key}={given[key]!r} and model_card_kwargs[{key!r}]={value!r} contradict each other"
                )
            else:
                given[key] = value
        given.update(json.loads(json.dumps(given, allow_nan=False)))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"model_card_kwargs cannot be metadata of a card: {error}") from error
    return links


def _link(key: str, target: Any) -> str:
    if not isinstance(target, str) or not re.fullmatch(r"https?://[^\s<>]+", target):
        raise ArgumentError(f"model_card_kwargs[{key!r}]={target!r}: expected an address that begins with https://")
    return f"<{target}>"


# The text


def _about(config: TimmTowerConfig, facts: TowerFacts) -> str:
    height, width = image_size(config)
    width_in_words = f"an embedding of width {config.embed_dim}" if config.embed_dim else "what its head returns"
    what = f"An image tower: the timm trunk {_code(config.architecture)} and a head, from an image to {width_in_words}"
    if facts.classifier_parameters is not None:
        what = (
            f"An image classifier of {config.num_labels:,} labels: the timm trunk {_code(config.architecture)}, a head "
            f"that gives {width_in_words}, and a linear classifier on it"
        )
    lines = [f"{what}. Made with `hf_timm_tower`."]
    lines += _warnings(config)
    block = config.preprocess or {}
    mean, std = block.get("mean"), block.get("std")
    channels = "RGB" if config.in_chans == 3 else f"{config.in_chans} channels"
    rows = [
        ("Trunk", f"{_code(config.architecture)} ({_code(facts.trunk)}, timm {_text(config.timm_version or '?')})"),
        ("Pool", _code(config.pool or "none")),
        ("Head", facts.head),
        ("Embedding", f"`embed_dim` {config.embed_dim}" if config.embed_dim else "a structure of its head's own"),
        *_labels(config, facts),
        ("Parameters", f"{facts.parameters:,} ({_shares(facts)})"),
        ("Dtype", facts.dtype),
        ("Input", f"{channels}, {height} x {width} pixels"),
        (
            "Preprocessing",
            f"{block.get('interpolation')} resize, {block.get('crop_mode')} crop ({block.get('crop_pct')}), values "
            f"from 0 to 1, mean {mean}, std {std}",
        ),
        ("Frozen", _frozen(config, facts)),
    ]
    return "\n\n".join(lines) + "\n\n" + _table(("", ""), rows)


def _labels(config: TimmTowerConfig, facts: TowerFacts) -> list[tuple[str, str]]:
    if facts.classifier_parameters is None:
        return []
    names = [_text(_shortened(str(name), 60)) for _, name in sorted((config.id2label or {}).items())]
    listed = names[:_MOST_LABELS]
    while len(listed) > 1 and len(", ".join(listed)) > _MOST_LETTERS:
        listed.pop()
    rest = f", ... (all in `id2label` of `config.json`: {len(names):,})" if len(listed) < len(names) else ""
    rows = [("Labels", ", ".join(listed) + rest)]
    return [*rows, ("Problem", _code(config.problem_type))] if config.problem_type else rows


def _shares(facts: TowerFacts) -> str:
    shares = f"trunk {facts.trunk_parameters:,}, head {facts.head_parameters:,}"
    more = facts.classifier_parameters
    return shares if more is None else f"{shares}, classifier {more:,}"


def _warnings(config: TimmTowerConfig) -> list[str]:
    """What somebody must know before loading."""
    found = []
    head = config.head or {}
    if head.get("form") == "code":
        found.append(
            f"> **This tower's head is code.** Loading runs {_code(head.get('file'))} of this repository (class "
            f"{_code(head.get('class'))}), and only with `trust_remote_code=True`. Read the file first."
        )
    if head.get("form") == "registered":
        found.append(
            f"> The head is registered as {_code(head.get('name'))}: import the module whose class "
            f"{_code(head.get('class'))} has that `@register_head` before loading."
        )
    if config.tower_class:
        found.append(
            f"> The tower is a {_code(config.tower_class)}, a subclass of `TimmModel`: load it with that class."
        )
    source = config.trunk_source
    if source:
        repo = source.get("repo_id") or source.get("repo") or "another repository"
        commit = source.get("commit") or source.get("revision") or source.get("sha") or "?"
        found.append(
            f"> **Only the head is here.** The trunk's weights are those of {_code(repo)} at commit {_code(commit)}; "
            "loading fetches them there, under that repository's terms."
        )
    return found


def _head_in_words(config: TimmTowerConfig) -> str:
    head = config.head
    if head is not None:
        name = _code(head.get("class") or "custom head")
        form = head.get("form")
        if form == "code":
            return f"{name}, stored as code in {_code(head.get('file'))}"
        if form == "registered":
            return f"{name}, registered as {_code(head.get('name'))}"
        if form == "graph":
            return f"{name}, stored as data"
        return f"{name}, made by {_code(config.tower_class)}" if config.tower_class else name
    if config.pool in ("abs_attn", "rot_attn"):
        return f"attention pool {_code(config.pool)}, then projection {_code(config.proj or 'none')}"
    if config.proj is None:
        return "the trunk's own classifier as projection"
    return "none" if config.proj == "none" else f"built-in projection {_code(config.proj)}"


def _frozen(config: TimmTowerConfig, facts: TowerFacts) -> str:
    share = f"{facts.parameters - facts.trainable:,} of {facts.parameters:,} parameters"
    if not config.frozen:
        return share if facts.trainable < facts.parameters else "nothing"
    text = json.dumps(config.frozen, sort_keys=True)
    words = text[1:-1].replace('"', "")
    return f"{share} ({_text(_shortened(words, 160))})"


def _results(metrics: Mapping[str, float], evaluated_on: str | None) -> str:
    on = f" on {_code(evaluated_on)}" if evaluated_on else ""
    return (
        f"## Results\n\nMeasured{on} by the author. A later save without figures leaves these as they are.\n\n"
        + _table(("Metric", "Value"), [(_text(name), repr(value)) for name, value in metrics.items()])
    )


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _text(value: object) -> str:
    """A text from outside as Markdown that is nothing but this text: one line, no markup, no end of a table's cell."""
    words = html.escape(" ".join(str(value).split()), quote=False).encode(errors="replace").decode()
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", words)


def _shortened(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 3] + "..."


def _code(value: object) -> str:
    return f"`{value}`" if _PLAIN.fullmatch(str(value)) else _text(value)

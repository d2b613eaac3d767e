"""The model card of a tower: metadata that the Hub understands, a table, and snippets that run.

`card_template.md` is the card's text; this module says what goes into it. `card_merge` keeps what people write into a
card afterwards.
"""

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..files.fingerprint import weight_digests
from ..files.same_save import form_digest
from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError, shown
from ..reader.tower import CLASSIFIER
from .card_merge import MODEL_INDEX, Record, merge_card
from .reader_file import READER_NAME

PIPELINE_TAG, CLASSIFICATION_TAG = "image-feature-extraction", "image-classification"

# `transformers.pipeline(repo)` without a task refuses every repository whose library is neither `transformers` nor
# `timm`. Under `timm` the Hub would show a `timm.create_model("hf-hub:...")` that cannot read a tower; what it shows
# under `transformers`, `AutoModel.from_pretrained(...)`, can. That the tower is ours is in the tags.
_LIBRARY_NAME = "transformers"

# What the template of huggingface_hub's mixin takes beside the metadata.
_LINKS = {"repo_url": "Code", "paper_url": "Paper", "docs_url": "Documentation"}
# Metadata that the Hub documents beyond the arguments of ModelCardData.
_HUB_KEYS = set(
    """base_model_relation co2_eq_emissions extra_gated_button_content extra_gated_description extra_gated_fields
    extra_gated_heading extra_gated_prompt inference new_version thumbnail widget""".split()
)
_KEYS = set(inspect.signature(ModelCardData).parameters) - {"ignore_metadata_errors", "kwargs"} | _HUB_KEYS
_MOST_LABELS, _MOST_LETTERS = 10, 160


@dataclass(frozen=True)
class TowerFacts:
    """What a card says of a tower and its config does not.

    Attributes:
        trunk: Name of the trunk's class.
        trunk_parameters: Number of parameters of the trunk.
        head_parameters: Number of parameters of the head.
        parameters: Number of parameters of all, shared ones counted once.
        trainable: How many of them take a gradient.
        dtype: Dtype of the parameters; all of them, the most frequent first, where there are several.
        classifier_parameters: Number of parameters of the classifier on top; None where there is none.
        classifier_digest: SHA-256 of its weights, which no fingerprint holds.
    """

    trunk: str
    trunk_parameters: int
    head_parameters: int
    parameters: int
    trainable: int
    dtype: str
    classifier_parameters: int | None = None
    classifier_digest: str | None = None


def tower_facts(tower: nn.Module) -> TowerFacts:
    """The facts of a tower, which has `trunk` and `head`, and may have `classifier`."""
    dtypes: Counter[str] = Counter()
    for parameter in tower.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    classifier: nn.Module | None = getattr(tower, CLASSIFIER, None)
    return TowerFacts(
        trunk=type(tower.get_submodule("trunk")).__name__,
        trunk_parameters=_count(tower.get_submodule("trunk")),
        head_parameters=_count(tower.get_submodule("head")),
        parameters=_count(tower),
        trainable=sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad),
        dtype=", ".join(sorted(dtypes, key=lambda name: (-dtypes[name], name))) or "none",
        classifier_parameters=None if classifier is None else _count(classifier),
        classifier_digest=None if classifier is None else weight_digests(nn.ModuleDict({"head": classifier}))["head"],
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class CardOptions:
    """What the caller of a save or push wants in the card, kept until the card is made.

    Attributes:
        tags: Tags beside `timm_tower`, `timm` and the architecture.
        license: Identifier of the license. There is none in the card unless it is given.
        more: `model_card_kwargs`: further metadata as the Hub names it (`base_model`, `datasets`, `language`, ...),
            the links `repo_url`, `paper_url` and `docs_url`, and figures as `{"metrics": {...}, "evaluated_on": ...,
            "evaluated_task": ...}`.
        metrics: Name of a metric -> figure, for a table and for `model-index`.
        evaluated_on: Id of the data set that they were measured on.
        include_code: Whether the reader is in the repository, so that transformers can load the tower without this
            package.
        repo_id: The repository (or folder) that the snippets load; None keeps what the existing card says.
    """

    tags: Sequence[str] = ()
    license: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] | None = None
    evaluated_on: str | None = None
    include_code: bool = True
    repo_id: str | None = None

    def make(
        self,
        facts: TowerFacts,
        config: TimmTowerConfig,
        existing: str | None = None,
        weights: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a tower's README.md, made anew or out of the existing one. Equal arguments give equal bytes.

        Args:
            facts: From `tower_facts`.
            config: A completed config, with the head in its stored form.
            existing: The card that is there: text outside our marks and metadata that somebody edited are kept, and
                so is what an earlier call was given and this one is not; metrics only where the weights are the same.
            weights: `weights` of the tower's fingerprint, digests of what the metrics were measured with.

        Raises:
            ArgumentError: a keyword that no card has, two that contradict each other, or a metric that is no number.
        """
        record = Record.read(existing or "")
        repo_id = self.repo_id or record.repo_id
        name = repo_id.rstrip("/").rpartition("/")[2] if repo_id else config.architecture
        classifies = facts.classifier_parameters is not None
        task = CLASSIFICATION_TAG if classifies else PIPELINE_TAG
        if weights is not None:
            weights = {**weights, "form": form_digest(config)}
            if facts.classifier_digest is not None:
                weights["classifier"] = facts.classifier_digest
        given, figures = self._given(task, name)
        tags = ["timm_tower", "timm", config.architecture.partition(".")[0]]
        own = {"library_name": _LIBRARY_NAME, "pipeline_tag": task, "tags": tags}
        values = {**figures, **_values(config, facts, repo_id), "task": task, "include_code": self.include_code}
        values |= {"title": name if re.fullmatch(r"[\w.-]+", name) else _code(name), "reader": READER_NAME}
        values["reader_lines"] = Path(__file__).with_name(READER_NAME).read_bytes().count(b"\n")
        template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")

        def render(data: dict[str, Any]) -> ModelCard:
            data_of_card = ModelCardData(**data)
            card: ModelCard = ModelCard.from_template(
                data_of_card, template_str=template, **values, config=config, facts=facts
            )
            return card

        return merge_card(existing, record, own, given, render, repo_id=repo_id, weights=weights)

    def _given(self, task: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The metadata that the caller gave, and what the template shows of it."""
        more = dict(self.more)
        names = more.pop("metrics", None) if not isinstance(more.get("metrics"), Mapping) else None
        metrics = {key: _number(key, value) for key, value in (_one("metrics", self.metrics, more) or {}).items()}
        evaluated_on = _one("evaluated_on", self.evaluated_on, more)
        evaluated_task = more.pop("evaluated_task", None) or task
        if unknown := sorted(set(more) - _KEYS - set(_LINKS)):
            known = ", ".join(sorted(_KEYS | set(_LINKS)))
            raise ArgumentError(f"model_card_kwargs: a card has no place for {', '.join(unknown)}; it has for {known}")
        links = {_LINKS[key]: _link(key, more.pop(key)) for key in _LINKS if key in more}
        # As other libraries write it: the Hub wants a data set with every figure.
        data_set = {"dataset_type": evaluated_on or "unknown", "dataset_name": evaluated_on or "Unknown"}
        results = [
            EvalResult(task_type=evaluated_task, metric_type=key, metric_value=value, **data_set)  # type: ignore[arg-type]
            for key, value in metrics.items()
        ]
        extra = more.pop("eval_results", None) or []
        results += [extra] if isinstance(extra, EvalResult) else extra
        name = more.pop("model_name", None) or name
        given: dict[str, Any] = {
            "tags": [*_words("tags", self.tags), *_words("tags", more.pop("tags", None))],
            "license": _one("license", self.license, more),
            "datasets": _words("datasets", more.pop("datasets", None)),
            "metrics": [*metrics, *_words("metrics", names)],
        }
        try:
            if results:
                given[MODEL_INDEX] = eval_results_to_model_index(name, results)
            given = json.loads(json.dumps({**given, **more}, allow_nan=False))
        except (TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"model_card_kwargs cannot be metadata of a card: {error}") from error
        given = {key: value for key, value in given.items() if value not in (None, [])}
        return given, {"metrics": metrics, "evaluated_on": evaluated_on, "links": links}


def as_tags(tags: str | Sequence[str] | None) -> tuple[str, ...]:
    """Tags as transformers takes them: several, one alone, or none."""
    return (tags,) if isinstance(tags, str) else tuple(tags or ())


# The arguments


def _one(name: str, value: Any, more: dict[str, Any]) -> Any:
    """An argument that may also be given in `model_card_kwargs`."""
    other = more.pop(name, None)
    if value is not None and other not in (None, value):
        raise ArgumentError(f"{name}={value!r} and model_card_kwargs[{name!r}]={other!r} contradict each other")
    return other if value is None else value


def _words(name: str, values: Any) -> list[str]:
    words = [values] if isinstance(values, str) and name != "tags" else values or []
    if isinstance(words, str) or not all(isinstance(value, str) and value for value in words):
        raise ArgumentError(f"{name}={values!r}: expected a list of words")
    return list(dict.fromkeys(words))


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ArgumentError(f"metrics[{name!r}]={shown(value)}: expected a finite Python number")
    return float(value) if isinstance(value, float) else int(value)


def _link(key: str, target: Any) -> str:
    if not isinstance(target, str) or not re.fullmatch(r"https?://[^\s<>]+", target):
        raise ArgumentError(f"model_card_kwargs[{key!r}]={target!r}: expected an address that begins with https://")
    return f"<{target}>"


# The text


def _values(config: TimmTowerConfig, facts: TowerFacts, repo_id: str | None) -> dict[str, Any]:
    """What the template needs to know, beside the config and the facts."""
    head = config.head or {}
    classifies = facts.classifier_parameters is not None
    plain = config.head is None and (config.layout == "NC" or config.pool in ("token_avg", "abs_attn", "rot_attn"))
    # As transformers' loss has it: one label without a word about the problem is a number to be predicted. Its
    # pipeline would squash that number into 0 to 1.
    lone = config.problem_type is None and config.num_labels == 1
    size = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size or (0, 0)
    registered = head.get("form") == "registered"
    return {
        "code": _code,
        "text": _text,
        "head": head,
        "source": config.trunk_source,
        "preprocess": config.preprocess or {},
        "size": size,
        "mode": {1: "L", 3: "RGB"}.get(config.in_chans),
        "classifies": classifies,
        "problem": "regression" if lone else config.problem_type,
        "auto": "AutoModelForImageClassification" if classifies else "AutoModel",
        "tower_class": config.tower_class if (config.tower_class or "").isidentifier() else "TimmModel",
        "registered": f"\n# first import the module with @register_head({_literal(head.get('name'))})"
        if registered
        else "",
        "trust": ", trust_remote_code=True" if head.get("form") == "code" else "",
        "repo": _literal(repo_id or "path/to/this/folder"),
        "shape": f"  # [1, {config.embed_dim}]" if plain and config.embed_dim else "",
        "output": f"an embedding of width {config.embed_dim}" if config.embed_dim else "what its head returns",
        "head_text": _head_text(config),
        "labels": _labels(config) if classifies else "",
        "frozen": _frozen(config, facts),
    }


def _head_text(config: TimmTowerConfig) -> str:
    head = config.head
    if head is not None:
        forms = {"code": "stored as code in", "registered": "registered as"}
        made = f"made by {_code(config.tower_class)}" if config.tower_class else ""
        form = str(head.get("form"))
        how = f"{forms[form]} {_code(head.get('file' if form == 'code' else 'name'))}" if form in forms else made
        stored = "stored as data" if form == "graph" else how
        return ", ".join(filter(None, [_code(head.get("class") or "head"), stored]))
    if config.pool in ("abs_attn", "rot_attn"):
        return f"attention pool {_code(config.pool)}, then projection {_code(config.proj or 'none')}"
    if config.proj is None:
        return "the trunk's own classifier as projection"
    return "none" if config.proj == "none" else f"built-in projection {_code(config.proj)}"


def _labels(config: TimmTowerConfig) -> str:
    names = [_text(name) for _, name in sorted((config.id2label or {}).items())]
    listed = names[:_MOST_LABELS]
    while len(listed) > 1 and len(", ".join(listed)) > _MOST_LETTERS:
        listed.pop()
    rest = f", ... (all in `id2label` of `config.json`: {len(names):,})" if len(listed) < len(names) else ""
    return ", ".join(listed) + rest


def _frozen(config: TimmTowerConfig, facts: TowerFacts) -> str:
    share = f"{facts.parameters - facts.trainable:,} of {facts.parameters:,} parameters"
    if not config.frozen:
        return share if facts.trainable < facts.parameters else "nothing"
    return f"{share} ({_code(json.dumps(config.frozen, sort_keys=True)[1:-1].replace(chr(34), ''), 160)})"


def _code(value: object, limit: int = 80) -> str:
    """Any text as a code span that Markdown, HTML and a table's cell take for this text alone: one line, short.

    What could end the span, the cell or the line, or change how text is shown, is escaped as in a Python string.
    """
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "`" + "".join(map(_escaped, text)) + "`"


def _escaped(char: str) -> str:
    if char in "`|<>&\\":
        return f"\\x{ord(char):02x}"
    return char if char.isprintable() else ascii(char)[1:-1]


def _text(value: object) -> str:
    """Words as they are, anything that Markdown could act on as code."""
    words = str(value)
    return words if re.fullmatch(r"[^\W_](?:[^\W_]|[ ,.+()-]){0,59}", words) and "www" not in words else _code(words)


def _literal(value: object) -> str:
    """A text as Python and JSON write it, with no mark of a comment inside a fence."""
    return json.dumps(str(value)).replace("<", "\\u003c")

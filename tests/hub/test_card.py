"""The model card: what the Hub reads in it, what people read and run, and that nobody's edit is lost."""

import ast
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.pipelines import get_supported_tasks

from hf_timm_tower import ArgumentError, TimmModel, TimmTowerConfig
from hf_timm_tower.hub.card import CardOptions, TowerFacts, tower_facts

from ..card_snippets import snippets

FACTS = TowerFacts("ResNet", 1000, 24, 1024, 1024, "float32")
PREPROCESS = {
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "padding": None,
    "channel_order": "RGB",
    "value_range": [0.0, 1.0],
}


def config(**fields: Any) -> TimmTowerConfig:
    fixed = {"architecture": "test_resnet", "embed_dim": 32, "image_size": 160, "num_features": 96, "layout": "NC"}
    return TimmTowerConfig(**{**fixed, "preprocess": PREPROCESS, **fields})


def make_card(
    config: TimmTowerConfig,
    facts: TowerFacts,
    existing: str | None = None,
    weights: dict[str, str] | None = None,
    model_card_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    return CardOptions(**options, more=model_card_kwargs or {}).make(facts, config, existing, weights)


def card(**arguments: Any) -> str:
    return make_card(config(), FACTS, **{"repo_id": "me/eyes", **arguments})


def unwarned(existing: str, **arguments: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return card(existing=existing, **arguments)


# What the Hub reads


def test_metadata_names_library_task_and_tags_and_no_license() -> None:
    data = ModelCard(card(tags=["pathology"])).data
    assert data.library_name in {"transformers", "timm"}, "pipeline(repo) without a task refuses others"
    assert data.pipeline_tag in get_supported_tasks()
    assert data.tags == ["timm_tower", "timm", "test_resnet", "pathology"]
    assert (data.license, data.base_model, data.datasets, data.eval_results) == (None, None, None, None)
    assert "license" not in card()


def test_what_is_given_stands_in_the_metadata() -> None:
    more = {"language": "en", "base_model": "timm/resnet18.a1_in1k", "datasets": ["a/b"]}
    made = card(license="mit", model_card_kwargs=more)
    data = ModelCard(made).data
    assert (data.license, data.base_model, data.datasets) == ("mit", "timm/resnet18.a1_in1k", ["a/b"])
    assert data.language == "en"


def test_metrics_come_back_as_evaluation_results() -> None:
    more = EvalResult("image-classification", "beans", "Beans", "f1", 0.25, dataset_split="test")
    metrics = {"accuracy": 0.9, "ece": 1e-05}
    made = card(metrics=metrics, evaluated_on="cifar10", model_card_kwargs={"eval_results": more})
    data = ModelCard(made).data
    assert data.model_name == "eyes"
    found = {result.metric_type: result for result in data.eval_results}
    assert found["f1"] == more
    assert {name: found[name].metric_value for name in metrics} == metrics
    assert found["accuracy"].dataset_type == "cifar10"
    assert data.metrics == ["accuracy", "ece"]
    assert "| accuracy | 0.9 |" in made


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_card_kwargs": {"model_descripton": "a typing error"}},
        {"model_card_kwargs": {"license": "apache-2.0"}, "license": "mit"},
        {"model_card_kwargs": {"paper_url": "javascript:alert(1)"}},
        {"model_card_kwargs": {"widget": object()}},
        {"metrics": {"accuracy": float("nan")}},
        {"metrics": {"accuracy": 10**400}},
        {"metrics": {"accuracy": True}},
        {"tags": "one word"},
    ],
)
def test_arguments_that_no_card_can_hold_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"model_card_kwargs|metrics|tags"):
        card(**arguments)


def test_equal_input_gives_equal_bytes_also_when_written_again() -> None:
    arguments: dict[str, Any] = {
        "license": "mit",
        "tags": ["b", "a"],
        "metrics": {"z": 0.5, "a": 1},
        "model_card_kwargs": {"paper_url": "https://example.org/p_1", "library_name": "timm"},
    }
    made = card(**arguments)
    assert card(**arguments) == made
    assert unwarned(made, **arguments) == made
    assert unwarned(made) == make_card(config(), FACTS, existing=made) == made, "what is not given again stays"


# What people read and run


def test_table_states_what_the_tower_is() -> None:
    tower = TimmModel("test_resnet", embed_dim=32)
    tower.trunk.requires_grad_(False)
    tower.head.to(torch.bfloat16)
    text = make_card(tower.config, tower_facts(tower))
    table = dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE))
    trunk = sum(parameter.numel() for parameter in tower.trunk.parameters())
    assert table["Trunk"].startswith("`test_resnet` (`ResNet`, timm ")
    assert table["Parameters"] == f"{trunk + 96 * 32:,} (trunk {trunk:,}, head {96 * 32:,})"
    assert table["Frozen"] == f"{trunk:,} of {trunk + 96 * 32:,} parameters"
    assert table["Dtype"] == "float32, bfloat16"
    assert (table["Head"], table["Embedding"]) == ("built-in projection `linear`", "`embed_dim` 32")
    assert table["Input"] == "RGB, 160 x 160 pixels"


def test_snippet_of_this_package_runs_for_a_folder(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    tower = TimmModel("test_resnet", embed_dim=32, custom_head=torch.nn.Linear(96, 32))
    tower.save_pretrained(tmp_path / "eyes")
    text = make_card(tower.config, tower_facts(tower), repo_id=str(tmp_path / "eyes"))
    printed = fresh_process(snippets(text)["package"] + "\nprint(list(embedding.shape), tower.training)")
    assert printed.split("\n")[-2] == "[1, 32] False"


def test_snippets_are_python_and_name_the_repository_once() -> None:
    for fields in ({}, {"in_chans": 1}, {"in_chans": 5}, {"head": {"form": "code", "file": "head_code.py"}}):
        for name, code in snippets(make_card(config(**fields), FACTS, repo_id="me/eyes")).items():
            ast.parse(code)
            assert code.count("me/eyes") == 1, name


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, {"package", "transformers", "pipeline", "remote_code"}),
        ({"in_chans": 1}, {"package", "transformers", "remote_code"}),  # the pipeline makes every image RGB
        ({"head": {"form": "registered", "name": "n"}}, {"package", "transformers", "pipeline"}),
        ({"tower_class": "Mine"}, {"package"}),
    ],
)
def test_a_card_shows_only_what_works(fields: dict[str, Any], names: set[str]) -> None:
    assert set(snippets(make_card(config(**fields), FACTS))) == names


def test_without_code_in_the_repository_nothing_says_that_it_loads_without_this_package() -> None:
    assert "remote_code" not in snippets(make_card(config(), FACTS, include_code=False))


def test_a_head_of_code_is_said_loudly() -> None:
    head = {"form": "code", "file": "head_code.py", "class": "Router"}
    text = make_card(config(head=head), FACTS)
    assert "**This tower's head is code.**" in text
    assert "`head_code.py`" in text
    assert "`Router`" in text
    assert all("trust_remote_code=True" in code for code in snippets(text).values())


def test_a_head_without_its_trunk_says_where_the_trunk_lies() -> None:
    text = make_card(config(trunk_source={"repo_id": "org/trunk", "commit": "c0ffee"}), FACTS)
    assert re.search(r"Only the head is here.*`org/trunk` at commit `c0ffee`", text)


def test_names_from_a_foreign_config_are_text_and_nothing_else() -> None:
    name = "A`|<!-- hf_timm_tower: end about -->\n\n# [x](http://x)"
    fields = {"head": {"form": "code", "class": name, "file": name}, "frozen": {"parameters": [name], "statistics": []}}
    text = make_card(config(**fields), replace(FACTS, trunk=name), repo_id=f"me/{name}")
    assert text.count("<!-- hf_timm_tower: end about") == 1
    assert snippets(text)["package"].count(r"\u003c!-- hf_timm_tower: end about -->") == 1
    ast.parse(snippets(text)["package"])
    assert not re.search(r"^# \[x", text, re.MULTILINE)
    assert make_card(config(**fields), replace(FACTS, trunk=name), existing=text, repo_id=f"me/{name}") == text


@pytest.mark.parametrize(
    "name",
    ["\x1b[2J\x1b]0;owned\x07", "a\nb", "verified\u202ecod.exe", "https://evil.example", "www.evil.example", "[x](y)",
     "<img src=x>", "|x|", "``` ", "@someone", "&lt;", "**bold**", "\ud800", "a" * 10_000],
)  # fmt: skip
def test_text_of_a_foreign_config_is_printable_short_and_no_markup(name: str) -> None:
    fields = {
        "head": {"form": "code", "class": name, "file": name},
        "tower_class": name,
        "problem_type": None,
        "frozen": {"parameters": [name], "statistics": []},
        "trunk_source": {"repo_id": name, "commit": name},
        "id2label": {0: name, 1: "b"},
    }
    text = make_card(config(**fields), replace(CLASSIFIES, trunk=name), repo_id="me/eyes")
    text.encode()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text) < 9000
    prose = re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->", "", text.split("\n---\n", 1)[1], flags=re.DOTALL)
    for markup in ("evil", "[x]", "<img", "@", "&lt;", "**bold", "|x|"):
        assert markup not in prose


# A classifier

CLASSIFIES = replace(FACTS, classifier_parameters=99)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"id2label": {0: "cat", 1: "dog"}}, "label = "),
        ({"num_labels": 2, "problem_type": "single_label_classification"}, "label = "),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, "scores = "),
        ({"num_labels": 2, "problem_type": "regression"}, "values = "),
        ({"num_labels": 1}, "values = "),
        ({"num_labels": 2, "in_chans": 5}, "label = "),
    ],
)
def test_a_classifier_shows_what_its_numbers_are(fields: dict[str, Any], answer: str) -> None:
    made = make_card(config(**fields), CLASSIFIES, repo_id="me/eyes")
    assert ModelCard(made).data.pipeline_tag == "image-classification"
    shown = snippets(made)
    pictures = {"pipeline"} if fields.get("in_chans", 3) == 3 else set()
    assert set(shown) == {"package", "transformers", "remote_code", "embedding", *pictures}
    for name, code in shown.items():
        ast.parse(code)
        assert code.count("me/eyes") == 1, name
    for name in ("package", "transformers", "remote_code"):
        assert answer in shown[name]
        assert f"[1, {config(**fields).num_labels}]" in shown[name]
    assert ('function_to_apply="none"' in made) == (answer == "values = "), "else the pipeline squashes it"


def test_labels_are_listed_shortly_and_as_text() -> None:
    names = {index: f"label {index}" for index in range(1000)}
    made = make_card(config(id2label=names), CLASSIFIES)
    assert re.search(r"^\| Labels \| label 0, label 1, .*label 9, \.\.\. \(.* 1,000\) \|$", made, re.MULTILINE)
    names = {0: "a|b\n# <!-- hf_timm_tower: end about -->", 1: "x" * 5000, 2: "y" * 5000, 3: "z" * 5000}
    made = make_card(config(id2label=names), CLASSIFIES)
    [row] = re.findall(r"^\| Labels .*$", made, re.MULTILINE)
    assert len(row) < 400
    assert row.count("|") == 3
    assert made.count("hf_timm_tower: end about -->") == 1
    assert make_card(config(id2label=names), CLASSIFIES, existing=made) == made


def test_a_card_follows_when_the_classifier_goes_and_comes() -> None:
    plain, labelled = config(), config(num_labels=3)
    made = make_card(plain, FACTS, repo_id="me/eyes")
    both = make_card(labelled, CLASSIFIES, existing=made)
    assert both == make_card(labelled, CLASSIFIES, repo_id="me/eyes")
    assert make_card(plain, FACTS, existing=both) == made


def test_metrics_of_a_classifier_are_of_its_task() -> None:
    made = make_card(config(num_labels=3), CLASSIFIES, metrics={"accuracy": 0.5})
    assert ModelCard(made).data.eval_results[0].task_type == "image-classification"
    more = {"evaluated_task": "other"}
    made = make_card(config(num_labels=3), CLASSIFIES, metrics={"accuracy": 0.5}, model_card_kwargs=more)
    assert ModelCard(made).data.eval_results[0].task_type == "other"


# What people wrote


def test_an_edited_card_keeps_the_edits_and_renews_the_rest() -> None:
    made = card(license="mit", tags=["pathology", "unwanted"], metrics={"accuracy": 0.5})
    edited = made.replace("license: mit", "license: apache-2.0\nthumbnail: 'cat.png'")
    edited = edited.replace("- unwanted\n", "- added\n")
    edited = edited.replace("# eyes", "# Eyes of ours")
    edited = re.sub(r"<!-- hf_timm_tower: begin use.*end use -->", "Our text.", edited, flags=re.DOTALL) + "\nThe end."
    other = config(architecture="test_vit", embed_dim=64)
    with pytest.warns(UserWarning, match="keeps its own tags"):
        renewed = make_card(other, FACTS, existing=edited, metrics={"accuracy": 0.75}, tags=["pathology", "unwanted"])
    data = ModelCard(renewed).data
    assert (data.license, data["thumbnail"]) == ("apache-2.0", "cat.png")
    assert data.tags == ["timm_tower", "timm", "pathology", "added", "test_vit"]
    assert [result.metric_value for result in data.eval_results] == [0.75]
    assert "# Eyes of ours" in renewed
    assert "Our text." in renewed
    assert renewed.rstrip().endswith("The end.")
    assert "begin use" not in renewed, "somebody took it out"
    assert "| accuracy | 0.75 |" in renewed
    assert "| Embedding | `embed_dim` 64 |" in renewed
    assert "`embed_dim` 32" not in renewed
    assert make_card(other, FACTS, existing=renewed) == renewed


def test_a_figure_that_somebody_added_to_the_index_stays() -> None:
    made = card(metrics={"accuracy": 0.5, "f1": 0.25})
    edited = made.replace("    - type: f1\n", "    - type: auc\n      value: 0.125\n    - type: f1\n", 1)
    edited = edited.replace("value: 0.25", "value: 0.375", 1)
    with pytest.warns(UserWarning, match="keeps its own model-index"):
        renewed = card(existing=edited, metrics={"accuracy": 0.75, "f1": 0.25})
    found = {result.metric_type: result.metric_value for result in ModelCard(renewed).data.eval_results}
    assert found == {"accuracy": 0.75, "auc": 0.125, "f1": 0.375}


def test_an_edited_license_wins_over_the_given_one_with_a_warning() -> None:
    edited = card(license="mit").replace("license: mit", "license: cc-by-nc-4.0")
    with pytest.warns(UserWarning, match="keeps its own license"):
        renewed = card(existing=edited, license="mit")
    assert renewed == edited


def test_a_license_not_given_again_stays() -> None:
    assert ModelCard(unwarned(card(license="mit"))).data.license == "mit"


def test_a_changed_license_is_written_where_nobody_edited_it() -> None:
    assert ModelCard(unwarned(card(license="mit"), license="apache-2.0")).data.license == "apache-2.0"


def test_a_card_of_somebodys_own_keeps_its_text_and_gains_metadata() -> None:
    lists = "tags:\n  - eyes   # what it is\n  - 'timm'\ndatasets: [a/b]\n"
    own = f"---\n# ours\nlicense: mit\n{lists}language: en\n---\n# My model\n\nNot `yours`.\n"
    renewed = unwarned(own, license="mit", metrics={"accuracy": 0.5}, model_card_kwargs={"datasets": ["c/d"]})
    assert "---\n# My model\n\nNot `yours`.\n" in renewed
    assert "## Use" not in renewed
    data = ModelCard(renewed).data
    assert data.tags == ["eyes", "timm", "timm_tower", "test_resnet"]
    assert (data.pipeline_tag, data.datasets, data.language) == ("image-feature-extraction", ["a/b", "c/d"], "en")
    assert data.eval_results[0].metric_value == 0.5
    assert unwarned(renewed) == renewed


def test_metadata_that_does_not_change_keeps_its_spelling_and_comments() -> None:
    head, _, rest = card(license="mit").partition("license: mit\n")
    edited = f"{head}# after the lawyers\nlicense:   'mit'  # for now\nlanguage: [en,   de]\n{rest}"
    renewed = make_card(config(embed_dim=64), FACTS, existing=edited, license="mit")
    assert "`embed_dim` 64" in renewed
    assert renewed.split("\n---\n")[0] == edited.split("\n---\n")[0]


# Figures belong to the weights that they were measured with

ONE, TWO = {"trunk": "1", "head": "1"}, {"trunk": "1", "head": "2"}


def measured(**arguments: Any) -> str:
    return card(metrics={"accuracy": 0.5, "f1": 0.25}, weights=ONE, tags=["eyes"], **arguments)


def test_metrics_stay_with_their_weights() -> None:
    assert unwarned(measured(), weights=ONE) == measured()


def test_metrics_of_earlier_weights_go_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="other weights"):
        renewed = card(existing=measured(), weights=TWO)
    data = ModelCard(renewed).data
    assert (data.eval_results, data.metrics) == (None, None)
    assert "eyes" in data.tags
    assert "Results" not in renewed
    assert "accuracy" not in renewed
    assert unwarned(renewed, weights=ONE) == unwarned(renewed, weights=ONE), "once gone, they are gone"
    again = unwarned(renewed, weights=TWO, metrics={"accuracy": 0.75})
    assert "| accuracy | 0.75 |" in again
    assert ModelCard(again).data.eval_results[0].metric_value == 0.75


def test_new_metrics_take_the_place_of_all_that_were_measured_with_other_weights() -> None:
    renewed = unwarned(measured(), weights=TWO, metrics={"accuracy": 0.75})
    assert [(found.metric_type, found.metric_value) for found in ModelCard(renewed).data.eval_results] == [
        ("accuracy", 0.75)
    ]
    assert ModelCard(renewed).data.metrics == ["accuracy"]
    assert "f1" not in renewed


def test_metrics_of_a_classifier_belong_to_the_classifier_too() -> None:
    before, after = (replace(CLASSIFIES, classifier_digest=digest) for digest in "ab")
    made = make_card(config(num_labels=3), before, weights=ONE, metrics={"accuracy": 0.5})
    assert make_card(config(num_labels=3), before, existing=made, weights=ONE) == made
    with pytest.warns(UserWarning, match="other weights"):
        assert "accuracy" not in make_card(config(num_labels=3), after, existing=made, weights=ONE)


def test_figures_that_a_person_wrote_are_not_ours_to_take_out() -> None:
    edited = measured().replace("value: 0.25", "value: 0.375", 1)
    edited = edited.replace("    - type: f1\n", "    - type: auc\n      value: 0.125\n    - type: f1\n", 1)
    with pytest.warns(UserWarning, match="other weights"):
        renewed = card(existing=edited, weights=TWO)
    found = {result.metric_type: result.metric_value for result in ModelCard(renewed).data.eval_results}
    assert found == {"auc": 0.125, "f1": 0.375}


def test_metrics_in_a_card_of_somebodys_own_go_too() -> None:
    own = "---\nlicense: mit\n---\nMine.\n"
    renewed = unwarned(own, metrics={"accuracy": 0.5}, weights=ONE)
    with pytest.warns(UserWarning, match="other weights"):
        later = card(existing=renewed, weights=TWO)
    assert ModelCard(later).data.eval_results is None
    assert later.split("---\n")[2].startswith("Mine.\n")


# Cards that cost


def bomb(depth: int) -> str:
    """YAML of some hundred bytes whose aliases stand for 9**depth words."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
RESULT = (
    "model-index:\n- name: m\n  results:\n  - task: {{type: t}}\n    dataset: {}\n"
    "    metrics: [{{type: a, value: 1}}]\n"
)


@pytest.mark.parametrize(
    "metadata",
    [
        bomb(9) + RESULT.format("{name: x, type: y, args: *a8}"),
        bomb(9) + "license: *a8\n",
        bomb(30),
        MERGES,
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "x: " + "[" * 30_000 + "\n",
        "".join(f"k{i}: {{a: [b, c]}}\n" for i in range(6000)),
        "x: " + "a" * 70_000 + "\n",
        f"x: {'9' * 5000}\n",
        f"x: {'1:' * 3000}1\n",
    ],
    ids="index license thirty merges itself itself_in_dict deep wide long digits sexagesimal".split(),
)
def test_metadata_that_costs_is_left_as_it_is_in_no_time(metadata: str) -> None:
    existing = f"---\n{metadata}---\n# hi\n"
    started = time.process_time()
    with pytest.warns(UserWarning, match=r"README\.md was left as it is"):
        assert card(existing=existing) == existing
    assert time.process_time() - started < 5


def test_aliases_of_an_honest_card_stay() -> None:
    existing = "---\nx: &x [one, two]\ny: *x\ntags: *x\n---\nText.\n"
    data = yaml.safe_load(unwarned(existing).split("---\n")[1])
    assert (data["x"], data["y"], data["tags"][:2]) == (["one", "two"],) * 3


@pytest.mark.parametrize(
    "text",
    [
        "<!-- hf_timm_tower: record " + " " * 200_000 + "x\n",
        "<!-- hf_timm_tower: record " * 20_000,
        "<!-- hf_timm_tower: begin a " * 20_000 + "-->",
        "<!-- hf_timm_tower: begin " + "a" * 200_000,
        "<!-- hf_timm_tower: record " + "[" * 200_000 + " -->",
        "<!--" + " " * 200_000 + "hf_timm_tower",
        "---\n" * 100_000,
        "---\n" + "\n--- " * 50_000,
        " " * 300_000 + "x",
        "x" * (2**20 + 1),
    ],
    ids="blanks records begins name deep_record opening rules rules_with_blanks spaces long".split(),
)
def test_text_that_costs_is_read_in_no_time(text: str) -> None:
    for existing in (f"{text}\nMine.\n", f"---\nlicense: mit\n---\n{text}\nMine.\n"):
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            renewed = card(existing=existing)
        assert "\nMine.\n" in renewed
        assert time.process_time() - started < 5


def test_a_card_whose_marks_were_taken_out_gets_no_second_body() -> None:
    without = re.sub(r"<!-- hf_timm_tower: (begin|end|record).*?-->\n?", "", card(license="mit"))
    renewed = unwarned(without, license="mit")
    assert renewed == without
    assert renewed.count("## Use") == 1


@pytest.mark.parametrize("existing", ["", "  \n", "---\nlicense: mit\n---\n"])
def test_a_card_without_text_gets_ours(existing: str) -> None:
    renewed = unwarned(existing)
    assert ModelCard(renewed).data.license == ("mit" if "mit" in existing else None)
    assert set(snippets(renewed)) == set(snippets(card()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("<!-- hf_timm_tower: end about -->", ""),
        lambda text: text.replace("hf_timm_tower: end about", "hf_timm_tower: end use"),
        lambda text: text + re.search(r"<!-- hf_timm_tower: begin use.*end use -->", text, re.DOTALL)[0],
        lambda text: text.replace("end about -->", "end about --"),
        lambda text: text + "\n<!-- hf_timm_tower: record {} -->",
        lambda text: text.replace("tags:", "tags: [a"),
        lambda text: text.replace("tags:", "- tags\nx:"),
        lambda text: text.replace("---\n", "---\nmodel-index: 5\n", 1),
        lambda text: text.replace("---\n", "---\nmodel-index: [{name: x, results: [{}]}]\n", 1),
        lambda text: text.replace("---\n", "---\ndatasets: {a: b}\n", 1),
    ],
)
def test_a_card_that_cannot_be_read_is_left_as_it_is_with_a_warning(spoil: Callable[[str], str]) -> None:
    broken = spoil(card())
    assert broken != card()
    with pytest.warns(UserWarning, match=r"README\.md was left as it is"):
        assert make_card(config(embed_dim=64), FACTS, existing=broken, license="mit") == broken


@pytest.mark.parametrize(
    "record", ["{", "[1]", '{"own": 5}', '{"own": {"tags": 5}, "given": {}, "sections": 7}', "[" * 10**5]
)
def test_a_broken_record_only_means_that_we_do_not_know(record: str) -> None:
    edited = re.sub(r"(hf_timm_tower: record).*?-->", lambda found: f"{found[1]} {record} -->", card(license="mit"))
    renewed = unwarned(edited)
    assert ModelCard(renewed).data.license == "mit"
    assert unwarned(renewed) == renewed


def test_line_ends_and_byte_order_mark_stay() -> None:
    windows = "\ufeff" + card().replace("\n", "\r\n")
    renewed = make_card(config(embed_dim=64), FACTS, existing=windows, license="mit")
    assert renewed.startswith("\ufeff---\r\n")
    assert not re.search(r"(?<!\r)\n", renewed)
    assert "`embed_dim` 64" in renewed
    assert set(snippets(renewed)) == set(snippets(card()))


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: "hf_timm_tower" not in text)
_SECTION = re.compile(r"<!-- hf_timm_tower: begin (\w+).*?end \1 -->|<!-- hf_timm_tower: record.*?-->", re.DOTALL)


@settings(max_examples=50, deadline=None)
@given(st.lists(_TEXT, min_size=6, max_size=6), st.booleans())
@example(["", "---\nlicense: mit\n---\n", "<!--", "-->", "```", "\x0b\r"], True)
def test_text_outside_the_marks_survives_anything(texts: list[str], crlf: bool) -> None:
    made = card(metrics={"accuracy": 0.5})
    metadata, body = made[: made.index("\n# eyes")], made[made.index("\n# eyes") :]
    pieces = iter(texts)
    edited = metadata + _SECTION.sub(lambda found: next(pieces) + found[0] + next(pieces), body, count=3)
    if crlf:
        edited = edited.replace("\n", "\r\n")
    renewed = make_card(config(architecture="test_vit"), FACTS, existing=edited, license="mit")
    outside = [_SECTION.sub("*", text.split("# eyes", 1)[1]) for text in (edited, renewed)]
    assert outside[0] == outside[1]
    assert "test_vit" in renewed
    assert ModelCard(renewed).data.license == "mit"


_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), _VALUE, max_size=5), st.booleans(), st.booleans())
def test_metadata_that_somebody_added_survives_anything(added: dict[str, Any], flow: bool, anchored: bool) -> None:
    metadata: dict[str, Any] = {f"x_{key}": value for key, value in added.items()}
    if anchored:
        shared = ["one", "two"]
        metadata |= {"x_one": shared, "tags": shared}
    source = yaml.safe_dump(metadata, default_flow_style=flow, allow_unicode=True)
    renewed = make_card(config(), FACTS, existing=f"---\n{source}---\nText.\n", license="mit")
    found = yaml.safe_load(renewed.split("\n---", 1)[0].removeprefix("---"))
    before = yaml.safe_load(source)
    assert {key: found[key] for key in before if key != "tags"} == {key: before[key] for key in before if key != "tags"}
    assert found["license"] == "mit"
    assert found["tags"][-3:] == ["timm_tower", "timm", "test_resnet"]
    assert renewed.endswith("---\nText.\n")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_card_cut_anywhere_is_left_or_renewed_once_and_for_all(data: st.DataObject) -> None:
    made = card(license="mit", metrics={"accuracy": 0.5})
    start = data.draw(st.integers(0, len(made)))
    end = data.draw(st.integers(start, min(len(made), start + 400)))
    insert = data.draw(st.sampled_from(["", made[start:end] * 2, "---\n", "\r\n", "<!-- hf_timm_tower: ", "{", ": "]))
    cut = made[:start] + insert + made[end:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        renewed = make_card(config(embed_dim=64), FACTS, existing=cut)
    if any("left as it is" in str(warning.message) for warning in caught):
        assert renewed == cut
    else:
        ModelCard(renewed)
        assert make_card(config(embed_dim=64), FACTS, existing=renewed) == renewed


@pytest.mark.parametrize(
    "change", [{"image_size": 96}, {"pool": "max"}, {"preprocess": {**PREPROCESS, "crop_pct": 0.5}}]
)
def test_metrics_belong_to_the_form_too_where_the_weights_are_the_same(change: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="another form or preprocessing"):
        renewed = make_card(config(**change), FACTS, existing=measured(), weights=ONE)
    assert ModelCard(renewed).data.eval_results is None


def test_metrics_of_a_card_that_says_nothing_of_the_form_stay() -> None:
    earlier = re.sub(r'"form":"\w+",', "", measured())
    assert earlier != measured()
    assert ModelCard(unwarned(earlier, weights=ONE)).data.eval_results is not None

"""transformers' models of a tower save and push what `TimmModel` does: files, card, commit."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_timm_tower import TimmModel, TimmTowerForImageClassification, TimmTowerModel

from .. import face_calls as calls
from .. import hub_calls
from ..card_snippets import snippets
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

CLASSIFIER = "classifier.safetensors"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub"), users={"ann": "hf_ann", "bob": "hf_bob"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def ann(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _fresh_log(hub: LocalHub) -> None:
    hub.forget()


def read_all(worker: HubWorker, repo: str, revision: str | None = None) -> dict[str, bytes]:
    names = [name for name in worker.call(hub_calls.list_files, repo, revision) if name != ".gitattributes"]
    found: dict[str, bytes] = worker.call(hub_calls.read_files, repo, names, revision)
    return found


def card_of(worker: HubWorker, repo: str, revision: str | None = None) -> str:
    return str(worker.call(hub_calls.read_files, repo, ["README.md"], revision)["README.md"].decode())


Step = tuple[Callable[..., Any], dict[str, Any]]


def push(repo: str, seed: int = 1, **arguments: Any) -> Step:
    return calls.push_face, {"repo_id": repo, "seed": seed, **arguments}


def load(repo: str, by: str, revision: str | None = None) -> Step:
    return calls.load, {"repo_id": repo, "by": by, "revision": revision}


def other(this: dict[str, bytes], that: dict[str, bytes]) -> set[str]:
    """Names of the files that are not the same in both."""
    return {name for name in this.keys() | that.keys() if this.get(name) != that.get(name)}


# --- the same repository


def test_a_pushed_face_is_what_timm_model_pushes_and_loads_everywhere_with_the_same_bits(ann: HubWorker) -> None:
    said = {"license": "mit", "tags": ["digits"], "metrics": {"accuracy": 0.5}, "evaluated_on": "me/digits"}
    by_timm = (calls.push_as_timm_model, {"repo_id": "ann/by-timm", "seed": 1, **said})
    loads = [load("ann/by-face", by) for by in ("TimmModel", "AutoModel")]
    embedding, (address, same), *found = ann.call(calls.in_turn, by_timm, push("ann/by-face", **said), *loads)
    assert re.search(r"/ann/by-face/commit/[0-9a-f]{40}$", address)
    assert all(torch.equal(tensor, embedding) for tensor in (same, *found))
    expected = {
        name: data.replace(b"by-timm", b"by-face") if name == "README.md" else data
        for name, data in read_all(ann, "ann/by-timm").items()
    }
    assert "modeling_timm_tower.py" in expected
    assert other(read_all(ann, "ann/by-face"), expected) == set()
    [result] = ModelCard(card_of(ann, "ann/by-face")).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "me/digits")
    assert result.task_type == "image-feature-extraction"


def test_a_pushed_classifier_is_the_tower_s_repository_and_its_classifier(ann: HubWorker) -> None:
    embedding, (_, logits), with_classifier, without = ann.call(
        calls.in_turn,
        (calls.push_as_timm_model, {"repo_id": "ann/plain", "seed": 1}),
        push("ann/labelled", labels=calls.LABELS, metrics={"accuracy": 0.75}),
        load("ann/labelled", "classifier"),
        load("ann/labelled", "TimmModel"),
    )
    assert torch.equal(with_classifier, logits)
    assert torch.equal(without, embedding)
    plain, labelled = read_all(ann, "ann/plain"), read_all(ann, "ann/labelled")
    assert labelled.keys() - plain.keys() == {CLASSIFIER}
    told = {"README.md", "config.json", "fingerprint.json", "model.safetensors.index.json"}
    assert other(labelled, plain) == {CLASSIFIER, *told}
    configs = [json.loads(files["config.json"]) for files in (labelled, plain)]
    assert {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)} <= {
        "architectures", "id2label", "label2id",
    }  # fmt: skip
    data = ModelCard(labelled["README.md"].decode()).data
    assert data.pipeline_tag == "image-classification"
    assert data.eval_results[0].task_type == "image-classification"
    assert "| Labels | cat, dog, owl |" in labelled["README.md"].decode()


def test_after_a_change_of_one_part_only_that_part_is_sent_and_an_edited_card_stays(
    hub: LocalHub, ann: HubWorker
) -> None:
    ann.call(calls.push_face, "ann/again", 1, calls.LABELS, license="mit")
    edited = card_of(ann, "ann/again").replace("license: mit", "license: apache-2.0") + "\nMy own words.\n"
    ann.call(hub_calls.push_files, "ann/again", {"README.md": edited.encode()})
    commits = len(ann.call(hub_calls.api, "list_repo_commits", "ann/again"))
    hub.forget()
    ann.call(calls.change_and_push, "ann/again", "classifier", metrics={"accuracy": 0.25})
    files = read_all(ann, "ann/again")
    assert list(hub.uploaded().values()) == [len(files[CLASSIFIER])]
    assert len(ann.call(hub_calls.api, "list_repo_commits", "ann/again")) == commits + 1
    card = files["README.md"].decode()
    assert "My own words." in card
    assert "license: apache-2.0" in card
    assert "| accuracy | 0.25 |" in card
    # The tower alone takes its place: nothing of the classifier is left, and nothing sent but the head.
    hub.forget()
    ann.call(calls.change_and_push, "ann/again", "head")
    files = read_all(ann, "ann/again")
    assert list(hub.uploaded().values()) == [len(files["head.safetensors"])]
    assert CLASSIFIER not in files
    data = ModelCard(files["README.md"].decode()).data
    assert (data.pipeline_tag, data.license) == ("image-feature-extraction", "apache-2.0")


def test_an_older_single_file_in_the_repository_is_not_taken_for_the_tower(ann: HubWorker) -> None:
    refusal = (calls.refused, {"call": calls.load, "repo_id": "ann/over", "by": "AutoModel"})
    uploaded = (calls.upload_over_a_single_file, {"repo_id": "ann/over"})
    expected, by_timm_model, told, (_, pushed), by_auto_model = ann.call(
        calls.in_turn,
        uploaded,
        load("ann/over", "TimmModel"),
        refusal,
        push("ann/over", 3),  # takes the old file away
        load("ann/over", "AutoModel"),
    )
    assert torch.equal(by_timm_model, expected)
    assert re.match(r"FormatError: ann/over: holds both model\.safetensors and model\.safetensors\.index\.json", told)
    assert torch.equal(by_auto_model, pushed)


# --- transformers' arguments


def test_private_branch_pull_request_message_and_tags(hub: LocalHub, ann: HubWorker) -> None:
    mine = {"private": True, "token": "hf_ann", "commit_message": "Mine", "commit_description": "Long words"}
    repo, refs = "ann/options", ["main", "draft", "refs/pr/1"]
    *pushed, main, draft, pull = ann.call(
        calls.in_turn,
        push(repo, 1, added="added", tags="alone", **mine),
        push(repo, 2, revision="draft"),
        push(repo, 3, create_pr=True),
        *(load(repo, "AutoModel", ref) for ref in refs),
    )
    for (_, embedding), loaded in zip(pushed, (main, draft, pull), strict=True):
        assert torch.equal(loaded, embedding)
    assert pushed[2][0] == f"{hub.url}/ann/options/discussions/1"
    assert ann.call(hub_calls.api, "model_info", repo).private
    newest = ann.call(hub_calls.api, "list_repo_commits", repo)[0]
    assert (newest.title, newest.message.strip()) == ("Mine", "Long words")
    assert ModelCard(card_of(ann, repo)).data.tags == ["timm_tower", "timm", "test_resnet", "added", "alone"]


def test_tags_of_one_model_are_not_those_of_the_next() -> None:
    one = calls.face(1)
    one.add_model_tags("mine")
    assert (one.model_tags, calls.face(1).model_tags) == (["timm", "mine"], ["timm"])


def test_saving_with_a_push_sends_the_gathered_weights(ann: HubWorker, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    ann.call(calls.save_and_push, str(folder), 1, repo_id="ann/gathered", license="mit", revision="draft")
    local = hub_calls.files_of(str(folder))
    assert other(local, read_all(ann, "ann/gathered", "draft")) == set()
    assert b"license: mit" in local["README.md"]
    expected = calls.output(hub_calls.make(2))
    assert torch.equal(calls.output(TimmModel.from_pretrained(folder)), expected)


def test_what_cannot_be_honoured_is_refused_before_anything_is_written_or_sent(
    hub: LocalHub, ann: HubWorker, tmp_path: Path
) -> None:
    told = ann.call(calls.refusals, "ann/typo", str(tmp_path / "typo"))
    patterns = [
        "TypeError.*licence", "ArgumentError.*accuracy", "ArgumentError.*contradict", "ArgumentError.*licence",
        "ArgumentError.*commit_message",
    ]  # fmt: skip
    for text, pattern in zip(told, patterns, strict=True):
        assert re.search(pattern, text), text
    assert not (tmp_path / "typo").exists()
    assert hub.log() == []


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers adds adapters with peft {MIN_PEFT_VERSION} and later only",
)
def test_an_adapter_is_pushed_as_transformers_does(ann: HubWorker) -> None:
    ann.call(calls.push_adapter, "ann/adapter", tags=["lora"])
    assert read_all(ann, "ann/adapter").keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "lora" in ModelCard(card_of(ann, "ann/adapter")).data.tags


def test_a_tower_with_its_trunk_elsewhere_is_saved_whole_where_that_is_asked_for(
    ann: HubWorker, tmp_path: Path
) -> None:
    *_, embedding = ann.call(
        calls.in_turn,
        (hub_calls.push, {"repo_id": "ann/base", "seed": 1}),
        (hub_calls.push_head_on, {"repo_id": "ann/head-only", "base": "ann/base", "seed": 9}),
        (calls.save_head_only, {"repo_id": "ann/head-only", "folder": str(tmp_path / "saved")}),
    )
    assert torch.equal(calls.output(TimmTowerModel.from_pretrained(tmp_path / "saved")), embedding)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("trunk_source") is None


# --- the card


def test_both_faces_write_the_same_card_into_a_folder_and_keep_what_was_edited(tmp_path: Path) -> None:
    tower = hub_calls.make(1)
    tower.lock()
    tower.save_pretrained(tmp_path / "a", license="mit")
    model = TimmTowerModel.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", license="mit")
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
    edited = (tmp_path / "b" / "README.md").read_text().replace("# test_resnet", "# Eyes") + "\nMine.\n"
    (tmp_path / "b" / "README.md").write_text(edited)
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == edited


@pytest.fixture(scope="module")
def shown(hub: LocalHub, ann: HubWorker) -> dict[str, str]:
    """The snippets of a classifier's card."""
    ann.call(calls.push_face, "ann/shown", 1, calls.LABELS)
    return snippets(card_of(ann, "ann/shown"))


@pytest.fixture(scope="module")
def answers() -> tuple[str, list[float]]:
    """The label and the embedding of the image that the snippets take."""
    tower, model = hub_calls.make(1), calls.face(1, calls.LABELS)
    pixels = tower.transform()(Image.new("RGB", (640, 480)))[None]
    with torch.no_grad():
        return calls.LABELS[int(model(pixels).logits.argmax())], tower(pixels).flatten().tolist()


def test_a_classifier_s_snippets_run_and_say_what_the_tower_says(
    shown: dict[str, str],
    answers: tuple[str, list[float]],
    hub: LocalHub,
    tmp_path: Path,
    fresh_process: Callable[..., str],
) -> None:
    assert set(shown) == {"package", "transformers", "pipeline", "remote_code", "embedding"}
    environment = hub.env(tmp_path / "cache")
    # transformers' comes first, and the pipeline has a process of its own: each must import the package itself.
    code = "\n".join(
        [shown["transformers"], "print(label)", shown["package"], "print(label)", shown["embedding"],
         "print(embedding.flatten().tolist())"]
    )  # fmt: skip
    label, embedding = answers
    assert fresh_process(code, env=environment).splitlines()[-3:] == [label, label, repr(embedding)]
    code = shown["pipeline"] + "\nprint(max(answers, key=lambda answer: answer['score'])['label'])"
    assert fresh_process(code, env=environment).splitlines()[-1] == label


def test_where_the_package_is_absent_the_snippet_runs_and_a_push_is_transformers_own(
    shown: dict[str, str],
    answers: tuple[str, list[float]],
    hub: LocalHub,
    ann: HubWorker,
    tmp_path: Path,
    fresh_process: Callable[..., str],
) -> None:
    code = [
        "import sys",
        "sys.modules['hf_timm_tower'] = None",
        shown["remote_code"],
        "assert type(model).__module__.startswith('transformers_modules.'), type(model)",
        "print(model.push_to_hub('ann/shown-2'))",
        "print(label)",
    ]
    address, label = fresh_process("\n".join(code), env=hub.env(tmp_path / "cache")).splitlines()[-2:]
    assert label == answers[0]
    assert "/ann/shown-2/commit/" in address
    pushed, before = read_all(ann, "ann/shown-2"), read_all(ann, "ann/shown")
    assert {"config.json", "model.safetensors", "modeling_timm_tower.py"} <= pushed.keys()
    assert pushed["modeling_timm_tower.py"] == before["modeling_timm_tower.py"]
    by_both = [ann.call(calls.load, name, by="classifier") for name in ("ann/shown", "ann/shown-2")]
    assert torch.equal(*by_both)


# --- frozen statistics


def test_frozen_statistics_stay_in_modules_that_took_another_s_place(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.lock(freeze_bn_stats=True)
    tower.save_pretrained(tmp_path, include_code=False)
    with pytest.warns(UserWarning, match="fresh"):
        model = TimmTowerForImageClassification.from_pretrained(tmp_path, num_labels=2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # In train mode, SyncBatchNorm refuses to run on a CPU at all.
    model.train()(pixel_values=torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert model.classifier.training
    assert not any(norm.training for norm in norms)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

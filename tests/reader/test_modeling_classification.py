"""`TimmTowerForImageClassification`: labels, losses, a fresh classifier that is announced, and a round trip."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from transformers import AutoModelForImageClassification

from hf_timm_tower import ConfigError, HeadError, TimmModel, WeightsError
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel

LABELS = {0: "cat", 1: "dog", 2: "owl"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower without a classifier."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    TimmModel("test_resnet", 16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tower with a classifier of three labels."""
    folder = tmp_path_factory.mktemp("labelled")
    with pytest.warns(UserWarning, match="fresh"):
        model = TimmTowerForImageClassification.from_pretrained(plain, id2label=LABELS)
    model.save_pretrained(folder)
    return folder


def images() -> torch.Tensor:
    return torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_a_fresh_classifier_is_announced_and_random(plain: Path) -> None:
    with pytest.warns(UserWarning, match=r"fresh .*classifier\.bias, classifier\.weight"):
        model, info = AutoModelForImageClassification.from_pretrained(plain, num_labels=5, output_loading_info=True)
    assert isinstance(model, TimmTowerForImageClassification)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (5, 16)
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert torch.equal(model.classifier.bias, torch.zeros(5))
    assert model.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    with torch.no_grad():
        expected = model.classifier(TimmModel.from_pretrained(plain)(images()))
        assert torch.equal(model(images()).logits, expected)


def test_labels_and_weights_come_back_and_the_tower_files_are_not_touched(
    plain: Path, labelled: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForImageClassification.from_pretrained(labelled)
    assert model.config.id2label == LABELS
    assert model.config.label2id == {label: index for index, label in LABELS.items()}
    assert model.config.architectures == ["TimmTowerForImageClassification"]
    for name in ("trunk.safetensors", "head.safetensors"):
        assert (labelled / name).read_bytes() == (plain / name).read_bytes()
    index = json.loads((labelled / "model.safetensors.index.json").read_text())["weight_map"]
    assert {index["classifier.weight"], index["classifier.bias"]} == {"classifier.safetensors"}
    model.save_pretrained(tmp_path)
    names = {name for name in os.listdir(labelled) if name != "README.md"}
    assert all((tmp_path / name).read_bytes() == (labelled / name).read_bytes() for name in names)
    with torch.no_grad():
        again = TimmTowerForImageClassification.from_pretrained(tmp_path)(images()).logits
        assert torch.equal(again, model(images()).logits)


def test_saving_a_plain_tower_over_it_leaves_no_classifier_behind(labelled: Path, tmp_path: Path) -> None:
    TimmTowerForImageClassification.from_pretrained(labelled).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out: classifier\.bias, classifier\.weight"):
        tower = TimmTowerModel.from_pretrained(tmp_path)
    tower.save_pretrained(tmp_path)
    assert not (tmp_path / "classifier.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["TimmTowerModel"]
    with torch.no_grad():
        assert torch.equal(TimmModel.from_pretrained(tmp_path)(images()), tower(images()).pooler_output)


def test_a_classifier_of_another_size_or_a_lost_one_is_an_error(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"classifier\.weight: found \[3, 16\], expected \[7, 16\]"):
        TimmTowerForImageClassification.from_pretrained(labelled, num_labels=7)
    with pytest.warns(UserWarning, match="fresh .*classifier"):
        wider = TimmTowerForImageClassification.from_pretrained(labelled, num_labels=7, ignore_mismatched_sizes=True)
    assert wider(images()).logits.shape == (4, 7)
    assert wider(images()).logits.isfinite().all()
    for name in ("config.json", "trunk.safetensors", "head.safetensors"):
        (tmp_path / name).write_bytes((labelled / name).read_bytes())
    index = json.loads((labelled / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if not key.startswith("classifier")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="2 missing: classifier"):
        TimmTowerForImageClassification.from_pretrained(tmp_path)


def test_losses_are_those_of_transformers(plain: Path) -> None:
    targets = {
        "single_label_classification": (torch.tensor([0, 2, 1, 1]), nn.CrossEntropyLoss()),
        "multi_label_classification": (torch.tensor([[0.0, 1, 1]] * 4), nn.BCEWithLogitsLoss()),
        "regression": (torch.rand(4, 3), nn.MSELoss()),
    }
    for problem, (labels, loss) in targets.items():
        with pytest.warns(UserWarning, match="fresh"):
            model = TimmTowerForImageClassification.from_pretrained(plain, num_labels=3, problem_type=problem)
        output = model(images(), labels=labels)
        assert torch.equal(output.loss, loss(output.logits, labels))
        values = model(images(), labels=labels, return_dict=False)
        assert torch.equal(values[0], output.loss)
        assert torch.equal(values[1], output.logits)
    with pytest.warns(UserWarning, match="fresh"):
        model = TimmTowerForImageClassification.from_pretrained(plain, num_labels=3)
    model(images(), labels=targets["single_label_classification"][0])
    assert model.config.problem_type == "single_label_classification"


def test_a_training_step_moves_every_part(labelled: Path) -> None:
    model = TimmTowerForImageClassification.from_pretrained(labelled).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    labels, losses = torch.tensor([0, 2, 1, 1]), []
    for _ in range(4):
        loss = model(images(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"trunk", "head", "classifier"} == {name.split(".")[0] for name in moved}


def test_embeddings_that_are_no_vectors_get_no_classifier(tmp_path: Path) -> None:
    TimmModel("test_vit", embed_dim=None, pool="none", proj="none").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fresh"):
        model = TimmTowerForImageClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.raises(HeadError, match=r"\[B, embed_dim\].*\(4, 101, 64\)"):
        model(images())


def test_no_labels_no_classifier(plain: Path) -> None:
    with pytest.raises(ConfigError, match="num_labels"):
        TimmTowerForImageClassification.from_pretrained(plain, num_labels=0)


def test_timm_model_does_not_lose_a_classifier_without_a_word(labelled: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="classifier on top of the tower, which is left out"):
        tower = TimmModel.from_pretrained(labelled)
    assert tower.verify().status == "equal"
    tower.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["TimmTowerModel"]
    assert not (tmp_path / "classifier.safetensors").exists()

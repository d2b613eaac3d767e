"""A tower as another of its classes without files in between, and timm's repositories as transformers models."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperModel

from hf_timm_tower import (
    ArgumentError,
    ConfigError,
    ExportError,
    TimmModel,
    TimmTowerForImageClassification,
    TimmTowerModel,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
NATIVE = torch.linspace(-1, 1, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)
FACES = [TimmTowerModel, TimmTowerForImageClassification]


class Gate(nn.Module):
    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(in_features, embed_dim), nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value(x) * self.gate(x).sigmoid()


def tower(**arguments: Any) -> TimmModel:
    return TimmModel("test_vit", 16, image_size=64, pool="token", **arguments).eval()


@pytest.fixture(scope="module")
def timm_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("timm") / "model"
    model = timm.create_model("test_vit", num_classes=5).eval()
    nn.init.normal_(model.head.weight)
    save_for_hf(model, folder, safe_serialization=True)
    return folder, model


@pytest.mark.parametrize("custom_head", [None, Gate])
def test_a_tower_in_memory_becomes_a_transformers_model_and_back_on_the_same_modules(
    custom_head: Any, tmp_path: Path
) -> None:
    ours = tower(custom_head=custom_head)
    ours.lock()
    face = TimmTowerModel.from_tower(ours)
    assert face.trunk is ours.trunk
    assert face.head is ours.head
    assert not face.training
    assert not any(parameter.requires_grad for parameter in face.trunk.parameters())
    again = TimmModel.from_tower(face)
    assert torch.equal(face(IMAGES).pooler_output, ours(IMAGES))
    assert torch.equal(again(IMAGES), ours(IMAGES))
    for number, model in enumerate((ours, face, again)):
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModel.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(IMAGES).pooler_output, ours(IMAGES))
    names = ("config.json", "trunk.safetensors", "head.safetensors")
    first, *others = ([(tmp_path / str(number) / name).read_bytes() for name in names] for number in range(3))
    assert others == [first, first]


def test_a_classifier_on_a_tower_in_memory_has_its_labels_and_stays_on_the_way(tmp_path: Path) -> None:
    ours = tower()
    named = TimmTowerForImageClassification.from_tower(ours, id2label={0: "cat", 1: "dog"})
    named.save_pretrained(tmp_path / "named")
    loaded = TimmTowerForImageClassification.from_pretrained(tmp_path / "named")
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(loaded(IMAGES).logits, named(IMAGES).logits)
    assert TimmTowerForImageClassification.from_tower(loaded).classifier is loaded.classifier
    assert TimmTowerForImageClassification.from_tower(loaded, num_labels=7)(IMAGES).logits.shape == (2, 7)
    TimmModel.from_tower(loaded).save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "classifier.safetensors").exists()
    with pytest.raises(ArgumentError, match="num_labels"):
        TimmTowerForImageClassification.from_tower(ours)
    with pytest.raises(ArgumentError, match="id2label has 2"):
        TimmTowerForImageClassification.from_tower(ours, num_labels=3, id2label={0: "cat", 1: "dog"})


def test_what_only_its_own_class_can_run_is_refused() -> None:
    class Doubled(TimmModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigError, match=r"Doubled has its own forward"):
        TimmTowerModel.from_tower(Doubled("test_vit", 16))
    with pytest.raises(ConfigError, match=r"Doubled has its own forward"):
        Doubled.from_tower(tower())
    with pytest.raises(ArgumentError, match="no tower"):
        TimmTowerModel.from_tower(timm.create_model("test_vit"))


def test_a_timm_repository_as_a_classifier_gives_timm_s_logits(timm_model: Any, tmp_path: Path) -> None:
    folder, model = timm_model
    face = TimmTowerForImageClassification.from_timm(folder)
    assert not face.training
    assert face.config.num_labels == 5
    assert torch.equal(face(NATIVE).logits, model(NATIVE))
    face.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(NATIVE).logits, model(NATIVE))


def test_a_timm_repository_with_a_head_of_one_s_own(timm_model: Any, tmp_path: Path) -> None:
    face = TimmTowerModel.from_timm(timm_model[0], embed_dim=16, custom_head=Gate)
    face.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(NATIVE).pooler_output, face(NATIVE).pooler_output)


def test_a_timm_repository_for_other_labels_and_as_features(timm_model: Any, tmp_path: Path) -> None:
    folder, model = timm_model
    face = TimmTowerForImageClassification.from_timm(folder, num_labels=10, image_size=96)
    assert face.config.image_size == [96, 96]
    assert face(torch.zeros(1, 3, 96, 96)).logits.shape == (1, 10)
    features = model.forward_head(model.forward_features(NATIVE), pre_logits=True)
    assert torch.equal(TimmTowerModel.from_timm(folder)(NATIVE).pooler_output, features)
    wrapped = TimmWrapperModel(TimmWrapperConfig(architecture="test_vit")).eval()
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(TimmTowerModel.from_timm(tmp_path)(NATIVE).pooler_output, wrapped(NATIVE).pooler_output)
    with pytest.raises(ConfigError, match=r"no classifier.*num_labels"):
        TimmTowerForImageClassification.from_timm(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'embeddim'"):
        TimmTowerModel.from_timm(tmp_path, embeddim=3)


@pytest.mark.parametrize("cls", [TimmModel, *FACES])
@pytest.mark.parametrize("kind", ["timm", "timm_wrapper"])
def test_from_pretrained_of_a_timm_repository_names_the_call_that_takes_it(
    cls: Any, kind: str, timm_model: Any, tmp_path: Path
) -> None:
    folder, _ = timm_model
    if kind == "timm_wrapper":
        folder = tmp_path
        TimmWrapperModel(TimmWrapperConfig(architecture="test_vit")).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"TimmModel\.from_timm"):
        cls.from_pretrained(folder)


def test_timm_s_own_error_on_a_tower_says_what_loads_it(tmp_path: Path) -> None:
    tower().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"not a timm checkpoint.*TimmModel\.from_pretrained"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_torchscript_of_a_transformers_model_is_refused_in_words() -> None:
    face = TimmTowerModel.from_tower(tower())
    with pytest.raises(ExportError, match=r"torch_export.*TimmModel\.from_tower"):
        torch.jit.script(face)


def test_a_tower_says_its_device_dtype_and_width_as_others_do() -> None:
    ours = tower().to(torch.bfloat16)
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert ours.num_features == ours.trunk.num_features

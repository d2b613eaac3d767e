"""peft on a tower: LoRA trains, comes back with its head, merges, and what is merged is a tower again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_timm_tower import ArgumentError, TimmModel, WeightsError
from hf_timm_tower.interop.peft import add_lora, load_lora, lora_config, merge_lora
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel

from ..class_towers import randomise

FACES = [TimmModel, TimmTowerModel]
NAMES = {"test_vit": ["qkv", "fc1"], "test_convnext": ["fc1", "fc2"]}


def embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    return next(found[key] for key in ("logits", "pooler_output") if key in found) if isinstance(found, dict) else found


def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return embed(model.eval(), images)


def train(model: nn.Module, images: torch.Tensor, steps: int = 3) -> None:
    """Every parameter that trains gets a gradient and moves."""
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(steps):
        (embed(model, images) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert before
    assert [name for name, old in before.items() if torch.equal(old, after[name])] == []


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160)


@pytest.fixture(scope="module", params=list(NAMES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of this architecture, named as it; its weights are such that every layer shows in the output."""
    torch.manual_seed(0)
    tower = TimmModel(request.param, 8, proj="mlp")
    randomise(tower)
    path = tmp_path_factory.mktemp("towers") / request.param
    tower.save_pretrained(path)
    return path


@pytest.mark.parametrize("face", FACES)
def test_lora_comes_back_with_its_head_and_merges_into_a_tower(
    face: Any, folder: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    base = outputs(face.from_pretrained(folder), images)
    model = add_lora(face.from_pretrained(folder), lora_config(face.from_pretrained(folder), 4))
    assert torch.equal(outputs(model, images), base), "a fresh adapter changes nothing"
    train(model, images)
    trained = outputs(model, images)
    assert not torch.allclose(trained, base, rtol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.rsplit(".model.")[-1] for key in saved if "lora" not in key} == {
        f"head.{name}" for name in face.from_pretrained(folder).head.state_dict()
    }

    loaded = load_lora(face.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, images), trained)
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded, images), base), "the tower underneath is as it was"
    tower = merge_lora(loaded)
    merged = outputs(tower, images)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)
    assert type(tower) is face
    tower.save_pretrained(tmp_path / "merged")
    for other in FACES:
        again: Any = other.from_pretrained(tmp_path / "merged")
        assert torch.equal(outputs(again, images), merged)
        assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("face", FACES)
def test_peft_alone_does_the_same(face: Any, folder: Path, images: torch.Tensor, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=NAMES[folder.name], modules_to_save=["head"], lora_dropout=0.1)
    model = get_peft_model(face.from_pretrained(folder), config)
    train(model, images)
    trained = outputs(model, images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(face.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, images), trained)
    tower = loaded.merge_and_unload()
    merged = outputs(tower, images)
    tower.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(TimmModel.from_pretrained(tmp_path / "merged"), images), merged)


def test_lora_goes_on_where_it_was_saved(folder: Path, images: torch.Tensor, tmp_path: Path) -> None:
    model = add_lora(TimmModel.from_pretrained(folder))
    train(model, images)
    model.save_pretrained(tmp_path)
    loaded = load_lora(TimmModel.from_pretrained(folder), tmp_path, is_trainable=True)
    for each in (model, loaded):
        train(each, images)
    assert torch.equal(outputs(loaded, images), outputs(model, images))


@pytest.mark.parametrize("lock", [lambda tower: tower.lock(1), lambda tower: tower.lock(head=True)])
def test_a_lock_survives_lora(
    lock: Callable[[TimmModel], None], folder: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    tower = TimmModel.from_pretrained(folder)
    lock(tower)
    open_before = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    frozen = tower.config.frozen
    model = add_lora(tower)
    train(model, images)
    merged = merge_lora(model)
    merged.save_pretrained(tmp_path)
    again = TimmModel.from_pretrained(tmp_path)
    assert again.config.frozen == frozen
    for each in (merged, again):
        assert {name for name, parameter in each.named_parameters() if parameter.requires_grad} == open_before


@pytest.mark.parametrize("face", FACES)
def test_gradient_checkpointing_gives_the_same_gradients(face: Any, folder: Path, images: torch.Tensor) -> None:
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(1)
        model = add_lora(face.from_pretrained(folder)).train()
        tower: Any = model.get_base_model()
        if checkpoints:
            tower.gradient_checkpointing_enable() if face is TimmTowerModel else tower.set_grad_checkpointing()
        embed(model, images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert None not in gradients[1].values()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("face", FACES)
def test_running_statistics_of_the_trunk_stay_for_they_are_not_saved(
    face: Any, images: torch.Tensor, tmp_path: Path
) -> None:
    tower = TimmModel("test_resnet", 8)
    randomise(tower)  # the last norm of a block starts at zero
    tower.save_pretrained(tmp_path / "tower")
    model = add_lora(face.from_pretrained(tmp_path / "tower"))
    train(model, images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_lora(face.from_pretrained(tmp_path / "tower"), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(outputs(loaded, images), outputs(model, images))
    train(loaded, images)
    before = face.from_pretrained(tmp_path / "tower").state_dict()
    tower = merge_lora(loaded)
    for name, tensor in tower.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, before[name]), name
    tower.train()
    embed(tower, images)
    assert not torch.equal(tower.state_dict()["trunk.bn1.running_mean"], before["trunk.bn1.running_mean"])


class Fixed(nn.Module):
    """A head with a projection that never trains, statistics, and a part named like the head itself."""

    def __init__(self) -> None:
        super().__init__()
        self.random = nn.Linear(64, 32, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.random(x)))


def test_a_head_keeps_what_is_fixed_in_it_and_brings_its_statistics(images: torch.Tensor, tmp_path: Path) -> None:
    TimmModel("test_vit", 8, custom_head=Fixed()).save_pretrained(tmp_path / "tower")
    fixed = TimmModel.from_pretrained(tmp_path / "tower").head.random.weight
    model = add_lora(TimmModel.from_pretrained(tmp_path / "tower"))
    train(model, images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_lora(TimmModel.from_pretrained(tmp_path / "tower"), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(outputs(loaded, images), outputs(model, images))
    train(loaded, images)
    tower = merge_lora(loaded)
    tower.save_pretrained(tmp_path / "merged")
    again = TimmModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(again, images), outputs(tower, images))
    assert torch.equal(again.head.random.weight, fixed)
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == ["head.random.weight"]


def test_layers_of_the_trunk_that_are_named_like_the_head_do_not_train(images: torch.Tensor) -> None:
    model = add_lora(TimmModel("test_efficientnet", 8))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name and ".model.head." not in name} == set()
    assert any("conv_head.lora" in name for name in trained)


def test_layers_that_the_trunk_never_calls_are_not_adapted() -> None:
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    tower = TimmModel("swinv2_tiny_window8_256", 8, model_kwargs=small)
    with pytest.raises(ArgumentError, match=r"never calls trunk\.layers\.0\.blocks\.0\.attn\.qkv"):
        lora_config(tower, target_modules=["qkv", "proj"])
    randomise(tower)
    train(add_lora(tower), torch.randn(2, 3, 256, 256))


def test_an_adapter_goes_onto_the_tower_of_its_training_cast_or_not_and_onto_no_other(
    folder: Path, tmp_path: Path
) -> None:
    config = LoraConfig(target_modules=NAMES[folder.name])
    add_lora(TimmModel.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
    for dtype in (None, torch.bfloat16, torch.float16):
        load_lora(TimmModel.from_pretrained(folder, dtype=dtype), tmp_path / "adapter")
    other = TimmModel(folder.name, 8, proj="mlp")
    with pytest.raises(WeightsError, match=r"another tower.*weight.*differ"):
        load_lora(other, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_tower.json").unlink()
    load_lora(other, tmp_path / "adapter")


@pytest.mark.parametrize("missing", ["head", "lora_B"])
def test_an_incomplete_adapter_is_an_error(missing: str, folder: Path, tmp_path: Path) -> None:
    add_lora(TimmModel.from_pretrained(folder)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key: tensor for key, tensor in weights.items() if missing not in key}, path)
    with pytest.raises(WeightsError, match=missing):
        load_lora(TimmModel.from_pretrained(folder), tmp_path)


def test_a_classifier_is_trained_and_saved_with_the_adapter(folder: Path, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fresh"):
        labelled = TimmTowerForImageClassification.from_pretrained(folder, num_labels=3)
    labelled.save_pretrained(tmp_path / "labelled")
    model = add_lora(labelled)
    train(model, images)
    model.save_pretrained(tmp_path / "adapter")
    fresh = TimmTowerForImageClassification.from_pretrained(tmp_path / "labelled")
    loaded = load_lora(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(loaded, images), outputs(model, images))
    tower = merge_lora(loaded)
    tower.save_pretrained(tmp_path / "merged")
    again = TimmTowerForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(again, images), outputs(tower, images))

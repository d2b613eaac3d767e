"""A second save of a tower in one process proves bytes only, and only where nothing but weights has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import TimmModel, TimmTowerModel, TowerError, proof, save


class Scaled(nn.Module):
    """A head with settings of every kind."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(in_features, 16), nn.ReLU(), nn.Dropout(0.1))
        self.out = nn.Linear(16, embed_dim)
        self.scale = 2.0
        self.weights = [1.0, 0.5]
        self.offset = torch.tensor([0.25])
        self.act: Callable[[torch.Tensor], torch.Tensor] = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(self.hidden(x)) * self.scale
        return self.act(x * self.weights[0]) + x * self.weights[1] + self.offset


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was proven beside bytes, by name."""
    done: list[str] = []

    def noted(module: Any, name: str) -> None:
        native = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (done.append(name), native(*args, **kwargs))[1])

    noted(save, "store_head")
    noted(proof, "_compare_behaviour")
    return done


def assert_same(tower: Any, again: Any) -> None:
    images = torch.randn(2, 3, 160, 160)
    tower.eval()
    with torch.no_grad():
        assert torch.equal(again(images), tower(images))
    assert again.verify().status == "equal"


def train(tower: nn.Module) -> None:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.5)


def test_after_training_only_bytes_are_proven(tmp_path: Path, proofs: list[str]) -> None:
    tower = TimmModel("test_resnet", 8, custom_head=Scaled)
    tower.save_pretrained(tmp_path / "first")
    assert proofs == ["store_head", "_compare_behaviour"]
    tower.train()
    train(tower)
    tower.save_pretrained(tmp_path / "second")
    assert proofs == ["store_head", "_compare_behaviour"], "the second save proved more than bytes"
    assert_same(tower, TimmModel.from_pretrained(tmp_path / "second"))


def test_the_transformers_models_keep_what_was_proven_too(tmp_path: Path, proofs: list[str]) -> None:
    TimmModel("test_resnet", 8).save_pretrained(tmp_path / "tower")
    model = TimmTowerModel.from_pretrained(tmp_path / "tower")
    model.save_pretrained(tmp_path / "first")
    proofs.clear()
    train(model)
    model.save_pretrained(tmp_path / "second")
    assert proofs == []
    assert torch.equal(TimmTowerModel.from_pretrained(tmp_path / "second").head.proj.weight, model.head.proj.weight)


def widen(tower: Any) -> None:
    tower.head.hidden.append(nn.Linear(16, 16))


def exchange(tower: Any) -> None:
    tower.head.hidden[1] = nn.GELU()


def other_mean(tower: Any) -> None:
    tower.config.preprocess = {**tower.config.preprocess, "mean": [0.4, 0.5, 0.6]}


def set_item(tower: Any) -> None:
    tower.head.weights[1] = 3.0


def set_in_place(tower: Any) -> None:
    tower.head.offset += 1


def set_data(tower: Any) -> None:
    tower.head.offset.data.fill_(7.0)


CHANGES: dict[str, Callable[[Any], None]] = {
    "config": other_mean,
    "class of a layer": exchange,
    "another layer": widen,
    "another head": lambda tower: setattr(tower, "head", nn.Linear(tower.num_features, 8)),
    "number": lambda tower: setattr(tower.head, "scale", 5.0),
    "rate": lambda tower: setattr(tower.head.hidden[2], "p", 0.7),
    "item of a list": set_item,
    "tensor that is no buffer": lambda tower: setattr(tower.head, "offset", torch.tensor([4.0])),
    "such a tensor in place": set_in_place,
    "data of such a tensor": set_data,
    "function": lambda tower: setattr(tower.head, "act", torch.tanh),
    "dtype": lambda tower: tower.head.double() and tower.double(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_anything_but_weights_is_proven_anew(what: str, tmp_path: Path, proofs: list[str]) -> None:
    tower = TimmModel("test_resnet", 8, custom_head=Scaled)
    tower.save_pretrained(tmp_path / "first")
    proofs.clear()
    train(tower)
    CHANGES[what](tower)
    tower.save_pretrained(tmp_path / "second")
    assert proofs == ["store_head", "_compare_behaviour"]
    again = TimmModel.from_pretrained(tmp_path / "second")
    if what == "dtype":
        assert again.dtype == torch.float64
    else:
        assert_same(tower, again)


def test_a_setting_of_the_trunk_that_no_config_says_is_refused_the_second_time_too(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    nn.init.ones_(tower.trunk.layer1[0].bn2.weight)  # else the branch counts for nothing
    tower.save_pretrained(tmp_path / "first")
    tower.trunk.layer1[0].conv2.dilation = (2, 2)
    tower.trunk.layer1[0].conv2.padding = (2, 2)
    with pytest.raises(TowerError, match="other outputs"):
        tower.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second").exists()

"""What was frozen is part of the tower: through save and load, for built-in and custom heads, and in its methods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import ConfigError, TimmModel, TimmTowerConfig


def trainable(tower: nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def statistics(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in tower.named_buffers()}


def moved(tower: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    now = dict(tower.named_buffers())
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


class OwnHead(nn.Module):
    """A prototype that never trains, a norm with statistics, and a branch by mode."""

    def __init__(self, width: int, _: int | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, 8)
        self.prototype = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)) * self.prototype


LOCKS: list[dict[str, Any]] = [
    {},
    {"unlocked_groups": 2, "freeze_bn_stats": True},
    {"until": "layer2.0", "head": True, "freeze_bn_stats": True},
    {"only": ["*.bias", "layer1.0"], "freeze_bn_stats": True},
]


@pytest.mark.parametrize("head", [None, OwnHead], ids=["built_in", "own"])
@pytest.mark.parametrize("arguments", LOCKS)
def test_frozen_state_comes_back(tmp_path: Path, head: Any, arguments: dict[str, Any]) -> None:
    tower = TimmModel("test_resnet", 8, custom_head=head)
    tower.save_pretrained(tmp_path / "plain")
    tower.lock(**arguments)
    tower.save_pretrained(tmp_path / "t")
    assert tower.config.frozen == json.loads((tmp_path / "t" / "config.json").read_text())["frozen"]
    loaded = TimmModel.from_pretrained(tmp_path / "t")
    assert trainable(loaded) == trainable(tower)
    assert loaded.config.frozen == tower.config.frozen
    image = torch.randn(4, 3, 64, 64)
    moves = []
    for model in (tower, loaded):
        before = statistics(model)
        model.train()(image)
        moves.append(moved(model, before))
    assert moves[0] == moves[1]
    assert (moves[0] == set(before)) == (not arguments.get("freeze_bn_stats"))
    # saved again from what was loaded: the same files
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((tmp_path / "t" / "config.json").read_text())
    # a lock is no part of the head
    assert config["head"] == json.loads((tmp_path / "plain" / "config.json").read_text())["head"]
    loaded.unlock()
    everything = {name for name, _ in loaded.named_parameters()}
    assert trainable(loaded) == everything - {"head.prototype"}
    assert loaded.config.frozen is None
    opened = TimmModel.from_pretrained(tmp_path / "t", frozen=False)
    assert trainable(opened) == trainable(loaded)
    before = statistics(opened)
    opened.train()(image)
    assert moved(opened, before) == set(before)
    assert opened.config.frozen is None


def test_what_was_frozen_by_hand_comes_back_too(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.requires_grad_(False)
    tower.save_pretrained(tmp_path / "t")
    loaded = TimmModel.from_pretrained(tmp_path / "t")
    assert trainable(loaded) == set()
    loaded.unlock()
    assert trainable(loaded) == {name for name, _ in loaded.named_parameters()}


def test_a_config_that_freezes_what_is_not_there_is_refused(tmp_path: Path) -> None:
    TimmModel("test_resnet", 8).save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "config.json"
    config = json.loads(path.read_text())
    for frozen, message in (({"parameters": ["trunk.layer7"]}, "trunk.layer7"), ({"groups": ["stem"]}, "groups")):
        path.write_text(json.dumps({**config, "frozen": frozen}))
        with pytest.raises(ConfigError, match=message):
            TimmModel.from_pretrained(tmp_path / "t")
    with pytest.raises(ConfigError, match="frozen"):
        TimmTowerConfig(architecture="test_resnet", frozen={"parameters": [1]})


def test_a_locked_trunk_runs_without_a_graph_in_every_method() -> None:
    tower = TimmModel("test_vit", 8).train()
    image = torch.randn(2, 3, 160, 160)
    tower.lock()
    assert tower(image).requires_grad
    features = tower.forward_features(image)
    assert not features.requires_grad
    assert tower.forward_head(features).requires_grad
    found = tower.forward_intermediates(image)
    assert found["image_features"].requires_grad
    assert not any(value.requires_grad for value in found["image_intermediates"])
    wanted = image.clone().requires_grad_()
    tower(wanted).sum().backward()
    assert wanted.grad is not None
    tower.unlock(1)
    assert tower.forward_features(image).requires_grad


def test_methods_are_those_of_the_layer_groups() -> None:
    tower = TimmModel("test_vit", 8)
    assert [group.name for group in tower.layer_groups()] == ["stem", *(f"blocks.{n}" for n in range(6)), "head"]
    assert tower.no_weight_decay() == {"trunk.pos_embed", "trunk.cls_token"}
    tower.lock(1)
    names = {group["name"] for group in tower.param_groups(0.1, layer_decay=0.5)}
    assert names == {"blocks.5", "blocks.5, no decay", "head"}
    assert "blocks.5" in tower.summary()

"""Freezing: which parameters train, and that the call alone decides."""

import pytest
import torch
import torch.nn as nn
from timm.models import group_parameters

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TowerError


def trainable(tower: nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def test_lock_freezes_the_trunk_and_leaves_the_head() -> None:
    tower = TimmModel("test_resnet", 8, proj="mlp")
    tower.lock()
    assert trainable(tower) == {name for name, _ in tower.named_parameters() if name.startswith("head.")}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout"])
def test_unlocked_groups_are_the_last_of_timm_s(name: str) -> None:
    tower = TimmModel(name, 8)
    groups = group_parameters(tower.trunk, tower.trunk.group_matcher())
    order = sorted(groups)
    for count in range(len(order) + 1):
        tower.lock(count)
        expected = {f"trunk.{key}" for index in order[len(order) - count :] for key in groups[index]}
        assert {key for key in trainable(tower) if key.startswith("trunk.")} == expected, count
    with pytest.raises(ArgumentError, match=f"{len(order)} layer groups"):
        tower.lock(len(order) + 1)


@pytest.mark.parametrize("count", [-1, True, 1.0, "1", None])
def test_a_number_of_groups_that_is_none_is_refused(count: object) -> None:
    tower = TimmModel("test_resnet", 8)
    before = trainable(tower)
    with pytest.raises(ArgumentError, match="unlocked_groups"):
        tower.lock(count)  # type: ignore[arg-type]
    assert trainable(tower) == before


def test_the_last_call_alone_decides() -> None:
    tower, once = TimmModel("test_vit", 8), TimmModel("test_vit", 8)
    for count in (0, 3, 1):
        tower.lock(count, freeze_bn_stats=count == 3)
    once.lock(1)
    assert trainable(tower) == trainable(once)


def test_a_locked_trunk_gets_no_gradient_and_does_not_move() -> None:
    tower = TimmModel("test_resnet", 8)
    tower.lock(freeze_bn_stats=True)
    before = {key: value.clone() for key, value in tower.trunk.state_dict().items()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        tower.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in tower.trunk.state_dict().items())


def test_a_trunk_without_groups_says_so() -> None:
    tower = TimmModel("test_resnet", 8)
    tower.trunk = nn.Sequential(nn.Conv2d(3, 96, 1))
    with pytest.raises(ConfigError, match="layer groups"):
        tower.lock(1)
    tower.lock(0)
    assert not [key for key in trainable(tower) if key.startswith("trunk.")]


def test_gradient_checkpointing_that_is_not_there_says_so() -> None:
    tower = TimmModel("test_resnet", 8)
    tower.trunk = nn.Conv2d(3, 96, 1)
    with pytest.raises(TowerError, match="checkpointing"):
        tower.set_grad_checkpointing()

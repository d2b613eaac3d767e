"""What was frozen is part of the tower: after any history, through save and load, in the card, in its methods."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_timm_tower import ConfigError, TimmModel, TimmTowerConfig
from hf_timm_tower.reader.freezing import has_frozen_statistics


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


# --- history


def state_of(tower: TimmModel) -> tuple[Any, ...]:
    """All that a lock or unlock may leave behind."""
    held = [name for name, module in tower.named_modules() if has_frozen_statistics(module)]
    modes = [module.training for module in copy.deepcopy(tower).train().modules()]
    return trainable(tower), held, modes, tower.config.frozen


def calls() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """`lock` and `unlock`, with every selector."""
    patterns = st.lists(st.sampled_from(["stem", "layer[23].*", "*.bias", "head", "*bn*"]), min_size=1, max_size=2)
    where: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({}),
        st.fixed_dictionaries({"unlocked_groups": st.integers(0, 5)}),
        st.fixed_dictionaries({"until": st.sampled_from(["stem", "layer3", "layer4.0", "head"])}),
        st.fixed_dictionaries({"only": patterns}),
    )
    also = st.fixed_dictionaries(
        {}, optional={"freeze_bn_stats": st.booleans(), "head": st.booleans(), "except_": patterns}
    )
    return st.tuples(st.sampled_from(["lock", "unlock"]), st.tuples(where, also).map(lambda two: {**two[0], **two[1]}))


HISTORY = st.lists(st.one_of(calls(), st.sampled_from(["train", "eval", "copy", "save", "by hand"])), max_size=6)
AFTERWARDS = st.lists(st.sampled_from(["train", "eval", "copy", "save"]), max_size=3)


def through(tower: TimmModel, step: Any) -> TimmModel:
    if step == "copy":
        return copy.deepcopy(tower)
    if step == "save":
        with tempfile.TemporaryDirectory() as folder:
            tower.save_pretrained(folder)
            return TimmModel.from_pretrained(folder)
    if step == "by hand":
        return tower.requires_grad_(False)
    if isinstance(step, str):
        return getattr(tower, step)()
    getattr(tower, step[0])(**step[1])
    return tower


@settings(max_examples=12, deadline=None)
@given(HISTORY, calls(), AFTERWARDS)
def test_the_last_call_alone_decides_whatever_came_before_and_it_stays(
    history: list[Any], last: tuple[str, dict[str, Any]], afterwards: list[str]
) -> None:
    made = TimmModel("test_resnet", custom_head=OwnHead)
    fresh = through(copy.deepcopy(made), last)
    tower = made
    for step in history:
        tower = through(tower, step)
    tower = through(tower, last)
    assert state_of(tower) == state_of(fresh)
    assert state_of(through(tower, last)) == state_of(fresh), "twice is once"
    for step in afterwards:
        tower = through(tower, step)
    assert state_of(tower) == state_of(fresh)


# --- by hand, by a config, by timm


def test_what_was_frozen_by_hand_comes_back_too(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.requires_grad_(False)
    tower.save_pretrained(tmp_path / "t")
    loaded = TimmModel.from_pretrained(tmp_path / "t")
    assert trainable(loaded) == set()
    loaded.unlock()
    assert trainable(loaded) == {name for name, _ in loaded.named_parameters()}


@pytest.mark.parametrize("locked", [False, True])
def test_what_timm_shuts_nobody_opens_and_what_somebody_shut_everybody_does(tmp_path: Path, locked: bool) -> None:
    """EfficientViM's `weights` mix its classifiers, so that without these they have no gradient; timm shuts them."""
    trunk = timm.create_model("efficientvim_m1", num_classes=0, drop_path_rate=0.0)
    assert {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad} == {"weights"}
    trunk.requires_grad_(not locked)
    tower = TimmModel.from_trunk(trunk, 8)
    tower.unlock()
    everything = {name for name, _ in tower.named_parameters()}
    assert trainable(tower) == everything - {"trunk.weights"}
    tower(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == ["trunk.weights"]
    assert tower.config.frozen is None
    tower.save_pretrained(tmp_path / "t")
    assert trainable(TimmModel.from_pretrained(tmp_path / "t")) == trainable(tower)
    tower.lock()
    assert tower.config.frozen == {"parameters": ["trunk"]}


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


def test_the_card_says_what_is_frozen(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    trunk = sum(parameter.numel() for parameter in tower.trunk.parameters())
    total = trunk + tower.head.proj.weight.numel()
    said = []
    for call in (tower.unlock, lambda: tower.lock(freeze_bn_stats=True), lambda: tower.lock(until="layer1")):
        call()
        tower.save_pretrained(tmp_path / "t")  # over the card of the last time
        lines = (tmp_path / "t" / "README.md").read_text().splitlines()
        said += [line.replace("\\", "") for line in lines if line.startswith("| Frozen |")]
    assert said[0] == "| Frozen | nothing |"
    assert said[1] == (f"| Frozen | {trunk:,} of {total:,} parameters (`parameters: [trunk], statistics: [trunk]`) |")
    assert "trunk.layer1" in said[2]
    assert "statistics" not in said[2]
    assert len(said) == 3


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

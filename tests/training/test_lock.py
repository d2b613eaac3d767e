"""Layer groups, locks by them, statistics that stay, and the state that a config keeps."""

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_timm_tower.reader.errors import ArgumentError, ConfigError
from hf_timm_tower.reader.freezing import check_frozen, keep_statistics, keeps_statistics
from hf_timm_tower.training.freezing import describe_frozen, head_without_lock, restore_frozen
from hf_timm_tower.training.layer_groups import layer_groups, smallest_cover
from hf_timm_tower.training.lock import lock, unlock

from .bare_towers import Tower, everything, moved, statistics, trainable, under


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64)


# --- groups


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("test_vit", ["stem", *(f"blocks.{index}" for index in range(6)), "head"]),
        ("test_resnet", ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "head"]),
        # the trunk's own head is its last norm; it must not be taken for the tower's
        (
            "test_convnext",
            [
                "stem",
                "stages.0.blocks.0",
                *(f"stages.1.blocks.{index}" for index in range(2)),
                *(f"stages.2.blocks.{index}" for index in range(4)),
                *(f"stages.3.blocks.{index}" for index in range(2)),
                "trunk.head",
                "head",
            ],
        ),
        # a class without a group matcher
        (
            "poolformerv2_s12",
            [
                "stem",
                *(f"stages.{stage}.blocks.{index}" for stage in range(4) for index in range((2, 2, 6, 2)[stage])),
                "trunk.head",
                "head",
            ],
        ),
    ],
)
def test_groups_are_named_after_their_blocks_and_hold_each_parameter_once(architecture: str, names: list[str]) -> None:
    with torch.device("meta"):
        tower = Tower(architecture)
    groups = layer_groups(tower)
    assert [group.name for group in groups] == names
    assert sorted(name for group in groups for name in group.parameters) == sorted(everything(tower))


def test_what_a_subclass_adds_is_a_group_of_its_own() -> None:
    tower = Tower("test_resnet", nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8, affine=False)))
    tower.logit_scale = nn.Parameter(torch.zeros(()))
    tower.adapter = nn.Linear(8, 8)
    groups = {group.name: group for group in layer_groups(tower)}
    assert list(groups)[-3:] == ["head", "logit_scale", "adapter"]
    assert groups["logit_scale"].parameters == ("logit_scale",)
    assert groups["head"].statistics == ("head.1",)
    lock(tower)
    assert trainable(tower) == under(everything(tower), "head", "logit_scale", "adapter")


def test_a_trunk_that_is_no_timm_model_has_groups_too() -> None:
    tower = Tower("test_resnet")
    tower.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 96, 1))
    assert [group.name for group in layer_groups(tower)] == ["stem", "2", "head"]
    assert layer_groups(tower)[0].statistics == ("trunk.1",)


def test_the_smallest_cover_stands_for_just_what_was_chosen() -> None:
    names = ["a.x.1", "a.x.2", "a.y", "b.z.1", "b.z.2", "ab.x"]
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            cover = smallest_cover(chosen, names)
            covered = [name for name in names if any(name == entry or name.startswith(f"{entry}.") for entry in cover)]
            assert covered == list(chosen)
    assert smallest_cover(names, names) == ["a", "b", "ab"]


# --- selectors


def test_until_freezes_from_the_input_and_opens_from_the_output() -> None:
    tower = Tower("test_vit")
    lower = under(
        everything(tower), "trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed", "trunk.blocks.0", "trunk.blocks.1"
    )
    lock(tower, until="blocks.1")
    assert trainable(tower) == everything(tower) - lower
    unlock(tower, until="blocks.2")
    assert trainable(tower) == everything(tower) - lower
    lock(tower, until="blocks.1", head=True)
    assert trainable(tower) == everything(tower) - lower - under(everything(tower), "head")
    # a module that lies inside a group stands for its group: the last norm goes with the last block
    lock(tower, until="norm")
    assert trainable(tower) == under(everything(tower), "head")


def test_only_and_except_take_names_of_groups_and_of_parameters() -> None:
    tower = Tower("test_vit")
    lock(tower, only=["blocks.[01]", "head"])
    assert trainable(tower) == everything(tower) - under(everything(tower), "trunk.blocks.0", "trunk.blocks.1", "head")
    lock(tower, except_="*.bias")
    assert trainable(tower) == {n for n in everything(tower) if n.endswith(".bias") or n.startswith("head.")}
    lock(tower, 2, except_=["stem"])
    assert trainable(tower) == under(
        everything(tower), "trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed", "trunk.blocks.4",
        "trunk.blocks.5", "trunk.norm", "head",
    )  # fmt: skip
    unlock(tower, only="trunk.blocks.*.attn.*")
    assert trainable(tower) == {n for n in everything(tower) if ".attn." in n or n.startswith("head.")}
    unlock(tower, 1, head=False)
    assert trainable(tower) == under(everything(tower), "trunk.blocks.5", "trunk.norm")
    unlock(tower)
    assert trainable(tower) == everything(tower)
    assert describe_frozen(tower) is None


CALLS: list[Callable[[Tower], None]] = [
    lambda tower: lock(tower),
    lambda tower: lock(tower, 2, True),
    lambda tower: lock(tower, until="layer2.0", head=True, freeze_bn_stats=True),
    lambda tower: lock(tower, only="*.bias", freeze_bn_stats=True),
    lambda tower: unlock(tower, 1),
    lambda tower: unlock(tower),
]


def test_the_last_call_alone_decides() -> None:
    tower = Tower("test_resnet", nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8)))
    expected = []
    for call in CALLS:
        alone = copy.deepcopy(tower)
        call(alone)
        expected.append((trainable(alone), describe_frozen(alone), [module.training for module in alone.modules()]))
    assert len({str(state) for state in expected}) == len(CALLS)
    for first, second in itertools.product(range(len(CALLS)), repeat=2):
        CALLS[first](tower)
        CALLS[second](tower)
        found = (trainable(tower), describe_frozen(tower), [module.training for module in tower.modules()])
        assert found == expected[second], (first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"until": "block.3"}, r"Near names:.*blocks\.3"),
        ({"only": "blocks.9"}, r"Near names:.*blocks\.\d"),
        ({"except_": ["head", "trunk.block.0*"]}, "trunk.block.0.*matches nothing.*stem"),
        ({"unlocked_groups": 8}, "has 7 layer groups"),
        ({"unlocked_groups": -1}, "whole number"),
        ({"unlocked_groups": 1, "until": "stem"}, "contradict"),
        ({"only": "stem", "until": "stem"}, "contradict"),
    ],
)
@pytest.mark.parametrize("call", [lock, unlock])
def test_a_selector_that_cannot_be_meant_changes_nothing(
    call: Callable[..., None], arguments: dict[str, Any], message: str
) -> None:
    tower = Tower("test_vit")
    lock(tower, 3)
    before = trainable(tower)
    with pytest.raises(ArgumentError, match=message):
        call(tower, **arguments)
    assert trainable(tower) == before


def test_what_a_head_was_made_not_to_train_no_call_opens() -> None:
    head = nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 8))
    head[1].requires_grad_(False)
    tower = Tower("test_resnet", head)
    for call in CALLS:
        call(tower)
        assert not under(trainable(tower), "head.1")
    assert describe_frozen(tower) is None, "it is part of the head, not of what is frozen"
    lock(tower, head=True)
    assert describe_frozen(tower) == {"parameters": ["trunk", "head"]}
    tower.requires_grad_(False)  # by hand, as everybody does it
    unlock(tower)
    assert trainable(tower) == everything(tower) - under(everything(tower), "head.1")


# --- statistics


@pytest.mark.parametrize("through", ["tower", "trunk", "part", "copy", "pickle", "eval_and_back"])
def test_frozen_statistics_stay_and_the_others_move(through: str, image: torch.Tensor) -> None:
    tower = Tower("test_resnet", nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8)))
    keys = list(tower.state_dict())
    modules = [(name, type(module)) for name, module in tower.named_modules()]
    lock(tower, 2, freeze_bn_stats=True)
    if through == "copy":
        tower = copy.deepcopy(tower)
    if through == "pickle":
        tower = pickle.loads(pickle.dumps(tower))
    if through == "eval_and_back":
        tower.eval()
    tower.train()
    if through == "trunk":
        tower.trunk.train()
    if through == "part":
        tower.trunk.layer1[0].bn1.train()
    before = statistics(tower)
    tower(image).sum().backward()
    free = under(set(before), "trunk.layer3", "trunk.layer4", "head")
    assert moved(tower, before) == free
    assert len(free) < len(before)
    assert list(tower.state_dict()) == keys
    assert [(name, type(module)) for name, module in tower.named_modules()] == modules
    unlock(tower)
    assert all(module.training for module in tower.modules())
    tower(image)
    assert moved(tower, before) == set(before)


class Renorm(nn.Module):
    """A norm of somebody's own, with running state under names of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_std", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_std.lerp_(x.detach().std(0), 0.1)
        return x / self.running_std


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(96),
        nn.BatchNorm1d(96, affine=False),
        nn.Sequential(nn.Unflatten(1, (96, 1, 1)), nn.SyncBatchNorm(96), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (12, 8)), nn.InstanceNorm1d(12, track_running_stats=True), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (96, 1, 1)), timm.layers.BatchNormAct2d(96), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (96, 1, 1)), timm.layers.EvoNorm2dB0(96), nn.Flatten()),
        Renorm(96),
        spectral_norm(nn.Linear(96, 96)),
        nn.utils.spectral_norm(nn.Linear(96, 96)),
    ],
    ids=["batch", "no_affine", "sync", "instance", "timm_act", "evo", "own", "spectral", "old_spectral"],
)
def test_every_kind_of_running_state_can_be_frozen(norm: nn.Module, image: torch.Tensor) -> None:
    tower = Tower("test_resnet", nn.Sequential(norm, nn.Linear(96, 8)))
    own = under(set(statistics(tower)), "head")
    tower.train()
    before = statistics(tower)
    tower(image)
    assert own & moved(tower, before), "it moves where nothing is frozen"
    lock(tower, head=True, freeze_bn_stats=True)
    tower.train()
    before = statistics(tower)
    tower(image)
    assert moved(tower, before) == set()


TRUNK_NORMS: dict[str, Any] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNormAct2d": timm.layers.BatchNormAct2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "SyncBatchNormAct": timm.layers.SyncBatchNormAct,
    "SplitBatchNorm2d": partial(timm.layers.SplitBatchNorm2d, num_splits=2),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "EvoNorm2dB0": timm.layers.EvoNorm2dB0,
    "EvoNorm2dB1": timm.layers.EvoNorm2dB1,
    "EvoNorm2dB2": timm.layers.EvoNorm2dB2,
}


@pytest.mark.parametrize("norm", TRUNK_NORMS)
def test_every_kind_of_norm_in_a_trunk_stays_below_the_lock_and_moves_above(norm: str, image: torch.Tensor) -> None:
    tower = Tower("test_resnet", norm_layer=TRUNK_NORMS[norm]).train()
    keys = list(tower.state_dict())
    before = statistics(tower)
    tower(image)
    moving = moved(tower, before)  # not InstanceNorm's number of batches
    assert len({name.rpartition(".")[0] for name in before}) == len({name.rpartition(".")[0] for name in moving})
    lock(tower, 2, freeze_bn_stats=True)
    for again in (tower, copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        again.train()
        again.trunk.train()
        before = statistics(again)
        again(image)
        assert moved(again, before) == under(moving, "trunk.layer3", "trunk.layer4") != set()
        assert list(again.state_dict()) == keys


def test_statistics_of_inplace_abn_count_too() -> None:
    """Its forward needs a package for CUDA, so it does not run here."""
    norm = timm.layers.InplaceAbn(4)
    assert keeps_statistics(norm)
    without = (nn.LayerNorm(4), timm.layers.GroupNorm1(4), nn.BatchNorm1d(4, track_running_stats=False))
    assert not any(map(keeps_statistics, without))


def test_statistics_are_frozen_where_all_parameters_of_their_module_are() -> None:
    tower = Tower("test_resnet")
    lock(tower, only="trunk.bn1.*", freeze_bn_stats=True)
    assert describe_frozen(tower) == {"parameters": ["trunk.bn1"], "statistics": ["trunk.bn1"]}
    lock(tower, only="trunk.bn1.weight", freeze_bn_stats=True)
    assert describe_frozen(tower) == {"parameters": ["trunk.bn1.weight"]}


def test_statistics_stay_frozen_in_a_module_that_took_another_s_place(image: torch.Tensor) -> None:
    tower = Tower("test_resnet")
    lock(tower, freeze_bn_stats=True)
    tower = nn.SyncBatchNorm.convert_sync_batchnorm(tower)
    assert isinstance(tower.trunk.bn1, nn.SyncBatchNorm)
    before = statistics(tower)
    tower.train()
    keep_statistics(tower)  # as both faces do at the end of their own `train`
    tower(image)
    assert moved(tower, before) == set()


# --- state


@pytest.mark.parametrize("call", CALLS)
def test_frozen_state_comes_back_through_json(call: Callable[[Tower], None]) -> None:
    def make() -> Tower:
        return Tower("test_resnet", nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8)))

    tower, again = make(), make()
    call(tower)
    state = json.loads(json.dumps(describe_frozen(tower)))
    restore_frozen(again, state)
    assert trainable(again) == trainable(tower)
    assert [module.training for module in again.modules()] == [module.training for module in tower.modules()]
    assert describe_frozen(again) == state


def test_the_state_of_a_frozen_trunk_is_one_word() -> None:
    tower = Tower("test_resnet")
    lock(tower, freeze_bn_stats=True)
    assert describe_frozen(tower) == {"parameters": ["trunk"], "statistics": ["trunk"]}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"parameters": ["trunk.layer9"]}, r"no trunk\.layer9.*near: trunk\.layer"),
        ({"parameters": ["trunk.lay"]}, "no trunk.lay"),
        ({"statistics": ["head"]}, "no head"),
        ({"statistics": ["trunk.layer1.0.conv1"]}, "no trunk.layer1.0.conv1"),
    ],
)
def test_a_state_of_another_tower_is_refused(state: dict[str, Any], message: str) -> None:
    tower = Tower("test_resnet")
    lock(tower, 1)
    before = trainable(tower)
    with pytest.raises(ConfigError, match=message):
        restore_frozen(tower, state)
    assert trainable(tower) == before


@pytest.mark.parametrize(
    "state",
    [
        {"groups": ["stem"]},
        {"parameters": "trunk"},
        {"parameters": [1]},
        {"statistics": [""]},
        {"parameters": ["a"] * 100_001},
    ],
)
def test_what_is_no_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="frozen"):
        check_frozen(state)


def test_a_lock_is_no_part_of_the_head(image: torch.Tensor) -> None:
    tower = Tower("test_resnet", nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8)))
    lock(tower, head=True, freeze_bn_stats=True)
    tower.train()
    before, modes = describe_frozen(tower), [module.training for module in tower.modules()]
    with head_without_lock(tower) as head:
        assert all(parameter.requires_grad for parameter in head.parameters())
        assert all(module.training and not module._forward_pre_hooks for module in head.modules())
    assert describe_frozen(tower) == before
    assert [module.training for module in tower.modules()] == modes

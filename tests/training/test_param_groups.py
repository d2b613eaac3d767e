"""Locks as open_clip's, parameter groups as timm's, and training that moves what is open and nothing else."""

import copy
from pathlib import Path

import open_clip.timm_model
import pytest
import timm.optim
import torch
import torch.nn as nn
from timm.models import group_parameters

from hf_timm_tower import ArgumentError, TimmModel, TimmTowerConfig, TimmTowerModel, TowerError
from hf_timm_tower.interop.peft import add_lora, lora_config, merge_lora
from hf_timm_tower.reader.skip_init import skip_init
from hf_timm_tower.training.freezing import describe_frozen
from hf_timm_tower.training.layer_groups import layer_groups
from hf_timm_tower.training.lock import lock, unlock
from hf_timm_tower.training.param_groups import no_weight_decay, param_groups, summary_table

# One of each way in which timm cuts its models into groups.
CUTS = (
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "regnetx_002",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "densenet121",
    "xcit_nano_12_p8_224",
    "coat_tiny",
    "efficientvim_m1",
)


def trainable(tower: nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


# --- locks


def test_lock_freezes_the_trunk_and_leaves_the_head() -> None:
    tower = TimmModel("test_resnet", 8, proj="mlp")
    tower.lock()
    assert trainable(tower) == {name for name, _ in tower.named_parameters() if name.startswith("head.")}


@pytest.mark.parametrize("name", CUTS)
def test_unlocked_groups_are_those_of_open_clip(name: str) -> None:
    """The sets are equal for every count that open_clip takes as meant; a greater one opens all there, silently."""
    with skip_init():
        ours = TimmModel(name, 8)
        theirs = open_clip.timm_model.TimmModel(name, 8, pretrained=False)
    count = len(group_parameters(ours.trunk, ours.trunk.group_matcher()))
    opened = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for unlocked in range(count + 1):
        for parameter in opened:  # its lock only ever closes
            parameter.requires_grad_(True)
        theirs.lock(unlocked)
        lock(ours, unlocked)
        assert trainable(ours) == trainable(theirs), unlocked
    with pytest.raises(ArgumentError, match=f"{count} layer groups"):
        lock(ours, count + 1)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_frozen_statistics_are_those_of_open_clip(name: str) -> None:
    """But where every group is open: open_clip takes its empty list for all modules, and freezes behind open layers."""
    with skip_init():
        ours = TimmModel(name, 8)
    count = sum(group.part == "trunk" for group in layer_groups(ours))
    for unlocked in range(count + 1):
        with skip_init():
            theirs = open_clip.timm_model.TimmModel(name, 8, pretrained=False)
        theirs.lock(unlocked, freeze_bn_stats=True)
        frozen = {key for key, module in theirs.named_modules() if type(module).__name__.startswith("FrozenBatchNorm")}
        lock(ours, unlocked, freeze_bn_stats=True)
        expected = frozen if unlocked < count else set()
        assert {key for key, module in ours.named_modules() if module._forward_pre_hooks} == expected, unlocked


@pytest.mark.parametrize("count", [-1, True, 1.0, "1", None])
def test_a_number_of_groups_that_is_none_is_refused(count: object) -> None:
    tower = TimmModel("test_resnet", 8)
    before = trainable(tower)
    with pytest.raises(ArgumentError, match="unlocked_groups"):
        tower.lock(count)  # type: ignore[arg-type]
    assert trainable(tower) == before


def test_the_trunk_s_own_classifier_belongs_to_its_last_group() -> None:
    tower = TimmModel("test_vit", 8, pool="token", proj=None)
    lock(tower, 1)
    assert trainable(tower) == {"trunk.head.weight", "trunk.head.bias"}


def test_the_last_call_alone_decides() -> None:
    tower, once = TimmModel("test_vit", 8), TimmModel("test_vit", 8)
    for count in (0, 3, 1):
        tower.lock(count, freeze_bn_stats=count == 3)
    once.lock(1)
    assert trainable(tower) == trainable(once)


def test_gradient_checkpointing_that_is_not_there_says_so() -> None:
    tower = TimmModel("test_resnet", 8)
    tower.trunk = nn.Conv2d(3, 96, 1)
    with pytest.raises(TowerError, match="checkpointing"):
        tower.set_grad_checkpointing()


# --- training


def optimizers(groups: list[dict[str, object]]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(groups, momentum=0.9, nesterov=True), torch.optim.AdamW(groups)]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("unlocked", [0, 2])
@pytest.mark.parametrize("kind", [0, 1], ids=["sgd", "adamw"])
@pytest.mark.parametrize("groups", ["ours", "all"])
def test_three_steps_move_what_is_open_and_nothing_else(name: str, unlocked: int, kind: int, groups: str) -> None:
    tower = TimmModel(name, custom_head=lambda width, _: _head(width))
    with torch.no_grad():  # what starts at zero would get no gradient through it, and no decay
        for parameter in tower.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    lock(tower, unlocked, freeze_bn_stats=True)
    tower.train()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    everything = [{"params": list(tower.parameters()), "lr": 0.05, "weight_decay": 0.1}]
    made = optimizers(param_groups(tower, 0.05, 0.1, layer_decay=0.7) if groups == "ours" else everything)[kind]
    size = 160 if "vit" in name else 64
    for _ in range(3):
        made.zero_grad()
        tower(torch.randn(8, 3, size, size)).square().sum().backward()
        made.step()
    after = tower.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    open_parameters = trainable(tower)
    open_modules = {key.rpartition(".")[0] for key in open_parameters}
    open_buffers = {key for key, _ in tower.named_buffers() if key.rpartition(".")[0] in open_modules}
    assert moved == open_parameters | (open_buffers & set(before))
    assert any("running_mean" in key for key in moved), "the head's at least"


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))


def test_frozen_statistics_stay_in_transformers_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = TimmModel("test_resnet", 2)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.tower(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Model()
    lock(model.tower, 1, freeze_bn_stats=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [{"pixel_values": torch.randn(3, 64, 64), "labels": index % 2} for index in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], save_strategy="no",
        eval_strategy="epoch", use_cpu=True, disable_tqdm=True, learning_rate=0.01, weight_decay=0.1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith(("tower.head.", "tower.trunk.layer4."))}


def test_adapters_of_peft_train_in_a_locked_tower() -> None:
    from peft import LoraConfig, get_peft_model

    tower = TimmModel("test_vit", 8)
    lock(tower)
    adapted = get_peft_model(tower, LoraConfig(target_modules=r".*attn\.qkv", r=2, init_lora_weights=False))
    open_names = trainable(adapted)
    assert open_names
    assert all("lora_" in name for name in open_names)
    adapted(torch.randn(2, 3, 160, 160)).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    groups = layer_groups(tower)
    assert [group.name for group in groups] == ["stem", *(f"blocks.{index}" for index in range(6)), "head"]
    assert all("lora" in " ".join(group.parameters) for group in groups[1:7])


def locked(face: str, architecture: str) -> nn.Module:
    """Two groups open, statistics of the rest frozen, in train mode."""
    config = TimmTowerConfig(architecture=architecture, embed_dim=8, image_size=64)
    tower = TimmModel.from_config(config) if face == "TimmModel" else TimmTowerModel(config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    lock(tower, 2, freeze_bn_stats=True)
    return tower.train()


def three_steps(model: nn.Module, images: torch.Tensor) -> None:
    """Of an optimizer that has every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(images)
        (output if isinstance(output, torch.Tensor) else output.pooler_output).square().mean().backward()
        optimizer.step()


def closed(tower: nn.Module) -> dict[str, torch.Tensor]:
    """What a lock by two groups leaves as it is: parameters, and statistics of their modules."""
    groups = [group for group in layer_groups(tower) if group.part == "trunk"][:-2]
    names = {name for group in groups for name in group.parameters}
    names |= {f"{name}.{key}" for group in groups for name in group.statistics
              for key, _ in tower.get_submodule(name).named_buffers()}  # fmt: skip
    return {name: value.clone() for name, value in tower.state_dict().items() if name in names}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


PAIRS = [("test_resnet", "TimmModel"), ("test_vit", "transformers")]


@pytest.mark.parametrize(
    ("architecture", "face", "backend"),
    [
        *((*pair, "aot_eager") for pair in PAIRS),
        pytest.param(*PAIRS[0], "inductor", marks=[pytest.mark.slow, pytest.mark.turn(0)]),
    ],
)
def test_a_partly_locked_tower_trains_compiled_as_it_does_uncompiled(
    architecture: str, face: str, backend: str
) -> None:
    torch.compiler.reset()
    images = torch.randn(4, 3, 64, 64)
    tower = locked(face, architecture)
    twin = copy.deepcopy(tower)
    before, started = closed(twin), copy.deepcopy(twin.state_dict())
    three_steps(tower, images)
    three_steps(torch.compile(twin, backend=backend, fullgraph=True), images)
    assert before
    assert same(closed(tower), before)
    assert same(closed(twin), before)
    for (name, ours), theirs in zip(tower.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), name
        assert torch.equal(theirs, started[name]) == (name in before), name


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("architecture", "face"), PAIRS)
def test_lora_trains_in_a_partly_locked_tower_and_nothing_else_does(
    architecture: str, face: str, compiled: bool
) -> None:
    torch.compiler.reset()
    images = torch.randn(4, 3, 64, 64)
    tower = locked(face, architecture)
    opened, whole = trainable(tower), copy.deepcopy(tower.state_dict())
    tower.config.frozen = describe_frozen(tower)
    model = add_lora(tower, lora_config(tower, 2, init_lora_weights=False)).train()
    before = copy.deepcopy(model.state_dict())
    three_steps(torch.compile(model, backend="aot_eager") if compiled else model, images)
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == trainable(model)
    assert moved == {name for name in after if "lora_" in name or "modules_to_save" in name}
    merged = merge_lora(model)
    assert trainable(merged) == opened, "what is locked is what was"
    statistics = {name for name in whole if "running" in name or "num_batches" in name}
    assert all(torch.equal(merged.state_dict()[name], whole[name]) for name in statistics)
    assert merged.state_dict().keys() == whole.keys()


# --- parameter groups


def per_parameter(
    model: nn.Module, groups: list[dict[str, object]], factor: str
) -> dict[str, tuple[object, float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (float(group.get(factor, 1.0)), float(group["weight_decay"]))  # type: ignore[misc]
        for group in groups
        for parameter in group["params"]  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("unlocked", [None, 3])
def test_layer_decay_is_timm_s(name: str, unlocked: int | None) -> None:
    """On the same parameters: a trunk with its classifier, and no further head."""
    tower = nn.Module()
    with skip_init():
        tower.trunk, tower.head = timm.create_model(name, num_classes=8), nn.Identity()
    unlock(tower, unlocked)
    trunk = tower.trunk
    undecayed = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_layer_decay(
        trunk, weight_decay=0.1, no_weight_decay_list=undecayed, layer_decay=0.6, min_scale=0.01
    )
    ours = param_groups(tower, 0.2, 0.1, layer_decay=0.6, min_scale=0.01)
    assert per_parameter(trunk, ours, "scale") == per_parameter(trunk, theirs, "lr_scale")
    assert all(group["lr"] == pytest.approx(0.2 * group["scale"]) for group in ours)


@pytest.mark.parametrize("name", CUTS)
def test_weight_decay_alone_is_timm_s(name: str) -> None:
    with skip_init():
        tower = TimmModel(name, 8)
    lock(tower, 4)
    theirs = timm.optim.param_groups_weight_decay(tower, 0.1, no_weight_decay_list=no_weight_decay(tower))
    ours = param_groups(tower, 0.2, 0.1)
    assert per_parameter(tower, ours, "scale") == per_parameter(tower, theirs, "lr_scale")
    assert {group["lr"] for group in ours} == {0.2}
    assert len(ours) == 2


def test_the_head_has_the_full_rate_and_each_group_before_it_less() -> None:
    tower = TimmModel("test_vit", 8)
    groups = param_groups(tower, 1.0, layer_decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups if "no decay" not in group["name"]}
    assert rates == {"head": 1.0, "stem": 0.5**7, **{f"blocks.{index}": 0.5 ** (6 - index) for index in range(6)}}
    torch.optim.AdamW(groups)


def test_norms_biases_and_what_is_named_do_not_decay() -> None:
    head = nn.Sequential(nn.Unflatten(1, (8, 12)), nn.LayerNorm((8, 12)), nn.Flatten(), nn.Linear(96, 8))
    tower = TimmModel("test_resnet", custom_head=head)
    decays = {name for name, (_, decay) in per_parameter(tower, param_groups(tower, 1.0), "scale").items() if decay}
    assert "head.3.weight" in decays
    assert not decays & {"head.1.weight", "head.1.bias", "head.3.bias", "trunk.bn1.weight"}
    named = per_parameter(tower, param_groups(tower, 1.0, no_decay=["head.*"]), "scale")
    assert not any(decay for name, (_, decay) in named.items() if name.startswith("head."))
    assert no_weight_decay(TimmModel("test_vit", 8)) == {"trunk.pos_embed", "trunk.cls_token"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": 1.0, "weight_decay": "0.1"}, "weight_decay"),
        ({"lr": 1.0, "layer_decay": 1.5}, "layer_decay=1.5"),
        ({"lr": 1.0, "no_decay": ["nothing*"]}, "nothing"),
    ],
)
def test_numbers_and_patterns_that_cannot_be_meant_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        param_groups(TimmModel("test_resnet", 8), **arguments)  # type: ignore[arg-type]


def test_nothing_to_train_says_so() -> None:
    tower = TimmModel("test_resnet", 8)
    lock(tower, head=True)
    with pytest.raises(ArgumentError, match="everything is frozen"):
        param_groups(tower, 1.0)


# --- table


def test_the_table_has_a_row_for_each_group_with_its_counts() -> None:
    tower = TimmModel("test_resnet", 8)
    lock(tower, 1, freeze_bn_stats=True)
    lines = [line.split() for line in summary_table(tower).splitlines()]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "head", "total"]
    for group in layer_groups(tower):
        size = sum(tower.get_parameter(name).numel() for name in group.parameters)
        shown = f"{size:,}"
        assert shown in rows[group.name]
        assert rows[group.name].count(shown) == (2 if group.name in ("layer4.0", "head") else 1)
    assert rows["head"] == ["head", "768", "768"]
    assert rows["total"][0] == f"{sum(p.numel() for p in tower.parameters()):,}"
    assert "3 of 3 frozen" in " ".join(rows["stem"])
    assert "statistics" not in summary_table(TimmModel("test_vit", 8))

"""Every timm model class: its layer groups in the order in which they run, every lock by their number, and training."""

import re
from collections import Counter
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import group_parameters

from hf_timm_tower import ConfigError, TimmModel
from hf_timm_tower.reader.freezing import has_frozen_statistics
from hf_timm_tower.reader.skip_init import skip_init
from hf_timm_tower.reader.trunk import eval_mode
from hf_timm_tower.training.freezing import note_fixed
from hf_timm_tower.training.layer_groups import LayerGroup, layer_groups
from hf_timm_tower.training.lock import lock, unlock

from ..timm_classes import smallest_of_each_class

# With and without a matcher; maps, tokens, pyramids; parameters of the model itself; layers that are used twice.
QUICK = ("test_resnet", "test_vit", "test_mambaout", "pit_ti_224", "efficientvim_m1", "levit_128s")

# Their last group has the norms of all stages, of which the first runs long before the last block; what they give is
# summed up at the end. timm's lr decay and open_clip's lock count it last, and so do we.
BY_LAST_RUN = ("efficientvim.EfficientViM", "efficientvim.EfficientViMDistilled")

# Classes without a matcher: where one of their blocks begins in a parameter's name, and modules after the last block
# that are no mere norm.
BLOCKS = {
    "pit.PoolingVisionTransformer": (r"trunk\.transformers\.\d+\.blocks\.\d+\.", ()),
    "csatv2.CSATv2": (r"trunk\.stages\.\d+\.\d+\.(?=\w+\.)", ("trunk.head",)),
    "metaformer.MetaFormer": (r"trunk\.stages\.\d+\.blocks\.\d+\.", ("trunk.head",)),
    "mobilenetv5.MobileNetV5Encoder": (r"trunk\.blocks\.\d+\.\d+\.", ("trunk.msfa",)),
}

# The first image size that the class takes is used; None is its native one.
SIZES = (64, 96, 112, 128, 160, 192, 224, None)

# These take only their native size (CrossViT because two patch sizes must divide it), and trying others takes long.
ONE_SIZE = ("crossvit.CrossVit", "efficientformer.EfficientFormer")

# What is too large or too slow for one core in full is trained with fewer layers, or narrower.
SMALLER: dict[str, dict[str, object]] = {
    "deepseek_vit.DeepseekVitClassifier": {"depth": 4, "embed_dim": 256},
    "deepseek_vit.DeepseekVitEncoder": {"depth": 4, "embed_dim": 256},
    "gemma4_vit.Gemma4VitClassifier": {"depth": 4},
    "gemma4_vit.Gemma4VitEncoder": {"depth": 4},
    "mobilenetv5.MobileNetV5Encoder": {"channel_multiplier": 0.25},
    "vgg.VGG": {"mlp_ratio": 0.125},
}


def build(architecture: str, image_size: int | None = None, **model_kwargs: object) -> TimmModel:
    """A tower without values, with the first pool that the trunk has."""
    for pool in ("avg", "default", "none"):
        try:
            with skip_init():
                return TimmModel(architecture, 8, image_size, pool=pool, model_kwargs=model_kwargs)
        except ConfigError as error:
            refused = error
    raise refused


def check_partition(tower: TimmModel, groups: list[LayerGroup]) -> None:
    frozen_statistics = Counter(name for group in groups for name in group.parameters)
    assert frozen_statistics == Counter(name for name, _ in tower.named_parameters())
    assert len({group.name for group in groups}) == len(groups)
    assert len(groups) >= 4, "a model of several blocks"
    statistics = Counter(name for group in groups for name in group.statistics)
    assert statistics == Counter(
        name for name, module in tower.named_modules() if getattr(module, "running_mean", None) is not None
    )
    by_parameter = {key: group.name for group in groups for key in group.parameters}
    for group in groups:
        for name in group.statistics:
            own = {by_parameter[f"{name}.{key}"] for key, _ in tower.get_submodule(name).named_parameters()}
            assert own <= {group.name}, "statistics are in the group of their own parameters"


def trunk_cut(tower: TimmModel, name: str) -> list[list[str]]:
    """The trunk's groups, not by our code: timm's own, or where it has none, cut by the names of the blocks."""
    trunk = tower.trunk
    assert hasattr(trunk, "group_matcher") == (name not in BLOCKS)
    if name not in BLOCKS:
        found = group_parameters(trunk, trunk.group_matcher())
        return [[f"trunk.{key}" for key in found[index]] for index in sorted(found)]
    block, after = BLOCKS[name]
    cut: list[list[str]] = [[]]
    current, between = None, []
    for key in [key for key, _ in tower.named_parameters() if key.startswith("trunk.")]:
        begins = re.match(block, key)
        if begins is None:
            between.append(key)
        elif begins[0] == current and not between:
            cut[-1].append(key)
        elif current is None:  # the first block: what was before it is the stem
            cut, between, current = [between, [key]], [], begins[0]
        else:  # what lies between two blocks feeds the second
            cut.append([*between, key])
            between, current = [], begins[0]
    ends = [key for key in between if key.startswith(after)] if after else []
    cut[-1] += [key for key in between if key not in ends]
    return [*cut, ends] if ends else cut


def shut_by_timm(architecture: str) -> set[str]:
    """What does not train in the bare trunk, which has no classifier that needs it."""
    with skip_init(), torch.device("meta"):
        trunk = timm.create_model(architecture, num_classes=0)
    return {f"trunk.{name}" for name, parameter in trunk.named_parameters() if not parameter.requires_grad}


def check_locks(tower: TimmModel, cut: list[list[str]], shut: set[str]) -> None:
    names = [name for name, _ in tower.named_parameters()]
    for count in range(len(cut) + 1):
        lock(tower, count)
        expected = {name for group in cut[len(cut) - count :] for name in group}
        expected |= {name for name in names if name.startswith("head.")}
        trains = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
        assert trains == expected - shut, count
    tower.trunk.requires_grad_(False)
    note_fixed(tower)  # as for a trunk that somebody brings frozen
    unlock(tower)
    assert {name for name, parameter in tower.named_parameters() if not parameter.requires_grad} == shut


def check_run(tower: TimmModel, groups: list[LayerGroup], by_last_run: bool) -> None:
    """On the meta device: groups in the order of their first run; frozen ones in eval mode, and without a graph."""
    trunk = [group for group in groups if group.part == "trunk"]
    index_of = {name: index for index, group in enumerate(trunk) for name in group.parameters}
    lock(tower, len(trunk) // 2, freeze_bn_stats=True)
    frozen_statistics = {name for name, module in tower.named_modules() if has_frozen_statistics(module)}
    assert frozen_statistics == {name for group in trunk[: len(trunk) - len(trunk) // 2] for name in group.statistics}
    tower.trunk.train()  # behind the tower's back
    runs: list[tuple[str, bool]] = []
    in_graph: dict[str, bool] = {}

    def before(module: nn.Module, inputs: object, name: str) -> None:
        runs.append((name, module.training))

    def after(module: nn.Module, inputs: object, output: object, name: str) -> None:
        # by the first run: one that is used again later may then follow what trains
        in_graph.setdefault(name, isinstance(output, torch.Tensor) and output.requires_grad)

    for name, module in tower.named_modules():
        if name.startswith("trunk."):  # the model's own parameters may be used anywhere
            module.register_forward_pre_hook(partial(before, name=name))
            module.register_forward_hook(partial(after, name=name))
    tower.trunk.to("meta")(torch.empty(2, tower.config.in_chans, *tower.config.image_size, device="meta"))
    frozen = {name.rpartition(".")[0] for name, p in tower.trunk.named_parameters("trunk") if not p.requires_grad}
    assert not [name for name in frozen if in_graph.get(name) and _is_frozen(tower, name)]
    with_statistics = {name for group in groups for name in group.statistics}
    assert {name for name, training in runs if name in with_statistics and not training} <= frozen_statistics
    assert not [name for name, training in runs if name in frozen_statistics and training]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, (name, _) in enumerate(runs):
        for key, _ in tower.get_submodule(name).named_parameters(recurse=False):
            if f"{name}.{key}" in index_of:
                first.setdefault(index_of[f"{name}.{key}"], step)
                last[index_of[f"{name}.{key}"]] = step
    order = sorted(first)
    assert by_last_run != ([first[index] for index in order] == sorted(first.values())), "an exception that is none"
    steps = [(last if by_last_run else first)[index] for index in order]
    assert steps == sorted(steps), [trunk[index].name for index in order]
    unused = [trunk[index].name for index in range(len(trunk)) if index not in first]
    assert all(_only_own(tower.trunk, trunk[index]) for index in range(len(trunk)) if index not in first), unused


def _is_frozen(tower: TimmModel, name: str) -> bool:
    return not any(parameter.requires_grad for parameter in tower.get_submodule(name).parameters())


def _only_own(trunk: nn.Module, group: LayerGroup) -> bool:
    return all(name.count(".") == 1 for name in group.parameters)


def at_smallest_size(name: str, architecture: str, **model_kwargs: object) -> TimmModel:
    for size in (None,) if name in ONE_SIZE else SIZES:
        try:
            return build(architecture, size, **model_kwargs)
        except ConfigError as error:
            refused = error
    raise refused


@torch.no_grad()
def give_values(tower: nn.Module) -> None:
    """Values of which none is zero, so that gradients come everywhere, and outputs stay finite."""
    for key, parameter in tower.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, (parameter[0].numel() or 1) ** -0.5)
        else:
            parameter.normal_(1 if key.endswith("weight") else 0, 0.1)


def snapshot(tower: nn.Module) -> dict[str, torch.Tensor]:
    """All numbers, buffers that are not saved too."""
    return {key: value.detach().clone() for key, value in (*tower.named_parameters(), *tower.named_buffers())}


def images(tower: TimmModel) -> torch.Tensor:
    return torch.randn(4, tower.config.in_chans, *tower.config.image_size)


def train(tower: TimmModel, steps: int = 3) -> None:
    """Three steps with weight decay and momentum, of an optimizer that has every parameter, frozen or not."""
    optimizer = torch.optim.SGD(tower.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = tower(images(tower)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        assert torch.isfinite(loss)
        assert torch.isfinite(norm)
        optimizer.step()


def check_training(name: str, architecture: str) -> list[int]:
    """Half of the groups frozen, statistics too: these keep their bits, all else moves."""
    tower = at_smallest_size(name, architecture, **SMALLER.get(name, {}))
    give_values(tower)
    trunk = [group for group in layer_groups(tower) if group.part == "trunk"]
    closed = trunk[: len(trunk) - len(trunk) // 2]
    lock(tower, len(trunk) // 2, freeze_bn_stats=True)
    tower.train()
    tower.trunk.train()  # behind the tower's back
    with torch.no_grad(), eval_mode(tower):
        tower(images(tower))  # tables that are made at the first call
    before = snapshot(tower)
    train(tower)
    frozen = {key for group in closed for key in group.parameters}
    still = {key for group in closed for name in group.statistics for key in _own_buffers(tower, name)}
    moves = {key for group in trunk if group not in closed for name in group.statistics
             for key in _own_buffers(tower, name)}  # fmt: skip
    moved = {key for key, value in snapshot(tower).items() if not torch.equal(value, before[key])}
    expected = {key for key, _ in tower.named_parameters()} - frozen - shut_by_timm(architecture) | moves
    assert moved == expected, (sorted(moved - expected)[:9], sorted(expected - moved)[:9])
    assert not still & moves, "statistics belong to one group"
    return list(tower.config.image_size)


def _own_buffers(tower: nn.Module, name: str) -> list[str]:
    return [f"{name}.{key}" for key, _ in tower.get_submodule(name).named_buffers(recurse=False)]


def check_class(name: str, architecture: str) -> int:
    tower = at_smallest_size(name, architecture)
    groups = layer_groups(tower)
    check_partition(tower, groups)
    check_locks(tower, trunk_cut(tower, name), shut_by_timm(architecture))
    check_run(tower, groups, name in BY_LAST_RUN)
    return len(groups)


def name_of(architecture: str) -> str:
    return next(key for key, value in smallest_of_each_class().items() if value == architecture)


@pytest.mark.parametrize("architecture", QUICK)
def test_groups_are_a_partition_in_the_order_in_which_they_run(architecture: str) -> None:
    check_class(name_of(architecture), architecture)


@pytest.mark.parametrize("architecture", QUICK)
def test_training_moves_what_is_open_and_nothing_else(architecture: str) -> None:
    check_training(name_of(architecture), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(smallest_of_each_class()))
def test_every_timm_class_has_groups_that_lock_as_counted(name: str) -> None:
    print(f"{name}: {check_class(name, smallest_of_each_class()[name])} groups")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(smallest_of_each_class()))
def test_every_timm_class_trains_what_is_open_and_nothing_else(name: str) -> None:
    print(f"{name}: {check_training(name, smallest_of_each_class()[name])}")

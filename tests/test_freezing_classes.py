"""Every timm model class: its layer groups, in the order in which they run, and every lock by their number."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn as nn
from timm.models import group_parameters

from hf_timm_tower import ConfigError, TimmModel
from hf_timm_tower.core.frozen_statistics import is_held
from hf_timm_tower.core.layer_groups import LayerGroup, layer_groups
from hf_timm_tower.core.locking import lock
from hf_timm_tower.core.no_init import no_init

from .timm_classes import smallest_of_each_class

# With and without a matcher; maps, tokens, pyramids; parameters of the model itself; layers that are used twice.
QUICK = ("test_resnet", "test_vit", "test_mambaout", "pit_ti_224", "efficientvim_m1", "levit_128s")

# Their last group has the norms of all stages, of which the first runs long before the last block; what they give is
# summed up at the end. timm's lr decay and open_clip's lock count it last, and so do we.
BY_LAST_RUN = ("efficientvim.EfficientViM", "efficientvim.EfficientViMDistilled")


def build(architecture: str) -> TimmModel:
    """A tower without values, with the first pool that the trunk has."""
    for pool in ("avg", "default", "none"):
        try:
            with no_init():
                return TimmModel(architecture, 8, pool=pool)
        except ConfigError as error:
            refused = error
    raise refused


def check_partition(tower: TimmModel, groups: list[LayerGroup]) -> None:
    held = Counter(name for group in groups for name in group.parameters)
    assert held == Counter(name for name, _ in tower.named_parameters())
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


def check_locks(tower: TimmModel, groups: list[LayerGroup]) -> None:
    names = [name for name, _ in tower.named_parameters()]
    trunk = tower.trunk
    if hasattr(trunk, "group_matcher"):
        found = group_parameters(trunk, trunk.group_matcher())
        cut = [[f"trunk.{name}" for name in found[index]] for index in sorted(found)]
    else:
        cut = [list(group.parameters) for group in groups if group.part == "trunk"]
    for count in range(len(cut) + 1):
        lock(tower, count)
        expected = {name for group in cut[len(cut) - count :] for name in group}
        expected |= {name for name in names if name.startswith("head.")}
        assert {name for name, parameter in tower.named_parameters() if parameter.requires_grad} == expected, count


def check_run(tower: TimmModel, groups: list[LayerGroup], by_last_run: bool) -> None:
    """On the meta device: groups in the order of their first run; frozen ones in eval mode, and without a graph."""
    trunk = [group for group in groups if group.part == "trunk"]
    index_of = {name: index for index, group in enumerate(trunk) for name in group.parameters}
    lock(tower, len(trunk) // 2, freeze_bn_stats=True)
    held = {name for name, module in tower.named_modules() if is_held(module)}
    assert held == {name for group in trunk[: len(trunk) - len(trunk) // 2] for name in group.statistics}
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
    keepers = {name for group in groups for name in group.statistics}
    assert {name for name, training in runs if name in keepers and not training} <= held
    assert not [name for name, training in runs if name in held and training]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, (name, _) in enumerate(runs):
        for key, _ in tower.get_submodule(name).named_parameters(recurse=False):
            if f"{name}.{key}" in index_of:
                first.setdefault(index_of[f"{name}.{key}"], step)
                last[index_of[f"{name}.{key}"]] = step
    order = sorted(first)
    steps = [(last if by_last_run else first)[index] for index in order]
    assert steps == sorted(steps), [trunk[index].name for index in order]
    unused = [trunk[index].name for index in range(len(trunk)) if index not in first]
    assert all(_only_own(tower.trunk, trunk[index]) for index in range(len(trunk)) if index not in first), unused


def _is_frozen(tower: TimmModel, name: str) -> bool:
    return not any(parameter.requires_grad for parameter in tower.get_submodule(name).parameters())


def _only_own(trunk: nn.Module, group: LayerGroup) -> bool:
    return all(name.count(".") == 1 for name in group.parameters)


def check_class(name: str, architecture: str) -> int:
    tower = build(architecture)
    groups = layer_groups(tower)
    check_partition(tower, groups)
    check_locks(tower, groups)
    check_run(tower, groups, name in BY_LAST_RUN)
    return len(groups)


@pytest.mark.parametrize("architecture", QUICK)
def test_groups_are_a_partition_in_the_order_in_which_they_run(architecture: str) -> None:
    name = next(key for key, value in smallest_of_each_class().items() if value == architecture)
    check_class(name, architecture)


@pytest.mark.wide
@pytest.mark.parametrize("name", list(smallest_of_each_class()))
def test_every_timm_class_has_groups_that_lock_as_counted(name: str) -> None:
    print(f"{name}: {check_class(name, smallest_of_each_class()[name])} groups")

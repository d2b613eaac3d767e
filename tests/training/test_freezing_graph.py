"""What is frozen costs no graph and no activations: on bare modules, in both faces, checkpointed, compiled."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_timm_tower import TimmModel, TimmTowerConfig, TimmTowerModel
from hf_timm_tower.training.freezing import frozen_context
from hf_timm_tower.training.layer_groups import layer_groups
from hf_timm_tower.training.lock import lock, unlock

from .bare_towers import Tower, moved, statistics, trainable, under


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64)


# --- what autograd keeps


def saved_bytes(tower: nn.Module, image: torch.Tensor) -> int:
    """Bytes that a forward in train mode keeps for backward, parameters and input left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*tower.parameters(), *tower.buffers(), image)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower(image)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_frozen_trunk_keeps_nothing_and_gives_the_same(architecture: str) -> None:
    tower = Tower(architecture)
    image = torch.randn(4, 3, 160, 160)
    tower.eval()
    expected = tower(image)
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.head.named_parameters()}
    for parameter in tower.parameters():
        parameter.grad = None
    lock(tower)
    with torch.no_grad():
        features = tower.trunk(image)
    assert saved_bytes(tower, image) <= features.untyped_storage().nbytes()
    output = tower(image)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in tower.head.named_parameters())
    assert all(parameter.grad is None for parameter in tower.trunk.parameters())


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_partly_frozen_trunk_keeps_nothing_below_its_first_open_group(architecture: str) -> None:
    tower = Tower(architecture).train()
    image = torch.randn(4, 3, 160, 160)
    trunk = [group for group in layer_groups(tower) if group.part == "trunk"]
    kept = []
    in_graph: list[bool] = []
    for count in range(len(trunk) + 1):
        lock(tower, count)
        handles = [
            tower.get_submodule(name.rpartition(".")[0]).register_forward_hook(
                lambda module, inputs, output: in_graph.append(output.requires_grad)
            )
            for group in trunk[: len(trunk) - count]
            for name in group.parameters
            if name.count(".") > 1
        ]
        kept.append(saved_bytes(tower, image))
        for handle in handles:
            handle.remove()
    assert in_graph, "layers ran"
    assert not any(in_graph), "no layer of a frozen group is in the graph"
    assert kept == sorted(kept)
    assert kept[0] * 10 < kept[-1]


# --- what stays in memory


FACES: dict[str, Any] = {
    "TimmModel": lambda name: TimmModel(name, 8, image_size=64),
    "transformers": lambda name: TimmTowerModel(TimmTowerConfig(architecture=name, embed_dim=8, image_size=64)),
}


def kept_of_frozen(model: nn.Module, count: int | None, image: torch.Tensor) -> int:
    """How many different memories that frozen layers wrote into are still there when the embedding is.

    Asked of the memory itself, since `saved_tensors_hooks` sees nothing of what checkpointing holds.
    """
    groups = [group for group in layer_groups(model) if group.part == "trunk"]
    if count is None:
        unlock(model)
    else:
        lock(model, count, freeze_bn_stats=True)
        groups = groups[: len(groups) - count]
    names = {name.rpartition(".")[0] for group in groups for name in group.parameters} - {"trunk"}
    layers = {model.get_submodule(name) for name in names}
    written: list[StorageWeakRef] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in layers:
            written.append(StorageWeakRef(output.untyped_storage()))

    # for all modules: a hook of a layer's own might bring in what trains, and the trunk would build a graph
    handle = nn.modules.module.register_module_forward_hook(note)
    output = model(image)
    embedding = output.pooler_output if hasattr(output, "pooler_output") else output
    del output
    handle.remove()
    assert embedding.requires_grad
    assert len(written) >= len(names) // 2, "they ran"
    return len({reference.cdata for reference in written if not reference.expired()})


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_of_frozen_layers_only_the_input_of_what_is_open_stays(
    face: str, checkpointing: bool, architecture: str, image: torch.Tensor
) -> None:
    model = FACES[face](architecture).train()
    trunk = sum(group.part == "trunk" for group in layer_groups(model))
    everything = kept_of_frozen(model, None, image)
    if checkpointing:
        model.trunk.set_grad_checkpointing()
        assert kept_of_frozen(model, None, image) < everything
    else:
        assert everything >= trunk, "the measure sees activations where they are kept"
    for count in range(trunk):
        assert kept_of_frozen(model, count, image) <= 1, count


# --- what must not be cut off


def test_a_frozen_trunk_runs_with_gradients_off_and_an_open_one_with_them_on(image: torch.Tensor) -> None:
    tower = Tower("test_resnet")
    modes: list[bool] = []
    forward = type(tower.trunk).forward_features
    type(tower.trunk).forward_features = lambda self, x: modes.append(torch.is_grad_enabled()) or forward(self, x)
    try:
        for call in (lock, unlock, lambda tower: lock(tower, 1)):
            call(tower)
            assert tower(image).requires_grad
    finally:
        type(tower.trunk).forward_features = forward
    assert modes == [False, True, True]


def test_a_frozen_trunk_still_carries_gradients_that_somebody_needs(image: torch.Tensor) -> None:
    tower = Tower("test_vit", img_size=64)
    lock(tower)
    wanted = image.clone().requires_grad_()
    tower(wanted).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
    # a prompt that a hook adds, held outside the trunk
    tower.prompt = nn.Parameter(torch.zeros(1, 1, 64))
    handle = tower.trunk.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + tower.prompt,))
    tower(image).sum().backward()
    assert tower.prompt.grad is not None
    handle.remove()
    # an adapter inside it
    tower.trunk.blocks[2].mlp.adapter = nn.Linear(1, 1)
    assert tower.trunk.blocks[2].mlp.adapter.weight.requires_grad
    with frozen_context(tower.trunk, image):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("count", [0, 2])
def test_gradient_checkpointing_gives_the_same_gradients_on_a_locked_tower(count: int, image: torch.Tensor) -> None:
    tower = Tower("test_vit", img_size=64).train()
    lock(tower, count)
    tower(image).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in tower.named_parameters()}
    for parameter in tower.parameters():
        parameter.grad = None
    tower.trunk.set_grad_checkpointing()
    tower(image).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None) == (name not in trainable(tower))
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("count", [0, 1])
def test_a_locked_tower_compiles_whole(count: int, image: torch.Tensor) -> None:
    tower = Tower("test_resnet").train()
    lock(tower, count, freeze_bn_stats=True)
    tower.train()
    other = copy.deepcopy(tower)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    before = statistics(other)
    for model in (tower, compiled):
        model(image).square().sum().backward()
    assert moved(tower, before) == moved(other, before) == (under(set(before), "trunk.layer4") if count else set())
    for (name, ours), (_, theirs) in zip(tower.named_parameters(), other.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (name not in trainable(tower))
        if ours.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5), name

"""Construction without initialisation: parameters untouched, buffers and random states real."""

import pytest
import timm
import torch
import torch.nn as nn

from hf_timm_tower.reader.errors import ConfigError
from hf_timm_tower.reader.skip_init import skip_init


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_maxvit", "test_vit4", "test_vit_relpos"])
def test_buffers_and_shapes_are_those_of_an_ordinary_construction(name: str) -> None:
    plain = timm.create_model(name)
    with skip_init():
        bare = timm.create_model(name)
    ours, theirs = dict(bare.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {k: v.shape for k, v in bare.named_parameters()} == {k: v.shape for k, v in plain.named_parameters()}
    assert [p.requires_grad for p in bare.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_parameters_are_left_alone_inside_and_initialised_again_outside() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    with skip_init():
        nn.init.ones_(layer.weight)
        nn.init.normal_(tensor=layer.weight)
        buffer = torch.zeros(3).fill_(2.0)
    assert torch.equal(layer.weight, before)
    assert buffer.tolist() == [2.0, 2.0, 2.0]
    nn.init.ones_(layer.weight)
    assert layer.weight.sum() == 16


def test_the_random_state_is_as_before_also_after_an_error() -> None:
    before = torch.get_rng_state()
    with skip_init():
        timm.create_model("test_resnet")
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), skip_init():  # noqa: PT012
        torch.rand(3)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    assert layer.weight.abs().sum() == 0, "the mode ends with the error"


def test_a_budget_refuses_before_memory_is_taken() -> None:
    with pytest.raises(ConfigError, match="GiB"), skip_init(budget=2**20):
        nn.Linear(2**24, 2**20)
    with skip_init(budget=2**20):
        nn.Linear(16, 16)
    with pytest.raises(ConfigError, match="GiB"), skip_init(budget=2**20):  # noqa: PT012
        for _ in range(10**5):
            nn.Linear(1, 1)

"""Construction without initialisation: parameters untouched, buffers and random states real."""

import functools
import threading
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn as nn

from hf_timm_tower import TimmModel, TimmTowerConfig, TimmTowerModel
from hf_timm_tower.reader import skip_init as skip_init_module
from hf_timm_tower.reader.errors import ConfigError
from hf_timm_tower.reader.skip_init import Budget, skip_init, within_budget


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


def test_torch_s_random_generator_is_not_used_and_an_error_ends_the_mode() -> None:
    before = torch.get_rng_state()
    with skip_init():
        timm.create_model("test_resnet")
        drawn = [torch.rand(3), torch.rand_like(torch.ones(3)), torch.zeros(3).normal_(), torch.randperm(4).float()]
        drawn.append(nn.init.trunc_normal_(torch.zeros(3)))
        drawn.append(nn.init.normal_(torch.zeros(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(len(set(each.tolist())) > 1 for each in drawn)
    with pytest.raises(ZeroDivisionError), skip_init():  # noqa: PT012
        torch.rand(3)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    assert layer.weight.abs().sum() == 0, "the mode ends with the error"


def test_another_thread_draws_what_it_would_have_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(100)
    torch.manual_seed(0)
    found = []
    for number in range(100):
        with skip_init():
            nn.Linear(3, 3), torch.rand(number)
            thread = threading.Thread(target=lambda: found.append(torch.rand(1)))
            thread.start()
            thread.join()
    torch.manual_seed(0)
    assert torch.equal(torch.cat(found), torch.cat([torch.rand(1) for _ in range(100)]))
    assert expected.shape == (100,)


def test_data_and_views_of_parameters_are_left_alone_too_and_buffers_are_not() -> None:
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    before = layer.weight.detach().clone()
    with skip_init():
        layer.weight.data.zero_()
        layer.weight[:2].data.zero_()
        nn.init.zeros_(layer.weight[1])
        norm.running_mean.data.fill_(3.0)
    assert torch.equal(layer.weight, before)
    assert norm.running_mean.tolist() == [3.0] * 4


def chain() -> nn.Sequential:
    layers = nn.Sequential()
    for _ in range(10**6):
        layers.append(nn.Identity())
    return layers


COSTS: dict[str, Callable[[], object]] = {
    "one layer of 64 TiB": lambda: nn.Linear(2**24, 2**20),
    "many small layers": lambda: [nn.Linear(1, 1) for _ in range(10**6)],
    "modules without tensors": chain,
    "copies of a layer": lambda: nn.Transformer(8, 1, num_encoder_layers=10**6),
    "copies of a large layer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 1), 1000),
    "ones": lambda: torch.ones(2**30, 2),
    "an outer product": lambda: torch.outer(torch.ones(2**17), torch.ones(2**17)),
    "a broadcast": lambda: torch.arange(2**17)[:, None] - torch.arange(2**17)[None],
    "a Kronecker product": lambda: torch.kron(torch.ones(2**9, 2**9), torch.ones(2**9, 2**9)),
    "repeats": lambda: torch.ones(2**10).repeat(2**20),
    "a grid": lambda: torch.meshgrid(*[torch.arange(2**6)] * 6, indexing="ij")[0].contiguous(),
    "doubling": lambda: functools.reduce(lambda x, _: torch.cat([x, x]), range(40), torch.ones(2)),
    "work that leaves nothing": lambda: [torch.ones(2**22) * 2 for _ in range(10**6)],
    "a table": lambda: torch.eye(2**17),
    "random numbers": lambda: torch.randn(2**30),
    "a sequence": lambda: torch.arange(2**33),
}


@pytest.mark.parametrize("cost", COSTS)
def test_what_costs_without_bound_is_refused_without_a_known_size_of_weights(cost: str) -> None:
    with pytest.raises(ConfigError, match="asks for a model of more than"), skip_init(Budget.default()):
        COSTS[cost]()


def test_a_known_size_of_weights_tightens_the_budget() -> None:
    def build() -> None:
        for _ in range(3):
            nn.Linear(2**14, 2**13)  # 512 MiB, never written

    with skip_init(Budget.default()):
        build()
    with skip_init(Budget.for_weights(2**29)):
        build()
    with pytest.raises(ConfigError, match="weight files do not hold"), skip_init(Budget.for_weights(2**20)):
        build()


def test_a_budget_holds_inside_another_one_and_where_weights_are_initialised() -> None:
    with pytest.raises(ConfigError), within_budget(Budget.default()):
        [nn.Linear(1, 1) for _ in range(10**6)]
    layer = nn.Linear(4, 4)
    with within_budget(Budget.default()):
        nn.init.ones_(layer.weight)
    assert layer.weight.sum() == 16
    with pytest.raises(ConfigError), skip_init(Budget(1000)), within_budget(Budget.default()):
        torch.empty(1001)


@pytest.mark.parametrize("name", ["swinv2_tiny_window16_256", "maxvit_tiny_tf_224", "beit_base_patch16_224"])
def test_honest_architectures_stay_far_below_the_limits(name: str) -> None:
    budget = Budget.default()
    with skip_init(budget):
        timm.create_model(name)
    assert all(budget.spent[kind] * 3 < limit for kind, limit in budget.limits.items())


def test_where_weights_are_initialised_the_seed_is_the_users() -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with within_budget(Budget.default()):
            made.append(nn.Linear(4, 3).weight.detach().clone())
    torch.manual_seed(1)
    assert torch.equal(made[0], nn.Linear(4, 3).weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_is_initialised_fits_into_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_init_module, "_MEMORY", 2**20)
    with pytest.raises(ConfigError, match=r"asks for a model of more than 0\.00 GiB"), within_budget(Budget.default()):
        nn.Linear(2**10, 2**10)
    with skip_init(Budget.default()):
        nn.Linear(2**10, 2**10)
    with torch.device("meta"), within_budget(Budget.default()):
        nn.Linear(2**10, 2**10)


@pytest.mark.parametrize("make", [TimmModel.from_config, TimmTowerModel], ids=["timm", "face"])
def test_a_config_alone_costs_no_more_than_one_with_weights(make: Callable[[TimmTowerConfig], nn.Module]) -> None:
    config = TimmTowerConfig(architecture="vit_tiny_patch16_224", model_args={"depth": 2000, "embed_dim": 12})
    with pytest.raises(ConfigError, match="asks for a model of more than"):
        make(config)

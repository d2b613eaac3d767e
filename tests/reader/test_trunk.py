"""Trunks: what they give is measured, not believed, and how they were made is read back."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from hf_timm_tower import ArgumentError, ConfigError, TimmTowerConfig
from hf_timm_tower.reader.trunk import create_trunk, eval_mode
from hf_timm_tower.trunk_facts import offered_pools, trunk_arguments, trunk_output


def config(name: str, **arguments: Any) -> TimmTowerConfig:
    return TimmTowerConfig(architecture=name, embed_dim=8, **arguments)


@pytest.mark.parametrize(
    ("name", "pool", "layout"),
    [("test_resnet", "avg", "NC"), ("test_resnet", "none", "NCHW"), ("test_vit", "none", "NLC"),
     ("test_mambaout", "none", "NHWC"), ("test_mambaout", "avg", "NC"), ("test_convnext", "none", "NCHW"),
     ("mobilenetv3_small_050", "avg", "NC")],
)  # fmt: skip
def test_output_is_what_a_real_run_gives(name: str, pool: str, layout: str) -> None:
    trunk = create_trunk(config(name, pool=pool)).eval()
    size = list(trunk.pretrained_cfg["input_size"][1:])
    said = trunk_output(trunk, 3, size)
    with torch.no_grad():
        real = trunk(torch.zeros(2, 3, *size))
    order = {
        "NC": (said.width,),
        "NLC": (*said.size, said.width),
        "NCHW": (said.width, *said.size),
        "NHWC": (*said.size, said.width),
    }
    assert said.layout == layout
    assert tuple(real.shape[1:]) == order[layout]


def test_looking_at_the_output_changes_nothing() -> None:
    trunk = create_trunk(config("test_resnet")).train()
    state = {key: value.clone() for key, value in trunk.state_dict().items()}
    before = torch.get_rng_state()
    trunk_output(trunk, 3, [160, 160])
    assert trunk.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[key], value) for key, value in trunk.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_offered_pool_builds_and_no_other(name: str) -> None:
    offered = offered_pools(config(name))
    assert {"avg", "default", "none"} <= set(offered)
    for pool in ("avg", "token", "map", "catavgmax", "token_avg", "prr"):
        fits = True
        try:
            trunk = create_trunk(config(name, pool=pool))
            fits = trunk_output(trunk, 3, [160, 160]).layout == ("NLC" if pool == "token_avg" else "NC")
        except ConfigError:
            fits = False
        assert fits == (pool in offered) or pool == "token_avg"


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {"drop_path_rate": 0.2, "act_layer": nn.SiLU, "num_classes": 5}),
        ("test_vit", {"reg_tokens": 4, "depth": 2, "global_pool": "token", "in_chans": 1}),
        ("test_vit", {"img_size": 96, "drop_path_rate": 0.1, "patch_drop_rate": 0.5}),
        ("test_convnext", {"drop_path_rate": 0.3}),
    ],
    ids=str,
)
def test_a_model_is_described_so_that_it_is_made_again(name: str, kwargs: dict[str, Any]) -> None:
    model = timm.create_model(name, **kwargs)
    described = trunk_arguments(model)
    made = create_trunk(
        TimmTowerConfig(
            **described, pool="default", proj=None, embed_dim=kwargs.get("num_classes", 1000), classifier="reset"
        )
    )
    again = timm.create_model(name, **kwargs)
    assert trunk_arguments(again) == described
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert repr(made) == repr(model), "drop rates and activations too"


def test_a_model_that_timm_did_not_make_is_refused() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential()):
        with pytest.raises(ConfigError, match="create_model"):
            trunk_arguments(model)


def test_an_argument_that_the_model_does_not_take_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"model_kwargs\['reg_tokens'\].*test_resnet"):
        create_trunk(config("test_resnet", model_args={"reg_tokens": 4}))
    with pytest.raises(ConfigError, match="head"):
        create_trunk(config("test_vit", model_args={"num_heads": 7}))


def test_eval_mode_gives_every_module_its_own_mode_back_also_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    module[1].eval()
    with pytest.raises(ZeroDivisionError), eval_mode(module):  # noqa: PT012
        assert not any(part.training for part in module.modules())
        _ = 1 / 0
    assert [part.training for part in module.modules()] == [True, True, False, True]


def test_building_leaves_the_config_as_it_was() -> None:
    given = config("test_vit", image_size=96, model_args={"act_layer": nn.SiLU})
    before = copy.deepcopy(given.to_dict())
    create_trunk(given)
    assert given.to_dict() == before

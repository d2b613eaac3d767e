"""Completing a config by what the trunk is, and arranging features for the head."""

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import ConfigError, HeadError, TimmModel, TimmTowerConfig
from hf_timm_tower.build import check_embedding, example_input, resolve_config
from hf_timm_tower.reader.tower import HeadInput
from hf_timm_tower.reader.trunk import create_trunk


def test_token_avg_leaves_prefix_tokens_out_of_the_mean() -> None:
    tokens = torch.arange(24.0).view(1, 6, 4)
    given = HeadInput(prefix=2)(tokens)  # a class token, one register, four patches
    assert torch.equal(given, torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1))


def test_a_map_is_handed_on_channels_first_and_contiguous() -> None:
    given = HeadInput(to_nchw=True)(torch.arange(24.0).view(1, 2, 3, 4))
    assert given.shape == (1, 4, 2, 3)
    assert given.is_contiguous()
    assert given[0, 1, 1, 2] == 21


@pytest.mark.parametrize(
    ("name", "pool", "width", "feat_size"),
    [("test_resnet", "avg", 96, None), ("test_vit", "token_avg", 128, None), ("test_mambaout", "avg", 256, None),
     ("test_convnext", "none", 64, [5, 5])],
)  # fmt: skip
def test_a_config_is_completed_by_what_the_trunk_is(
    name: str, pool: str, width: int, feat_size: list[int] | None
) -> None:
    given = TimmTowerConfig(architecture=name, pool=pool, embed_dim=8)
    before = given.to_dict()
    done, _ = resolve_config(given, create_trunk(given, initialise=False))
    assert given.to_dict() == before
    assert (done.num_features, done.feat_size, done.image_size) == (width, feat_size, [160, 160])
    assert resolve_config(done, create_trunk(done, initialise=False))[0].to_dict() == done.to_dict(), (
        "completing is done once"
    )


def test_the_example_has_the_sizes_that_the_head_will_meet() -> None:
    config = TimmTowerConfig(architecture="test_mambaout", pool="none", proj="none", head={"form": "live"})
    trunk = create_trunk(config)
    done, _ = resolve_config(config, trunk)
    with torch.no_grad():
        real = HeadInput.of(done, trunk)(trunk.eval()(torch.zeros(2, 3, 160, 160)))
    example = example_input(done, trunk)
    assert example.shape == real.shape
    assert torch.equal(example_input(done, trunk), example)


def test_the_width_that_a_head_gives_is_the_embedding_s() -> None:
    config = TimmTowerConfig(architecture="test_resnet", proj="none", head={"form": "live"})
    done, _ = resolve_config(config, create_trunk(config, initialise=False))
    for shape in ((2, 96), (2, 7, 96)):
        assert check_embedding(done, nn.Linear(96, 5), torch.randn(shape)) == 5
    assert check_embedding(done, nn.Conv2d(96, 5, 1), torch.randn(2, 96, 4, 4)) == 5
    done.embed_dim = 6
    with pytest.raises(HeadError, match=r"embed_dim=6.*width 5"):
        check_embedding(done, nn.Linear(96, 5), torch.randn(2, 96))
    with pytest.raises(HeadError, match="fails"):
        check_embedding(done, nn.Linear(95, 5), torch.randn(2, 96))


def test_no_projection_and_another_embed_dim_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="embed_dim=8"):
        TimmModel("test_resnet", 8, proj="none")
    assert TimmModel("test_resnet", proj="none").config.embed_dim == 96

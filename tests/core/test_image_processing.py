"""The transform is timm's own, to the pixel, from the config alone."""

from typing import Any

import pytest
import timm
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform, resolve_model_data_config

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TimmTowerConfig
from hf_timm_tower.core.image_processing import check_preprocess, make_transform
from hf_timm_tower.core.tower import complete
from hf_timm_tower.core.trunk import create_trunk

# each with another interpolation, crop, size or normalisation
ARCHITECTURES = (
    "test_resnet", "test_vit", "resnet18.tv_in1k", "resnet18.a1_in1k", "mobilenetv3_small_050.lamb_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "efficientnet_b0.ra_in1k", "tf_efficientnet_b0.ap_in1k",
    "vit_small_patch14_dinov2.lvd142m", "levit_128s.fb_dist_in1k", "edgenext_xx_small.in1k", "convnext_atto.d2_in1k",
)  # fmt: skip


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """A landscape and a portrait in colour, and one smaller than the crop."""
    astronaut, coffee = Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())
    return [coffee, astronaut.crop((100, 0, 311, 400)), astronaut.resize((61, 47))]


def without_weights(architecture: str, **arguments: Any) -> tuple[TimmTowerConfig, torch.nn.Module]:
    config = TimmTowerConfig(architecture=architecture, proj="none", **arguments)
    trunk = create_trunk(config, initialise=False)
    return complete(config, trunk)[0], trunk


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transform_is_timm_s_own(architecture: str, photographs: list[Image.Image]) -> None:
    config, _ = without_weights(architecture)
    reference = create_transform(**resolve_model_data_config(timm.create_model(architecture)))
    for made in (make_transform(config), make_transform(TimmTowerConfig.from_dict(config.to_dict()))):
        assert str(made) == str(reference)
        for photograph in photographs:
            assert torch.equal(made(photograph), reference(photograph))


def test_transform_follows_the_input_size(photographs: list[Image.Image]) -> None:
    tower = TimmModel("test_vit", 8)
    tower.set_input_size((96, 128))
    reference = create_transform(
        **{**resolve_model_data_config(timm.create_model("test_vit")), "input_size": (3, 96, 128)}
    )
    for photograph in photographs:
        assert torch.equal(tower.transform()(photograph), reference(photograph))


def test_what_the_config_decides_cannot_be_given_and_augmentation_can(photographs: list[Image.Image]) -> None:
    tower = TimmModel("test_resnet", 8)
    for name, value in (("input_size", 96), ("mean", 0.5), ("interpolation", "bicubic")):
        with pytest.raises(ArgumentError, match=name):
            tower.transform(**{name: value})
    with pytest.raises(ArgumentError, match="hflipp"):
        tower.transform(is_training=True, hflipp=0.5)
    assert tower.transform(is_training=True, hflip=1.0, color_jitter=None)(photographs[0]).shape == (3, 160, 160)


def test_transform_of_a_config_that_is_not_completed_is_refused() -> None:
    with pytest.raises(ConfigError, match="build a tower"):
        make_transform(TimmTowerConfig())


@pytest.mark.parametrize(
    ("entry", "value"),
    [("padding", 128), ("channel_order", "BGR"), ("value_range", [-1.0, 1.0]), ("value_range", [0.0, 255.0])],
    ids=str,
)
def test_entry_of_the_preprocess_block_is_applied_or_refused(
    entry: str, value: Any, photographs: list[Image.Image]
) -> None:
    config, _ = without_weights("test_resnet")
    assert config.preprocess is not None
    plain = make_transform(config)(photographs[1])
    config.preprocess[entry] = value
    try:
        check_preprocess(config.preprocess, 3)
        changed = make_transform(config)(photographs[1])
    except ConfigError:
        return
    assert not torch.equal(changed, plain), f"preprocess.{entry}={value} is taken and ignored"

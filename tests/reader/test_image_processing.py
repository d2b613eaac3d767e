"""The transform is timm's own, to the pixel, from the config alone."""

from typing import Any

import pytest
import timm
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms_factory import transforms_imagenet_eval

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TimmTowerConfig
from hf_timm_tower.build import resolve_config
from hf_timm_tower.reader.image_processing import check_preprocess
from hf_timm_tower.reader.trunk import create_trunk
from hf_timm_tower.training.transform import make_transform
from hf_timm_tower.trunk_facts import preprocess_from_timm

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
    return resolve_config(config, trunk)[0], trunk


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


def described(**entries: Any) -> TimmTowerConfig:
    """A config with a preprocess block, of the size 64 x 64, that is not timm's in these entries."""
    config = TimmTowerConfig(architecture="test_resnet", image_size=64)
    block = preprocess_from_timm({"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3), "crop_pct": 0.9}, 3)
    config.preprocess = {**block, **entries}
    check_preprocess(config.preprocess, 3)
    return config


def pad_as_taggers_do(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


CROPS = ("center", "squash", "border")


@pytest.mark.parametrize("crop_mode", CROPS)
def test_padding_is_that_of_hand_written_code(crop_mode: str, photographs: list[Image.Image]) -> None:
    made = make_transform(described(padding={"mode": "square", "color": [255, 250, 7]}, crop_mode=crop_mode))
    reference = make_transform(described(crop_mode=crop_mode))
    for photograph in photographs:
        assert torch.equal(made(photograph), reference(pad_as_taggers_do(photograph, (255, 250, 7))))
        assert not torch.equal(made(photograph), reference(photograph))


def test_tagger_with_square_white_padding_and_bgr(photographs: list[Image.Image]) -> None:
    """The preprocessing of the wd-v3 taggers, as their users write it around timm's transform."""
    entries = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    padding = {"mode": "square", "color": [255, 255, 255]}
    made = make_transform(described(**entries, padding=padding, channel_order="BGR"))
    timms = create_transform(
        (3, 64, 64), interpolation="bicubic", crop_pct=1.0, crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for photograph in photographs:
        by_hand = timms(pad_as_taggers_do(photograph, (255, 255, 255))).unsqueeze(0)[:, [2, 1, 0]]
        assert torch.equal(made(photograph), by_hand[0])


@pytest.mark.parametrize("crop_mode", CROPS)
def test_pixels_from_0_to_255_and_means_of_each_color(crop_mode: str, photographs: list[Image.Image]) -> None:
    """Caffe's preprocessing: no division by 255, means in pixels, blue first."""
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    entries = {"value_range": [0.0, 255.0], "channel_order": "BGR", "crop_mode": crop_mode, "crop_pct": 1.0}
    made = make_transform(described(mean=mean, std=std, **entries))
    as_timm_has_it = {"mean": (0.485, 0.456, 0.406), "crop_pct": 1.0, "crop_mode": crop_mode}
    resized = transforms_imagenet_eval((64, 64), interpolation="bicubic", normalize=False, **as_timm_has_it)
    for photograph in photographs:
        pixels = resized(photograph).float()
        by_hand = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.equal(made(photograph), by_hand[[2, 1, 0]])


def test_any_value_range_is_applied_before_mean_and_std(photographs: list[Image.Image]) -> None:
    made = make_transform(described(value_range=[-1.0, 1.0], mean=[0.0] * 3, std=[1.0] * 3))
    reference = make_transform(described(mean=[0.0] * 3, std=[1.0] * 3))
    for photograph in photographs:
        assert torch.equal(made(photograph), reference(photograph) * 2 - 1)


def test_training_transform_has_the_same_steps_or_is_refused(photographs: list[Image.Image]) -> None:
    config = described(padding={"mode": "square", "color": [9] * 3}, channel_order="BGR", value_range=[0.0, 255.0])
    still = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None}
    plain = described(mean=[0.0] * 3, std=[1.0] * 3)
    made = make_transform(config, is_training=True, **still)(photographs[0])
    pixels = make_transform(plain, is_training=True, **still)(pad_as_taggers_do(photographs[0], (9, 9, 9))) * 255
    mean, std = (torch.tensor(config.preprocess[key])[:, None, None] for key in ("mean", "std"))  # type: ignore[index]
    assert torch.equal(made, ((pixels - mean) / std)[[2, 1, 0]])
    for lost in ({"separate": True}, {"normalize": False}, {"use_prefetcher": True}):
        with pytest.raises(ArgumentError, match="value_range"):
            make_transform(config, is_training=True, **lost)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("padding", 128),
        ("padding", {"mode": "square"}),
        ("padding", {"mode": "round", "color": [0, 0, 0]}),
        ("padding", {"mode": "square", "color": [0, 0]}),
        ("padding", {"mode": "square", "color": [0, 0, 256]}),
        ("padding", {"mode": "square", "color": [0, 0, 0.5]}),
        ("channel_order", "RBG"),
        ("channel_order", ["BGR"]),
        ("value_range", [1.0, 0.0]),
        ("value_range", [0.0, float("inf")]),
        ("value_range", 255),
        ("interpolation", "random"),
        ("value_range", [0.0, 1e-300]),
        ("value_range", [-1e308, 1e308]),
        ("mean", [10**400, 0, 0]),
        ("mean", [float("nan"), 0, 0]),
        ("std", [1e-300, 1.0, 1.0]),
        ("std", [0.0, 1.0, 1.0]),
        ("crop_pct", 10**400),
        ("crop_mode", {"center": 1}),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, int) else "int",
)
def test_entry_that_cannot_be_applied_is_refused(entry: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"preprocess\.{entry}="):
        described(**{entry: value})


def test_reversed_channels_need_colors() -> None:
    block = {**preprocess_from_timm({"crop_pct": 1.0}, 1), "channel_order": "BGR"}
    with pytest.raises(ConfigError, match="in_chans=1"):
        check_preprocess(block, 1)


def test_image_of_other_channels_than_the_padding_is_refused(photographs: list[Image.Image]) -> None:
    made = make_transform(described(padding={"mode": "square", "color": [0] * 3}))
    with pytest.raises(ArgumentError, match="convert"):
        made(photographs[0].convert("RGBA"))


@pytest.mark.parametrize(
    ("size", "entries"),
    [
        ([16384, 16384], {"crop_pct": 0.05}),
        ([16384, 16384], {"crop_pct": 1.0}),
        ([4096, 4096], {"crop_pct": 0.05, "crop_mode": "squash"}),
        ([512, 16384], {"crop_pct": 0.1, "crop_mode": "border"}),
        ([1, 1], {"crop_pct": 2.0}),
    ],
    ids=str,
)
def test_block_that_asks_for_too_many_pixels_or_none_is_refused(size: list[int], entries: dict[str, Any]) -> None:
    config = described(**entries)
    config.image_size = size
    for is_training in (False, True):
        with pytest.raises(ConfigError, match=r"image_size=.* crop_pct="):
            make_transform(config, is_training)


@pytest.mark.parametrize(
    ("image", "entries", "reason"),
    [
        ((1, 40_000), {"padding": {"mode": "square", "color": [0] * 3}}, "padded"),
        ((4_000_000, 1), {"crop_mode": "center"}, "too unequal"),
        ((1, 4_000_000), {"crop_mode": "border"}, "0"),
        ((0, 5), {}, "empty"),
    ],
    ids=str,
)
def test_image_that_becomes_too_large_or_nothing_is_refused(
    image: tuple[int, int], entries: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        make_transform(described(**entries))(Image.new("RGB", image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "YCbCr", "I;16", "F"])
def test_image_of_another_mode_is_refused_by_name(mode: str) -> None:
    for is_training in (False, True):
        with pytest.raises(ArgumentError, match=rf"mode {mode}.*convert\('RGB'\)"):
            make_transform(described(), is_training)(Image.new(mode, (70, 70)))


def test_border_of_a_mean_that_is_no_color(photographs: list[Image.Image]) -> None:
    made = make_transform(described(crop_mode="border", mean=[2.0, -1.0, 0.5]))
    assert made(photographs[0]).isfinite().all()

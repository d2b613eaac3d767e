"""The image processor gives timm's pixels, to transformers' ways of asking, and travels as transformers' files do."""

import ast
import base64
import copy
import functools
import itertools
import json
import pickle
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from PIL import Image, ImageOps
from skimage import data
from timm.data import create_transform, resolve_data_config

from hf_timm_tower import ArgumentError, ConfigError, TimmTowerConfig
from hf_timm_tower.files.same_save import check_processor, processor_dict
from hf_timm_tower.reader.image_processing import READER_MODULE, STANDARD_KEYS
from hf_timm_tower.reader.image_processor import TimmTowerImageProcessor
from hf_timm_tower.training.transform import make_transform
from hf_timm_tower.trunk_facts import preprocess_from_timm

READER = Path(__file__).resolve().parents[2] / "hf_timm_tower" / "reader"
# transformers, too, takes torchvision to have it for tensors from this version on
LANCZOS = ("lanczos",) if Version(torchvision.__version__) >= Version("0.27") else ()
SQUARE = {"mode": "square", "color": [255, 250, 7]}
EVERYTHING = {"padding": SQUARE, "channel_order": "BGR", "value_range": [0.0, 255.0]}


def described(size: int | tuple[int, int] = 64, in_chans: int = 3, **entries: Any) -> TimmTowerConfig:
    """A completed config as far as preprocessing goes."""
    timms = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3), "crop_pct": 0.9}
    block = {**preprocess_from_timm(timms, in_chans), **entries}
    return TimmTowerConfig(architecture="test_resnet", image_size=size, in_chans=in_chans, preprocess=block)


def processor(*args: Any, **entries: Any) -> TimmTowerImageProcessor:
    return TimmTowerImageProcessor.from_tower_config(described(*args, **entries))


def pixels(made_by: TimmTowerImageProcessor, images: Any, **kwargs: Any) -> torch.Tensor:
    made = made_by(images, return_tensors="pt", **kwargs)
    assert list(made) == ["pixel_values"]
    assert made.pixel_values.dtype == torch.float32
    return made.pixel_values


@pytest.fixture(scope="module")
def colors() -> list[Image.Image]:
    """Landscape, portrait, square, smaller than the crop, and of the size resized to."""
    coffee, astronaut = Image.fromarray(data.coffee()), Image.fromarray(data.astronaut())
    return [
        coffee,
        astronaut.crop((100, 0, 311, 400)),
        astronaut.crop((150, 0, 300, 150)),
        astronaut.resize((31, 17)),
        coffee.resize((71, 71)),
    ]


@pytest.fixture(scope="module")
def of_every_mode() -> dict[str, Image.Image]:
    color = Image.fromarray(data.astronaut()).crop((120, 20, 260, 120))
    ramp = Image.linear_gradient("L").resize(color.size)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE, colors=60)
    clear = palette.copy()
    clear.info["transparency"] = 3
    sixteen = np.asarray(color.convert("L")).astype(np.uint16)
    modes = {mode: color.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "YCbCr", "HSV", "RGBX")}
    return {
        **modes,
        "RGBA": Image.merge("RGBA", (*color.split(), ramp)),
        "LA": Image.merge("LA", (color.convert("L"), ramp)),
        "P": palette,
        "P with transparency": clear,
        "PA": Image.merge("RGBA", (*color.split(), ramp)).convert("PA"),
        "I": Image.fromarray(sixteen.astype(np.int32)),
        "I;16": Image.fromarray(sixteen),
        "F": Image.fromarray(sixteen.astype(np.float32)),
    }


# each with another interpolation, crop, size or normalisation
@pytest.mark.parametrize(
    "architecture",
    ["resnet18.tv_in1k", "mobilenetv3_small_050.lamb_in1k", "vit_small_patch14_dinov2.lvd142m", "test_vit.r160_in1k",
     "convnext_atto.d2_in1k", "tf_efficientnet_b0.ap_in1k", "vit_base_patch16_siglip_224.webli"],
)  # fmt: skip
def test_pixels_are_timm_s_for_pretrained_models(architecture: str, colors: list[Image.Image]) -> None:
    cfg = timm.get_pretrained_cfg(architecture).to_dict()
    config = TimmTowerConfig(
        architecture=architecture, image_size=list(cfg["input_size"][1:]), preprocess=preprocess_from_timm(cfg, 3)
    )
    reference = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    made = pixels(TimmTowerImageProcessor.from_tower_config(config), colors)
    assert torch.equal(made, torch.stack([reference(image) for image in colors]))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_are_timm_s_for_every_interpolation(
    size: tuple[int, int], crop_mode: str, colors: list[Image.Image]
) -> None:
    mean_and_std = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    for interpolation, crop_pct in itertools.product(
        ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"), (0.875, 1.0)
    ):
        steps = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
        reference = create_transform((3, *size), **steps, **mean_and_std)
        made = pixels(processor(size, **steps), colors)
        assert torch.equal(made, torch.stack([reference(image) for image in colors])), steps


@pytest.mark.parametrize("entries", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("in_chans", "mode"), [(3, "RGB"), (1, "L")])
def test_pixels_of_every_image_mode_are_those_of_pil_s_convert(
    in_chans: int, mode: str, entries: dict[str, Any], of_every_mode: dict[str, Image.Image]
) -> None:
    if in_chans == 1:
        entries = {**entries, "channel_order": "RGB", "padding": {"mode": "square", "color": [200]}}
    ours, reference = processor(64, in_chans, **entries), make_transform(described(64, in_chans, **entries))
    for name, image in of_every_mode.items():
        assert torch.equal(pixels(ours, image)[0], reference(image.convert(mode))), name


DEEP = {
    "16-bit PNG": (np.uint16, "scan.png"),
    "16-bit TIFF": (np.uint16, "scan.tif"),
    "32-bit TIFF": (np.int32, "scan.tif"),
    "float TIFF": (np.float32, "scan.tif"),
}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
def test_deeper_image_has_one_meaning_and_one_warning_for_every_way_in(
    kind: str, in_chans: int, tmp_path: Path
) -> None:
    dtype, name = DEEP[kind]
    values = np.linspace(0, 65535, 90 * 120).reshape(90, 120).astype(dtype)
    Image.fromarray(values).save(tmp_path / name)
    data_url = "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()
    ways: list[Any] = [tmp_path / name, str(tmp_path / name), data_url, Image.open(tmp_path / name)]
    if dtype != np.float32:  # floating point arrays are in [0, 1]
        ways += [values, values[:, :, None], values.astype(values.dtype.newbyteorder(">"))]
    reference = make_transform(described(in_chans=in_chans))
    expected = reference(Image.open(tmp_path / name).convert({1: "L", 3: "RGB"}[in_chans]))
    for given in ways:
        with pytest.warns(UserWarning, match="clips"):
            made = pixels(processor(in_chans=in_chans), given)
        assert torch.equal(made[0], expected), type(given)
    with pytest.raises(ArgumentError, match="scaling it to 8 bits"):
        reference(Image.open(tmp_path / name))


def test_deeper_image_by_url(tmp_path: Path) -> None:
    Image.fromarray(np.full((90, 120), 999, np.uint16)).save(tmp_path / "scan.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.warns(UserWarning, match="clips"):
            processor()(f"http://127.0.0.1:{server.server_port}/scan.png")
        with pytest.raises(ArgumentError, match="404"):
            processor()(f"http://127.0.0.1:{server.server_port}/none.png")
        server.shutdown()


def test_damaged_file_is_refused_however_it_comes(colors: list[Image.Image], tmp_path: Path) -> None:
    colors[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-5000])
    for refuse in (processor(), make_transform(described())):
        with pytest.raises(ArgumentError, match="truncated"):
            refuse(Image.open(tmp_path / "half.png"))
    with pytest.raises(ArgumentError, match="truncated"):
        processor()(tmp_path / "half.png")


def test_steps_named_as_transformers_names_them_are_taken_where_they_are_exact(colors: list[Image.Image]) -> None:
    ours, small = processor(), colors[1].resize((64, 64))
    tensor = torch.from_numpy(np.array(colors[0])).permute(2, 0, 1)
    named = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
    assert torch.equal(pixels(ours, colors, **named, do_convert_rgb=False), pixels(ours, colors))
    assert torch.equal(pixels(ours, tensor / 255, do_rescale=False), pixels(ours, tensor / 255))
    mean_and_std = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    as_it_is = create_transform((3, 64, 64), crop_pct=1.0, crop_mode="squash", **mean_and_std)
    whole = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    for given in (small, np.array(small), whole, whole / 255):
        assert torch.equal(pixels(ours, given, do_resize=False, do_center_crop=False)[0], as_it_is(small))
    squashed = processor(crop_mode="squash", crop_pct=1.0)
    assert torch.equal(pixels(squashed, colors, do_center_crop=False), pixels(squashed, colors))


def test_lists_within_lists_are_flattened(colors: list[Image.Image]) -> None:
    nested = [[colors[0], np.asarray(colors[1])], [[colors[2]], colors[3]], (colors[4],)]
    assert torch.equal(pixels(processor(), nested), pixels(processor(), colors))


def test_standard_keys_give_timm_s_pixels_in_transformers_own_processor(colors: list[Image.Image]) -> None:
    """Every key is left out, or read by another class as we mean it."""
    from transformers import ViTImageProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    assert ViTImageProcessor is not None
    for entries in ({}, {"value_range": [0.0, 255.0], "mean": [100.0] * 3, "std": [50.0] * 3}):
        config = described((48, 80), crop_mode="squash", crop_pct=1.0, **entries)
        stored = processor_dict(config)
        assert {"do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize"} <= set(stored)
        keys = {name: stored[name] for name in ("size", "image_mean", "image_std", *STANDARD_KEYS)}
        keys.pop("do_center_crop")  # this class crops nothing
        theirs = ViTImageProcessorPil(**keys)(colors, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(theirs, pixels(TimmTowerImageProcessor.from_tower_config(config), colors))


def test_steps_that_the_standard_keys_cannot_say_are_left_out() -> None:
    for entries, left_out in (
        ({}, {"do_resize", "resample", "do_center_crop"}),
        ({"crop_mode": "squash", "crop_pct": 1.0, "padding": SQUARE}, {"do_resize"}),
        ({"channel_order": "BGR"}, {"do_normalize", "do_rescale"}),
        ({"value_range": [-1.0, 1.0]}, {"do_normalize", "do_rescale"}),
    ):
        assert not left_out & set(processor_dict(described(**entries)))


def test_file_without_the_standard_keys_is_read_too(colors: list[Image.Image]) -> None:
    config = described()
    old = {name: value for name, value in processor_dict(config).items() if name not in STANDARD_KEYS}
    check_processor(old, config)
    assert torch.equal(pixels(TimmTowerImageProcessor.from_dict(old), colors), pixels(processor(), colors))
    for wrong in ({"do_normalize": False}, {"do_resize": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TimmTowerImageProcessor.from_dict({**old, **wrong})
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            TimmTowerImageProcessor.from_dict(old, **wrong)
    squashed = processor_dict(described(crop_mode="squash", crop_pct=1.0))
    changed = TimmTowerImageProcessor.from_dict(squashed, crop_pct=0.5)
    assert "do_resize" not in changed.to_dict()


def test_saving_replaces_a_link_and_is_the_tower_s_file_beside_a_tower(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("years of work")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "preprocessor_config.json").symlink_to(tmp_path / "precious.txt")
    for config, alone in ((b"[" * 100_000, True), (b"\xff", True), (b'{"model_type": "timm_tower"}', False)):
        (tmp_path / "tower" / "config.json").write_bytes(config)
        processor().save_pretrained(tmp_path / "tower")
        stored = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
        assert ("auto_map" in stored) == ("image_processor_type" in stored) == alone
    assert (tmp_path / "precious.txt").read_text() == "years of work"


def test_deeper_image_is_clipped_as_timm_has_it_and_said_so() -> None:
    deep = Image.fromarray(data.camera()[:90, :120].astype(np.uint16) * 257)
    reference = make_transform(described())
    with pytest.warns(UserWarning, match="clips"):
        made = pixels(processor(), deep)
    assert torch.equal(made[0], reference(deep.convert("RGB")))
    with pytest.warns(UserWarning, match="0 to 255"):
        processor()(Image.fromarray(data.camera()[:90, :120].astype(np.float32) / 255))


def test_arrays_of_8_bits_are_as_their_images(colors: list[Image.Image]) -> None:
    ours = processor()
    for image in colors[:3]:
        array, grey, clear = np.asarray(image), np.asarray(image.convert("L")), np.asarray(image.convert("RGBA"))
        expected, expected_grey = pixels(ours, image), pixels(ours, image.convert("L"))
        for given in (array, array.transpose(2, 0, 1), array[None], clear, np.asfortranarray(array)):
            assert torch.equal(pixels(ours, given), expected)
        for given in (grey, grey[:, :, None], grey[None, :, :]):
            assert torch.equal(pixels(ours, given), expected_grey)
    one = processor(in_chans=1)
    assert torch.equal(pixels(one, np.asarray(colors[0])), pixels(one, colors[0]))


def test_array_whose_channels_could_be_first_or_last_is_not_guessed(colors: list[Image.Image]) -> None:
    narrow = np.asarray(colors[0])[:3, :40]
    with pytest.raises(ArgumentError, match="input_data_format"):
        processor()(narrow)
    made = pixels(processor(), narrow, input_data_format="channels_last")
    assert torch.equal(made, pixels(processor(), Image.fromarray(narrow)))


def test_paths_are_upright_as_in_pipelines_and_images_as_timm_takes_them(
    colors: list[Image.Image], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    colors[1].save(tmp_path / "turned.jpg", exif=exif)
    colors[0].convert("RGBA").save(tmp_path / "clear.png")
    reference = make_transform(described())
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    as_stored = Image.open(turned).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(turned)).convert("RGB")
    assert upright.size == as_stored.size[::-1]
    expected = torch.stack([reference(upright), reference(Image.open(clear).convert("RGB"))])
    assert torch.equal(pixels(processor(), [turned, clear]), expected)
    assert torch.equal(pixels(processor(), [str(turned), str(clear)]), expected)
    assert torch.equal(pixels(processor(), Image.open(turned))[0], reference(as_stored))


def test_batches_and_what_they_come_back_as(colors: list[Image.Image]) -> None:
    ours = processor((48, 80))
    single = [pixels(ours, image) for image in colors]
    batch = pixels(ours, colors)
    assert batch.shape == (5, 3, 48, 80)
    assert torch.equal(batch, torch.cat(single))
    assert torch.equal(pixels(ours, tuple(colors)), batch)
    assert torch.equal(pixels(ours, [colors[0], np.asarray(colors[1])]), batch[:2])
    arrays = ours(images=colors, return_tensors="np").pixel_values
    assert isinstance(arrays, np.ndarray)
    assert np.array_equal(arrays, batch.numpy())
    listed = ours(colors).pixel_values
    assert isinstance(listed, list)
    assert torch.equal(torch.stack(listed), batch)


@pytest.mark.parametrize("entries", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_tensors_are_as_close_as_documented(crop_mode: str, entries: dict[str, Any], colors: list[Image.Image]) -> None:
    for interpolation, size in itertools.product(("nearest", "bilinear", "bicubic", *LANCZOS), (64, (180, 96))):
        facts = {"crop_mode": crop_mode, "interpolation": interpolation, **entries}
        ours, scale = processor(size, **facts), 255.0 if not entries else 1.0
        std = torch.tensor([0.1, 0.2, 0.3])
        step = scale * (std.flip(0) if entries else std)[:, None, None]  # one step of an 8-bit pixel, after std
        for image in colors:
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            exact = pixels(ours, image)
            for given in (tensor, tensor / 255, (tensor / 255).double()):
                apart = (pixels(ours, given) - exact).abs() * step
                # the figures of tensor_transform.py for any order of rows and columns, with or without a uint8 kernel
                most, mean = (0.0, 0.0) if interpolation == "nearest" else (11.0, 0.36)
                assert apart.max() <= most + 1e-3, (facts, given.dtype)
                assert apart.mean() <= mean + 1e-3, (facts, given.dtype)


def test_tensors_batched_listed_grey_and_with_gradient(colors: list[Image.Image]) -> None:
    ours = processor(**EVERYTHING)
    tensor = torch.from_numpy(np.array(colors[0])).permute(2, 0, 1)
    batch = torch.stack([tensor, tensor.flip(2)])
    made = pixels(ours, batch)
    assert torch.equal(made, torch.cat([pixels(ours, one) for one in batch]))
    assert torch.equal(made, pixels(ours, list(batch)))
    assert torch.equal(made, pixels(ours, [batch, batch])[2:])
    assert torch.equal(made, pixels(ours, batch.permute(0, 2, 3, 1), input_data_format="channels_last"))
    floats = np.array(colors[0]).astype(np.float32) / 255
    assert torch.equal(pixels(ours, floats), pixels(ours, tensor / 255))
    grey = tensor[:1]
    assert torch.equal(pixels(ours, grey), pixels(ours, grey.repeat(3, 1, 1)))
    traced = (tensor / 255).requires_grad_()
    pixels(ours, traced).square().mean().backward()
    assert traced.grad is not None
    assert traced.grad.abs().sum() > 0


def test_channels_of_no_image_mode_come_as_arrays_or_tensors(colors: list[Image.Image]) -> None:
    six = np.concatenate([np.asarray(colors[0]), np.asarray(colors[0])[::-1]], axis=2)
    ours = processor(in_chans=6)
    made = pixels(ours, six)
    assert made.shape == (1, 6, 64, 64)
    assert torch.equal(made, pixels(ours, torch.from_numpy(six.transpose(2, 0, 1).copy())))
    block = described(in_chans=6).preprocess
    half = processor(mean=block["mean"][:3], std=block["std"][:3])  # type: ignore[index]
    assert torch.equal(made[:, :3], pixels(half, torch.from_numpy(six[:, :, :3]).permute(2, 0, 1)))
    with pytest.raises(ArgumentError, match="6 channels"):
        ours(colors[0])


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (list, {}, "no images"),
    (lambda: None, {}, "NoneType"),
    (lambda: torch.rand(3, 9, 9) * 255, {}, "Divide by 255"),
    (lambda: torch.rand(3, 9, 9) - 0.5, {}, r"\[0, 1\]"),
    (lambda: torch.full((3, 9, 9), torch.nan), {}, r"\[0, 1\]"),
    (lambda: torch.zeros(3, 9, 9, dtype=torch.int64), {}, "int64"),
    (lambda: np.zeros((9, 9, 3), np.uint16), {}, "uint16"),
    (lambda: np.zeros((9, 9), np.int64), {}, "int64"),
    (lambda: np.zeros((0, 9, 3), np.uint8), {}, "empty"),
    (lambda: np.zeros((0, 9), np.float32), {}, "empty"),
    (lambda: np.zeros((0, 9, 9, 3), np.uint8), {}, "no images"),
    (lambda: np.array("cat.png"), {}, "shape"),
    (lambda: Image.new("RGB", (0, 9)), {}, "empty"),
    (lambda: Image.new("RGB", (1, 2_000_000)), {}, "too unequal"),
    (lambda: torch.zeros(3, 1, 2_000_000), {}, "too unequal"),
    (lambda: torch.zeros(3, 9, 9, device="meta"), {}, "shape"),
    (lambda: "no-such.png", {}, "no-such.png"),
    (lambda: __file__, {}, "cannot identify image"),
    (lambda: "data:image/png;base64,AAAA", {}, "cannot identify image"),
    (lambda: [[[[[Image.new("RGB", (9, 9))]]]]], {}, "deep"),
    (lambda: [[1, 2], [3, 4]], {}, "type int"),
    (lambda: torch.zeros(9, 9, 3), {}, "channels_last"),
    (lambda: torch.zeros(4, 9, 9), {}, "3 channels"),
    (lambda: torch.zeros(9, 9), {}, "shape"),
    (lambda: torch.zeros(1, 1, 3, 9, 9), {}, "shape"),
    (lambda: torch.zeros(0, 3, 9, 9), {}, "empty"),
    (lambda: np.zeros((9, 9, 5), np.uint8), {}, "shape"),
    (lambda: Image.new("RGB", (9, 9)), {"return_tensors": "tf"}, "return_tensors"),
    (lambda: Image.new("RGB", (9, 9)), {"input_data_format": "last"}, "input_data_format"),
    (lambda: Image.new("RGB", (9, 9)), {"do_normalize": False}, "do_normalize"),
    (lambda: Image.new("RGB", (9, 9)), {"do_resize": False}, r"\[9, 9\], but the tower takes \[64, 64\]"),
    (lambda: Image.new("RGB", (9, 9)), {"do_center_crop": False}, "do_center_crop"),
    (lambda: Image.new("RGB", (9, 9)), {"do_rescale": False}, "divided by 255"),
    (lambda: torch.zeros(3, 9, 9, dtype=torch.uint8), {"do_rescale": False}, "divided by 255"),
    (lambda: np.zeros((9, 9, 3), np.float32), {"do_rescale": True}, "divided by 255"),
    (lambda: Image.new("L", (9, 9)), {"do_convert_rgb": False}, "mode L"),
    (lambda: Image.new("RGB", (9, 9)), {"rescale_factor": 1.0}, "rescale_factor"),
    (lambda: Image.new("RGB", (9, 9)), {"do_resize": 3}, "do_resize=3"),
    (lambda: Image.new("RGB", (9, 9)), {"return_tensor": "pt"}, "return_tensor"),
]


@pytest.mark.parametrize(("images", "kwargs", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_what_is_no_image_or_no_keyword_is_refused(
    images: Callable[[], Any], kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        processor()(images(), **kwargs)


def test_interpolation_that_torch_lacks_is_refused_for_tensors_only(colors: list[Image.Image]) -> None:
    for interpolation in {"box", "hamming", "lanczos"} - set(LANCZOS):
        ours = processor(interpolation=interpolation)
        assert pixels(ours, colors[0]).shape == (1, 3, 64, 64)
        for tensor in (torch.zeros(3, 99, 99), torch.zeros(3, 99, 99, dtype=torch.uint8)):
            with pytest.raises(ArgumentError, match=interpolation):
                ours(tensor)


def test_attribute_that_is_set_holds_from_the_next_call_on(colors: list[Image.Image]) -> None:
    ours = processor()
    ours.size = 32
    ours.image_mean = (0.1, 0.2, 0.3)
    assert torch.equal(pixels(ours, colors), pixels(processor(32, mean=[0.1, 0.2, 0.3]), colors))
    ours.image_std = [0.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="std"):
        ours(colors[0])


@pytest.mark.parametrize("entries", [{}, EVERYTHING], ids=["plain", "everything"])
def test_file_is_the_one_the_config_describes_and_comes_back(
    entries: dict[str, Any], colors: list[Image.Image], tmp_path: Path
) -> None:
    config = described((48, 80), **entries)
    ours = TimmTowerImageProcessor.from_tower_config(config)
    ours.save_pretrained(tmp_path / "first")
    written = (tmp_path / "first" / "preprocessor_config.json").read_bytes()
    assert written == (json.dumps(processor_dict(config), indent=2, sort_keys=True) + "\n").encode()
    assert [file.name for file in (tmp_path / "first").iterdir()] == ["preprocessor_config.json"]
    again = TimmTowerImageProcessor.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "preprocessor_config.json").read_bytes() == written
    from_json = TimmTowerImageProcessor.from_json_file(tmp_path / "first" / "preprocessor_config.json")
    for other in (again, from_json, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.to_dict() == ours.to_dict() == json.loads(written)
        assert torch.equal(pixels(other, colors), pixels(ours, colors))
    check_processor(json.loads(written), config)
    check_processor(json.loads(written), TimmTowerConfig.from_dict(config.to_dict()))


def test_size_given_on_loading_is_followed_and_a_misspelt_fact_refused(
    colors: list[Image.Image], tmp_path: Path
) -> None:
    processor().save_pretrained(tmp_path)
    # what `pipeline(..., model_kwargs=...)` hands to model and processor alike
    for given in ({"size": 32}, {"image_size": 32, "dtype": torch.float16, "device_map": None}):
        assert torch.equal(
            pixels(TimmTowerImageProcessor.from_pretrained(tmp_path, **given), colors), pixels(processor(32), colors)
        )
    _, unused = TimmTowerImageProcessor.from_pretrained(tmp_path, foo=1, size=32, return_unused_kwargs=True)
    assert unused == {"foo": 1}
    for wrong in ("interpolatoin", "image_means", "std"):
        with pytest.raises(ArgumentError, match=wrong):
            TimmTowerImageProcessor.from_pretrained(tmp_path, **{wrong: 1})
    with pytest.raises(ArgumentError, match="image_size"):
        TimmTowerImageProcessor.from_pretrained(tmp_path, size=32, image_size=32)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"size": {"height": 64, "width": 65}}, "size is"),
        ({"image_mean": [0.4, 0.5, 0.61]}, "image_mean is"),
        ({"interpolation": "bilinear"}, "interpolation is"),
        ({"padding": SQUARE}, "padding is"),
        ({"channel_order": "BGR"}, "channel_order is"),
        ({"do_resize": True}, "do_resize is True there and should be 'left out'"),
        ({"do_normalize": False}, "do_normalize is False there and should be True"),
        ({"rescale_factor": 1.0}, "rescale_factor is"),
        ({"do_flip": True}, "unknown 'do_flip'"),
        ({"crop_percent": 1.0}, "unknown 'crop_percent' .did you mean crop_pct"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"value_range": None}, "value_range is"),
    ],
    ids=str,
)
def test_file_that_disagrees_with_the_config_is_refused(edit: dict[str, Any], reason: str) -> None:
    config = described()
    with pytest.raises(ConfigError, match=reason):
        check_processor({**processor_dict(config), **edit}, config)
    missing = {key: value for key, value in processor_dict(config).items() if key not in edit}
    # Beside a tower the class's name is in config.json.
    if len(missing) < len(processor_dict(config)) and not {"image_processor_type", *STANDARD_KEYS} & set(edit):
        with pytest.raises(ConfigError, match=next(iter(edit))):
            check_processor(missing, config)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"size": {"shortest_edge": 64}}, "size"),
        ({"size": [0, 1]}, "size"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0.1]}, "std"),
        ({"interpolation": 3}, "interpolation"),
        ({"crop_percent": 1.0}, "did you mean crop_pct"),
        ({"do_resize": True}, "do_resize"),
    ],
    ids=str,
)
def test_file_that_no_processor_can_be_made_from_is_refused(edit: dict[str, Any], reason: str) -> None:
    facts = {**processor_dict(described()), "processor_class": "VisionTextDualEncoderProcessor"}
    TimmTowerImageProcessor.from_dict(facts)
    with pytest.raises(ConfigError, match=reason):
        TimmTowerImageProcessor.from_dict({**facts, **edit})
    with pytest.raises(ConfigError, match="interpolation"):
        TimmTowerImageProcessor(size=64, crop_pct=1.0, crop_mode="center", image_mean=[0.5], image_std=[0.5])


def test_transformers_pipelines_and_processors_take_it(colors: list[Image.Image], tmp_path: Path) -> None:
    from transformers import (
        BertConfig,
        BertTokenizer,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
        ViTConfig,
        ViTForImageClassification,
        ViTModel,
        pipeline,
    )

    ours = processor(32, **EVERYTHING)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTConfig(image_size=32, patch_size=16, num_labels=3, **tiny)
    batch = pixels(ours, colors)

    model = ViTModel(vit).eval()
    features = pipeline("image-feature-extraction", model=model, image_processor=ours, device="cpu")
    classified = ViTForImageClassification(vit).eval()
    classes = pipeline("image-classification", model=classified, image_processor=ours, device="cpu", top_k=3)
    with torch.no_grad():
        for image, one in zip(colors, batch, strict=True):
            hidden = model(pixel_values=one[None]).last_hidden_state
            assert torch.equal(features(image, return_tensors=True), hidden)
            logits = classified(pixel_values=one[None]).logits[0]
            scores = {found["label"]: found["score"] for found in classes(image)}
            found = torch.tensor([scores[f"LABEL_{i}"] for i in range(3)])
            assert torch.allclose(found, logits.softmax(-1), atol=1e-6)  # the pipeline's softmax is numpy's

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", "cat", "cup", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    text = BertConfig(vocab_size=len(vocabulary), **tiny)
    both = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(vit, text)).eval()
    joined = VisionTextDualEncoderProcessor(ours, tokenizer)
    made = joined(text=["a cup", "a photo of a cat"], images=colors, return_tensors="pt", padding=True)
    assert torch.equal(made["pixel_values"], batch)
    joined.save_pretrained(tmp_path / "joined")
    stored = json.loads((tmp_path / "joined" / "processor_config.json").read_text())["image_processor"]
    assert torch.equal(pixels(TimmTowerImageProcessor.from_dict(stored), colors), batch)

    asked = pipeline(
        "zero-shot-image-classification", model=both, tokenizer=tokenizer, image_processor=ours, device="cpu"
    )
    told = {one["label"]: one["score"] for one in asked(colors[0], candidate_labels=["cat", "cup"])}
    words = tokenizer(["This is a photo of cat.", "This is a photo of cup."], return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = both(**words, pixel_values=batch[:1]).logits_per_image.softmax(-1)[0]
    assert torch.allclose(torch.tensor([told["cat"], told["cup"]]), scores, atol=1e-6)


def one_file(last: Path) -> str:
    """A module of the reader and all that it needs as one file: what travels, cut down to the processor."""
    done: dict[Path, str] = {}

    def add(file: Path) -> None:
        text = file.read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                needed = file.parents[node.level - 1].joinpath(*str(node.module).split(".")).with_suffix(".py")
                if needed not in done:
                    add(needed)
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        done[file] = "\n".join(lines)

    add(last)
    return "\n".join(done.values())


@pytest.fixture
def tower_folder(colors: list[Image.Image], tmp_path: Path) -> Path:
    """What a saved tower has of preprocessing, beside an image and the pixels it must give."""
    folder = tmp_path / "tower"
    config = described((48, 80), **EVERYTHING)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_dict(config), indent=2, sort_keys=True))
    (folder / f"{READER_MODULE}.py").write_text(one_file(READER / "image_processor.py"))
    colors[0].save(tmp_path / "image.png")
    torch.save(pixels(TimmTowerImageProcessor.from_tower_config(config), colors[0]), tmp_path / "expected.pt")
    return folder


COMPARE = """
import sys
from pathlib import Path
import torch
from transformers import AutoImageProcessor
folder = Path(sys.argv[1])
def check(processor):
    made = processor(str(folder.parent / "image.png"), return_tensors="pt").pixel_values
    assert torch.equal(made, torch.load(folder.parent / "expected.pt")), "other pixels"
"""


def test_registered_class_is_found_by_auto_image_processor(
    fresh_process: Callable[..., str], tower_folder: Path
) -> None:
    code = f"""{COMPARE}
from transformers import AutoConfig
from hf_timm_tower.reader.config import TimmTowerConfig
from hf_timm_tower.reader.image_processor import TimmTowerImageProcessor
AutoConfig.register("timm_tower", TimmTowerConfig, exist_ok=True)
classes = {{"pil": TimmTowerImageProcessor, "torchvision": TimmTowerImageProcessor}}
AutoImageProcessor.register(TimmTowerConfig, image_processor_classes=classes, exist_ok=True)
for backend in (None, "pil", "torchvision"):
    found = AutoImageProcessor.from_pretrained(folder, backend=backend)
    assert type(found) is TimmTowerImageProcessor
    check(found)
"""
    fresh_process(code, tower_folder)


def test_remote_code_loads_without_the_package_and_saves_what_loads_again(
    fresh_process: Callable[..., str], tower_folder: Path, tmp_path: Path
) -> None:
    """In a process that has transformers and timm, and in which importing this package fails, installed or not."""
    code = f"""{COMPARE}
import json
sys.modules["hf_timm_tower"] = None
found = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(found).__module__.startswith("transformers_modules."), type(found)
check(found)
again = folder.parent / "again"
found.save_pretrained(again)
assert json.loads((again / "preprocessor_config.json").read_text()) == found.to_dict()
code = "modeling_timm_tower.py"
assert sorted(file.name for file in again.iterdir()) == [code, "preprocessor_config.json"]
assert (again / code).read_bytes() == (folder / code).read_bytes()
check(AutoImageProcessor.from_pretrained(again, trust_remote_code=True))
try:
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("ran remote code unasked")
"""
    (tmp_path / "hf_home").mkdir()
    fresh_process(code, tower_folder, env={"PYTHONPATH": None, "HF_HOME": str(tmp_path / "hf_home")})


def test_an_image_that_pil_cannot_convert_is_named(tmp_path: Path) -> None:
    deep = Image.frombytes("I;16B", (8, 8), np.arange(64, dtype=">u2").tobytes())
    deep.save(tmp_path / "deep.tiff")
    made = processor()
    for image in (deep, tmp_path / "deep.tiff"):
        with pytest.raises(ArgumentError, match="I;16B, which PIL cannot convert"):
            made(image, return_tensors="pt")

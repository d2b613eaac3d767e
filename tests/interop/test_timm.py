"""timm's and transformers' own folders as towers, and towers as folders that stock timm and transformers load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.layers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from hf_timm_tower import (
    ConfigError,
    FolderError,
    FormatError,
    HeadError,
    TimmModel,
    TimmTowerConfig,
    TowerError,
    WeightsError,
)
from hf_timm_tower.interop.timm_export import export_timm

from ..local_hub import LocalHub
from ..timm_classes import smallest_of_each_class


def shake(model: nn.Module) -> nn.Module:
    """Random statistics and scales too, which a fresh model has at 0 and 1, and eval mode."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name.endswith(("running_mean", "bias", "gamma", "_token")):
            nn.init.normal_(tensor.data, std=0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(tensor.data, 0.5, 2)
    return model.eval()


def timm_folder(folder: Path, name: str, **arguments: Any) -> nn.Module:
    """A model of timm's, saved by timm."""
    model = shake(timm.create_model(name, **arguments))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def images_for(tower: TimmModel) -> torch.Tensor:
    return torch.randn(2, tower.config.in_chans, *tower.config.image_size)


def picture(size: tuple[int, int] = (200, 150)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (19, 25, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- from timm


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {}),
        ("test_convnext", {"in_chans": 1, "num_classes": 5}),
        ("test_vit", {"num_classes": 7, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "img_size": 96, "depth": 2}),
        ("test_vit", {"depth": 2, "dynamic_img_size": True, "global_pool": ""}),
    ],
)
def test_timm_folder_gives_what_timm_gives(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    timm_folder(tmp_path, name, **arguments)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    tower = TimmModel.from_timm(tmp_path)
    images = images_for(tower)
    assert tuple(images.shape[1:]) == tuple(theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        features = theirs.forward_features(images)
        pooled = theirs.forward_head(features, pre_logits=True)
        assert torch.equal(tower.forward_features(images), features)
        assert torch.equal(tower(images), pooled)
    if tower.config.in_chans == 3:
        transform = create_transform(**resolve_data_config(theirs.pretrained_cfg))
        assert torch.equal(tower.transform()(picture()), transform(picture()))
    tower.save_pretrained(tmp_path / "tower")
    back = TimmModel.from_pretrained(tmp_path / "tower")
    with torch.no_grad():
        assert torch.equal(back(images), pooled)


def test_the_classifier_of_a_timm_folder_may_stay_as_the_projection(tmp_path: Path) -> None:
    theirs = timm_folder(tmp_path, "test_resnet", num_classes=6)
    tower = TimmModel.from_timm(tmp_path, proj=None)
    images = images_for(tower)
    with torch.no_grad():
        assert torch.equal(tower(images), theirs(images))
    assert tower.config.embed_dim == 6


def test_another_size_and_other_channels_are_adapted_as_timm_does(tmp_path: Path) -> None:
    timm_folder(tmp_path, "test_vit")
    changes = {"img_size": 96, "in_chans": 4, "num_classes": 0}
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changes).eval()
    tower = TimmModel.from_timm(tmp_path, image_size=96, model_kwargs={"in_chans": 4})
    images = images_for(tower)
    assert images.shape == (2, 4, 96, 96)
    with torch.no_grad():
        assert torch.equal(tower(images), theirs(images))
    assert len(tower.config.preprocess["mean"]) == 4


@pytest.mark.parametrize("kind", ["model", "classifier", "prefixed keys", "shards"])
def test_transformers_timm_wrapper_folder_gives_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    config = TimmWrapperConfig(architecture="test_convnext.r160_in1k", num_labels=4, model_args={"in_chans": 3})
    cls = TimmWrapperForImageClassification if kind == "classifier" else TimmWrapperModel
    theirs = shake(cls(config))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if kind == "shards" else "5GB")
    if kind == "prefixed keys":
        path = tmp_path / "model.safetensors"
        plain = {key.removeprefix("timm_model."): value for key, value in load_file(path).items()}
        save_file({f"timm_model.{key}": value for key, value in plain.items()}, path)
    if kind == "shards":
        assert not (tmp_path / "model.safetensors").exists()
    tower = TimmModel.from_timm(tmp_path, proj=None if kind == "classifier" else "none")
    images = images_for(tower)
    with torch.no_grad():
        expected = theirs(images).logits if kind == "classifier" else theirs(images).pooler_output
        assert torch.equal(tower(images), expected)


def test_repositories_of_timm_and_of_transformers_wrapper_are_read_by_id_and_revision(
    tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    code = """
        import sys, timm, torch
        from huggingface_hub import HfApi
        from timm.models import save_for_hf
        from transformers import TimmWrapperConfig, TimmWrapperModel
        from hf_timm_tower import HubError, TimmModel

        api, folder, commits, models = HfApi(), sys.argv[1], [], []
        api.create_repo("ann/timm")
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(timm.create_model("test_resnet", num_classes=3).eval())
            save_for_hf(models[-1], folder, safe_serialization=True)
            commits.append(api.upload_folder(repo_id="ann/timm", folder_path=folder).oid)
        images = torch.randn(2, 3, 160, 160)

        def assert_same(tower, number, place):
            with torch.no_grad():
                theirs = models[number].forward_head(models[number].forward_features(images), pre_logits=True)
                assert torch.equal(tower.eval().trunk(images), theirs), place
            stored = tower.config.to_json_string()
            assert "hf-hub" not in stored and "ann/timm" not in stored, "a stored config names no place"

        places = {("ann/timm", None): 1, ("hf-hub:ann/timm", None): 1, ("ann/timm", commits[0]): 0,
                  (f"hf-hub:ann/timm@{commits[0]}", None): 0}
        for (place, revision), number in places.items():
            assert_same(TimmModel.from_timm(place, revision=revision), number, place)
        for place, number in {"hf-hub:ann/timm": 1, f"hf_hub:ann/timm@{commits[0]}": 0}.items():
            tower = TimmModel(place, 8, pretrained=True)
            assert_same(tower, number, place)
            tower.save_pretrained(sys.argv[2])
            assert_same(TimmModel.from_pretrained(sys.argv[2]), number, place)
        with_classifier = TimmModel.from_timm("ann/timm", proj=None)
        with torch.no_grad():
            assert torch.equal(with_classifier(images), models[1](images))

        wrapped = TimmWrapperModel(TimmWrapperConfig(architecture="test_convnext.r160_in1k")).eval()
        wrapped.push_to_hub("ann/wrapped")
        with torch.no_grad():
            expected = wrapped(images).pooler_output
            assert torch.equal(TimmModel.from_timm("ann/wrapped")(images), expected)
            assert torch.equal(TimmModel("hf-hub:ann/wrapped", 8, pretrained=True).eval().trunk(images), expected)
        try:
            TimmModel.from_timm("ann/timm", revision="v9")
        except HubError as error:
            assert "no revision 'v9'" in str(error)
            print("done")
    """
    with LocalHub(tmp_path / "hub") as hub:
        told = fresh_process(code, tmp_path / "model", tmp_path / "tower", env=hub.env(tmp_path / "cache"))
    assert told.strip().endswith("done")


def test_pickled_weights_are_read_only_when_asked_for(tmp_path: Path) -> None:
    theirs = timm.create_model("test_resnet").eval()
    save_for_hf(theirs, tmp_path, safe_serialization=False)
    with pytest.raises(FolderError, match="allow_pickle=True"):
        TimmModel.from_timm(tmp_path)
    tower = TimmModel.from_timm(tmp_path, allow_pickle=True)
    for key, value in tower.trunk.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


# dla: timm itself loads it without strictness, and would leave the weight random
@pytest.mark.parametrize("name", ["test_resnet", "dla46x_c"])
def test_a_missing_weight_is_an_error(name: str, tmp_path: Path) -> None:
    timm_folder(tmp_path, name)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in reversed(weights) if key.endswith("running_var"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=lost):
        TimmModel.from_timm(tmp_path)


def test_a_weight_that_is_not_the_models_is_an_error(tmp_path: Path) -> None:
    timm_folder(tmp_path, "test_resnet")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "adapter.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"adapter\.weight"):
        TimmModel.from_timm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architecture": "resnet18_of_tomorrow"}, ConfigError, "unknown to timm"),
        ({"architecture": "hf-hub:ann/other"}, ConfigError, "without a scheme"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, ConfigError, "checkpoint_path"),
        ({"model_args": {"stem_width": 2**16}}, ConfigError, "refused before it is built"),
        ({"model_args": [1]}, FormatError, "must be objects"),
        ({"model_type": "bert"}, ConfigError, "no timm model"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    changes: dict[str, Any], error: type[TowerError], words: str, tmp_path: Path
) -> None:
    timm_folder(tmp_path, "test_resnet")
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=words):
        TimmModel.from_timm(tmp_path)


def test_a_towers_own_folder_is_not_taken_for_timms(tmp_path: Path) -> None:
    TimmModel("test_resnet", embed_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="timm_tower"):
        TimmModel.from_timm(tmp_path)


def test_the_constructor_takes_timms_spelling(tmp_path: Path) -> None:
    theirs = timm_folder(tmp_path, "test_vit", num_classes=7, global_pool="avg")
    tower = TimmModel(f"local-dir:{tmp_path}", 8, pretrained=True).eval()
    images = images_for(tower)
    with torch.no_grad():
        pooled = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert torch.equal(tower.trunk(images), pooled)
        fresh = TimmModel(f"local-dir:{tmp_path}", 8)
        assert fresh.config.to_dict() == tower.config.to_dict()
        assert not torch.equal(fresh.eval().trunk(images), pooled)
    assert str(tmp_path) not in tower.config.to_json_string(), "a stored config names no place"
    tower.save_pretrained(tmp_path / "tower")
    with torch.no_grad():
        assert torch.equal(TimmModel.from_pretrained(tmp_path / "tower")(images), tower(images))
        assert torch.equal(TimmModel.from_timm(tmp_path)(images), pooled)
    tower.export_timm(tmp_path / "timm")
    with torch.no_grad():
        assert torch.equal(TimmModel.from_timm(tmp_path / "timm", proj=None)(images), tower(images))


def test_of_two_stored_sizes_one_must_be_chosen(tmp_path: Path) -> None:
    timm_folder(tmp_path, "test_vit", img_size=96, num_classes=0)  # of dynamic size; timm shows it 160 pixels
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with pytest.raises(ConfigError, match=r"\[96, 96\].*\[160, 160\]"):
        TimmModel.from_timm(tmp_path)
    for size in (96, 160):
        tower = TimmModel.from_timm(tmp_path, image_size=size)
        images = images_for(tower)
        with torch.no_grad():
            torch.testing.assert_close(tower(images), theirs(images), rtol=1e-5, atol=1e-5)


# --- to timm


def check_export(tower: TimmModel, folder: Path) -> None:
    """Stock timm and stock transformers load the folder, with the same bits and pixels."""
    written = export_timm(tower, folder)
    images = images_for(tower)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features, expected = tower.forward_features(images), tower(images)
        assert torch.isfinite(expected).all()
        output = wrapped(images)
        # some trunks give several features, in a tuple or a list
        ours, others = ([each] if isinstance(each, torch.Tensor) else each for each in (features, output[0]))
        assert all(torch.equal(*pair) for pair in zip(ours, others, strict=True))
        assert torch.equal(output.pooler_output, tower.trunk.forward_head(features, pre_logits=True))
        if written.difference == 0:
            assert torch.equal(theirs(images), expected)
        else:
            torch.testing.assert_close(theirs(images), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert (theirs.num_classes == 0) == (written.num_classes == 0)
    image = picture()
    pixels = tower.transform()(image)
    assert torch.equal(create_transform(**resolve_data_config(theirs.pretrained_cfg))(image), pixels)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert torch.equal(processor(image)["pixel_values"][0], pixels)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"proj": "none"}),
        ("test_convnext", {"proj": "none", "image_size": 128}),
        ("test_vit", {"pool": "avg", "proj": "none"}),
        ("test_vit", {"pool": "none", "proj": "none", "image_size": (96, 128)}),
        ("test_byobnet", {"proj": "none", "pool": "max"}),
    ],
)
def test_an_exported_trunk_loads_in_timm_and_transformers(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    tower = TimmModel(name, **arguments)
    shake(tower)
    check_export(tower, tmp_path / "exported")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"embed_dim": 10, "drop": 0.3}),
        ("test_vit", {"embed_dim": 10, "pool": "token", "proj_bias": True}),
        ("test_resnet", {"embed_dim": 1000, "proj": None}),
        ("test_efficientnet", {"custom_head": lambda width, _: nn.Sequential(nn.Dropout(), nn.Linear(width, 10))}),
    ],
)
def test_a_linear_head_becomes_timms_classifier(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    tower = TimmModel(name, **arguments)
    shake(tower)
    check_export(tower, tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    back = TimmModel.from_timm(tmp_path, proj=None)
    images = images_for(tower)
    with torch.no_grad():
        assert torch.equal(classifier(images).logits, tower(images))
        assert torch.equal(back(images), tower(images))
    assert classifier.config.id2label[0] == "LABEL_0", "an embedding is not the classes of ImageNet"


class Gate(nn.Module):
    """Not one linear layer, though it holds one."""

    def __init__(self, width: int, _: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sigmoid()


@pytest.mark.parametrize(
    "arguments",
    [
        {"embed_dim": 8, "proj": "mlp"},
        {"embed_dim": 8, "pool": "token_avg"},
        {"embed_dim": 8, "pool": "none"},
        {"custom_head": Gate},
        {"custom_head": lambda width, _: nn.Sequential(nn.Linear(width, 8), nn.ReLU())},
    ],
)
def test_a_head_that_timm_has_no_place_for_is_refused_or_left_out_by_name(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    tower = TimmModel("test_vit", **{"pool": "token", **arguments}).eval()
    with pytest.raises(HeadError, match="head='drop'"):
        export_timm(tower, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    written = export_timm(tower, tmp_path / "exported", head="drop")
    assert len(written.left_out) == 1
    images = images_for(tower)
    with torch.no_grad():
        theirs = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
        assert torch.equal(theirs(images), tower.trunk(images))


def test_preprocessing_that_timm_cannot_say_is_refused_or_left_out_by_name(tmp_path: Path) -> None:
    plain = TimmModel("test_resnet", proj="none").config.preprocess
    padding = {"mode": "square", "color": [255, 255, 255]}
    config = TimmTowerConfig(
        architecture="test_resnet",
        proj="none",
        preprocess={**plain, "padding": padding, "channel_order": "BGR", "value_range": [-1.0, 1.0]},
    )
    tower = TimmModel.from_config(config)
    with pytest.raises(ConfigError, match=r"padding.*BGR.*value_range"):
        export_timm(tower, tmp_path)
    written = export_timm(tower, tmp_path, preprocess="nearest")
    assert len(written.left_out) == 3
    data = resolve_data_config(timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg)
    assert data["mean"] == pytest.approx([(value + 1) / 2 for value in plain["mean"]])
    assert data["std"] == pytest.approx([value / 2 for value in plain["std"]])


def test_layers_that_json_cannot_name_are_refused(tmp_path: Path) -> None:
    tower = TimmModel("test_vit", proj="none", model_kwargs={"mlp_layer": timm.layers.SwiGLUPacked})
    with pytest.raises(ConfigError, match="holds no classes"):
        export_timm(tower, tmp_path / "exported")
    # one that timm knows by a name goes along
    named = TimmModel("test_vit", proj="none", pool="token", model_kwargs={"act_layer": nn.SiLU})
    check_export(named.eval(), tmp_path / "named")


def test_an_export_replaces_only_an_earlier_export(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", proj="none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"notes\.txt"):
        export_timm(tower, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    for _ in range(2):
        export_timm(tower, tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["config.json", "model.safetensors"]


# What CI runs: the classes that cost least, by measurement (together half a minute). The rest is for `-m wide`.
CHEAPEST = (
    "byobnet.ByobNet efficientnet.EfficientNet resnet.ResNet vision_transformer.VisionTransformer mambaout.MambaOut "
    "maxxvit.MaxxVit nfnet.NormFreeNet convnext.ConvNeXt starnet.StarNet "
    "vision_transformer_relpos.VisionTransformerRelPos mobilenetv3.MobileNetV3 cpubone.CPUBone "
    "efficientvit_mit.EfficientVit vovnet.VovNet edgenext.EdgeNeXt cspnext.CspNext regnet.RegNet cspnet.CspNet "
    "ghostnet.GhostNet repghost.RepGhostNet fasternet.FasterNet dla.DLA lcnetv2.LCNetV2 pit.PoolingVisionTransformer "
    "inception_next.MetaNeXt pvt_v2.PyramidVisionTransformerV2 hgnet.HighPerfGpuNet levit.LevitDistilled "
    "swiftformer.SwiftFormer iformer.IFormer rexnet.RexNet efficientformer_v2.EfficientFormerV2 "
    "deit.VisionTransformerDistilled resnetv2.ResNetV2 visformer.Visformer senet.SENet fastvit.FastVit dpn.DPN "
    "efficientvit_msra.EfficientVitMsra lowformer.LowFormer "
).split()


def test_twenty_classes_and_more_are_exported_where_ci_runs_the_slow_tests() -> None:
    assert len(set(CHEAPEST) & smallest_of_each_class().keys()) >= 24


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=key, marks=pytest.mark.slow if key in CHEAPEST else pytest.mark.wide)
        for key, name in smallest_of_each_class().items()
    ],
)
def test_every_model_class_is_exported(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    if size > 60_000_000:
        pytest.skip("too large for one thread")
    tower = TimmModel(name, pool="default", proj="none")
    shake(tower)
    check_export(tower, tmp_path)

"""Trunks as backbones of transformers' models of dense prediction: timm's feature maps, trained, saved, loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitMatteConfig,
    VitMatteForImageMatting,
)

from hf_timm_tower import (
    ConfigError,
    TimmModel,
    TimmTowerBackbone,
    TimmTowerModel,
    align_weights,
)
from hf_timm_tower.reader.freezing import has_frozen_statistics

from ..home_processes import make_environment
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
# Trunk -> its arguments, the side of its images, the stages that are taken.
TRUNKS: dict[str, tuple[dict[str, Any] | None, int, list[int]]] = {
    "test_resnet": (None, 64, [1, 2, 3, 4]),
    "test_convnext": (None, 64, [0, 1, 2, 3]),
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, 128, [0, 1, 2, 3]),
    "test_vit": (None, 64, [1, 3, 5]),
}
MATTING = {"convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [16, 8, 8, 8]}
SMALL = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 4, "num_labels": 3}
DETR = {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "num_attention_heads": 2,
    "dim_feedforward": 32,
}


def make_tower(architecture: str) -> TimmModel:
    model_kwargs, side, _ = TRUNKS[architecture]
    return TimmModel(architecture, 8, image_size=side, model_kwargs=model_kwargs)


def backbone_of(folder: Path, **kwargs: Any) -> TimmTowerBackbone:
    with pytest.warns(UserWarning, match=r"this model leaves out: head\.proj\.weight"):
        backbone: TimmTowerBackbone = TimmTowerBackbone.from_pretrained(folder, **kwargs)
    return backbone


def segmenter_on(backbone: TimmTowerBackbone) -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=16,
        pool_scales=[1, 2],
        num_labels=3,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone
    return model


def train(model: nn.Module, images: torch.Tensor) -> None:
    """Two steps on masks that follow from the images."""
    masks = (images.mean(dim=1) * 3).long().clamp(0, 2)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        model(images, labels=masks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


LOAD = """
import sys
import torch
import hf_timm_tower
from transformers import UperNetForSemanticSegmentation

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt")
    model, info = UperNetForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == expected["frozen"], frozen
    with torch.no_grad():
        maps = model.backbone(expected["images"]).feature_maps
        assert all(map(torch.equal, maps, expected["maps"])), folder
        assert torch.equal(model(expected["images"]).logits, expected["logits"]), folder
        model.backbone.train()(expected["images"])
    statistics = {name: buffer for name, buffer in model.backbone.named_buffers() if "running" in name}
    kept = [name for name, buffer in statistics.items() if torch.equal(buffer, expected["state"][f"backbone.{name}"])]
    assert {name.rpartition(".")[0] for name in kept} == expected["held"], (folder, kept)
    print("equal")
"""


def test_a_segmenter_on_each_kind_of_trunk_comes_back_bit_for_bit(
    tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    places = [*TRUNKS, "frozen"]
    for place in places:
        architecture = "test_resnet" if place == "frozen" else place
        _, side, indices = TRUNKS[architecture]
        tower = make_tower(architecture)
        if place == "frozen":
            tower.lock(unlocked_groups=1, freeze_bn_stats=True)
        tower.save_pretrained(tmp_path / "tower")
        backbone = backbone_of(tmp_path / "tower", out_indices=indices)
        model, images = segmenter_on(backbone), torch.rand(2, 3, side, side)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        train(model, images)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert bool(frozen) == (place == "frozen")
        assert not set(moved) & set(frozen)
        assert any(name.startswith("backbone.") for name in moved)
        model.save_pretrained(tmp_path / place)
        align_weights(tmp_path / place)
        with torch.no_grad():
            maps, logits = model.backbone(images).feature_maps, model(images).logits
        held = {name for name, module in backbone.named_modules() if has_frozen_statistics(module)}
        assert bool(held) == (place == "frozen")
        expected = {"images": images, "maps": maps, "logits": logits, "frozen": frozen, "held": held}
        torch.save({**expected, "state": model.state_dict()}, tmp_path / place / "expected.pt")
    printed = fresh_process(LOAD, *(tmp_path / place for place in places))
    assert printed.split() == ["equal"] * len(places)


@pytest.mark.parametrize("architecture", TRUNKS)
def test_feature_maps_are_those_of_timm(architecture: str, tmp_path: Path) -> None:
    tower = make_tower(architecture).eval()
    tower.save_pretrained(tmp_path)
    _, side, indices = TRUNKS[architecture]
    backbone = backbone_of(tmp_path, out_indices=indices)
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        maps = backbone(images).feature_maps
        timms = tower.trunk.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
        assert len(timms) == len(backbone.stage_names)
        assert all(map(torch.equal, maps, (timms[index] for index in indices)))
        assert [each.shape[1] for each in maps] == backbone.channels
        both = backbone(images, output_hidden_states=True)
        assert all(map(torch.equal, both.feature_maps, maps))
        assert all(map(torch.equal, both.hidden_states, timms))
        backbone.out_features = backbone.stage_names[-1:]
        assert backbone.out_indices == [len(timms) - 1]
        (last,) = backbone(images, return_dict=False)[0]
        assert torch.equal(last, timms[-1])


@pytest.mark.parametrize("outputs", [{"out_indices": (0, 9)}, {"out_indices": [2, 1]}, {"out_features": ["stage1"]}])
def test_stages_that_the_trunk_has_not_are_refused(outputs: dict[str, Any], tmp_path: Path) -> None:
    make_tower("test_resnet").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"stages 0 to 4; expected|no stage 'stage1'; there are act1, layer1, "):
        TimmTowerBackbone.from_pretrained(tmp_path, **outputs)


@pytest.mark.parametrize(("pool", "proj"), [("token_avg", "none"), ("map", "none"), ("token", None), ("none", "mlp")])
def test_a_backbone_saved_alone_is_a_tower_without_a_head(pool: str, proj: str | None, tmp_path: Path) -> None:
    tower = TimmModel("test_vit", None if proj == "none" else 8, image_size=64, pool=pool, proj=proj)
    tower.save_pretrained(tmp_path / "tower")
    backbone = TimmTowerBackbone.from_pretrained(tmp_path / "tower", out_indices=[1, 4])
    backbone.save_pretrained(tmp_path / "backbone")
    again = TimmTowerBackbone.from_pretrained(tmp_path / "backbone")
    assert again.out_indices == [1, 4]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, again(images).feature_maps, backbone(images).feature_maps))
        whole = TimmTowerModel.from_pretrained(tmp_path / "backbone")(images)
        assert torch.equal(whole.last_hidden_state, tower.eval().trunk.forward_features(images))


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_a_detector_and_a_mask_model_come_back(kind: str, tmp_path: Path) -> None:
    make_tower("test_resnet").save_pretrained(tmp_path / "tower")
    config = backbone_of(tmp_path / "tower", out_indices=[1, 2, 3, 4]).config
    model: Any
    if kind == "detr":
        model = DetrForObjectDetection(DetrConfig(backbone_config=config, use_timm_backbone=False, **SMALL, **DETR))
    else:
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, **SMALL, **MASK2FORMER))
    images = torch.rand(1, 3, 64, 64)
    model.eval().save_pretrained(tmp_path / kind)
    align_weights(tmp_path / kind)
    with torch.no_grad():
        expected, found = (each(images).to_tuple() for each in (model, type(model).from_pretrained(tmp_path / kind)))
    assert torch.equal(expected[0], found[0])


def test_norms_that_were_frozen_before_detr_froze_them_come_back(tmp_path: Path) -> None:
    tower = make_tower("test_resnet")
    tower.lock(1, freeze_bn_stats=True)
    tower.save_pretrained(tmp_path / "tower")
    assert "trunk.bn1" in (tower.config.frozen or {})["parameters"]
    config = backbone_of(tmp_path / "tower", out_indices=[4]).config
    built = DetrForObjectDetection(DetrConfig(backbone_config=config, use_timm_backbone=False, **SMALL, **DETR))
    built.save_pretrained(tmp_path / "detr")
    model = DetrForObjectDetection.from_pretrained(tmp_path / "detr")
    backbone = next(part for part in model.modules() if isinstance(part, TimmTowerBackbone))
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    open_before = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert frozen == {name for name, _ in backbone.named_parameters()} - open_before
    assert "trunk.conv1.0.weight" in frozen
    assert "trunk.bn1.weight" in backbone.state_dict()


def test_a_backbone_has_the_channels_of_its_images(tmp_path: Path) -> None:
    TimmModel("test_vit", 8, image_size=64, model_kwargs={"in_chans": 4}).save_pretrained(tmp_path)
    config = backbone_of(tmp_path).config
    matting = VitMatteForImageMatting(VitMatteConfig(backbone_config=config, hidden_size=64, **MATTING))
    with torch.no_grad():
        assert matting.eval()(torch.rand(1, 4, 64, 64)).alphas.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_an_offloaded_backbone_leaves_the_head_out_too(architecture: str, tmp_path: Path) -> None:
    make_tower(architecture).save_pretrained(tmp_path / "tower")
    # transformers 5.4 runs no model that is on disk as a whole.
    where: dict[str, Any] = {"device_map": {"trunk": "disk", "head": "cpu"}, "offload_folder": tmp_path / "kept"}
    images = torch.rand(1, 3, 64, 64)
    expected = backbone_of(tmp_path / "tower")(images).feature_maps
    with pytest.warns(UserWarning, match=r"weights that this model leaves out: head\."):
        backbone = TimmTowerBackbone.from_pretrained(tmp_path / "tower", **where)
    for _ in range(2):
        assert torch.allclose(backbone(images).feature_maps[0], expected[0], rtol=1e-5, atol=1e-6)


def test_activations_that_detr_takes_away_with_their_norms_are_missed(tmp_path: Path) -> None:
    TimmModel("test_efficientnet", 8, image_size=64).save_pretrained(tmp_path)
    config = backbone_of(tmp_path, out_indices=[1, 2, 3, 4]).config
    model = DetrForObjectDetection(DetrConfig(backbone_config=config, use_timm_backbone=False, **SMALL, **DETR))
    with pytest.raises(ConfigError, match=r"activation of trunk\.\S+ is gone"):
        model.eval()(torch.rand(1, 3, 64, 64))


# With transformers and timm alone.
ONLINE = """
import sys
import torch
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

torch.set_num_threads(1)
folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt")
backbone = AutoBackbone.from_pretrained("ann/tower", out_indices=[1, 2, 3, 4], trust_remote_code=True)
assert type(backbone).__module__.startswith("transformers_modules."), type(backbone)
with torch.no_grad():
    assert all(map(torch.equal, backbone(expected["images"]).feature_maps, expected["before"]))
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, use_auxiliary_head=False))
    assert type(model.backbone) is type(backbone)
    again = UperNetForSemanticSegmentation.from_pretrained(folder)
    assert type(again.backbone) is type(backbone)
    assert torch.equal(again(expected["images"]).logits, expected["logits"])
print("equal")
"""


def push_and_load(folder: str, images: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Runs in a process that talks to the loopback Hub: feature maps, and channels of another model's backbone."""
    TimmModel.from_pretrained(folder).push_to_hub("ann/tower")
    backbone = AutoBackbone.from_pretrained("ann/tower", out_indices=[1, 2, 3, 4])
    assert type(backbone) is TimmTowerBackbone
    config = UperNetConfig(backbone="ann/tower", backbone_kwargs={"out_indices": [1, 3]}, use_auxiliary_head=False)
    with torch.no_grad():
        return list(backbone(images).feature_maps), UperNetForSemanticSegmentation(config).backbone.channels


def test_from_a_repository_with_the_package_and_without_it(tmp_path: Path) -> None:
    make_tower("test_resnet").save_pretrained(tmp_path / "tower")
    backbone, images = backbone_of(tmp_path / "tower", out_indices=[1, 2, 3, 4]), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = [each.clone() for each in backbone(images).feature_maps]
    model = segmenter_on(backbone)
    train(model, images)
    model.save_pretrained(tmp_path / "segmenter")
    align_weights(tmp_path / "segmenter")
    with torch.no_grad():
        expected = {"images": images, "before": before, "logits": model(images).logits}
    torch.save(expected, tmp_path / "segmenter" / "expected.pt")
    environment = make_environment(tmp_path / "venv")
    with LocalHub(tmp_path / "hub") as hub:
        worker = HubWorker(hub.env(tmp_path / "pushing"))
        maps, channels = worker.call(push_and_load, str(tmp_path / "tower"), images)
        worker.close()
        assert all(map(torch.equal, maps, before))
        assert channels == [backbone.channels[0], backbone.channels[2]]
        printed = environment.run(ONLINE, tmp_path / "segmenter", env=hub.env(tmp_path / "cold"))
    assert printed.split() == ["equal"]

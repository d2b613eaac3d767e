"""What was saved is what is loaded, for every timm model class: in a fresh process, with every pool, in transformers.

Each class is built and saved once, and several tests look at it, one after the other: see tests/conftest.py. The quick
six are in the default suite; of the rest a run takes those that `timm_classes` chooses.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from transformers import AutoModel

from hf_timm_tower import TimmModel
from hf_timm_tower.reader.config import TimmTowerConfig
from hf_timm_tower.reader.skip_init import skip_init

from ..class_towers import ClassTower, build, build_and_save
from ..fresh import outputs_in_fresh_process
from ..interop.test_export import FORMATS, compare
from ..timm_classes import QUICK, chosen_part, chosen_turn, class_and_size, smallest_of_each_class

EVERY_CLASS = [
    pytest.param(architecture, id=name, marks=[] if architecture in QUICK else pytest.mark.slow)
    for name, architecture in smallest_of_each_class().items()
]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClassTower]:
    """The tower of a class, built and saved once for all tests of this file that look at it."""
    folder = tmp_path_factory.mktemp("class")
    yield build_and_save(request.param, folder / "tower")
    shutil.rmtree(folder)


@pytest.mark.parametrize("built", EVERY_CLASS, indirect=True)
def test_a_class_comes_back_bit_for_bit_in_a_fresh_process(built: ClassTower) -> None:
    (found,) = outputs_in_fresh_process([built.folder], built.images, built.folder.parent)
    assert torch.equal(found, built.expected)


@torch.no_grad()
def share_weights(tower: TimmModel, with_: TimmModel) -> None:
    """Give a tower without values those of another one, by key and shape; what only it has gets values of its own."""
    generator = torch.Generator().manual_seed(11)
    shared = with_.state_dict()
    for name, tensor in tower.state_dict().items():
        if name in shared and shared[name].shape == tensor.shape:
            tensor.copy_(shared[name])
        elif tensor.is_floating_point():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("running_var"):
                tensor.abs_().add_(1)
        else:
            tensor.zero_()


@pytest.mark.parametrize("built", EVERY_CLASS, indirect=True)
def test_a_class_is_built_again_with_every_further_pool(built: ClassTower) -> None:
    """The disk does not know of pools: config and weights make the same tower, without saving each."""
    assert len(built.pools) >= 2 or built.architecture not in QUICK
    pools = built.pools[1:] if built.architecture in QUICK else chosen_turn(built.pools[1:], 2)
    for pool, proj in pools:
        with skip_init():
            tower = build(built.architecture, pool, proj)
            share_weights(tower, built.tower)
            again = TimmModel.from_config(TimmTowerConfig.from_dict(json.loads(tower.config.to_json_string())))
        again.load_state_dict(tower.state_dict())
        with torch.no_grad():
            expected, found = tower.eval()(built.images[:1]), again.eval()(built.images[:1])
        assert torch.isfinite(expected).all(), f"{pool}: the comparison needs finite outputs"
        assert torch.equal(found, expected), f"{pool}: other bits"


@pytest.mark.parametrize("built", EVERY_CLASS, indirect=True)
def test_auto_model_gives_the_bits_of_a_class_with_and_without_inner_features(built: ClassTower) -> None:
    model = AutoModel.from_pretrained(built.folder)
    with torch.no_grad():
        found = [model(built.images).pooler_output]
        if hasattr(model.trunk, "forward_intermediates"):
            found.append(model(built.images, output_hidden_states=True).pooler_output)
    assert all(torch.equal(embedding, built.expected) for embedding in found)


# The classes whose two exports cost least, by measurement (together 9 minutes on one core). The rest is for `-m wide`.
CHEAP_TO_EXPORT = (
    "resnet.ResNet efficientnet.EfficientNet byobnet.ByobNet starnet.StarNet mambaout.MambaOut maxxvit.MaxxVit "
    "vovnet.VovNet vision_transformer.VisionTransformer fasternet.FasterNet nfnet.NormFreeNet cspnet.CspNet "
    "senet.SENet resnetv2.ResNetV2 regnet.RegNet convnext.ConvNeXt cspnext.CspNext "
    "vision_transformer_relpos.VisionTransformerRelPos lcnetv2.LCNetV2 dla.DLA mobilenetv3.MobileNetV3 "
    "inception_next.MetaNeXt efficientformer.EfficientFormer cpubone.CPUBone hgnet.HighPerfGpuNet selecsls.SelecSls "
    "swiftformer.SwiftFormer efficientvim.EfficientViM edgenext.EdgeNeXt metaformer.MetaFormer iformer.IFormer "
    "deit.VisionTransformerDistilled lowformer.LowFormer visformer.Visformer pit.PoolingVisionTransformer "
    "repghost.RepGhostNet efficientvit_mit.EfficientVit ghostnet.GhostNet xception_aligned.XceptionAligned "
    "fastvit.FastVit pvt_v2.PyramidVisionTransformerV2 tresnet.TResNet nest.Nest mlp_mixer.MlpMixer dpn.DPN "
    "efficientformer_v2.EfficientFormerV2 crossvit.CrossVit "
).split()


@pytest.mark.parametrize("how", chosen_turn(FORMATS, 2))
@pytest.mark.parametrize(
    "built",
    [
        pytest.param(architecture, id=name, marks=pytest.mark.slow if name in CHEAP_TO_EXPORT else pytest.mark.wide)
        for name, architecture in smallest_of_each_class().items()
    ],
    indirect=True,
)
def test_a_class_is_exported(how: str, built: ClassTower, tmp_path: Path) -> None:
    if sum(parameter.numel() for parameter in built.tower.parameters()) > 60_000_000:
        pytest.skip("too large for one thread")
    export, file, _ = FORMATS[how]
    export(built.tower, tmp_path / file, check=False)
    compare(built.tower, how, tmp_path / file)


def test_forty_classes_and_more_are_exported_by_the_full_sweep() -> None:
    assert len(set(CHEAP_TO_EXPORT) & smallest_of_each_class().keys()) >= 44


def test_the_quick_six_are_classes_of_this_timm() -> None:
    assert set(QUICK) <= set(smallest_of_each_class().values())


@pytest.mark.slow
def test_no_architecture_is_of_a_class_that_the_list_lacks_or_smaller_than_its_choice() -> None:
    listed = {key: (class_and_size(name)[1], name) for key, name in smallest_of_each_class().items()}
    for name in chosen_part(timm.list_models()):
        key, size = class_and_size(name)
        assert key in listed, f"{name}: the list lacks its class, write it anew: python -m tests.timm_classes"
        assert listed[key] <= (size, name)

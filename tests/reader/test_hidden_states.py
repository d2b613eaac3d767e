"""Hidden states, attention maps and other sizes, as callers of transformers ask for them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from packaging.version import Version
from timm.utils import AttentionExtract
from transformers import Dinov2Config, Dinov2Model

from hf_timm_tower import ArgumentError, ConfigError, TimmModel
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel
from hf_timm_tower.reader.hidden_states import forward_hidden

from ..timm_classes import smallest_of_each_class

SMALL_SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4), "window_size": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("test_vit", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"image_size": 64, "model_kwargs": SMALL_SWIN}),
    "convnext": ("test_convnext", {"image_size": 64}),
    "resnet": ("test_resnet", {"image_size": 64}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    for name, (architecture, arguments) in ARCHITECTURES.items():
        TimmModel(architecture, 8, **arguments).save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def loaded(folder: Path, **kwargs: Any) -> tuple[TimmTowerModel, torch.Tensor]:
    model = TimmTowerModel.from_pretrained(folder, **kwargs)
    return model, torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_hidden_state_is_timms_after_what_the_stem_gives(folders: dict[str, Path], name: str) -> None:
    model, images = loaded(folders[name])
    plain, full = model(images), model(images, output_hidden_states=True)
    assert plain.hidden_states is None
    assert torch.equal(full.pooler_output, plain.pooler_output)
    assert torch.equal(full.last_hidden_state, plain.last_hidden_state)
    if name == "vit":
        _, pairs = model.trunk.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")
        expected = [torch.cat([prefix, patches], dim=1) for patches, prefix in pairs]
        assert torch.equal(model.trunk.norm(full.hidden_states[-1]), full.last_hidden_state)
    else:
        _, expected = model.trunk.forward_intermediates(images)
    stem, *states = full.hidden_states
    if name == "resnet":  # timm's list begins with the stem
        stem, states = None, full.hidden_states
    assert len(states) == len(expected) == len(model.trunk.feature_info)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, expected, strict=True))
    blocks = {"vit": "blocks", "swin": "layers", "convnext": "stages"}
    if stem is not None:
        inputs = stem.permute(0, 2, 3, 1) if name == "swin" else stem
        again = getattr(model.trunk, blocks[name])[0](inputs)
        assert torch.equal(again.permute(0, 3, 1, 2) if name == "swin" else again, states[0])


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="older ones know no indices")
@torch.no_grad()
@pytest.mark.parametrize("wanted", [True, 2, -2, 0, [0], [1, -1], [], (3, 1), False])
def test_an_index_means_what_it_means_in_transformers(folders: dict[str, Path], wanted: Any) -> None:
    model, images = loaded(folders["vit"])
    tiny = {"hidden_size": 8, "num_attention_heads": 1, "image_size": 28, "patch_size": 14, "mlp_ratio": 1}
    peer = Dinov2Model(Dinov2Config(num_hidden_layers=len(model.trunk.blocks), **tiny)).eval()
    theirs = peer(torch.zeros(1, 3, 28, 28), output_hidden_states=wanted).hidden_states
    ours, full = model(images, output_hidden_states=wanted), model(images, output_hidden_states=True)
    if theirs is None:
        assert ours.hidden_states is None
        return
    assert [state is None for state in ours.hidden_states] == [state is None for state in theirs]
    pairs = zip(ours.hidden_states, full.hidden_states, strict=True)
    assert all(state is None or torch.equal(state, same) for state, same in pairs)


@pytest.mark.parametrize("wanted", [7, -8, [0, 7], "all", 1.5, [True]])
def test_an_index_of_no_layer_is_refused(folders: dict[str, Path], wanted: Any) -> None:
    model, images = loaded(folders["vit"])
    with pytest.raises(ArgumentError, match=r"output_hidden_states=.* 7 hidden states of this trunk, from -7 to 6"):
        model(images, output_hidden_states=wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture",
    ["pvt_v2_b0", "pit_ti_224", "crossvit_tiny_240", "levit_128s", "twins_svt_small", "visformer_tiny"],
)
def test_the_stem_of_other_trunks_is_in_the_form_of_their_layers(architecture: str) -> None:
    trunk = timm.create_model(architecture).eval()
    images = torch.randn(1, 3, *trunk.pretrained_cfg["input_size"][1:])
    features, states = forward_hidden(trunk, images, True)
    tokens = isinstance(features, torch.Tensor) and features.ndim == 3
    assert len(states) == len(trunk.feature_info) + 1
    assert {state.ndim for state in states} == {3 if tokens else 4}
    assert states[0].shape == states[1].shape
    assert all(torch.equal(one, same) for one, same in zip(states, forward_hidden(trunk, images, True)[1], strict=True))


@torch.no_grad()
@pytest.mark.wide
@pytest.mark.parametrize("architecture", smallest_of_each_class().values())
def test_every_class_gives_its_layers_after_its_stem(architecture: str) -> None:
    trunk = timm.create_model(architecture, num_classes=0).eval()
    if not hasattr(trunk, "forward_intermediates"):
        return
    images = torch.randn(1, *trunk.pretrained_cfg["input_size"])
    features, states = forward_hidden(trunk, images, True)
    _, expected = trunk.forward_intermediates(images)
    assert 0 <= len(states) - len(expected) <= 1
    assert {state.ndim for state in states} == {3 if getattr(features, "ndim", 4) == 3 else 4}
    for state, layer in zip(states[len(states) - len(expected) :], expected, strict=True):
        tokens = layer.flatten(2).transpose(1, 2)
        assert torch.equal(state, layer) if state.ndim == 4 else torch.equal(state[:, -tokens.shape[1] :], tokens)
    _, picked = forward_hidden(trunk, images, [0, -2])
    assert torch.equal(picked[0], states[0])
    assert torch.equal(picked[-2], states[-2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_attention_maps_are_those_that_timm_extracts(folders: dict[str, Path], name: str) -> None:
    model, images = loaded(folders[name], attn_implementation="eager")
    output = model(images, output_attentions=True, output_hidden_states=True)
    theirs = AttentionExtract(model.trunk)(images)
    assert len(output.attentions) == len(theirs) > 0
    assert all(torch.equal(ours, each) for ours, each in zip(output.attentions, theirs.values(), strict=True))
    assert torch.equal(output.pooler_output, model(images).pooler_output)
    assert len(output.to_tuple()) == 4
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()), "nothing stays behind"


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit", "test_convnext", "test_resnet"])
def test_recomputed_activations_are_the_same_hidden_states(architecture: str) -> None:
    trunk: Any = timm.create_model(architecture, num_classes=0).eval()
    images = torch.rand(1, 3, 64, 64)
    _, expected = forward_hidden(trunk, images, True)
    trunk.set_grad_checkpointing(True)
    _, found = forward_hidden(trunk, images, True)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_attention_maps_have_a_graph_and_leave_modes_alone(folders: dict[str, Path]) -> None:
    model = TimmTowerForImageClassification.from_pretrained(folders["vit"], num_labels=3, attn_implementation="eager")
    model.train()
    model.trunk.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    output = model(torch.randn(2, 3, *model.config.image_size), output_attentions=True)
    assert [part.training for part in model.modules()] == modes
    output.attentions[-1].square().sum().backward()
    assert model.trunk.blocks[0].attn.qkv.weight.grad is not None


def test_attention_maps_that_nothing_computes_are_refused_in_words(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["vit"])
    with pytest.raises(ConfigError, match=r"fused .*set_attn_implementation\('eager'\)"):
        model(images, output_attentions=True)
    for name in ("convnext", "resnet"):
        model, images = loaded(folders[name], attn_implementation="eager")
        with pytest.raises(ConfigError, match="no attention layers"):
            model(images, output_attentions=True)


@torch.no_grad()
def test_the_attention_implementation_changes_after_loading(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["vit"])
    eager, _ = loaded(folders["vit"], attn_implementation="eager")

    def flags(of: TimmTowerModel) -> set[bool]:
        return {part.fused_attn for part in of.trunk.modules() if hasattr(part, "fused_attn")}

    fused = model(images).pooler_output
    model.set_attn_implementation("eager")
    assert flags(model) == {False}
    assert torch.equal(model(images).pooler_output, eager(images).pooler_output)
    assert model(images, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    assert flags(model) == {True}
    assert torch.equal(model(images).pooler_output, fused)
    eager.config._attn_implementation = "sdpa"  # as the model does that it is nested in
    assert torch.equal(eager(images).pooler_output, fused)


@torch.no_grad()
def test_images_of_another_size_run_where_timm_can_and_are_refused_elsewhere(folders: dict[str, Path]) -> None:
    for name in ("vit", "convnext"):  # test_vit is built with dynamic_img_size
        model, images = loaded(folders[name])
        other = torch.nn.functional.interpolate(images, (96, 64))
        output = model(other, interpolate_pos_encoding=True)
        assert torch.equal(output.last_hidden_state, model.trunk.forward_features(other))
    model, images = loaded(folders["swin"])
    same = model(images, interpolate_pos_encoding=True)
    assert torch.equal(same.pooler_output, model(images).pooler_output)
    classifier = TimmTowerForImageClassification.from_pretrained(folders["swin"], num_labels=2)
    for face in (model, classifier):
        with pytest.raises(ArgumentError, match=r"interpolate_pos_encoding=True.* 96 x 64, but Swin.* 64 x 64"):
            face(torch.randn(1, 3, 96, 64), interpolate_pos_encoding=True)
        with pytest.raises(ArgumentError, match=r"^pixel_values are 96 x 64.*image_size="):
            face(torch.randn(1, 3, 96, 64))


@torch.no_grad()
def test_pooling_can_be_left_out(folders: dict[str, Path]) -> None:
    model, images = loaded(folders["resnet"])
    output, full = model(images, do_pooling=False), model(images, do_pooling=True)
    assert output.pooler_output is None
    assert torch.equal(output.last_hidden_state, full.last_hidden_state)
    assert torch.equal(full.pooler_output, model(images).pooler_output)

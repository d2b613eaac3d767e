"""The transformers models of a tower: what transformers tests of its own models, and the bits of `TimmModel`."""

import copy
import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, VisionTextDualEncoderModel

from hf_timm_tower import ArgumentError, ConfigError, HeadError, TimmModel, TimmTowerConfig, WeightsError, register_head
from hf_timm_tower.build import build_for_transformers
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel

from ..code_head import Looping

Towers = dict[str, Path]

# A map, tokens, and tokens with tables that no checkpoint holds (rotary positions; relative position indices).
ARCHITECTURES = {
    "cnn": ("test_resnet", {}),
    "vit": ("test_vit", {}),
    "rope": ("eva02_tiny_patch14_224", {"image_size": 56, "model_kwargs": {"depth": 2}}),
    "swin": ("swinv2_cr_tiny_ns_224", {"image_size": 64, "model_kwargs": {"depths": (1, 1, 1, 1), "window_size": 2}}),
}


class TwoHeads(nn.Module):
    """A head that returns a dict."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.a = nn.Linear(in_features, embed_dim)
        self.b = nn.Linear(in_features, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"embedding": self.a(x), "more": (self.b(x), self.a.weight.sum())}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """Folders of small towers, saved by `TimmModel`."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    folders = {}
    for name, (architecture, arguments) in ARCHITECTURES.items():
        tower = TimmModel(architecture, 16, proj="mlp" if name == "vit" else "linear", **arguments)
        with torch.no_grad():
            for parameter in tower.parameters():  # some start at 0, and would hide what lies behind them
                parameter.add_(0.05 * torch.randn_like(parameter))
        folders[name] = root / name
        tower.save_pretrained(folders[name])
    custom = TimmModel("test_resnet", 16, custom_head=nn.Sequential(nn.Linear(96, 16), nn.GELU(), nn.LayerNorm(16)))
    folders["custom"] = root / "custom"
    custom.save_pretrained(folders["custom"])
    return folders


def images_for(folder: Path, batch: int = 2) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    return torch.randn(batch, config["in_chans"], *config["image_size"], generator=torch.Generator().manual_seed(1))


def embedding(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What `TimmModel` gives, loaded from the folder."""
    with torch.no_grad():
        return TimmModel.from_pretrained(folder)(images)


def same_files(one: Path, other: Path) -> bool:
    """Whether the two folders hold the same files byte for byte, apart from the cards."""
    names = {file.relative_to(folder) for folder in (one, other) for file in folder.rglob("*") if file.is_file()}
    return all(
        (one / name).is_file() and (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)
        for name in names
        if name.name != "README.md"
    )


@pytest.mark.parametrize("name", [*ARCHITECTURES, "custom"])
def test_both_faces_give_the_same_bits_and_write_the_same_files(towers: Towers, name: str, tmp_path: Path) -> None:
    images = images_for(towers[name])
    model = TimmTowerModel.from_pretrained(towers[name])
    assert not model.training
    with torch.no_grad():
        output = model(images)
        features = TimmModel.from_pretrained(towers[name]).forward_features(images)
    assert torch.equal(output.pooler_output, embedding(towers[name], images))
    assert torch.equal(output.last_hidden_state, features)
    model.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "again", towers[name])
    assert torch.equal(embedding(tmp_path / "again", images), output.pooler_output)


def test_buffers_that_no_checkpoint_holds_are_right_and_the_test_can_fail(towers: Towers) -> None:
    for name in ("rope", "swin"):
        model = TimmTowerModel.from_pretrained(towers[name])
        found = dict(model.named_non_persistent_buffers())
        assert found, "these architectures have such buffers"
        real = dict(build_for_transformers(model.config, False, None).named_buffers())
        assert all(torch.equal(buffer, real[key]) for key, buffer in found.items())
        images = images_for(towers[name], 1)
        before = model(images).pooler_output
        for key, buffer in found.items():
            model.get_buffer(key).copy_(torch.zeros_like(buffer))
        assert not torch.equal(model(images).pooler_output, before)


@pytest.mark.parametrize("name", ["cnn", "rope", "swin"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nested_in_another_models_from_pretrained(
    towers: Towers, name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    both = dual_encoder(towers[name])
    both.save_pretrained(tmp_path)
    assert any(tensor.data_ptr() % 64 for tensor in load_file(tmp_path / "model.safetensors").values())
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path, dtype=dtype)
    assert not any(tensor.data_ptr() % 64 for tensor in loaded.vision_model.state_dict().values())
    images = images_for(towers[name])
    with torch.no_grad():
        inner = loaded.vision_model(pixel_values=images).pooler_output
        expected = TimmModel.from_pretrained(towers[name], dtype=dtype)(images.to(dtype or torch.float32))
        if dtype is None:
            assert torch.equal(
                loaded.get_image_features(pixel_values=images).pooler_output,
                both.get_image_features(pixel_values=images).pooler_output,
            )
    assert torch.equal(inner, expected)


def dual_encoder(folder: Path) -> VisionTextDualEncoderModel:
    text = BertModel(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    return VisionTextDualEncoderModel(vision_model=TimmTowerModel.from_pretrained(folder), text_model=text).eval()


def test_loading_info_and_what_is_missing_unexpected_or_of_another_shape(towers: Towers, tmp_path: Path) -> None:
    model, info = TimmTowerModel.from_pretrained(towers["cnn"], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    key, trunk_key = "head.proj.weight", next(name for name in weights if name.startswith("trunk."))
    wrong = {
        "missing": {name: tensor for name, tensor in weights.items() if name != key},
        "unexpected": {**weights, "head.other": torch.ones(3)},
        "another shape": {**weights, key: torch.ones(16, 95)},
    }
    for kind, state in wrong.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_bytes((towers["cnn"] / "config.json").read_bytes())
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=f"1 (of )?{kind}: head"):
            TimmTowerModel.from_pretrained(folder)
        with pytest.warns(UserWarning, match="head"):
            loose, info = TimmTowerModel.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
        assert info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]
        assert torch.equal(loose.state_dict()[trunk_key], weights[trunk_key])
        if kind != "unexpected":
            fresh = loose.head.proj.weight
            assert fresh.isfinite().all()
            assert 0 < fresh.std() < 1


def test_a_folder_is_loaded_as_it_was_saved(towers: Towers) -> None:
    with pytest.raises(ConfigError, match="pool='max'"):
        TimmTowerModel.from_pretrained(towers["cnn"], pool="max")
    with pytest.raises(TypeError, match="pol"):
        TimmTowerModel.from_pretrained(towers["cnn"], pol="max")


def test_a_fresh_model_keeps_timms_initialisation() -> None:
    config = TimmTowerConfig(architecture="test_vit", embed_dim=16)
    torch.manual_seed(0)
    expected = TimmModel.from_config(config)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    assert isinstance(model, TimmTowerModel)
    assert model.config.num_features == expected.config.num_features
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_config_comes_back(towers: Towers, tmp_path: Path) -> None:
    for folder in towers.values():
        config = TimmTowerConfig.from_pretrained(folder)
        assert config.architectures == ["TimmTowerModel"]
        assert config.hidden_size == config.embed_dim == 16
        again = TimmTowerConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        config.save_pretrained(tmp_path)
        assert TimmTowerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_tuple_holds_what_the_output_holds(towers: Towers) -> None:
    model, images = TimmTowerModel.from_pretrained(towers["vit"]), images_for(towers["vit"])
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        values = model(images, output_hidden_states=True, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.last_hidden_state)
    assert torch.equal(values[1], output.pooler_output)
    assert all(torch.equal(a, b) for a, b in zip(values[2], output.hidden_states, strict=True))


def test_heads_that_return_more_than_a_tensor_arrive_whole(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=None, custom_head=TwoHeads(96, 8)).eval()
    tower.save_pretrained(tmp_path)
    images = images_for(tmp_path)
    with torch.no_grad():
        found, expected = TimmTowerModel.from_pretrained(tmp_path)(images).pooler_output, tower(images)
    assert found.keys() == expected.keys()
    assert torch.equal(found["embedding"], expected["embedding"])
    assert isinstance(found["more"], tuple)
    assert torch.equal(found["more"][0], expected["more"][0])
    with pytest.raises(ConfigError, match="classifier"):
        TimmTowerForImageClassification.from_pretrained(tmp_path, num_labels=3)


def test_pixels_that_were_not_prepared_are_refused(towers: Towers) -> None:
    model, images = TimmTowerModel.from_pretrained(towers["cnn"]), images_for(towers["cnn"])
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        model((images * 50).to(torch.uint8))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(towers: Towers, device_map: Any) -> None:
    images = images_for(towers["swin"])
    model = TimmTowerModel.from_pretrained(towers["swin"], device_map=device_map)
    with torch.no_grad():
        assert torch.equal(model(images).pooler_output, embedding(towers["swin"], images))


@pytest.mark.parametrize("name", ["swin", "vit", "cnn"])  # vit: parameters of the trunk itself
def test_disk_offload_keeps_the_trunk_in_one_piece(towers: Towers, name: str, tmp_path: Path) -> None:
    images = images_for(towers[name])
    model = TimmTowerModel.from_pretrained(
        towers[name], device_map={"trunk": "disk", "head": "cpu"}, offload_folder=tmp_path
    )
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(model(images).pooler_output, embedding(towers[name], images), rtol=1e-5, atol=1e-6)
        assert model(images, output_hidden_states=True).hidden_states is not None
    assert all(parameter.is_meta for parameter in model.trunk.parameters())


def test_a_classifier_is_left_out_with_a_warning_where_transformers_reads_the_files(
    towers: Towers, tmp_path: Path
) -> None:
    model = TimmTowerForImageClassification.from_pretrained(towers["vit"], num_labels=3)
    model.save_pretrained(tmp_path / "tower")
    where = {"device_map": {"trunk": "disk", "head": "cpu"}, "offload_folder": tmp_path / "kept"}
    with pytest.warns(UserWarning, match=r"weights that this model leaves out: classifier\.bias"):
        TimmTowerModel.from_pretrained(tmp_path / "tower", **where)


def test_arguments_that_nobody_takes_are_named(towers: Towers) -> None:
    for model in (AutoModel, TimmTowerModel, TimmTowerForImageClassification):
        with pytest.raises(ArgumentError, match=r"unknown argument 'imagesize' \(did you mean image_size\?\)"):
            model.from_pretrained(towers["vit"], imagesize=96)
        with pytest.raises(ArgumentError, match=r"'drop_path'.*TimmModel\.from_pretrained takes drop_path"):
            model.from_pretrained(towers["vit"], drop_path=0.1)


@pytest.mark.parametrize("given", [{"image_size": "96"}, {"image_size": True}, {"pool": 3}, {"problem_type": "nope"}])
def test_values_of_another_kind_are_named(towers: Towers, given: dict[str, Any]) -> None:
    name, value = next(iter(given.items()))
    with pytest.raises(ConfigError, match=rf"{name}.*{value!r}"):
        AutoModel.from_pretrained(towers["vit"], **given)


def test_there_are_no_words_to_add(towers: Towers) -> None:
    with pytest.raises(ArgumentError, match="takes images and has no input embeddings"):
        TimmTowerModel.from_pretrained(towers["vit"]).resize_token_embeddings(10)


@pytest.mark.parametrize("name", ["cnn", "rope", "swin"])
def test_dtype(towers: Towers, name: str, tmp_path: Path) -> None:
    images = images_for(towers[name])
    model = TimmTowerModel.from_pretrained(towers[name], dtype="bfloat16")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = TimmModel.from_pretrained(towers[name], dtype=torch.bfloat16)(images.bfloat16())
        assert torch.equal(model(images).pooler_output, expected)
    # What is saved in half precision stays so, and the config does not speak of it.
    model.save_pretrained(tmp_path)
    assert "dtype" not in json.loads((tmp_path / "config.json").read_text())
    again = TimmTowerModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.head.proj.weight, model.head.proj.weight)


def test_parts_of_different_dtypes_keep_them(towers: Towers, tmp_path: Path) -> None:
    tower = TimmModel.from_pretrained(towers["custom"])
    tower.head[2].double()
    tower.head.insert(2, ToDouble())
    tower.save_pretrained(tmp_path)
    images = images_for(tmp_path)
    model = TimmTowerModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert model(images).pooler_output.dtype == torch.float64
        assert torch.equal(model(images).pooler_output, embedding(tmp_path, images))


class ToDouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_gradient_checkpointing_changes_memory_and_not_numbers(towers: Towers) -> None:
    images = images_for(towers["vit"])
    found = []
    for checkpoints in (False, True):
        model = TimmTowerModel.from_pretrained(towers["vit"]).train()
        assert model.supports_gradient_checkpointing
        if checkpoints:
            model._activation_checkpointing_enable() if hasattr(
                model, "_activation_checkpointing_enable"
            ) else model.gradient_checkpointing_enable()
        assert model.trunk.grad_checkpointing == checkpoints == model.gradient_checkpointing
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(images).pooler_output.square().sum()
        loss.backward()
        found.append((kept, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (plain, grads), (lean, again) = found
    assert lean < plain
    assert all(torch.allclose(grads[name], again[name], rtol=1e-4, atol=1e-6) for name in grads)
    with pytest.warns(UserWarning, match="use_reentrant=True: timm checkpoints without it; the gradients are the same"):
        model._set_gradient_checkpointing(True, _reentrant())
    assert model.gradient_checkpointing


def _reentrant() -> Callable[..., Any]:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, use_reentrant=True)


def test_attention_implementations(towers: Towers) -> None:
    images = images_for(towers["vit"])
    fused = TimmTowerModel.from_pretrained(towers["vit"], attn_implementation="sdpa")
    eager = TimmTowerModel.from_pretrained(towers["vit"], attn_implementation="eager")
    assert TimmTowerModel.from_pretrained(towers["vit"]).config._attn_implementation == "sdpa"
    flags = [module.fused_attn for module in fused.trunk.modules() if hasattr(module, "fused_attn")]
    assert flags
    assert all(flags)
    assert not any(module.fused_attn for module in eager.trunk.modules() if hasattr(module, "fused_attn"))
    with torch.no_grad():
        assert torch.allclose(fused(images).pooler_output, eager(images).pooler_output, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Flash Attention"):
        TimmTowerModel.from_pretrained(towers["vit"], attn_implementation="flash_attention_2")


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_compiles_in_one_graph(towers: Towers, name: str) -> None:
    model, images = TimmTowerModel.from_pretrained(towers[name]), images_for(towers[name])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images).pooler_output, model(images).pooler_output)


def test_a_copy_and_a_pickle_are_the_same_model(towers: Towers, tmp_path: Path) -> None:
    model, images = TimmTowerModel.from_pretrained(towers["rope"]), images_for(towers["rope"])
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            assert torch.equal(twin(images).pooler_output, model(images).pooler_output)


def test_gathered_weights_are_what_is_saved(towers: Towers, tmp_path: Path) -> None:
    model = TimmTowerModel.from_pretrained(towers["cnn"])
    state = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "yes", state_dict=state)
    assert torch.equal(load_file(tmp_path / "yes" / "head.safetensors")["head.proj.weight"], state["head.proj.weight"])
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    assert same_files(tmp_path / "own", towers["cnn"])


def test_a_registered_head_must_give_the_numbers_of_the_save(tmp_path: Path) -> None:
    @register_head("test-modeling-noisy")
    class Noisy(nn.Module):
        factor = 1.0

        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(int(x.detach().abs().sum() > 0)):  # a branch on values: cannot be stored as data
                x = self.linear(x) * self.factor
            return x

    TimmModel("test_resnet", 8, custom_head=Noisy(width=96)).save_pretrained(tmp_path)
    images = images_for(tmp_path)
    with torch.no_grad():
        assert torch.equal(TimmTowerModel.from_pretrained(tmp_path)(images).pooler_output, embedding(tmp_path, images))
    Noisy.factor = 2.0
    with pytest.raises(HeadError, match="other outputs"):
        TimmTowerModel.from_pretrained(tmp_path)


def test_a_head_stored_as_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    TimmModel("test_resnet", 8, custom_head=Looping).save_pretrained(tmp_path / "tower", include_code=True)
    images = images_for(tmp_path / "tower")
    with pytest.raises(HeadError, match="trust_remote_code=True"):
        TimmTowerModel.from_pretrained(tmp_path / "tower")
    model = TimmTowerModel.from_pretrained(tmp_path / "tower", trust_remote_code=True)
    with torch.no_grad():
        expected = TimmModel.from_pretrained(tmp_path / "tower", trust_remote_code=True)(images)
        assert torch.equal(model(images).pooler_output, expected)
    with pytest.raises(HeadError, match="include_code=True"):
        model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again", include_code=True)
    assert same_files(tmp_path / "again", tmp_path / "tower")


def test_a_subfolder(towers: Towers) -> None:
    model = TimmTowerModel.from_pretrained(towers["cnn"].parent, subfolder="cnn")
    images = images_for(towers["cnn"])
    with torch.no_grad():
        assert torch.equal(model(images).pooler_output, embedding(towers["cnn"], images))


def test_a_config_that_asks_for_more_than_its_files_hold_is_refused_before_it_is_built(
    towers: Towers, tmp_path: Path
) -> None:
    for file in towers["vit"].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {"depth": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="refused before it is built"):
        TimmTowerModel.from_pretrained(tmp_path)


def test_what_is_frozen_stays_frozen(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.lock(freeze_bn_stats=True)
    tower.save_pretrained(tmp_path / "tower")
    model = TimmTowerModel.from_pretrained(tmp_path / "tower").train()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in tower.named_parameters() if parameter.requires_grad} != set()
    assert all(name.startswith("head.") for name in trains)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(images_for(tmp_path / "tower")).pooler_output.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "tower")
    for opened in (
        TimmTowerModel.from_pretrained(tmp_path / "tower", frozen=False),
        AutoModel.from_pretrained(tmp_path / "tower", frozen=None),
    ):
        assert all(parameter.requires_grad for parameter in opened.parameters())
        assert opened.train().trunk.bn1.training
        assert opened.config.frozen is None
    with pytest.warns(UserWarning, match="fresh"):
        labelled = TimmTowerForImageClassification.from_pretrained(tmp_path / "tower", num_labels=2)
    assert labelled.classifier.weight.requires_grad
    labelled.save_pretrained(tmp_path / "labelled")
    again = TimmTowerForImageClassification.from_pretrained(tmp_path / "labelled")
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == {
        *trains, "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_a_tower_of_a_subclass_says_what_to_load_it_with(tmp_path: Path) -> None:
    class Special(TimmModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    Special("test_resnet", 8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Special"):
        TimmTowerModel.from_pretrained(tmp_path)

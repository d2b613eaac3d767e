"""Towers quantized while they are loaded: as close to float as transformers' own wrapper of the same trunk."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_timm_tower import ConfigError, TimmModel, WeightsError, register_head
from hf_timm_tower.interop import peft
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel

METHODS = ("bitsandbytes 8 bit", "bitsandbytes 4 bit", "quanto", "torchao")


def quantization(method: str, **skipped: Any) -> Any:
    """A configuration of 8 (or 4) bit weights; skips where its package is not installed."""
    pytest.importorskip("accelerate", reason="transformers quantizes with it")
    if method.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
        bits: dict[str, Any] = {"load_in_8bit": True} if "8" in method else {"load_in_4bit": True}
        return BitsAndBytesConfig(**bits, llm_int8_skip_modules=skipped.get("modules_to_not_convert"))
    if method == "quanto":
        pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
        return QuantoConfig(weights="int8", **skipped)
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig(), **skipped)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tower, and its trunk for `TimmWrapperModel`."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    tower = TimmModel("vit_tiny_patch16_224", 64, image_size=64, model_kwargs={"depth": 2})
    tower.save_pretrained(root / "tower")
    tower.export_timm(root / "wrapped")
    return root / "tower", root / "wrapped"


def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.float(), other.float()).min().item()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_tower_is_as_close_to_float_as_the_wrapped_trunk(method: str, folders: tuple[Path, Path]) -> None:
    tower, wrapped = folders
    exact = TimmTowerModel.from_pretrained(tower)
    model = AutoModel.from_pretrained(tower, quantization_config=quantization(method))
    peer = AutoModel.from_pretrained(wrapped, quantization_config=quantization(method))
    quantized = type(model.trunk.blocks[0].attn.qkv)
    assert quantized is type(peer.timm_model.blocks[0].attn.qkv)
    output = model(images())
    assert cosine(output.pooler_output, exact(images()).pooler_output) > (0.9 if "4" in method else 0.99)
    assert torch.allclose(output.last_hidden_state, peer(images()).last_hidden_state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_tower_is_neither_saved_nor_resized(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model = TimmTowerModel.from_pretrained(folders[0], quantization_config=quantization(method), image_size=64)
    with pytest.raises(WeightsError, match="a quantized tower is not saved"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ConfigError, match=r"image_size=96: the trunk is quantized"):
        model.set_input_size(96)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_classifier_is_left_out_of_quantization_or_refused(method: str, folders: tuple[Path, Path]) -> None:
    load, labels = TimmTowerForImageClassification.from_pretrained, {"num_labels": 3}
    skipping = quantization(method, modules_to_not_convert=["classifier"])
    with pytest.warns(UserWarning, match="fresh random weights"):
        model = load(folders[0], quantization_config=skipping, **labels)
    assert type(model.classifier) is torch.nn.Linear
    assert 0.01 < model.classifier.weight.float().std() < 0.04
    assert model(images()).logits.shape == (4, 3)
    if method != "torchao":  # which leaves alone what is not in the files
        with pytest.raises(ConfigError, match=r"modules_to_not_convert=\['classifier'\]"):
            load(folders[0], quantization_config=quantization(method), **labels)


@pytest.mark.parametrize("method", METHODS[:2])
def test_adapters_train_on_a_quantized_tower_and_come_back(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    load = partial(TimmTowerModel.from_pretrained, folders[0], quantization_config=quantization(method))
    model = peft.add_lora(load()).train()
    trained = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    layers = {name.partition(".lora_")[0].rpartition("blocks.")[2] for name in trained if "lora_" in name}
    assert layers == {f"{n}.{name}" for n in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert any("head" in name for name in trained)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
    for _ in range(2):  # the first moves one of two factors
        model(images()).pooler_output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, old in trained.items() if torch.equal(old, model.get_parameter(name))] == []
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = peft.load_lora(load(), tmp_path).eval()
        assert torch.equal(again(images()).pooler_output, model(images()).pooler_output)


def test_a_quantized_head_that_should_train_is_refused(tmp_path: Path) -> None:
    TimmModel("test_vit", 16, proj="mlp", image_size=64).save_pretrained(tmp_path)
    packed = TimmTowerModel.from_pretrained(tmp_path, quantization_config=quantization(METHODS[1]))
    with pytest.raises(ConfigError, match=r"fc1.weight is quantized .* llm_int8_skip_modules=\['head'\]"):
        peft.add_lora(packed)


@register_head("quantized_twin")
class Twin(torch.nn.Linear):
    """A head by name, whose outputs a load compares with those of the save."""


@torch.no_grad()
def test_a_registered_head_is_not_held_to_the_outputs_before_quantization(tmp_path: Path) -> None:
    TimmModel("vit_tiny_patch16_224", custom_head="quantized_twin", embed_dim=8, pool="token", image_size=64,
              model_kwargs={"depth": 1}).save_pretrained(tmp_path)  # fmt: skip
    model = TimmTowerModel.from_pretrained(tmp_path, quantization_config=quantization("torchao"))
    exact = TimmTowerModel.from_pretrained(tmp_path)
    assert cosine(model(images()).pooler_output, exact(images()).pooler_output) > 0.99

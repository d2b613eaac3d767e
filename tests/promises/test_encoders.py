"""Trunks as encoders of tokens in transformers' models of two parts: trained, run, saved, loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
)

from hf_timm_tower import (
    ConfigError,
    TimmModel,
    TimmTowerConfig,
    TimmTowerEncoder,
    TimmTowerEncoderConfig,
    TimmTowerModel,
    align_weights,
)

SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
# Trunk -> its arguments; all at 64 pixels.
TRUNKS = {
    "test_vit": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "test_convnext": {},
}
IMAGE_TOKEN = 49
WORDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of towers, by their trunks, with embeddings of width 12."""
    root = tmp_path_factory.mktemp("towers")
    for architecture, model_kwargs in TRUNKS.items():
        tower = TimmModel(architecture, 12, image_size=64, model_kwargs=model_kwargs)
        tower.save_pretrained(root / architecture)
    return root


def encoder_of(folder: Path) -> TimmTowerEncoder:
    with pytest.warns(UserWarning, match=r"this model leaves out: head\.proj\.weight"):
        encoder: TimmTowerEncoder = TimmTowerEncoder.from_pretrained(folder)
    return encoder


def make_decoder(width: int = 32, **more: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=1, n_head=2, add_cross_attention=True, **WORDS, **more))


def make_captioner(encoder: Any) -> VisionEncoderDecoderModel:
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=make_decoder())
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 2
    return model


def make_llava(folder: Path, **options: Any) -> LlavaForConditionalGeneration:
    encoder = encoder_of(folder)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **WORDS
    )
    config = LlavaConfig(
        vision_config=encoder.config, text_config=text, image_token_index=IMAGE_TOKEN, pad_token_id=2, **options
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = encoder
    return model


def prompt(model: LlavaForConditionalGeneration, count: int) -> dict[str, torch.Tensor]:
    """As many image tokens as the model's processor would put in, and three words."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    whole = model.config.vision_feature_select_strategy == "full"
    prefix = getattr(model.model.vision_tower.tower.trunk, "num_prefix_tokens", 0)
    ids = [IMAGE_TOKEN] * (tokens + (prefix if whole else prefix - 1)) + [5, 6, 7]
    return {"input_ids": torch.tensor([ids] * count), "attention_mask": torch.ones(count, len(ids), dtype=torch.long)}


def train(model: Any, **inputs: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


LOAD = """
import sys
import torch
import transformers
import hf_timm_tower

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt")
    inputs = expected["inputs"]
    model, info = getattr(transformers, expected["class"]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == expected["frozen"], folder
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"]), folder
        inputs.pop("decoder_input_ids", None)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected["generated"]), folder
    print("equal")
"""


def save_with_outputs(model: Any, folder: Path, **inputs: torch.Tensor) -> None:
    model.save_pretrained(folder)
    align_weights(folder)
    with torch.no_grad():
        logits = model(**inputs).logits
        given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        generated = model.generate(**given, max_new_tokens=4, do_sample=False)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    expected = {"class": type(model).__name__, "inputs": inputs, "logits": logits, "generated": generated}
    torch.save({**expected, "frozen": frozen}, folder / "expected.pt")


def test_captioners_and_llavas_train_generate_and_come_back(
    towers: Path, tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    images, words = torch.rand(2, 3, 64, 64), torch.tensor([[0, 5, 6], [0, 7, 8]])
    for architecture in TRUNKS:
        model: Any = make_captioner(encoder_of(towers / architecture))
        train(model, pixel_values=images, labels=words)
        save_with_outputs(model, tmp_path / f"captioner-{architecture}", pixel_values=images, decoder_input_ids=words)
    model = make_captioner(TimmTowerModel.from_pretrained(towers / "test_vit"))
    train(model, pixel_values=images, labels=words)
    save_with_outputs(model, tmp_path / "captioner-tower", pixel_values=images, decoder_input_ids=words)
    locked = TimmModel.from_pretrained(towers / "test_vit")
    locked.lock(unlocked_groups=2)
    locked.save_pretrained(tmp_path / "locked")
    model = make_captioner(encoder_of(tmp_path / "locked"))
    shutil.rmtree(tmp_path / "locked")
    assert not model.encoder.tower.trunk.blocks[0].attn.qkv.weight.requires_grad
    train(model, pixel_values=images, labels=words)
    save_with_outputs(model, tmp_path / "captioner-locked", pixel_values=images, decoder_input_ids=words)
    full = {"vision_feature_select_strategy": "full"}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "second last": ("test_vit", {"vision_feature_layer": -2}),
        "two layers": ("test_vit", {"vision_feature_layer": [-3, -1], **full}),
        "swin": ("swin_tiny_patch4_window7_224", {"vision_feature_layer": -1, **full}),
        "convnext": ("test_convnext", {"vision_feature_layer": -1, **full}),
    }
    for name, (architecture, options) in kinds.items():
        model = make_llava(towers / architecture, **options)
        inputs = {"pixel_values": images, **prompt(model, 2)}
        before = next(model.model.vision_tower.parameters()).clone()
        train(model, **inputs, labels=inputs["input_ids"])
        assert not torch.equal(before, next(model.model.vision_tower.parameters()))
        save_with_outputs(model, tmp_path / name, **inputs)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == len(TRUNKS) + 2 + len(kinds)
    assert fresh_process(LOAD, *folders).split() == ["equal"] * len(folders)


@pytest.mark.parametrize("architecture", TRUNKS)
def test_tokens_are_those_of_timm(architecture: str, towers: Path) -> None:
    encoder, tower = encoder_of(towers / architecture), TimmModel.from_pretrained(towers / architecture)
    images, trunk = torch.rand(2, 3, 64, 64), tower.trunk
    with torch.no_grad():
        found, features = encoder(images, output_hidden_states=True), trunk.forward_features(images)
        maps = trunk.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    assert len(found.hidden_states) == encoder.config.num_hidden_layers + 1
    for state, timms in zip(found.hidden_states[1:], maps, strict=True):
        patches = state[:, getattr(trunk, "num_prefix_tokens", 0) :]
        assert torch.equal(patches, timms.flatten(2).transpose(1, 2))
    expected = features
    if features.ndim == 4:
        channels = features.shape.index(trunk.num_features)
        expected = features.flatten(1, 2) if channels == 3 else features.flatten(2).transpose(1, 2)
    assert torch.equal(found.last_hidden_state, expected)
    assert found.last_hidden_state.shape[2] == encoder.config.hidden_size
    some = encoder(images, output_hidden_states=[-2]).hidden_states
    assert [place for place, state in enumerate(some) if state is not None] == [len(some) - 2]
    assert torch.equal(some[-2], found.hidden_states[-2])


def test_the_config_says_what_others_ask(towers: Path) -> None:
    config = TimmTowerEncoderConfig.from_pretrained(towers / "test_vit")
    trunk = TimmModel("test_vit", 12, image_size=64).trunk
    assert config.hidden_size == trunk.embed_dim
    assert (config.image_size, config.num_channels) == (64, 3)
    assert (config.patch_size,) * 2 == trunk.patch_embed.patch_size
    assert config.num_hidden_layers == len(trunk.blocks)
    assert config.num_attention_heads == trunk.blocks[0].attn.num_heads
    fresh = TimmTowerEncoderConfig(tower_config=TimmTowerConfig(architecture="test_vit", embed_dim=12, image_size=64))
    differ = {name for name, value in config.to_dict().items() if fresh.to_dict()[name] != value}
    assert differ <= {"tower_config", "transformers_version"}
    assert TimmTowerConfig.from_pretrained(towers / "test_vit").hidden_size == 12, "a dual encoder needs it so"
    swin = TimmTowerEncoderConfig.from_pretrained(towers / "swin_tiny_patch4_window7_224")
    assert (swin.patch_size, swin.hidden_size, swin.num_attention_heads) == (32, 16 * 8, None)
    with pytest.raises(ConfigError, match="image_size=128: it follows from tower_config and is 64"):
        TimmTowerEncoderConfig.from_pretrained(towers / "test_vit", image_size=128)
    edited = TimmTowerEncoderConfig(**{**config.to_dict(), "hidden_size": 32})
    with pytest.raises(ConfigError, match="hidden_size=32: the trunk has 64"):
        TimmTowerEncoder(edited)
    with pytest.raises(ConfigError, match="without tower_config"):
        TimmTowerEncoder(TimmTowerEncoderConfig())


def test_an_encoder_saved_alone_comes_back_through_the_auto_classes(towers: Path, tmp_path: Path) -> None:
    encoder, images = encoder_of(towers / "test_vit"), torch.rand(1, 3, 64, 64)
    encoder.save_pretrained(tmp_path)
    again, config = AutoModel.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert (type(again), type(config)) == (TimmTowerEncoder, TimmTowerEncoderConfig)
    assert config.hidden_size == encoder.config.hidden_size
    with torch.no_grad():
        assert torch.equal(again(images).last_hidden_state, encoder(images).last_hidden_state)
    with pytest.raises(ConfigError, match="image_size=96: it follows from"):
        TimmTowerEncoder.from_pretrained(tmp_path, image_size=96)
    half = TimmTowerEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("width", [12, 64, 32])
def test_one_tower_is_the_encoder_of_a_decoder_and_half_of_a_dual_encoder(width: int, towers: Path) -> None:
    """Where the decoder is as wide as the embedding, as the tokens, or as neither."""
    tower, images = TimmTowerModel.from_pretrained(towers / "test_vit"), torch.rand(1, 3, 64, 64)
    captioner = VisionEncoderDecoderModel(encoder=tower, decoder=make_decoder(width))
    with torch.no_grad():
        captioner(pixel_values=images, decoder_input_ids=torch.ones(1, 3, dtype=torch.long))
    assert captioner.encoder.config.hidden_size == 64
    assert captioner.config.encoder.to_dict() == tower.config.to_dict()
    text = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    both = VisionTextDualEncoderModel(vision_model=tower, text_model=text)
    assert both.visual_projection.in_features == both.config.vision_config.hidden_size == 12
    with torch.no_grad():
        assert both.get_image_features(pixel_values=images).pooler_output.shape == (1, both.projection_dim)


def test_another_size_resamples_the_trunk_and_its_config_says_so(towers: Path) -> None:
    with pytest.warns(UserWarning, match="leaves out"):
        encoder = TimmTowerEncoder.from_pretrained(towers / "test_vit", image_size=96)
    tower = TimmModel.from_pretrained(towers / "test_vit", image_size=96)
    assert encoder.config.image_size == 96
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(encoder(images).last_hidden_state, tower.trunk.forward_features(images))


def test_what_is_set_on_the_whole_reaches_the_trunk(towers: Path) -> None:
    model, images = make_captioner(encoder_of(towers / "test_vit")), torch.rand(1, 3, 64, 64)
    trunk = model.encoder.tower.trunk
    model.gradient_checkpointing_enable()
    assert trunk.grad_checkpointing
    model.gradient_checkpointing_disable()
    assert not trunk.grad_checkpointing
    if Version(transformers.__version__) < Version("5.24"):  # 5.4 would tell the encoder and not what is in it
        model.encoder.set_attn_implementation("eager")
    else:
        model.set_attn_implementation({"encoder": "eager"})
    given = {"pixel_values": images, "decoder_input_ids": torch.tensor([[0, 5]])}
    maps = model.encoder(images, output_attentions=True).attentions
    assert len(maps) == len(trunk.blocks)
    states = model.eval()(**given, output_hidden_states=True).encoder_hidden_states
    assert len(states) == len(trunk.blocks) + 1


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit"])
def test_there_are_as_many_layers_as_hidden_states_after_the_first(architecture: str, tmp_path: Path) -> None:
    TimmModel(architecture, 12, image_size=64).save_pretrained(tmp_path)
    encoder = encoder_of(tmp_path).eval()
    states = encoder(torch.rand(1, 3, 64, 64), output_hidden_states=True).hidden_states
    assert encoder.config.num_hidden_layers == len(states) - 1


def test_what_is_no_tower_is_named_as_an_encoder_too(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match=r"seems to be a timm model: TimmModel\.from_timm"):
        TimmTowerEncoder.from_pretrained(tmp_path)

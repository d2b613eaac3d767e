"""Dense features, inner layers, and towers inside larger models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoBackbone,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    ConvNextBackbone,
    Dinov2Backbone,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TimmBackbone,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
)

import hf_timm_tower
from hf_timm_tower import TimmModel

from .models import SIZE, DiffersError, images, same, there

TEXT = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def _backbone(model: Any, load: Callable[[str], Any]) -> str:
    maps = model(images()).feature_maps
    if [each.shape[1] for each in maps] != list(model.channels) or any(each.ndim != 4 for each in maps):
        raise DiffersError("channels are not those of the maps")
    model.save_pretrained("again")
    for ours, theirs in zip(maps, load("again")(images()).feature_maps, strict=True):
        same(theirs, ours, "a map after saving")
    return f"{len(maps)} maps, the same after saving"


def _ours() -> Any:
    return there(hf_timm_tower, "TimmTowerBackbone")


def backbone_resnet(d: Path) -> str:
    return _backbone(_ours().from_pretrained(d / "resnet", out_indices=[1, 2, 3]), _ours().from_pretrained)


def backbone_vit(d: Path) -> str:
    return _backbone(_ours().from_pretrained(d / "vit", out_indices=[1, 2]), _ours().from_pretrained)


def backbone_timm(d: Path) -> str:
    config = TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3], use_pretrained_backbone=False)
    return _backbone(AutoBackbone.from_config(config).eval(), TimmBackbone.from_pretrained)


def backbone_dinov2(d: Path) -> str:
    load = Dinov2Backbone.from_pretrained
    return _backbone(load(d / "dinov2", out_indices=[1, 2]), load)


def auto_backbone(d: Path) -> str:
    return _backbone(AutoBackbone.from_pretrained(str(d / "vit"), out_indices=[1, 2]), AutoBackbone.from_pretrained)


def auto_backbone_dinov2(d: Path) -> str:
    return _backbone(AutoBackbone.from_pretrained(str(d / "dinov2"), out_indices=[1, 2]), AutoBackbone.from_pretrained)


def _upernet(loaded: Any) -> str:
    config = UperNetConfig(
        backbone_config=loaded.config,
        hidden_size=16,
        auxiliary_in_channels=loaded.channels[-1],
        auxiliary_channels=8,
        use_auxiliary_head=False,
        pool_scales=[1, 2],
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(loaded.state_dict())
    loss = model(images(), labels=torch.randint(0, 3, (2, SIZE, SIZE))).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval().save_pretrained("upernet")
    again = UperNetForSemanticSegmentation.from_pretrained("upernet")
    same(again(images()).logits, model(images()).logits, "the masks after saving", 1e-6)
    return "a step, saved, the same masks"


def upernet(d: Path) -> str:
    return _upernet(_ours().from_pretrained(d / "resnet", out_indices=[1, 2, 3, 4]))


def upernet_peer(d: Path) -> str:
    return _upernet(ConvNextBackbone.from_pretrained(d / "convnext_hf", out_indices=[1, 2, 3, 4]))


def _hidden(model: torch.nn.Module, pixels: torch.Tensor, wanted: object) -> tuple[torch.Tensor, ...]:
    return model(pixels, output_hidden_states=wanted).hidden_states


def hidden_true(d: Path) -> str:
    model, tower = AutoModel.from_pretrained(d / "vit"), TimmModel.from_pretrained(d / "vit")
    found = _hidden(model, images(), True)
    inner = tower.forward_intermediates(images(), output_fmt="NLC", output_extra_tokens=True)
    depth = len(inner["image_intermediates"])
    if len(found) != depth + 1:
        raise DiffersError(f"{len(found)} states of {depth} blocks, without the embedding layer")
    last = torch.cat([inner["image_intermediates_prefix"][-1], inner["image_intermediates"][-1]], dim=1)
    same(found[-1], last, "the last state")
    return f"{len(found)} of {depth} blocks and the embedding, [B, N, C]"


def hidden_true_peer(d: Path) -> str:
    found = _hidden(AutoModel.from_pretrained(d / "dinov2"), images(), True)
    return f"{len(found)} of 3 blocks and the embedding, [B, N, C]" if found[0].ndim == 3 else "maps"


def hidden_list(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit")
    every, some = _hidden(model, images(), True), _hidden(model, images(), [1, -1])
    if len(some) != len(every):
        raise DiffersError(f"a list of {len(some)}: the indices are not those of the full tuple")
    for index in (1, -1):
        same(some[index], every[index], f"state {index}")
    return "the tuple keeps its length"


def hidden_list_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "wrapper")
    every, some = _hidden(model, images(160), True), _hidden(model, images(160), [1, -1])
    if len(some) != len(every):
        raise DiffersError(f"a list of {len(some)}: the indices are not those of the full tuple")
    return "the tuple keeps its length"


def attentions(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit", attn_implementation="eager")
    found = model(images(), output_attentions=True).attentions
    same(found[0].sum(-1), torch.ones_like(found[0].sum(-1)), "the sum of a row", 1e-5)
    return f"{len(found)} layers"


def attentions_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "dinov2", attn_implementation="eager")
    found = model(images(), output_attentions=True).attentions
    same(found[0].sum(-1), torch.ones_like(found[0].sum(-1)), "the sum of a row", 1e-5)
    return f"{len(found)} layers"


def set_attention(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit")
    model.set_attn_implementation("eager")
    fused = {part.fused_attn for part in model.modules() if hasattr(part, "fused_attn")}
    if fused != {False}:
        raise DiffersError("the layers are as before")
    return ""


def set_attention_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "dinov2")
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise DiffersError("the layers are as before")
    return ""


def do_pooling(d: Path) -> str:
    output = AutoModel.from_pretrained(d / "vit")(images(), do_pooling=False)
    return "no pooler_output" if output.pooler_output is None else "taken"


def do_pooling_peer(d: Path) -> str:
    output = AutoModel.from_pretrained(d / "wrapper")(images(160), do_pooling=False)
    return "no pooler_output" if output.pooler_output is None else "taken"


def _encoder_decoder(encoder: torch.nn.Module, width: int) -> str:
    text = BertConfig(**{**TEXT, "hidden_size": 32}, is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(text))
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 0
    labels = torch.randint(1, 32, (2, 5))
    model.train()
    model(pixel_values=images(), labels=labels).loss.backward()
    model.eval().generate(images(), max_new_tokens=3)
    model.save_pretrained("pair")
    again = VisionEncoderDecoderModel.from_pretrained("pair")
    same(
        again(pixel_values=images(), labels=labels).logits, model(pixel_values=images(), labels=labels).logits, "logits"
    )
    return f"trains, generates, the same after saving (tokens of width {width})"


def _our_encoder(d: Path) -> torch.nn.Module:
    cls = there(hf_timm_tower, "TimmTowerEncoder")
    return cls.from_pretrained(d / "vit")


def encoder_decoder(d: Path) -> str:
    return _encoder_decoder(_our_encoder(d), 64)


def encoder_decoder_peer(d: Path) -> str:
    return _encoder_decoder(AutoModel.from_pretrained(d / "dinov2"), 32)


def _llava(vision: object, tokens: int) -> str:
    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[31] * tokens, 2]])
    pixels = images(count=1)
    logits = model(input_ids=ids, pixel_values=pixels).logits
    model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    model.save_pretrained("llava")
    again = LlavaForConditionalGeneration.from_pretrained("llava")
    same(again(input_ids=ids, pixel_values=pixels).logits, logits, "logits")
    return "generates, the same after saving"


def llava(d: Path) -> str:
    return _llava(_our_encoder(d).config, (SIZE // 16) ** 2)


def llava_peer(d: Path) -> str:
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=16)
    return _llava(vision, (SIZE // 16) ** 2)


def _dual(folder: Path) -> str:
    text = BertModel(BertConfig(**TEXT))
    text.save_pretrained("text")
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(str(folder), "text").eval()
    ids = torch.tensor([[1, 2, 3]])
    model.save_pretrained("dual")
    again = VisionTextDualEncoderModel.from_pretrained("dual")
    found, expected = (each(input_ids=ids, pixel_values=images()).image_embeds for each in (again, model))
    same(found, expected, "the embedding after saving")
    return "the same after saving"


def dual(d: Path) -> str:
    return _dual(d / "vit")


def dual_peer(d: Path) -> str:
    return _dual(d / "dinov2")


AUTO_BACKBONE = "AutoBackbone.from_pretrained(a folder)"
ROWS = [
    ("dense", "a ResNet as a backbone, out_indices=[1, 2, 3]", backbone_resnet,
     "TimmBackbone, of the same trunk", backbone_timm),
    ("dense", "a ViT as a backbone, out_indices=[1, 2]", backbone_vit, "Dinov2Backbone",
     backbone_dinov2),
    ("dense", AUTO_BACKBONE, auto_backbone, "Dinov2Backbone", auto_backbone_dinov2),
    ("dense", "UperNetForSemanticSegmentation on it, a step, saved and loaded", upernet, "ConvNextBackbone",
     upernet_peer),
    ("layers", "model(pixels, output_hidden_states=True)", hidden_true, "Dinov2Model", hidden_true_peer),
    ("layers", "model(pixels, output_hidden_states=[1, -1])", hidden_list, "TimmWrapperModel", hidden_list_peer),
    ("layers", "model(pixels, output_attentions=True)", attentions, "Dinov2Model", attentions_peer),
    ("layers", "model.set_attn_implementation('eager')", set_attention, "Dinov2Model", set_attention_peer),
    ("layers", "model(pixels, do_pooling=False)", do_pooling, "TimmWrapperModel", do_pooling_peer),
    ("inside", "VisionEncoderDecoderModel", encoder_decoder, "Dinov2Model", encoder_decoder_peer),
    ("inside", "LlavaForConditionalGeneration", llava, "Dinov2Model", llava_peer),
    ("inside", "VisionTextDualEncoderModel.from_vision_text_pretrained", dual, "Dinov2Model", dual_peer),
]  # fmt: skip

"""Another input size, images of any kind and aspect, and the processor."""

from pathlib import Path

import numpy as np
import timm
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    pipeline,
)

from hf_timm_tower import TimmModel

from .models import SIZE, TIMM_SIZE, DiffersError, images, picture, same

BIG = 96


def _resampled(d: Path) -> torch.Tensor:
    """What the tower gives at another size by timm's own resampling."""
    tower = TimmModel.from_pretrained(d / "vit")
    tower.trunk.set_input_size(img_size=(BIG, BIG))
    return tower(images(BIG))


def auto_size(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit", image_size=BIG)
    same(model(images(BIG)).pooler_output, _resampled(d), "the embedding")
    return f"{BIG} pixels, as timm resamples"


def auto_size_wrapper(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "wrapper", model_args={"img_size": BIG})
    trunk = timm.create_model("test_vit", num_classes=0)
    plain = AutoModel.from_pretrained(d / "wrapper").timm_model.state_dict()
    trunk.load_state_dict(plain)
    trunk.set_input_size(img_size=BIG)
    same(model(images(BIG)).last_hidden_state, trunk.eval().forward_features(images(BIG)), "the tokens")
    return "as timm resamples"


def own_size(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit", image_size=SIZE)
    same(model(images()).pooler_output, TimmModel.from_pretrained(d / "vit")(images()), "the embedding")
    return ""


def own_size_dinov2(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "dinov2", image_size=SIZE)
    same(model(images()).pooler_output, AutoModel.from_pretrained(d / "dinov2")(images()).pooler_output, "the output")
    return ""


def tower_size(d: Path) -> str:
    same(TimmModel.from_pretrained(d / "vit", image_size=BIG)(images(BIG)), _resampled(d), "the embedding")
    return "config and transform follow"


def open_clip_size(d: Path) -> str:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": SIZE},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
    }
    model = open_clip.model.CustomTextCLIP(**config)
    model.visual.set_input_size(BIG)
    model.visual(images(BIG))
    return "config and transform do not follow"


def pipeline_size(d: Path) -> str:
    run = pipeline("image-feature-extraction", model=str(d / "vit"), model_kwargs={"image_size": BIG}, pool=True)
    found = torch.tensor(run(picture()))
    tower = TimmModel.from_pretrained(d / "vit", image_size=BIG)
    expected = tower(tower.transform()(picture())[None])
    same(found, expected, "the embedding", 1e-5)
    return ""


def pipeline_size_dinov2(d: Path) -> str:
    run = pipeline("image-feature-extraction", model=str(d / "dinov2"), model_kwargs={"image_size": BIG}, pool=True)
    if run.image_processor.size["height"] != BIG:
        raise DiffersError("the processor still gives the old size")
    return ""


def interpolate(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit")
    model(images(BIG), interpolate_pos_encoding=True)
    return ""


def interpolate_siglip(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "siglip")
    model(images(BIG), interpolate_pos_encoding=True)
    return ""


def wrong_size(d: Path) -> str:
    fixed = {"dynamic_img_size": False}  # which timm's small ViT for tests has, and others do not
    TimmModel("test_vit", 16, image_size=SIZE, pool="token", model_kwargs=fixed).save_pretrained("fixed")
    pixels = AutoImageProcessor.from_pretrained("fixed", size=BIG)(picture(), return_tensors="pt")
    AutoModel.from_pretrained("fixed")(**pixels)
    raise DiffersError("runs at a size that the model was not made for")


def wrong_size_siglip(d: Path) -> str:
    size = {"height": BIG, "width": BIG}
    pixels = AutoImageProcessor.from_pretrained(d / "siglip", size=size)(picture(), return_tensors="pt")
    AutoModel.from_pretrained(d / "siglip")(**pixels)
    raise DiffersError("runs at a size that the model was not made for")


def nested_lists(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "vit")
    found = processor([[picture()], [picture(), picture(30, 40)]], return_tensors="pt")["pixel_values"]
    alone = processor(picture(30, 40), return_tensors="pt")["pixel_values"]
    same(found[2:], alone, "the pixels")
    return "flat, in order"


def nested_lists_peer(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "siglip")
    found = processor([[picture()], [picture(), picture(30, 40)]], return_tensors="pt")["pixel_values"]
    same(found[2:], processor(picture(30, 40), return_tensors="pt")["pixel_values"], "the pixels")
    return "flat, in order"


def ready_tensors(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "vit")
    ready = torch.rand(3, SIZE, SIZE)
    found = processor([ready, ready], do_rescale=False, do_resize=False, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    same(found[0], (ready - mean) / std, "the pixels", 1e-6)
    return "normalised only"


def ready_tensors_peer(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "siglip")
    ready = torch.rand(3, SIZE, SIZE)
    found = processor([ready, ready], do_rescale=False, do_resize=False, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    same(found[0], (ready - mean) / std, "the pixels", 1e-6)
    return "normalised only"


def floats_without_a_word(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "vit")
    ready = torch.rand(3, SIZE, SIZE)
    found = processor(ready, return_tensors="pt")["pixel_values"]
    same(found, processor(ready, do_rescale=False, return_tensors="pt")["pixel_values"], "the pixels")
    return "taken as 0..1"


def floats_without_a_word_peer(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "siglip")
    ready = torch.rand(3, SIZE, SIZE)
    found = processor(ready, return_tensors="pt")["pixel_values"]
    same(found, processor(ready, do_rescale=False, return_tensors="pt")["pixel_values"], "0..1 divided by 255 again")
    return "taken as 0..1"


def numbers(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "vit")
    array = np.asarray(picture())
    found = processor(array.tolist(), return_tensors="pt")["pixel_values"]
    same(found, processor(array, return_tensors="pt")["pixel_values"], "the pixels")
    return ""


def numbers_peer(d: Path) -> str:
    processor = AutoImageProcessor.from_pretrained(d / "siglip")
    array = np.asarray(picture())
    found = processor(array.tolist(), return_tensors="pt")["pixel_values"]
    same(found, processor(array, return_tensors="pt")["pixel_values"], "the pixels")
    return ""


def pixels_of_timm(d: Path) -> str:
    tower = TimmModel.from_timm(d / "timm")
    tower.save_pretrained("tower")
    pixels = AutoImageProcessor.from_pretrained("tower")(picture(300, 200), return_tensors="pt")["pixel_values"]
    same(pixels[0], _timm_pixels(), "the pixels")
    return "those of timm's transform"


def pixels_of_timm_peer(d: Path) -> str:
    pixels = AutoImageProcessor.from_pretrained(d / "wrapper")(picture(300, 200), return_tensors="pt")["pixel_values"]
    same(pixels[0], _timm_pixels(), "the pixels")
    return "those of timm's transform"


def _timm_pixels() -> torch.Tensor:
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert config["input_size"][1] == TIMM_SIZE
    return timm.data.create_transform(**config)(picture(300, 200))


def any_aspect(d: Path) -> str:
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    tower = TimmModel("naflexvit_base_patch16_gap", 16, image_size=SIZE, model_kwargs=small).eval()
    patches = tower.naflex(20)
    batch = patches([picture(90, 40), picture(30, 200)])
    same(tower(batch)[1:], tower(patches(picture(30, 200))), "alone and in a batch", 1e-5)
    return f"{batch['patch_valid'].sum(1).tolist()} patches, no crop"


def any_aspect_auto(d: Path) -> str:
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    TimmModel("naflexvit_base_patch16_gap", 16, image_size=SIZE, model_kwargs=small).save_pretrained("naflex")
    model, tower = AutoModel.from_pretrained("naflex"), TimmModel.from_pretrained("naflex")
    batch = model.naflex(20)([picture(90, 40), picture(30, 200)], return_tensors="pt")
    same(model(**batch).pooler_output, tower(dict(batch)), "the embedding")
    return f"{batch['patch_valid'].sum(1).tolist()} patches, no crop"


def any_aspect_peer(d: Path) -> str:
    config = Siglip2VisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 num_patches=16)  # fmt: skip
    model, processor = Siglip2VisionModel(config).eval(), Siglip2ImageProcessor(max_num_patches=20)
    batch = processor([picture(90, 40), picture(30, 200)], return_tensors="pt")
    alone = processor([picture(30, 200)], return_tensors="pt")
    same(model(**batch).pooler_output[1:], model(**alone).pooler_output, "alone and in a batch", 1e-5)
    return f"{batch['pixel_attention_mask'].sum(1).tolist()} patches, no crop"


ROWS = [
    ("size", f"AutoModel.from_pretrained(repo, image_size={BIG})", auto_size, "TimmWrapperModel, by model_args",
     auto_size_wrapper),
    ("size", "AutoModel.from_pretrained(repo, image_size=<the stored one>)", own_size, "Dinov2Model", own_size_dinov2),
    ("size", f"TimmModel.from_pretrained(repo, image_size={BIG})", tower_size, "open_clip, set_input_size",
     open_clip_size),
    ("size", f"pipeline(..., model_kwargs={{'image_size': {BIG}}})", pipeline_size, "Dinov2Model",
     pipeline_size_dinov2),
    ("size", "model(pixels, interpolate_pos_encoding=True)", interpolate, "SiglipVisionModel", interpolate_siglip),
    ("size", f"AutoImageProcessor.from_pretrained(repo, size={BIG}), then the model", wrong_size, "SiglipVisionModel",
     wrong_size_siglip),
    ("images", "processor([[a], [b, c]])", nested_lists, "SiglipVisionModel", nested_lists_peer),
    ("images", "processor(0..1 tensors, do_rescale=False, do_resize=False)", ready_tensors, "SiglipVisionModel",
     ready_tensors_peer),
    ("images", "processor(0..1 tensors)", floats_without_a_word, "SiglipVisionModel", floats_without_a_word_peer),
    ("images", "processor(array.tolist())", numbers, "SiglipVisionModel", numbers_peer),
    ("images", "tower.naflex(20)(pictures of any aspect)", any_aspect, "Siglip2VisionModel", any_aspect_peer),
    ("images", "model(**model.naflex(20)(pictures of any aspect)) of AutoModel", any_aspect_auto, "Siglip2VisionModel",
     any_aspect_peer),
    ("images", "AutoImageProcessor of a timm model", pixels_of_timm, "TimmWrapperModel", pixels_of_timm_peer),
]  # fmt: skip

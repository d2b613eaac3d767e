"""`image_size=` in the transformers models: trunk, config and image processor go to another size together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    VisionTextDualEncoderModel,
    pipeline,
)

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TimmTowerImageProcessor
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel
from hf_timm_tower.reader.config import OUR_FIELDS
from hf_timm_tower.reader.modeling import TimmTowerModel as TravellingModel

SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4), "window_size": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"image_size": 64, "model_kwargs": {"depth": 1}}),
    "swin": ("swin_tiny_patch4_window7_224", {"image_size": 64, "model_kwargs": SWIN}),
    "convnext": ("test_convnext", {"image_size": 64}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    for name, (architecture, arguments) in ARCHITECTURES.items():
        TimmModel(architecture, 8, **arguments).save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def by_config(folder: Path, image_size: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.image_size = image_size
    return AutoModel.from_pretrained(folder, config=config)


DOORS: dict[str, Callable[..., Any]] = {
    "class": TimmTowerModel.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "config": by_config,
}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [128, (128, 64), 64])
def test_the_model_is_the_tower_of_that_size(folders: dict[str, Path], name: str, size: Any, tmp_path: Path) -> None:
    tower = TimmModel.from_pretrained(folders[name], image_size=size)
    images = torch.randn(1, 3, *tower.config.image_size)
    for door in DOORS.values():
        model = door(folders[name], image_size=size)
        assert torch.equal(model(images).pooler_output, tower(images))
        assert all(getattr(model.config, field) == getattr(tower.config, field) for field in OUR_FIELDS)
    model.save_pretrained(tmp_path)
    again, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(images).pooler_output, tower(images))
    assert [processor.size["height"], processor.size["width"]] == again.config.image_size == tower.config.image_size
    assert TimmTowerImageProcessor.from_tower_config(model.config).size == processor.size


@torch.no_grad()
def test_a_classifier_and_a_half_precision_model_go_along(folders: dict[str, Path], tmp_path: Path) -> None:
    model = TimmTowerForImageClassification.from_pretrained(folders["vit"], id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path)
    wide = AutoModelForImageClassification.from_pretrained(tmp_path, image_size=96, dtype=torch.bfloat16)
    tower = TimmModel.from_pretrained(tmp_path, image_size=96, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 96, 96, dtype=torch.bfloat16)
    assert wide.config.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(wide(images).logits, wide.classifier(tower(images)))
    wide, info = TimmTowerForImageClassification.from_pretrained(tmp_path, image_size=96, output_loading_info=True)
    assert not info["missing_keys"]
    assert wide.config.image_size == [96, 96]


def test_a_pipeline_has_model_and_processor_of_that_size(folders: dict[str, Path]) -> None:
    made = pipeline("image-feature-extraction", str(folders["vit"]), model_kwargs={"image_size": 96}, pool=True)
    assert made.model.config.image_size == [96, 96]
    image = Image.new("RGB", (120, 100), (200, 10, 90))
    tower = TimmModel.from_pretrained(folders["vit"], image_size=96)
    with torch.no_grad():
        expected = tower(tower.transform()(image)[None])
    assert torch.equal(torch.tensor(made(image)), expected)


def test_a_size_that_the_trunk_cannot_take_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    TimmModel("crossvit_tiny_240", embed_dim=8, pool="token").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"crossvit_tiny_240 cannot take image_size=\[320, 320\]"):
        AutoModel.from_pretrained(tmp_path, image_size=320)
    for size in (0, "large", [1, 2, 3]):
        with pytest.raises(ConfigError, match="image_size="):
            TimmTowerModel.from_pretrained(folders["vit"], image_size=size)


def test_a_processor_of_another_size_is_found_out(folders: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(folders["vit"])
    processor = AutoImageProcessor.from_pretrained(folders["vit"], size=96)
    inputs = processor(Image.new("RGB", (70, 70)), return_tensors="pt")
    with pytest.raises(ArgumentError, match=r"pixel_values are 96 x 96, but VisionTransformer takes .* 64 x 64"):
        model(**inputs)
    model.set_input_size(96)
    assert model(**inputs).pooler_output.shape == (1, 8)


def test_the_travelling_classes_load_the_stored_size_and_name_the_package_for_another(folders: dict[str, Path]) -> None:
    model = TravellingModel.from_pretrained(folders["vit"], image_size=64)
    assert model.config.image_size == [64, 64]
    config = AutoConfig.from_pretrained(folders["vit"], image_size=96)
    for given in ({}, {"config": config}):
        with pytest.raises(ConfigError, match=r"image_size=\[96, 96\] \(stored \[64, 64\]\).*hf_timm_tower installed"):
            TravellingModel.from_pretrained(folders["vit"], image_size=96, **given)


def test_both_faces_say_what_they_are_and_verify(folders: dict[str, Path]) -> None:
    tower = TimmModel.from_pretrained(folders["vit"], dtype=torch.bfloat16)
    assert (tower.device, tower.dtype, tower.num_features) == (torch.device("cpu"), torch.bfloat16, 192)
    model = TimmTowerForImageClassification.from_pretrained(folders["vit"], num_labels=2)
    assert model.verify().status == "equal"
    with torch.no_grad():
        model.head.proj.weight.mul_(2)
    assert model.verify().status == "different"


@pytest.mark.parametrize("width", [16, None], ids=["embedding of another width", "embedding as wide as the trunk"])
def test_a_part_of_another_model_keeps_its_size_or_the_model_knows_the_new_one(
    width: int | None, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    text = BertModel(BertConfig(vocab_size=30, hidden_size=16, **small))
    tower = TimmModel("test_vit", width, pool="token", proj="linear" if width else "none")
    pair = VisionTextDualEncoderModel(vision_model=TimmTowerModel.from_tower(tower), text_model=text)
    if width is not None:
        with pytest.raises(ConfigError, match="before it becomes a part"):
            pair.vision_model.set_input_size(96)
    else:
        pair.vision_model.set_input_size(96)
    pair.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).vision_model
    assert loaded.config.image_size == pair.vision_model.config.image_size == ([160, 160] if width else [96, 96])

"""Images of any aspect on NaFlexVit towers: the pixels, masks and numbers of timm's own pipeline."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.naflex_dataset import NaFlexCollator
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TimmTowerModel
from hf_timm_tower.reader import modeling as reader

NARROW = {"depth": 2, "embed_dim": 64, "num_heads": 2}
PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((90, 40), (30, 200), (64, 64))]
MOST = 20


def tower(name: str = "naflexvit_base_patch16_gap", **arguments: Any) -> TimmModel:
    return TimmModel(name, **{"embed_dim": 16, "image_size": 64, "model_kwargs": NARROW, **arguments}).eval()


def timm_batch(ours: TimmModel) -> dict[str, torch.Tensor]:
    """What timm's own transform and collator make of the pictures."""
    block = ours.config.preprocess
    transform = create_transform(
        64, interpolation=block["interpolation"], mean=block["mean"], std=block["std"], naflex=True, patchify=True,
        patch_size=16, max_seq_len=MOST,
    )  # fmt: skip
    batch, _ = NaFlexCollator(MOST)([(transform(picture), 0) for picture in PICTURES])
    return batch


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"])
def test_patches_masks_and_features_are_those_of_timm_s_pipeline(name: str) -> None:
    ours = tower(name, embed_dim=None, pool="default", proj="none")
    batch, expected = ours.naflex(MOST)(PICTURES), timm_batch(ours)
    assert batch["patch_valid"].sum(1).tolist() != [MOST] * len(PICTURES), "some are filled up"
    for key, value in batch.items():
        assert torch.equal(value, expected[key]), key
    bare = timm.create_model(name, num_classes=0, img_size=64, **NARROW).eval()
    bare.load_state_dict(ours.trunk.state_dict())
    assert torch.equal(ours(batch), bare(expected))


def test_what_a_batch_is_filled_up_with_changes_nothing_and_nothing_is_cropped(tmp_path: Path) -> None:
    ours = tower()
    patches = ours.naflex(MOST)
    together = ours(patches(PICTURES))
    for number, picture in enumerate(PICTURES):
        torch.testing.assert_close(together[number], ours(patches(picture))[0])
    edged = PICTURES[1].copy()
    edged.paste((255, 0, 0), (0, 180, 30, 200))  # a centre crop would not see it
    assert not torch.allclose(ours(patches(edged)), ours(patches(PICTURES[1])))
    ours.save_pretrained(tmp_path)
    loaded = TimmModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(loaded.naflex(MOST)(PICTURES)), together)
    face = TimmTowerModel.from_pretrained(tmp_path)
    assert torch.equal(TimmModel.from_tower(face)(patches(PICTURES)), together)


def test_pictures_become_what_the_tower_takes() -> None:
    grey = tower(model_kwargs={**NARROW, "in_chans": 1})
    assert grey(grey.naflex(MOST)(PICTURES)).shape == (3, 16)
    patches = tower().naflex(MOST)
    assert torch.equal(
        patches(PICTURES[0].convert("L"))["patches"], patches(PICTURES[0].convert("L").convert("RGB"))["patches"]
    )


def test_it_trains_through_a_data_loader() -> None:
    ours = tower().train()
    patches = ours.naflex(is_training=True, hflip=0.5)
    assert patches.max_seq_len == 16, "as many as an image of the tower's size has"
    samples = [(patches.transform(picture), number) for number, picture in enumerate(PICTURES)]
    for batch, targets in DataLoader(samples, batch_size=3, collate_fn=patches.collate):
        torch.nn.functional.cross_entropy(ours(batch), targets).backward()
        assert targets.tolist() == [0, 1, 2]
    assert ours.trunk.embeds.proj.weight.grad is not None


def test_the_transformers_model_takes_patches_by_name_and_gives_timm_s_bits(tmp_path: Path) -> None:
    ours = tower()
    ours.save_pretrained(tmp_path)
    model, expected = AutoModel.from_pretrained(tmp_path), timm_batch(ours)
    batch = model.naflex(MOST)(PICTURES, return_tensors="pt")
    output = model(**batch, output_hidden_states=True)
    trunk = ours.trunk
    with torch.no_grad():
        assert torch.equal(output.pooler_output, ours.head(trunk(expected)))
        tokens, found = trunk.forward_intermediates(expected, output_fmt="NLC", return_prefix_tokens=True)
        inner = [torch.cat([registers, patches], dim=1) for patches, registers in found]
    assert torch.equal(output.last_hidden_state, tokens)
    assert all(torch.equal(*pair) for pair in zip(output.hidden_states[1:], inner, strict=True))
    assert torch.equal(model(**batch, do_pooling=False).last_hidden_state, tokens)
    run = pipeline("image-feature-extraction", model=model, image_processor=model.naflex(MOST), pool=True)
    for picture in PICTURES:
        assert torch.equal(torch.tensor(run(picture)), ours(ours.naflex(MOST)(picture)))


def test_trainer_takes_patches_with_labels_from_the_collator(tmp_path: Path) -> None:
    tower("naflexvit_base_patch16_map").save_pretrained(tmp_path / "tower")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tower", num_labels=3)
    patches = model.naflex(MOST)
    rows = [{**patches.transform(picture), "labels": number} for number, picture in enumerate(PICTURES)]
    before = model.trunk.embeds.proj.weight.clone()
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    Trainer(model, arguments, data_collator=patches.collate, train_dataset=rows).train()
    assert not torch.equal(model.trunk.embeds.proj.weight, before)
    batch = patches.collate(rows)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert model.eval()(**batch).loss.ndim == 0


def test_patches_that_a_model_cannot_take_are_refused_in_words(tmp_path: Path) -> None:
    ours = tower()
    model, batch = TimmTowerModel.from_tower(ours), ours.naflex(MOST)(PICTURES)
    with pytest.raises(ArgumentError, match=r"found pixel_values \(Tensor\), patches, patch_coord"):
        model(torch.rand(1, 3, 64, 64), **batch)
    with pytest.raises(ArgumentError, match=r"found patches$"):
        model(patches=batch["patches"])
    with pytest.raises(ArgumentError, match="found none"):
        model()
    with pytest.raises(ArgumentError, match=r"found pixel_values \(dict\)$"):
        model(batch)
    with pytest.raises(ConfigError, match="VisionTransformer takes images of one size"):
        TimmTowerModel.from_tower(TimmModel("test_vit", 16))(**batch)
    # What a machine without the package has.
    for alone in (reader.TimmTowerModel(ours.config), reader.TimmTowerForImageClassification(ours.config)):
        with pytest.raises(ArgumentError, match="are taken where hf_timm_tower is installed"):
            alone(**batch)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="VisionTransformer takes images of one size"):
        TimmModel("test_vit", 16).naflex()
    with pytest.raises(ConfigError, match="knows of no mask"):
        tower(pool="none", proj="none", embed_dim=None).naflex()
    with pytest.raises(ArgumentError, match="max_seq_len=0"):
        tower().naflex(0)
    with pytest.raises(ArgumentError, match="no images"):
        tower().naflex()([])
    with pytest.raises(ArgumentError, match="an image of type Tensor: expected PIL images"):
        tower().naflex()(torch.rand(1, 3, 64, 64))  # type: ignore[arg-type]

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

from hf_timm_tower import ArgumentError, ConfigError, TimmModel, TimmTowerModel

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


def test_it_trains_through_a_data_loader() -> None:
    ours = tower().train()
    patches = ours.naflex(is_training=True, hflip=0.5)
    assert patches.max_seq_len == 16, "as many as an image of the tower's size has"
    samples = [(patches.transform(picture), number) for number, picture in enumerate(PICTURES)]
    for batch, targets in DataLoader(samples, batch_size=3, collate_fn=patches.collate):
        torch.nn.functional.cross_entropy(ours(batch), targets).backward()
        assert targets.tolist() == [0, 1, 2]
    assert ours.trunk.embeds.proj.weight.grad is not None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="VisionTransformer takes images of one size"):
        TimmModel("test_vit", 16).naflex()
    with pytest.raises(ConfigError, match="knows of no mask"):
        tower(pool="none", proj="none", embed_dim=None).naflex()
    with pytest.raises(ArgumentError, match="max_seq_len=0"):
        tower().naflex(0)
    with pytest.raises(ArgumentError, match="no images"):
        tower().naflex()([])

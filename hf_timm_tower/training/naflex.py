"""Images of any aspect for towers on NaFlexVit: patches with their places and a mask, by timm's own pieces.

timm resizes an image, its aspect kept, to at most so many patches, and cuts it up; a batch is filled up to its longest
image, and `patch_valid` says what is an image. Nothing is cropped. `tower(batch)` takes it as it takes images, the
transformers models as `model(**batch)`. The names are timm's: its trunk takes the place of each patch, where Siglip2 of
transformers (`pixel_values`, `pixel_attention_mask`, `spatial_shapes`) takes sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from PIL import Image
from timm.data.naflex_dataset import NaFlexCollator
from torch.utils.data import default_collate
from transformers.feature_extraction_utils import BatchFeature

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError, ConfigError
from ..reader.image_processing import PIL_MODES, completed_preprocess
from .transform import make_transform

PATCH_KEYS = ("patches", "patch_coord", "patch_valid")


def check_takes_patches(config: TimmTowerConfig, trunk: nn.Module) -> tuple[int, int]:
    """The size of the trunk's patches.

    Raises:
        ConfigError: another trunk than NaFlexVit, or a head that takes tokens.
    """
    patch: Any = getattr(getattr(trunk, "embeds", None), "patch_size", None)
    if type(trunk).__name__ != "NaFlexVit" or patch is None:
        raise ConfigError(f"{type(trunk).__name__} takes images of one size; patches of any aspect are NaFlexVit's")
    if config.layout != "NC":
        raise ConfigError(
            f"pool={config.pool!r} leaves the trunk's tokens to the head, which knows of no mask and would take "
            "what a batch is filled up with for patches; take a pool of the trunk's own ('avg', 'map')"
        )
    return patch  # type: ignore[no-any-return]


class NaFlexProcessor:
    """PIL images -> a batch of patches that the tower takes; `transform` and `collate` alone for a data loader.

    Args:
        config: A completed config.
        trunk: A NaFlexVit.
        max_seq_len: Most patches of an image; by default as many as an image of the tower's size has.
        is_training: The random transform for training.
        augmentation: Further arguments of `timm.data.create_transform`.

    Attributes:
        transform: PIL image -> `patches` `[N, P * P * in_chans]`, `patch_coord` `[N, 2]` (row, column) and
            `patch_valid` `[N]`, N at most `max_seq_len`.
        max_seq_len: As given.

    Raises:
        ConfigError: another trunk, preprocessing that pads, or a head that takes tokens.
        ArgumentError: not a number of patches, or an argument that timm refuses.
    """

    def __init__(
        self,
        config: TimmTowerConfig,
        trunk: nn.Module,
        max_seq_len: int | None = None,
        is_training: bool = False,
        **augmentation: Any,
    ) -> None:
        patch = check_takes_patches(config, trunk)
        block, (height, width) = completed_preprocess(config)
        if block["padding"] is not None:
            raise ConfigError("preprocess.padding: an image of any aspect is not padded to a square")
        most = (height // patch[0]) * (width // patch[1]) if max_seq_len is None else max_seq_len
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ArgumentError(f"max_seq_len={max_seq_len!r}: expected a number of patches, from 1")
        self.max_seq_len = most
        self._mode = PIL_MODES.get(config.in_chans, "RGB")
        self.transform = make_transform(
            config, is_training, naflex=True, patchify=True, patch_size=tuple(patch), max_seq_len=most, **augmentation
        )

    def __call__(self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None) -> Any:
        """Images, converted to the tower's channels, -> a batch: `patches`, `patch_coord`, `patch_valid`.

        Args:
            images: PIL images.
            return_tensors: "pt", which pipelines ask for, gives transformers' `BatchFeature`; None a dict.

        Raises:
            ArgumentError: no images, or one that cannot be used.
        """
        given = [images] if isinstance(images, Image.Image) else list(images)
        if return_tensors not in (None, "pt"):
            raise ArgumentError(f"return_tensors={return_tensors!r}: patches are torch tensors, 'pt'")
        if others := [type(image).__name__ for image in given if not isinstance(image, Image.Image)]:
            raise ArgumentError(f"an image of type {others[0]}: expected PIL images, of any aspect")
        batch = self.collate([self.transform(image.convert(self._mode)) for image in given])
        return batch if return_tensors is None else BatchFeature(batch)

    def collate(self, samples: Sequence[Any]) -> Any:
        """What `transform` gave for several images, or pairs of it and a target -> a batch, or a batch and targets.

        Args:
            samples: For `DataLoader(collate_fn=...)`; filled up to the longest. With further keys (`labels`), as
                `Trainer(data_collator=...)` has them, the batch has these too.

        Raises:
            ArgumentError: no samples.
        """
        if not samples:
            raise ArgumentError("no images: expected one at least")
        paired = isinstance(samples[0], (tuple, list))
        pairs = [tuple(sample) if paired else (sample, 0) for sample in samples]
        longest = max(sample["patches"].shape[0] for sample, _ in pairs)
        batch, targets = NaFlexCollator(longest)(pairs)
        others = [{key: value for key, value in sample.items() if key not in PATCH_KEYS} for sample, _ in pairs]
        batch = {**{key: batch[key] for key in PATCH_KEYS}, **default_collate(others)}
        return (batch, targets) if paired else batch

"""A dataset of images as numbered rows of a feature cache, each made under a seed of its own.

Row `v * images + i` is version v of image i. The seed of a row depends on its number alone, so that a random transform
gives the same version again: in another process, with other workers, after a kill.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..heads.batch_formula import flat_bytes, same_bytes
from ..heads.isolation import isolated
from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError
from ..reader.image_processing import PIL_MODES, completed_preprocess, in_channels
from .transform import make_transform

_SEEDS_TRIED = 4
# In the repr of what has none of its own; it differs from process to process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class ImageRows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The rows: number -> (input of the trunk `[in_chans, H, W]`, label).

    Args:
        dataset: With a length; an item is `(image, label)`, or a mapping with these two columns.
        config: Of the tower.
        transform: Image -> input; None: the tower's own for evaluation, and tensors are taken as they are.
        repeats: Versions of each image.
        columns: Keys of image and label where items are mappings.

    Raises:
        ArgumentError: the dataset has no length or no items.
    """

    def __init__(
        self,
        dataset: Any,
        config: TimmTowerConfig,
        transform: Callable[[Any], Any] | None,
        repeats: int,
        columns: tuple[str, str],
    ) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(f"dataset: {type(dataset).__name__} needs a length and items by number, one is missing")
        if len(dataset) == 0:
            raise ArgumentError("dataset: it is empty")
        self.dataset, self.images, self.repeats, self.columns = dataset, len(dataset), repeats, columns
        self.own_transform = transform is None
        self.transform = make_transform(config) if transform is None else transform
        self.in_chans = config.in_chans

    def __len__(self) -> int:
        return self.images * self.repeats

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.make(row, seed=row)

    def make(self, row: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row under another seed than its own.

        Raises:
            ArgumentError: the dataset's item cannot be used; says which and why.
        """
        index = row % self.images
        with isolated(seed):
            image, label = self._parts(self.dataset[index], index)
            if isinstance(image, Image.Image) and self.in_chans in PIL_MODES:
                image = in_channels(image, self.in_chans)  # as timm's own datasets do
            if not (self.own_transform and isinstance(image, torch.Tensor)):
                image = self.transform(image)
        if not isinstance(image, torch.Tensor) or image.ndim != 3 or not image.is_floating_point():
            found = f"{list(image.shape)} of {image.dtype}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ArgumentError(f"dataset[{index}]: expected a float tensor [{self.in_chans}, H, W], found {found}")
        if image.shape[0] != self.in_chans:
            raise ArgumentError(f"dataset[{index}]: {image.shape[0]} channels, but the tower takes {self.in_chans}")
        try:
            return image, torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"dataset[{index}]: expected a number or a tensor as its label, found {str(label)[:40]!r} "
                f"({type(label).__name__})"
            ) from error

    def _parts(self, item: Any, index: int) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            missing = [column for column in self.columns if column not in item]
            if missing:
                raise ArgumentError(
                    f"dataset[{index}] has no {', '.join(missing)}, it has {', '.join(map(str, item))[:200]}; "
                    "name image and label: columns=('img', 'fine_label')"
                )
            return item[self.columns[0]], item[self.columns[1]]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], item[1]
        raise ArgumentError(f"dataset[{index}]: expected (image, label) or a mapping, found {type(item).__name__}")

    def identity(self, config: TimmTowerConfig) -> dict[str, Any]:
        """What the inputs depend on, without looking at them: JSON."""
        if self.own_transform:
            block, size = completed_preprocess(config)
            transform = json.dumps({**block, "image_size": size}, sort_keys=True)
        else:
            transform = _ADDRESS.sub("", repr(self.transform))
        return {
            "dataset length": self.images,
            "dataset fingerprint": getattr(self.dataset, "_fingerprint", None),
            "repeats": self.repeats,
            "transform": transform,
        }


@dataclass(frozen=True)
class Sample:
    """Some rows, made before all others.

    Attributes:
        rows: Their numbers.
        inputs: `[n, in_chans, H, W]`.
        labels: `[n, ...]`.
        digests: What identifies them; None where the same row is not the same twice.
    """

    rows: list[int]
    inputs: torch.Tensor
    labels: torch.Tensor
    digests: dict[str, str | None]


def take_sample(rows: ImageRows) -> Sample:
    """Up to four rows, spread over the images, to know what all will be and whether they are what they were.

    Raises:
        ArgumentError: the rows differ in shape; the transform is random and there is one version of each image, or it
            is not and there are more.
    """
    last = rows.images - 1
    numbers = sorted({0, last // 3, 2 * last // 3, last})
    inputs, labels = _stack([rows[number] for number in numbers])
    again, labels_again = _stack([rows[number] for number in numbers])
    repeatable, same_labels = same_bytes(inputs, again), same_bytes(labels, labels_again)
    random = not repeatable or any(
        not same_bytes(rows.make(number, seed=seed)[0], rows.make(number, seed=seed + 1)[0])
        for seed in range(1, _SEEDS_TRIED)
        for number in numbers
    )
    if random and rows.repeats == 1:
        raise ArgumentError(
            "the transform (or the dataset) is random: repeats=1 would train on one random version of each image for "
            "ever. Leave augmentation out with the transform for evaluation, or say how many versions: repeats=8"
        )
    if not random and rows.repeats > 1:
        raise ArgumentError(
            f"repeats={rows.repeats}, but the transform is not random: all versions of an image would be equal. "
            "Pass transform=tower.transform(is_training=True), or repeats=1"
        )
    return Sample(
        numbers,
        inputs,
        labels,
        {"inputs": _digest(inputs) if repeatable else None, "labels": _digest(labels) if same_labels else None},
    )


def _stack(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    for part, name in enumerate(("inputs", "labels")):
        kinds = {(tuple(pair[part].shape), pair[part].dtype) for pair in pairs}
        if len(kinds) > 1:
            found = " and ".join(f"{list(shape)} of {dtype}" for shape, dtype in sorted(kinds, key=str)[:2])
            raise ArgumentError(f"dataset: its {name} differ, {found}; all must be alike")
    return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])


def _digest(tensor: torch.Tensor) -> str:
    head = f"{tensor.dtype} {list(tensor.shape)}\n".encode()
    return hashlib.sha256(head + flat_bytes(tensor).numpy().tobytes()).hexdigest()

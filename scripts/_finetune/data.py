"""Images and labels: an image folder through `datasets`, or scikit-learn's digits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_timm_tower import ArgumentError, TimmTowerConfig, TimmTowerImageProcessor
from hf_timm_tower.training.transform import make_transform

from .arguments import DataArguments

_SPLIT_SEED = 0
_HELD_OUT = ("test", "validation")
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "crop": {"scale": (0.6, 1.0), "ratio": (0.8, 1.25), "hflip": 0.0, "color_jitter": None},
    "timm": {},
}


@dataclass(frozen=True)
class Data:
    """A data set in two splits, each with the columns `image` and `label`.

    Attributes:
        train: To learn from.
        test: Held out, for the figures.
        labels: Name of each label.
        name: Of the data set, for the card.
        augment: What is done to training images: `none`, `crop` or `timm`.
    """

    train: Dataset
    test: Dataset
    labels: list[str]
    name: str
    augment: str


def load_data(arguments: DataArguments) -> Data:
    """Read the data set.

    Raises:
        ArgumentError: the folder is not as described.
    """
    splits = _digits() if arguments.image_folder is None else _image_folder(Path(arguments.image_folder))
    held_out = next((name for name in _HELD_OUT if name in splits), None)
    if "train" not in splits:
        raise ArgumentError(f"--image-folder {arguments.image_folder}: no train/ in it, found {', '.join(splits)}")
    if held_out is None:
        splits = splits["train"].train_test_split(arguments.test_fraction, stratify_by_column="label", seed=_SPLIT_SEED)
        held_out = "test"
    train, test = (_at_most(splits[name], arguments.max_images) for name in ("train", held_out))
    labels = train.features["label"].names
    if test.features["label"].names != labels:
        raise ArgumentError(
            f"--image-folder: train/ has the labels {', '.join(labels)[:200]}, {held_out}/ has "
            f"{', '.join(test.features['label'].names)[:200]}"
        )
    of_digits = arguments.image_folder is None
    name = "scikit-learn digits" if of_digits else Path(arguments.image_folder or "").resolve().name
    augment = arguments.augment if arguments.augment != "auto" else "crop" if of_digits else "timm"
    return Data(train, test, labels, arguments.dataset_name or name, augment)


def prepare(data: Data, config: TimmTowerConfig) -> tuple[Dataset, Dataset]:
    """The two splits with `pixel_values` and `labels`, prepared for a tower each time that they are read.

    Args:
        data: The images.
        config: The tower's.
    """
    exact = TimmTowerImageProcessor.from_tower_config(config)
    mode = "L" if config.in_chans == 1 else "RGB"

    def exact_one(image: Image.Image) -> torch.Tensor:
        return exact(image)["pixel_values"][0]

    random = exact_one
    if data.augment != "none":
        random = make_transform(config, is_training=True, **_AUGMENTATION[data.augment])

    def with_transform(split: Dataset, transform: Callable[[Image.Image], torch.Tensor]) -> Dataset:
        def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = [transform(image.convert(mode)) for image in batch["image"]]
            return {"pixel_values": images, "labels": batch["label"]}

        return split.with_transform(read)

    return with_transform(data.train, random), with_transform(data.test, exact_one)


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def _image_folder(folder: Path) -> DatasetDict:
    if not folder.is_dir():
        raise ArgumentError(f"--image-folder {folder}: there is no such folder")
    splits = load_dataset("imagefolder", data_dir=str(folder))
    for name, split in splits.items():
        if not isinstance(split.features.get("label"), ClassLabel):
            raise ArgumentError(
                f"--image-folder {folder}: {name} has no labels; expected a folder of images for each label"
            )
    return splits


def _at_most(split: Dataset, count: int | None) -> Dataset:
    """Evenly spread over the split, which may be sorted by label."""
    if count is None or count >= len(split):
        return split
    return split.select([index * len(split) // count for index in range(count)])

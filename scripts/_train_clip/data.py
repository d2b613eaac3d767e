"""Images with captions, or images in pairs: scikit-learn's digits, or a data set that `datasets` reads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from .options import Options

DIGITS = "zero one two three four five six seven eight nine".split()
DIGIT_TEMPLATE = "a photo of the digit {}."
DIGIT_TEMPLATES = (
    DIGIT_TEMPLATE,
    "a picture of the number {}.",
    "a handwritten {}.",
    "somebody wrote a {} here.",
    "the digit {}, small and grey.",
)


@dataclass(frozen=True)
class Examples:
    """Images `[N]` (PIL, perhaps decoded when asked for) and what belongs to each.

    Attributes:
        images: The images.
        captions: For each image the captions to draw from.
        pairs: For each image its partner, where there is no text.
    """

    images: Sequence[Image.Image]
    captions: list[list[str]] | None = None
    pairs: Sequence[Image.Image] | None = None


@dataclass(frozen=True)
class Data:
    """What to train on and what is held out.

    Attributes:
        train: To learn from.
        held_out: To measure with.
        labels: What zero-shot classification chooses from.
        template: What makes a caption of a label.
        answers: For each image held out, the number of its label.
    """

    train: Examples
    held_out: Examples
    labels: list[str]
    template: str
    answers: list[int]


class Draws(Dataset):
    """Image and caption, or image and partner; the captions are drawn anew for each epoch.

    The draw depends on seed, epoch and index alone, so that it is the same however many processes share the work.
    """

    def __init__(self, examples: Examples, seed: int, limit: int | None = None) -> None:
        self.examples = examples
        self.length = len(examples.images) if limit is None else min(limit, len(examples.images))
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the captions of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        self.draws = torch.rand(self.length, generator=generator).tolist()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.examples.images[index]
        if self.examples.captions is None:
            assert self.examples.pairs is not None
            return image, self.examples.pairs[index]
        choices = self.examples.captions[index]
        return image, choices[int(self.draws[index] * len(choices))]


def load_data(options: Options) -> Data:
    """The data that the options name.

    Raises:
        SystemExit: it has not the columns that are needed.
    """
    with_text = options.second_tower is None
    return _digits(options, with_text) if options.data is None else _data_set(options, with_text)


def _digits(options: Options, with_text: bool) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)).convert("RGB") for image in data.images]
    # The same images are held out every time, whatever the seed of the training is.
    parts = train_test_split(range(len(images)), test_size=options.held_out, random_state=0, stratify=data.target)

    def examples(part: list[int]) -> Examples:
        chosen = [images[i] for i in part]
        if not with_text:
            # What the second tower sees of a digit: its negative, lying on its side.
            return Examples(chosen, pairs=[ImageOps.invert(image).rotate(90) for image in chosen])
        return Examples(chosen, [[text.format(DIGITS[data.target[i]]) for text in DIGIT_TEMPLATES] for i in part])

    answers = [int(data.target[i]) for i in parts[1]]
    return Data(examples(parts[0]), examples(parts[1]), DIGITS, DIGIT_TEMPLATE, answers)


def _data_set(options: Options, with_text: bool) -> Data:
    import datasets

    assert options.data is not None
    if os.path.isdir(options.data):
        splits = datasets.load_dataset("imagefolder", data_dir=options.data)
    else:
        splits = datasets.load_dataset(options.data)
    other = options.caption_column if with_text else options.pair_column
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        splits = splits["train"].train_test_split(test_size=options.held_out, seed=0)
        held_out = "test"
    for name in ("train", held_out):
        if missing := [column for column in (options.image_column, other) if column not in splits[name].column_names]:
            raise SystemExit(
                f"train_clip: {options.data}, split {name}: no column {' and no '.join(missing)} among "
                f"{', '.join(splits[name].column_names)}; --image-column, --caption-column and --pair-column name them"
            )
    made = [_examples(splits[name], options.image_column, other, with_text) for name in ("train", held_out)]
    captions = [choices[0] for choices in made[1].captions or []]
    labels = sorted(set(captions))
    return Data(made[0], made[1], labels, "{}", [labels.index(caption) for caption in captions])


def _examples(split: Any, image_column: str, other: str, with_text: bool) -> Examples:
    # A column decodes an image when it is asked for it.
    if not with_text:
        return Examples(split[image_column], pairs=split[other])
    texts = [[text] if isinstance(text, str) else list(text) for text in split[other]]
    return Examples(split[image_column], texts)

"""The demo's pictures, and a tower's embeddings of them.

Imported by `main.py`, and run by it as the fresh process: a Python that can import hf_timm_tower and what is
installed, but not `main.py`, and so has never heard of the head that is defined there.

    python embed.py TOWER_FOLDER EMBEDDINGS.safetensors
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hf_timm_tower import TimmModel

CROPS_PER_PHOTO = 3

# Photographs that lie in scikit-image's wheel itself; its other ones would be downloaded. `camera` is grey.
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "stereo_motorcycle", "retina", "hubble_deep_field")


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, 8 x 8 grey, cut in two: images in RGB, labels `[N]` int64."""

    train_images: list[Image.Image]
    train_labels: torch.Tensor
    test_images: list[Image.Image]
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Photos:
    """Photographs whole, and crops of them: crop i is of photograph i // CROPS_PER_PHOTO."""

    names: list[str]
    whole: list[Image.Image]
    crops: list[Image.Image]


def load_digit_images() -> Digits:
    """The digits; one in five of each class is held out, the same ones every time."""
    data = load_digits()
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)).convert("RGB") for image in data.images]
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=data.target)
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    return Digits([images[i] for i in train], labels[train], [images[i] for i in test], labels[test])


def load_photos() -> Photos:
    """The photographs, and of each a few crops of half to two thirds of its sides, some mirrored; always the same."""
    random = np.random.default_rng(0)
    whole, crops = [], []
    for name in PHOTOGRAPHS:
        pixels = getattr(skimage.data, name)()
        photo = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
        whole.append(photo)
        for _ in range(CROPS_PER_PHOTO):
            side = int(min(photo.size) * random.uniform(0.5, 0.67))
            left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
            crop = photo.crop((left, top, left + side, top + side))
            crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop)
    return Photos([name.removeprefix("stereo_").split("_")[0] for name in PHOTOGRAPHS], whole, crops)


def prepare(tower: TimmModel, images: list[Image.Image]) -> torch.Tensor:
    """Images -> the tower's input `[N, 3, H, W]`, by the tower's own transform."""
    transform = tower.transform()
    return torch.stack([transform(image) for image in images])


def embed_everything(tower: TimmModel, digits: Digits, photos: Photos) -> dict[str, torch.Tensor]:
    """Embeddings of every picture of the demo, by the name of their group."""
    groups = {
        "digits.train": digits.train_images,
        "digits.test": digits.test_images,
        "photos": photos.whole,
        "crops": photos.crops,
    }
    return {name: tower.embed(images, progress=sys.stderr.isatty()) for name, images in groups.items()}


def _classes_of(base: type[torch.nn.Module]) -> set[str]:
    return {base.__name__}.union(*(_classes_of(child) for child in base.__subclasses__()))


def main(folder: Path, output: Path) -> int:
    """The fresh process: load the tower, say what it is, embed everything, and write the embeddings.

    Returns:
        0, or 1 if the head's class is known here or the tower's numbers are not those it was saved with.
    """
    tower = TimmModel.from_pretrained(folder)
    head = (tower.config.head or {}).get("class")
    if head in _classes_of(torch.nn.Module):
        print(f"  this process knows a class {head}: it proves nothing", file=sys.stderr)
        return 1
    print(f"  process {os.getpid()} knows no class {head}; it came back from data, as {type(tower.head).__name__}")
    verification = tower.verify()
    print(f"  tower.verify(): {verification}")
    if verification.status != "equal":
        print("  expected: equal", file=sys.stderr)
        return 1
    found = embed_everything(tower, load_digit_images(), load_photos())
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python embed.py TOWER_FOLDER EMBEDDINGS.safetensors")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

"""The demo: a tower with a head of one's own is trained, saved, loaded by a process that never heard of the head, and
published on a Hub.

Run it with `scripts/demo`, which makes the environment first. The exit status is 0 only if everything that the fresh
process gives is equal, bit for bit, to what the trained tower gave here, also by way of the Hub.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn as nn
import torch.nn.functional as F
from embed import (
    CROPS_PER_PHOTO,
    Digits,
    Photos,
    embed_everything,
    load_digit_images,
    load_photos,
    prepare,
)
from hub import LOCAL_REPO, HubStepFailed, loopback_hub, publish, real_hub
from safetensors.torch import load_file
from sheet import Block, Tile, draw_sheet
from training import Accuracy, Split, fine_tune, measure

from hf_timm_tower import TimmModel, TowerError
from hf_timm_tower.embedding.neighbours import ExactIndex

HERE = Path(__file__).resolve().parent
NEIGHBOURS = 5


class DemoHead(nn.Module):
    """A head of one's own: normalise, project, bend, drop, project, to length 1. No library knows it.

    Args:
        in_features: Width of the trunk's pooled features.
        embed_dim: Width of the embedding.
    """

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, 2 * embed_dim)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, in_features]` -> `[B, embed_dim]`, rows of length 1."""
        x = self.drop(self.relu(self.linear(self.norm(x))))
        return F.normalize(self.out(x), dim=-1)


class DemoFailed(Exception):
    """A promise was not kept; the message says which."""


def build() -> TimmModel:
    """A small residual network with random weights (none can be downloaded here), and the head above on top."""
    return TimmModel("test_resnet", embed_dim=64, image_size=64, custom_head=DemoHead)


def train(tower: TimmModel, digits: Digits, epochs: int, images: int | None) -> tuple[Accuracy, Accuracy]:
    """Fine-tune on digits with the first part of the trunk frozen, and check that it stayed frozen.

    Args:
        tower: Trained in place.
        digits: What to learn, and what is held out.
        epochs: Passes over the images.
        images: How many images to learn from; None for all.

    Returns:
        Accuracy on the held-out digits, before and after.

    Raises:
        DemoFailed: something frozen moved.
    """
    data = Split(
        prepare(tower, digits.train_images[:images]),
        digits.train_labels[:images],
        prepare(tower, digits.test_images),
        digits.test_labels,
    )
    tower.lock(unlocked_groups=2, freeze_bn_stats=True)
    frozen = _frozen_tensors(tower)
    print(tower.summary())
    classifier = nn.Linear(64, len(data.train_labels.unique()))
    before = measure(tower, classifier, data, "  measuring")
    fine_tune(tower, classifier, data, epochs)
    after = measure(tower, classifier, data, "  measuring")
    now = tower.state_dict()
    moved = [name for name, tensor in frozen.items() if not torch.equal(now[name], tensor)]
    if moved:
        raise DemoFailed(f"{len(moved)} frozen tensors moved in training: {', '.join(moved[:4])}")
    print(f"\n  accuracy on {len(data.test_labels)} held-out digits    before    after")
    print(f"  classifier on the embedding       {before.classifier:6.1%}   {after.classifier:6.1%}")
    print(f"  nearest neighbour                 {before.neighbour:6.1%}   {after.neighbour:6.1%}")
    print(f"  frozen weights and BatchNorm statistics: {len(frozen)} tensors, all unmoved")
    return before, after


def _frozen_tensors(tower: TimmModel) -> dict[str, torch.Tensor]:
    """Copies of the parameters that do not train, and of the statistics beside them."""
    names = [name for name, parameter in tower.named_parameters() if not parameter.requires_grad]
    modules = {name.rpartition(".")[0] for name in names}
    names += [name for name, _ in tower.named_buffers() if name.rpartition(".")[0] in modules]
    state = tower.state_dict()
    return {name: state[name].clone() for name in names}


def embed_in_fresh_process(folder: Path) -> dict[str, torch.Tensor]:
    """What a new Python, which can import hf_timm_tower but not this file, makes of the saved tower.

    Raises:
        DemoFailed: the process ended non-zero.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "embeddings.safetensors"
        # Neither this file's folder nor the current one comes onto the path (from Python 3.11 on).
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, str(HERE / "embed.py"), str(folder), str(output)]
        done = subprocess.run(command, cwd=scratch, env=environment, check=False)
        if done.returncode:
            raise DemoFailed(f"the fresh process could not use {folder} (exit status {done.returncode}); see above")
        return load_file(output)


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Say of every group of embeddings whether both processes made the same bits.

    Raises:
        DemoFailed: not all of them are equal.
    """
    if set(ours) != set(theirs):
        raise DemoFailed(f"the fresh process embedded {sorted(theirs)}, expected {sorted(ours)}")
    different = []
    for name, tensor in ours.items():
        equal = torch.equal(tensor, theirs[name])
        print(f"  {name:<13} {len(tensor):>5} embeddings of {tensor.shape[1]}   {'equal' if equal else 'DIFFERENT'}")
        if not equal:
            different.append(name)
    if different:
        raise DemoFailed(f"the fresh process gives other bits for {', '.join(different)}")


def draw(embeddings: dict[str, torch.Tensor], digits: Digits, photos: Photos, path: Path) -> None:
    """The contact sheet: a digit of each class, the digits that go wrong, and the photographs with their crops."""
    labels = [str(label) for label in digits.train_labels.tolist()]
    owners = [photos.names[crop // CROPS_PER_PHOTO] for crop in range(len(photos.crops))]
    cosines, nearest = ExactIndex(labels, embeddings["digits.train"]).search(embeddings["digits.test"], NEIGHBOURS)
    crops = ExactIndex(owners, embeddings["crops"]).search(embeddings["photos"], CROPS_PER_PHOTO)[1].tolist()
    right = digits.train_labels[nearest] == digits.test_labels[:, None]

    def digit_row(query: int) -> list[Tile]:
        row = [Tile(digits.test_images[query], f"is a {digits.test_labels[query]}")]
        for place, found in enumerate(nearest[query].tolist()):
            label = f"{labels[found]}  ({cosines[query, place]:.2f})"
            row.append(Tile(digits.train_images[found], label, bool(right[query, place])))
        return row

    first = [int((digits.test_labels == digit).nonzero()[0]) for digit in range(10)]
    wrong = (~right[:, 0]).nonzero().flatten().tolist()
    photo_rows = []
    for query, name in enumerate(photos.names):
        row = [Tile(photos.whole[query], name)]
        row += [Tile(photos.crops[found], owners[found], owners[found] == name) for found in crops[query]]
        photo_rows.append(row)
    blocks = [
        Block(
            "One held-out digit of each class",
            "and the digits nearest to it; cosine in brackets",
            [digit_row(q) for q in first],
        ),
        Block(
            f"Held-out digits that go wrong: {len(wrong)} of {len(right)}",
            "the nearest is of another class" + (f"; the first {len(first)}" if len(wrong) > len(first) else ""),
            [digit_row(query) for query in wrong[: len(first)]],
        ),
        Block(
            "Photographs, never trained on",
            f"and the nearest of {len(photos.crops)} crops, {CROPS_PER_PHOTO} of each photograph",
            photo_rows,
        ),
    ]
    draw_sheet([[block] for block in blocks], path)


def run(arguments: argparse.Namespace) -> None:
    """The whole demo.

    Raises:
        DemoFailed, HubStepFailed, TowerError, OSError: by what went wrong.
    """
    torch.manual_seed(arguments.seed)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    digits, photos = load_digit_images(), load_photos()

    print("1/6  Build a tower: a timm trunk with random weights, and DemoHead, a class of this script")
    tower = build()

    print("2/6  Fine-tune it on scikit-learn's digits, the first part of the trunk frozen")
    before, after = train(tower, digits, arguments.epochs, 512 if arguments.quick else None)
    # The few steps of --quick show that it runs; how well is left to chance.
    if not arguments.quick and after.classifier <= before.classifier:
        raise DemoFailed(f"training did not help: accuracy {before.classifier:.1%}, then {after.classifier:.1%}")

    print(f"3/6  Save it to {out / 'tower'}")
    ours = embed_everything(tower, digits, photos)
    tower.save_pretrained(out / "tower")
    for file in sorted((out / "tower").iterdir()):
        print(f"  {file.name:<30} {file.stat().st_size:>10,} bytes")

    print("4/6  Load it in a fresh process, and embed the digits and photographs there")
    theirs = embed_in_fresh_process(out / "tower")
    compare(ours, theirs)

    print("5/6  Draw what is near to what")
    draw(theirs, digits, photos, out / "nearest.png")

    if arguments.repo_id:
        print(f"6/6  Publish it on the Hub as {arguments.repo_id}, load it by its id, tune the head, push again")
        publish(real_hub(), arguments.repo_id, out / "tower", ours)
    else:
        print("6/6  Publish it on a loopback Hub, load it by its id, tune the head, push again")
        shutil.rmtree(out / "hub", ignore_errors=True)
        with loopback_hub(out / "hub") as hub:
            publish(hub, LOCAL_REPO, out / "tower", ours)

    print(f"\nEvery bit is equal. Contact sheet: {out / 'nearest.png'}")
    print(f'Use the tower: TimmModel.from_pretrained("{out / "tower"}")')


def _whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 1000")
    return int(text)


def main() -> int:
    """Parse the command line and run; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=_whole_number, help="passes over the training images (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout (default 0)")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "demo", help="folder for what it makes (demo/)")
    parser.add_argument("--quick", action="store_true", help="two passes over 512 images: shows that it runs")
    parser.add_argument("--repo-id", help="publish here on the real Hub, with your own token, not on a loopback Hub")
    arguments = parser.parse_args()
    arguments.epochs = arguments.epochs or (2 if arguments.quick else 6)
    try:
        run(arguments)
    except (DemoFailed, HubStepFailed, TowerError, OSError) as error:
        print(f"\nThe demo FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

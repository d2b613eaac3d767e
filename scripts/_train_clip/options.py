"""The command line of `train_clip.py`, as HfArgumentParser reads it."""

from dataclasses import dataclass, field
from typing import Literal


def _option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """All options; each is `--its-name`."""

    data: str | None = _option(None, "folder of images with metadata, or a data set's id (default: digits)")
    image_column: str = _option("image", "column of the images")
    caption_column: str = _option("text", "column of the captions")
    pair_column: str = _option("pair", "column of the images' partners, with --second-tower")
    held_out: float = _option(0.2, "share of the images held out where the data has no split for that")
    limit: int | None = _option(None, "train on this many images only")

    architecture: str = _option("test_resnet", "timm architecture of a new tower")
    pretrained: bool = _option(False, "start the new tower from timm's weights")
    image_size: int | None = _option(None, "side in pixels (default: 32 for digits, the architecture's own otherwise)")
    embed_dim: int = _option(64, "width of the embeddings that are compared")
    tower: str | None = _option(None, "folder or repository of a tower to start from, in place of --architecture")
    text_model: str | None = _option(None, "folder or repository of a text model (default: a tiny new BERT)")
    second_tower: str | None = _option(
        None, "architecture, folder or ./folder of a second tower: train on pairs of images, without text"
    )

    loss: Literal["clip", "siglip"] = _option("clip", "softmax over the batch, or each pair by itself")
    epochs: int = _option(20, "passes over the training images")
    batch_size: int = _option(64, "pairs in a step, of all processes together: each is the others' negative")
    lr: float = _option(2e-3, "highest learning rate, of AdamW")
    weight_decay: float = _option(0.05, "of matrices; vectors and scalars have none")
    warmup: float = _option(0.1, "share of the steps in which the learning rate rises; then it falls as a cosine")
    workers: int = _option(0, "processes that prepare images, for each training process")
    cpu: bool = _option(False, "train on the CPU, also on several processes")
    seed: int = _option(0, "of weights, order and captions")
    lock_image: bool = _option(False, "freeze the image tower's trunk and its statistics (LiT)")
    lock_image_unlocked_groups: int = _option(0, "with --lock-image: layer groups that train, from the trunk's end")
    lock_image_head: bool = _option(False, "with --lock-image: freeze the head too")

    output: str = _option("clip", "folder to save into")
    push_to_hub: str | None = _option(None, "repository id to push to")
    private: bool | None = _option(None, "make a new repository private")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "embed_dim"):
            if getattr(self, name) < 1:
                raise SystemExit(f"train_clip: --{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
        if self.batch_size < 2:
            raise SystemExit("train_clip: --batch-size 1: a pair alone has no negatives; expected 2 or more")
        if not 0 < self.held_out < 1:
            raise SystemExit(f"train_clip: --held-out {self.held_out}: expected a share between 0 and 1")
        if self.tower is not None and self.pretrained:
            raise SystemExit("train_clip: --tower brings its own weights; --pretrained is for --architecture")
        if self.second_tower is not None and self.text_model is not None:
            raise SystemExit("train_clip: --second-tower trains without text; leave out --text-model")
        if not self.lock_image and (self.lock_image_unlocked_groups or self.lock_image_head):
            raise SystemExit("train_clip: --lock-image-... options need --lock-image")

"""The options of scripts/finetune.py, beside those that transformers' `TrainingArguments` has."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_timm_tower import ArgumentError


@dataclass
class ModelArguments:
    """Which tower, and what of it trains."""

    tower: str = field(
        default="test_resnet", metadata={"help": "name of a timm architecture, a tower's folder, or its repository id"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the repository"})
    pretrained: bool = field(
        default=False, metadata={"help": "begin with timm's pretrained weights (for an architecture's name)"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of the input in pixels; by default the tower's own, and 32 for digits"}
    )
    drop_path: float | None = field(
        default=None, metadata={"help": "stochastic depth rate of the trunk (for an architecture's name)"}
    )
    mode: Literal["full", "partial", "probe"] = field(
        default="full",
        metadata={"help": "what trains: everything, part of the trunk and all above it, or the classifier alone"},
    )
    unlocked_groups: int | None = field(
        default=None, metadata={"help": "partial: this many layer groups of the trunk, counted from the output"}
    )
    until: str | None = field(
        default=None, metadata={"help": "partial: all above this layer group, which is the last that stays frozen"}
    )
    freeze_bn_stats: bool = field(
        default=True, metadata={"help": "keep running statistics of what is frozen where they are"}
    )
    unfreeze_schedule: str | None = field(
        default=None,
        metadata={"help": "open the trunk by epoch, such as 0:0,2:1,4:3,6:all (groups from the output, or a name)"},
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "factor on the learning rate from one layer group to the one before it"}
    )

    def __post_init__(self) -> None:
        chosen = [name for name in ("unlocked_groups", "until") if getattr(self, name) is not None]
        if self.mode == "partial" and len(chosen) != 1:
            raise ArgumentError("--mode partial needs --unlocked-groups or --until, and one of them")
        if self.mode != "partial" and chosen:
            raise ArgumentError(f"--{chosen[0].replace('_', '-')} says what trains: it needs --mode partial")
        if self.mode != "full" and self.unfreeze_schedule is not None:
            raise ArgumentError("--unfreeze-schedule says by itself what trains: leave --mode out")


@dataclass
class DataArguments:
    """The images. Without an option: scikit-learn's digits."""

    image_folder: str | None = field(
        default=None,
        metadata={"help": "folder with train/ and test/ (or validation/), in each a folder of images per label"},
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "share of the images to hold out, where they do not come in two splits"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "id of the data set in the card; by default the folder's name"}
    )
    augment: Literal["auto", "none", "crop", "timm"] = field(
        default="auto",
        metadata={
            "help": "what is done to training images: nothing, mild crops (auto for digits), or timm's crops, flips "
            "and colours (auto for a folder)"
        },
    )
    max_images: int | None = field(
        default=None, metadata={"help": "take only so many images of each split, evenly spread: to try things out"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ArgumentError(f"--test-fraction {self.test_fraction}: expected a number between 0 and 1")


@dataclass
class FinetuneArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit a small data set; all of its options are there."""

    output_dir: str | None = field(
        default="finetuned", metadata={"help": "folder for checkpoints and figures; the tower comes into tower/ in it"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint's folder, or auto: the last whole one in the output folder"}
    )
    num_train_epochs: float = field(default=15, metadata={"help": "passes over the training images"})
    learning_rate: float = field(default=3e-3, metadata={"help": "of the classifier; see --layer-decay for the rest"})
    weight_decay: float = field(default=0.05, metadata={"help": "not for norms, biases and what timm names"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or below 1 the share of all steps"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "as in transformers"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "images per process and step"})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "images per process and step"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best"})
    logging_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false: images are read when needed"})
    hub_strategy: str = field(default="end", metadata={"help": "only end: the tower is pushed once and whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_strategy != HubStrategy.END:
            raise ArgumentError("--hub-strategy: only end; the others push a checkpoint's files one by one, no tower")
        if self.remove_unused_columns:
            raise ArgumentError("--remove-unused-columns would remove the images: they are prepared when they are used")

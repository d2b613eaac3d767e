"""transformers' `Trainer` with the tower's parameter groups, and the checkpoint that a killed run goes on from."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_timm_tower import ArgumentError
from hf_timm_tower.training.param_groups import param_groups

from .arguments import FinetuneArguments

_AUTO = "auto"
# `Trainer` writes it last; without it, a run would take the checkpoint's weights and begin at epoch 0 with them.
_STATE = "trainer_state.json"


class TowerTrainer(Trainer):
    """Trains with layer-wise learning rates, and no weight decay where timm wants none.

    Args:
        layer_decay: As in `param_groups`.
    """

    def __init__(self, *args: Any, layer_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_decay = layer_decay

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that `--optim` names, over all that trains now or opens later."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = param_groups(self.model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = kind(groups, **options)
        return self.optimizer


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Share of images whose most likely label is the true one."""
    return {"accuracy": float((np.argmax(predicted.predictions, axis=-1) == predicted.label_ids).mean())}


def find_checkpoint(arguments: FinetuneArguments) -> Path | None:
    """The checkpoint to go on from, None to begin.

    Raises:
        ArgumentError: it is not whole, or there are checkpoints and nothing says what is to become of them.
    """
    wanted, output = arguments.resume_from_checkpoint, Path(arguments.output_dir or "")
    ranks = arguments.world_size
    if wanted not in (None, _AUTO):
        if not is_whole(Path(wanted), ranks):
            raise ArgumentError(f"--resume-from-checkpoint {wanted}: not a whole checkpoint of {ranks} processes")
        return Path(wanted)
    found = sorted(
        (path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    if wanted is None and found:
        raise ArgumentError(
            f"{output} has checkpoints of an earlier run: --resume-from-checkpoint auto goes on from the last, another "
            "--output-dir begins anew"
        )
    return next((path for path in reversed(found) if is_whole(path, ranks)), None)


def is_whole(checkpoint: Path, ranks: int) -> bool:
    """Whether a checkpoint has been written to its end, for this number of processes."""
    generators = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    # torch's files are archives, and an archive has its table of contents at the end
    if not all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt", *generators)):
        return False
    try:
        json.loads((checkpoint / _STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True

#!/usr/bin/env python
"""Fine-tune a tower for image classification with transformers' Trainer: train, evaluate, save, push.

    python scripts/finetune.py                                        scikit-learn's digits, from scratch
    python scripts/finetune.py --tower org/name --mode probe          the classifier alone, on a tower from the Hub
    python scripts/finetune.py --tower vit_small_patch16_224 --pretrained --image-folder FOLDER --layer-decay 0.75
    python scripts/finetune.py --unfreeze-schedule 0:0,2:1,4:all      open the trunk by epoch
    python scripts/finetune.py --resume-from-checkpoint auto          go on after a kill
    torchrun --nproc-per-node 2 scripts/finetune.py --use-cpu         two processes (also: accelerate launch)

All options of `TrainingArguments` are there (--bf16, --gradient-checkpointing, --torch-compile, --push-to-hub
--hub-model-id org/name ...). The result is OUTPUT_DIR/tower: for `TimmTowerForImageClassification.from_pretrained`,
`AutoModelForImageClassification` and `pipeline("image-classification")`.

Needs `pip install "hf_timm_tower[train]"`. The figures in the card are of the held-out images, after the last epoch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from _finetune.arguments import DataArguments, FinetuneArguments, ModelArguments
from _finetune.data import Data, load_data, prepare
from _finetune.model import resume, set_trainable, start
from _finetune.publishing import Publication
from _finetune.training import TowerTrainer, accuracy, find_checkpoint
from transformers import HfArgumentParser, set_seed

from hf_timm_tower import TowerError
from hf_timm_tower.training.unfreeze_schedule import UnfreezeSchedule


def train(arguments: ModelArguments, data: Data, training: FinetuneArguments, of_digits: bool) -> TowerTrainer:
    """Train, from the beginning or from a checkpoint.

    Returns:
        The trainer, with the trained model.
    """
    checkpoint = find_checkpoint(training)
    set_seed(training.seed)
    if checkpoint is None:
        model = start(arguments, data.labels, of_digits)
        set_trainable(model, arguments)
    else:
        model = resume(checkpoint, arguments, data.labels)
    train_split, test_split = prepare(data, model.config)
    schedule = arguments.unfreeze_schedule
    trainer = TowerTrainer(
        model,
        training,
        train_dataset=train_split,
        eval_dataset=test_split,
        compute_metrics=accuracy,
        callbacks=[] if schedule is None else [UnfreezeSchedule(schedule)],
        layer_decay=arguments.layer_decay,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def finetune(arguments: ModelArguments, data_arguments: DataArguments, training: FinetuneArguments) -> None:
    """Train, evaluate, save and push.

    Raises:
        TowerError: by what is wrong with the options, the tower or the repository.
    """
    with training.main_process_first(desc="reading the images"):
        data = load_data(data_arguments)
    trainer = train(arguments, data, training, data_arguments.image_folder is None)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        figures = {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]}
        done = Publication(trainer.model, Path(training.output_dir or "", "tower"), figures, data)
        done.save()
        print(f"{done.folder}: accuracy {figures['accuracy']:.4f} on {len(data.test)} held-out images")
        if training.push_to_hub:
            print(done.push(trainer.hub_model_id, training))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def main(command_line: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, FinetuneArguments), description=(__doc__ or "").partition("\n")[0]
    )
    try:
        finetune(*parser.parse_args_into_dataclasses(command_line))
    except TowerError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

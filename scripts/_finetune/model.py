"""The tower with a classifier, as training begins with it."""

import os
import tempfile
from pathlib import Path

import timm
from transformers import AutoConfig

from hf_timm_tower import ArgumentError, TimmModel, TimmTowerForImageClassification
from hf_timm_tower.training.freezing import describe_frozen
from hf_timm_tower.training.lock import lock, unlock

from .arguments import ModelArguments

_SIZE_FOR_DIGITS = 32


def start(arguments: ModelArguments, labels: list[str], of_digits: bool) -> TimmTowerForImageClassification:
    """The tower that the options name, with a classifier for these labels: its own where it has one, else a fresh one.

    Raises:
        TowerError: by what is wrong with the options or the tower.
    """
    place = arguments.tower
    is_architecture = not os.path.isdir(place) and timm.is_model(place)
    if not is_architecture:
        if arguments.pretrained or arguments.drop_path is not None:
            raise ArgumentError("--pretrained and --drop-path are for an architecture's name: a tower has its own")
        if not os.path.isdir(place) and "/" not in place:
            near = ", ".join(timm.list_models(f"*{place}*")[:5])
            raise ArgumentError(
                f"--tower {place}: no architecture of timm {timm.__version__}, no folder, no repository's id"
                + (f" (near: {near})" if near else "")
            )
    wanted = dict(enumerate(labels))
    with tempfile.TemporaryDirectory(prefix="finetune_") as scratch:
        if is_architecture:
            size = arguments.image_size or (_SIZE_FOR_DIGITS if of_digits else None)
            pretrained, drop_path = arguments.pretrained, arguments.drop_path
            tower = TimmModel(place, None, image_size=size, proj="none", pretrained=pretrained, drop_path=drop_path)
            tower.save_pretrained(scratch)
        else:
            config = AutoConfig.from_pretrained(place, revision=arguments.revision)
            has_own = TimmTowerForImageClassification.__name__ in (config.architectures or ())
            if has_own and config.id2label == wanted and arguments.image_size is None:
                return TimmTowerForImageClassification.from_pretrained(place, revision=arguments.revision)
            tower = TimmModel.from_pretrained(place, revision=arguments.revision, image_size=arguments.image_size)
            tower.save_pretrained(scratch)
        return TimmTowerForImageClassification.from_pretrained(scratch, id2label=wanted)


def resume(checkpoint: Path, arguments: ModelArguments, labels: list[str]) -> TimmTowerForImageClassification:
    """The tower of a checkpoint, frozen as it was.

    Raises:
        ArgumentError: the options say something else than those that the checkpoint was made with.
    """
    model = TimmTowerForImageClassification.from_pretrained(checkpoint)
    if model.config.id2label != dict(enumerate(labels)):
        raise ArgumentError(f"{checkpoint} has other labels than the data: {model.config.id2label}")
    if arguments.unfreeze_schedule is None:
        was = describe_frozen(model)
        set_trainable(model, arguments)
        if describe_frozen(model) != was:
            raise ArgumentError(
                f"{checkpoint} was trained with something else frozen ({was}); go on with the options it began with "
                "(--mode, --unlocked-groups, --until, --freeze-bn-stats), or begin anew from it: --tower CHECKPOINT"
            )
    return model


def set_trainable(model: TimmTowerForImageClassification, arguments: ModelArguments) -> None:
    """Freeze and open what the options say, whatever the tower came with."""
    if arguments.mode == "probe":
        lock(model, freeze_bn_stats=arguments.freeze_bn_stats, head=True)
    elif arguments.until is not None:
        lock(model, until=arguments.until, freeze_bn_stats=arguments.freeze_bn_stats)
    elif arguments.unlocked_groups is not None:
        lock(model, arguments.unlocked_groups, arguments.freeze_bn_stats)
    else:
        unlock(model)

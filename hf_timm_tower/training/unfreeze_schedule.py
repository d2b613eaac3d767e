"""Progressive unfreezing: a callback of transformers' `Trainer` that opens a tower's layer groups by epoch.

Which groups are open follows from the epoch alone, so that a run that is resumed from a checkpoint has the same ones
open as one that was not interrupted.

What opens later is in the optimizer from the start (and in `DistributedDataParallel`, which takes no parameters
afterwards): while it is frozen it has no gradient, and torch's optimizers leave parameters without a gradient as they
are, decay and momentum included. Their state, Adam's count of steps too, begins when they open.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..reader.errors import ArgumentError
from .freezing import describe_frozen
from .layer_groups import layer_groups
from .lock import unlock

_ALL = "all"
_log = logging.getLogger(__name__)


def parse_schedule(schedule: str | Mapping[int, int | str]) -> dict[int, int | str]:
    """Read a schedule: `"0:0,2:1,4:3,6:all"`, or the same as a mapping.

    Args:
        schedule: First epoch, counted from 0 -> what of the trunk is open from then on: a number of layer groups,
            counted from the output; the name of the group (module, parameter) down to which it is open; or `all`.

    Returns:
        The same in order; it begins with epoch 0.

    Raises:
        ArgumentError: not a schedule; says where.
    """
    if isinstance(schedule, str):
        pairs = [_read_pair(entry, schedule) for entry in schedule.split(",")]
    else:
        pairs = list(schedule.items())
    for epoch, opens in pairs:
        if not _is_count(epoch) or not (_is_count(opens) or (isinstance(opens, str) and opens)):
            raise ArgumentError(
                f"unfreezing schedule: {{{epoch!r}: {opens!r}}}: expected an epoch from 0, and a number of groups from "
                "0, the name of one, or 'all'"
            )
    epochs = [epoch for epoch, _ in pairs]
    if not epochs or epochs[0] != 0:
        raise ArgumentError(f"unfreezing schedule {schedule!r}: it must say what is open from epoch 0 on, such as 0:0")
    if epochs != sorted(set(epochs)):
        raise ArgumentError(f"unfreezing schedule {schedule!r}: its epochs must rise, found {epochs}")
    return dict(pairs)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_pair(entry: str, schedule: str) -> tuple[int, int | str]:
    epoch, colon, opens = (part.strip() for part in entry.partition(":"))
    if not colon or not opens or not epoch.isdecimal():
        raise ArgumentError(
            f"unfreezing schedule {schedule!r}: {entry.strip()!r} is not epoch:groups. Expected such as 0:0,2:1,4:3,"
            "6:all, groups being a number counted from the output, the name of the group down to which, or all"
        )
    return int(epoch), int(opens) if opens.isdecimal() else opens


class UnfreezeSchedule(TrainerCallback):
    """Opens layer groups of the trunk by epoch; head and classifier train throughout.

    Running statistics of what is closed are frozen. With `Trainer(callbacks=[UnfreezeSchedule("0:0,2:1,4:all")])`
    nothing else is needed: the optimizer that `Trainer` makes has the parameters that open later. An optimizer made
    beforehand needs `prepare` before it is made. For one process or `DistributedDataParallel`.

    Args:
        schedule: As in `parse_schedule`.

    Raises:
        ArgumentError: not a schedule.
    """

    def __init__(self, schedule: str | Mapping[int, int | str]) -> None:
        self.stages = parse_schedule(schedule)

    def opens_at(self, epoch: int) -> int | str:
        """What is open in an epoch, as in `parse_schedule`."""
        return [opens for first, opens in self.stages.items() if first <= epoch][-1]

    def prepare(self, tower: nn.Module) -> None:
        """Open all that any stage opens: what an optimizer must know before training begins.

        Args:
            tower: A module with a `trunk` and a `head`.

        Raises:
            ArgumentError: a stage names a group that the trunk does not have, or more groups than it has.
        """
        # every stage opens from the output downwards, so that the largest has all that the others have
        _open(tower, max(self.stages.values(), key=lambda opens: _open(tower, opens)))

    def apply(self, tower: nn.Module, epoch: int) -> bool:
        """Open what is open in an epoch, and close the rest; what was open before does not matter.

        Args:
            tower: A module with a `trunk` and a `head`.
            epoch: Counted from 0.

        Returns:
            Whether anything changed.
        """
        before = describe_frozen(tower)
        _open(tower, self.opens_at(epoch))
        return describe_frozen(tower) != before

    # --- what `Trainer` calls

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the optimizer is made and the model is wrapped."""
        _check_wrapping(args)
        self.prepare(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint, if there is one, has been loaded by now."""
        self.prepare(kwargs["model"])
        _check_optimizer(kwargs["model"], kwargs["optimizer"])
        self._enter(kwargs["model"], state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also called when a run is resumed in the middle of an epoch."""
        self._enter(kwargs["model"], state)

    def _enter(self, model: nn.Module, state: TrainerState) -> None:
        epoch = int(state.epoch or 0)
        if not self.apply(model, epoch):
            return
        _log.info("epoch %d: %s of the trunk open", epoch, self.opens_at(epoch))
        if "torch._dynamo" in sys.modules:
            # torch.compile does not guard against hooks, which hold the statistics, and keeps but eight versions of a
            # function before it gives up compiling it.
            torch.compiler.reset()


def _open(tower: nn.Module, opens: int | str) -> int:
    """Open what a stage of the schedule says and close the rest; how many parameters are open."""
    if opens == _ALL:
        unlock(tower)
    elif isinstance(opens, int):
        unlock(tower, opens)
    else:
        if opens in [group.name for group in layer_groups(tower) if group.part != "trunk"]:
            raise ArgumentError(
                f"unfreezing schedule: {opens!r} is no group of the trunk and trains throughout; 0 opens nothing "
                "beside it"
            )
        unlock(tower, until=opens)
    return sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)


def _check_wrapping(args: TrainingArguments) -> None:
    if args.deepspeed or args.fsdp:
        raise ArgumentError(
            "an unfreezing schedule needs parameters as they are: FSDP and DeepSpeed shard them by what trains when "
            "the run begins. Use DistributedDataParallel (accelerate launch --multi_gpu, torchrun)"
        )
    if args.world_size == 1:
        return
    checkpoints = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    finds = args.ddp_find_unused_parameters
    if finds is False or (finds is None and checkpoints) or getattr(args, "ddp_static_graph", False):
        raise ArgumentError(
            "an unfreezing schedule on several processes needs ddp_find_unused_parameters=True (and no "
            "ddp_static_graph): what opens later has no gradient until then"
        )


def _check_optimizer(tower: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = list(tower.named_parameters())
    lacking = [name for name, parameter in parameters if parameter.requires_grad and id(parameter) not in known]
    if lacking:
        raise ArgumentError(
            f"the optimizer lacks {len(lacking)} parameters that the unfreezing schedule opens, such as {lacking[0]}: "
            "call prepare(tower) of the schedule before the optimizer is made, or let Trainer make it"
        )

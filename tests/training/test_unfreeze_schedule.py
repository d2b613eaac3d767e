"""A tower opens by epoch under transformers' Trainer: what is closed stays as it is, what has opened trains."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_timm_tower import ArgumentError, TimmTowerConfig, TimmTowerForImageClassification
from hf_timm_tower.reader.freezing import has_frozen_statistics
from hf_timm_tower.training.layer_groups import layer_groups
from hf_timm_tower.training.unfreeze_schedule import UnfreezeSchedule, parse_schedule

STEPS = 2
"""Steps of an epoch."""


def make_model(architecture: str = "test_resnet") -> TimmTowerForImageClassification:
    torch.manual_seed(0)
    config = TimmTowerConfig(architecture=architecture, proj="none", image_size=32, num_labels=3)
    model = TimmTowerForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 10)  # no zeros, through which no gradient comes
    return model


def images(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 3} for n in range(count)]


class Watch(TrainerCallback):
    """Notes all numbers of the model, and what is open, at the beginning and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.open: list[set[str]] = []

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.on_train_begin(model=model)
        self.open.append({name for name, tensor in model.named_parameters() if tensor.requires_grad})

    def moved(self, step: int) -> set[str]:
        """Names of the numbers that a step changed, counted from 0."""
        before, after = self.states[step], self.states[step + 1]
        return {name for name in before if not torch.equal(before[name], after[name])}


def run(
    folder: Path,
    schedule: UnfreezeSchedule,
    model: TimmTowerForImageClassification,
    *,
    epochs: int = 3,
    resume: str | None = None,
    optimizers: tuple[Any, Any] = (None, None),
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Watch:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": epochs,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(**{**options, **arguments}),
        train_dataset=images(),  # type: ignore[arg-type]
        callbacks=[schedule, watch, *callbacks],
        optimizers=optimizers,
    )
    trainer.train(resume_from_checkpoint=resume)
    return watch


def groups_of(model: TimmTowerForImageClassification, opened: int) -> tuple[set[str], set[str]]:
    """The parameters that train with so many groups of the trunk open, and the modules whose statistics are frozen."""
    trunk = [group for group in layer_groups(model) if group.part == "trunk"]
    closed = trunk[: len(trunk) - opened]
    frozen = {name for group in closed for name in group.parameters}
    frozen_statistics = {name for group in closed for name in group.statistics}
    return {name for name, _ in model.named_parameters()} - frozen, frozen_statistics


# --- schedules


def test_a_schedule_is_read_from_text_and_from_a_mapping() -> None:
    stages = {0: 0, 2: 1, 4: "layer2.0", 6: "all"}
    assert parse_schedule("0:0, 2:1,4: layer2.0,6:all") == stages
    assert parse_schedule(stages) == stages
    schedule = UnfreezeSchedule("0:0,2:1,4:all")
    assert [schedule.opens_at(epoch) for epoch in range(6)] == [0, 0, 1, 1, "all", "all"]


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("", "not epoch:groups"),
        ("0", "not epoch:groups"),
        ("0:0,x:1", "'x:1'"),
        ("0:", "not epoch:groups"),
        ("1:0", "from epoch 0"),
        ("0:0,3:1,2:2", "must rise"),
        ("0:0,0:1", "must rise"),
        ({}, "from epoch 0"),
        ({0: -1}, "-1"),
        ({0: True}, "True"),
        ({"0": 0}, "'0'"),
        ({0: None}, "None"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        UnfreezeSchedule(schedule)


@pytest.mark.parametrize(
    ("schedule", "says"), [("0:0,1:99", "99"), ("0:0,1:layer9", "layer4.0"), ("0:0,1:classifier", "trains throughout")]
)
def test_groups_that_the_trunk_lacks_are_refused_before_training_begins(
    schedule: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=says):
        run(tmp_path, UnfreezeSchedule(schedule), make_model())


def test_what_is_open_follows_from_the_epoch_alone() -> None:
    model, schedule = make_model(), UnfreezeSchedule("0:0,1:2,2:layer2.0,3:all")
    total = sum(group.part == "trunk" for group in layer_groups(model))
    expected = [groups_of(model, opened) for opened in (0, 2, total - 2, total)]
    schedule.prepare(model)
    for epoch in (3, 0, 2, 2, 1, 3, 1, 0):
        schedule.apply(model, epoch)
        opened = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert (opened, {name for name, module in model.named_modules() if has_frozen_statistics(module)}) == expected[
            epoch
        ]
        assert not schedule.apply(model, epoch), "a second time changes nothing"


# --- training


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_what_is_closed_keeps_its_bits_and_what_is_open_moves(optim: str, tmp_path: Path) -> None:
    model = make_model()
    momentum = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    # opens, closes again with decay and momentum at work, opens whole
    schedule = UnfreezeSchedule("0:0,1:2,2:0,3:all")
    watch = run(tmp_path, schedule, model, epochs=4, optim=optim, **momentum)
    statistics = {name for name, _ in model.named_buffers() if "running" in name}
    assert len(watch.open) == 4 * STEPS
    for step, opened in enumerate(watch.open):
        total = sum(group.part == "trunk" for group in layer_groups(model))
        trains, frozen_statistics = groups_of(model, (0, 2, 0, total)[step // STEPS])
        assert opened == trains
        moving = {name for name in statistics if name.rpartition(".")[0] not in frozen_statistics}
        moved = watch.moved(step)
        assert {name for name in moved if "num_batches_tracked" not in name} == trains | moving, f"step {step}"


def test_a_run_that_goes_on_in_the_middle_of_a_schedule_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    text = "0:0,1:1,2:3"
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", UnfreezeSchedule(text), make_model(), **options)
    for step in (3, 4):  # in the middle of an epoch, between two
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        loaded = TimmTowerForImageClassification.from_pretrained(checkpoint)
        again = run(tmp_path / str(step), UnfreezeSchedule(text), loaded, resume=str(checkpoint))
        assert again.open == whole.open[step:]
        assert again.states[0].keys() == whole.states[step].keys()
        for ours, theirs in zip(again.states, whole.states[step:], strict=True):
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


KILLED = """
import os, signal, sys, torch
from tests.training.test_unfreeze_schedule import *
torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), UnfreezeSchedule(SCHEDULE), make_model(), callbacks=[Kill()], **EVERY_STEP)
"""
SCHEDULE = "0:0,1:1,2:3"
EVERY_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def test_a_run_killed_in_the_middle_of_a_schedule_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    checkpoint = tmp_path / "killed" / "checkpoint-3"  # half of epoch 1
    whole = run(tmp_path / "whole", UnfreezeSchedule(SCHEDULE), make_model(), **EVERY_STEP)
    loaded = TimmTowerForImageClassification.from_pretrained(checkpoint)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == whole.open[2]
    again = run(tmp_path / "killed", UnfreezeSchedule(SCHEDULE), loaded, resume=str(checkpoint), **EVERY_STEP)
    assert again.open == whole.open[3:]
    assert len({frozenset(each) for each in again.open}) == 2, "one more stage began"
    for ours, theirs in zip(again.states, whole.states[3:], strict=True):
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_an_optimizer_without_what_opens_later_is_refused(tmp_path: Path) -> None:
    model, schedule = make_model(), UnfreezeSchedule("0:0,1:2")

    def sgd() -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1), None

    model.trunk.requires_grad_(False)
    with pytest.raises(ArgumentError, match="call prepare"):
        run(tmp_path, schedule, model, optimizers=sgd())
    schedule.prepare(model)
    assert len(run(tmp_path, schedule, model, optimizers=sgd()).open) == 3 * STEPS


def test_compiled_code_follows_statistics_that_open_and_close(tmp_path: Path) -> None:
    text = "0:0,1:all,2:0"
    plain = run(tmp_path / "plain", UnfreezeSchedule(text), make_model())
    compiled = run(
        tmp_path / "compiled", UnfreezeSchedule(text), make_model(), torch_compile=True, torch_compile_backend="eager"
    )
    assert [compiled.moved(step) for step in range(3 * STEPS)] == [plain.moved(step) for step in range(3 * STEPS)]


# --- several processes

TWO_PROCESSES = """
import os, sys, torch
from tests.training.test_unfreeze_schedule import *
torch.set_num_threads(1)
alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
for how in ("plain", "checkpointing"):
    batch = {"per_device_train_batch_size": 4 if alone else 2}
    if how == "checkpointing":
        batch |= {"gradient_checkpointing": True, "ddp_find_unused_parameters": None if alone else True}
    model = make_model("test_vit")
    watch = run(Path(sys.argv[1], how), UnfreezeSchedule("0:0,1:1,2:all"), model, optim="sgd", **batch)
    torch.save((watch.states, watch.open), f"{sys.argv[1]}/{how}.{os.environ.get('RANK', 'alone')}")
"""


@pytest.fixture(scope="module")
def two_processes_and_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each process of TWO_PROCESSES saw, of two that train together and of one by itself."""
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    (folder / "script.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for program in (torchrun, [sys.executable]):
        command = [*program, str(folder / "script.py"), str(folder)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.turn(0)
@pytest.mark.parametrize("how", ["plain", "checkpointing"])
def test_two_processes_keep_one_model_through_a_schedule(how: str, two_processes_and_one: Path) -> None:
    """`DistributedDataParallel` averages the gradients of what opened after it was made."""
    found = {name: torch.load(two_processes_and_one / f"{how}.{name}") for name in ("0", "1", "alone")}
    assert found["0"][1] == found["1"][1] == found["alone"][1]
    for first, second, alone in zip(*(found[name][0] for name in ("0", "1", "alone")), strict=True):
        for name in alone:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-5)


def test_several_processes_need_ddp_to_look_for_unused_parameters(tmp_path: Path) -> None:
    class Arguments(TrainingArguments):
        world_size: Any = 2

    schedule = UnfreezeSchedule("0:0,1:all")
    for refused in ({"ddp_find_unused_parameters": False}, {"gradient_checkpointing": True}):
        with pytest.raises(ArgumentError, match="ddp_find_unused_parameters=True"):
            schedule.on_init_end(Arguments(str(tmp_path), use_cpu=True, **refused), None, None, model=make_model())

"""scripts/finetune.py: what it saves loads everywhere, the card has its figures, a killed run goes on."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, pipeline

from hf_timm_tower import TimmModel, TimmTowerForImageClassification
from hf_timm_tower.training.layer_groups import layer_groups

from .. import hub_calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "finetune.py"
QUIET = ("--use-cpu", "--disable-tqdm", "True")
SMALL = (*QUIET, "--max-images", "40", "--per-device-train-batch-size", "16", "--num-train-epochs", "2")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("finetune")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def run(script: Any) -> Any:
    """`run(output, *options)` runs it in this process, small and on the digits unless the options say otherwise."""

    def run(output: Path, *options: object) -> int:
        return int(script.main([*SMALL, "--output-dir", str(output), *map(str, options)]))

    return run


def start_process(*options: object, before: tuple[str, ...] = (), env: Mapping[str, str | None] | None = None) -> Any:
    environment: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.Popen(
        [sys.executable, *before, str(SCRIPT), *QUIET, *map(str, options)],
        env={name: value for name, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: Any) -> str:
    printed: str = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed
    return printed


def figures(output: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / "eval_results.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Four digits of each of three kinds, in train/ and test/."""
    digits = load_digits()
    for position, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / "images" / ("test" if position % 2 else "train") / f"digit {digit}"
        if digit < 3 and len(list(folder.glob("*"))) < 4:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / f"{position}.png")
    return tmp_path / "images"


# --- what comes out


def test_the_pushed_tower_loads_everywhere_and_its_card_has_the_figures(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        environment = hub.env(tmp_path / "cache")
        options = ("--push-to-hub", "--hub-model-id", "ann/digits", "--output-dir", tmp_path / "out")
        printed = finish(start_process(*SMALL, *options, env=environment))
        assert f"{hub.url}/ann/digits/commit/" in printed
        worker = HubWorker(environment)
        names = worker.call(hub_calls.list_files, "ann/digits")
        files = worker.call(hub_calls.read_files, "ann/digits", [name for name in names if "/" not in name])
        worker.close()
    folder = tmp_path / "out" / "tower"
    local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(names) - {".gitattributes"} == local, "the tower, whole, and nothing else"
    assert all(files[name] == (folder / name).read_bytes() for name in local if name in files and name != "README.md")

    card = ModelCard(files["README.md"].decode())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    measured = figures(tmp_path / "out")
    assert found == {"accuracy": measured["eval_accuracy"], "loss": measured["eval_loss"]}
    assert card.data.pipeline_tag == "image-classification"
    assert f"| accuracy | {measured['eval_accuracy']!r} |" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"scikit-learn digits"}

    model = TimmTowerForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    classify = pipeline("image-classification", str(folder))
    digits = load_digits()
    image = Image.fromarray((digits.images[0] * 15.9).astype(np.uint8)).convert("RGB")
    pixels = TimmModel.from_pretrained(folder).transform()(image)[None]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0]
        assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixels).logits, model(pixels).logits)
    scores = {answer["label"]: answer["score"] for answer in classify(image, top_k=10)}
    assert [scores[str(digit)] for digit in range(10)] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_linear_probe_on_an_image_folder_leaves_the_tower_as_it_was(
    run: Any, tmp_path: Path, image_folder: Path
) -> None:
    base = tmp_path / "base"
    TimmModel("test_resnet", 16, image_size=32).save_pretrained(base)
    assert run(tmp_path / "out", "--tower", base, "--image-folder", image_folder, "--mode", "probe") == 0
    folder = tmp_path / "out" / "tower"
    for name in ("trunk.safetensors", "head.safetensors"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    model = TimmTowerForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "digit 0", 1: "digit 1", 2: "digit 2"}
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_partial_training_moves_what_is_open_and_nothing_else(run: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    TimmModel("test_resnet", 16, image_size=32).save_pretrained(base)
    before = weights(base)
    partial = ("--mode", "partial", "--until", "layer2.0", "--layer-decay", 0.5)
    assert run(tmp_path / "out", "--tower", base, *partial) == 0
    groups = layer_groups(TimmModel.from_pretrained(base))
    position = next(index for index, group in enumerate(groups) if group.name == "layer2.0")
    closed = {name for group in groups[: position + 1] for name in group.parameters}
    closed |= {key for key in before for group in groups[: position + 1] if key.rpartition(".")[0] in group.statistics}
    after = weights(tmp_path / "out" / "tower")
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert closed <= still
    assert not [key for key in still - closed if key.endswith("conv1.weight") or key.startswith("head.")]


def test_a_tower_that_was_trained_on_these_labels_goes_on_with_its_classifier(run: Any, tmp_path: Path) -> None:
    assert run(tmp_path / "first") == 0
    first = tmp_path / "first" / "tower"
    assert run(tmp_path / "second", "--tower", first, "--learning-rate", 0, "--mode", "probe") == 0
    assert figures(tmp_path / "second")["eval_accuracy"] == figures(tmp_path / "first")["eval_accuracy"]
    assert torch.equal(weights(tmp_path / "second" / "tower")["classifier.weight"], weights(first)["classifier.weight"])


def test_layers_have_their_own_rates(script: Any, tmp_path: Path) -> None:
    from _finetune.arguments import DataArguments, FinetuneArguments, ModelArguments

    data = script.load_data(DataArguments(max_images=40))
    training = FinetuneArguments(
        str(tmp_path), use_cpu=True, num_train_epochs=1, learning_rate=1e-3, lr_scheduler_type="constant",
        warmup_steps=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = script.train(ModelArguments(layer_decay=0.5), data, training, of_digits=True)
    rate_of = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    groups = layer_groups(trainer.model)
    parameters = dict(trainer.model.named_parameters())
    for depth, group in enumerate(reversed(groups)):
        rates = [rate_of[id(parameters[name])] for name in group.parameters]
        assert rates == pytest.approx([1e-3 * 0.5**depth] * len(rates)), group.name


def test_checkpointing_bfloat16_and_compilation_train(run: Any, tmp_path: Path) -> None:
    flags = ("--gradient-checkpointing", "--bf16", "--torch-compile", "--torch-compile-backend", "eager")
    assert run(tmp_path / "out", *flags, "--tower", "test_vit", "--unfreeze-schedule", "0:0,1:all") == 0
    tower = TimmModel.from_pretrained(tmp_path / "out" / "tower")
    assert tower.verify().status == "equal"
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


# --- going on


def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(run: Any, tmp_path: Path) -> None:
    options = ("--num-train-epochs", 3, "--save-total-limit", 9, "--unfreeze-schedule", "0:0,1:2,2:all")
    assert run(tmp_path / "whole", *options) == 0
    output = tmp_path / "killed"
    assert run(output, *options) == 0
    expected = weights(tmp_path / "whole" / "tower")
    steps = sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))
    assert len(steps) == 3
    # As a kill leaves them: one without its last file, one with half of a file.
    (output / f"checkpoint-{steps[2]}" / "trainer_state.json").unlink()
    half = output / f"checkpoint-{steps[1]}" / "optimizer.pt"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (output / "eval_results.json").unlink()
    assert run(output, *options) == 1, "there are checkpoints, and nothing says what is to become of them"
    assert run(output, *options, "--resume-from-checkpoint", f"{output}/checkpoint-{steps[1]}") == 1
    assert run(output, *options, "--resume-from-checkpoint", "auto") == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["epoch"] for entry in log if "loss" in entry] == [1, 2, 3]
    found = weights(output / "tower")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_other_options_than_the_checkpoints_are_refused(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--mode", "partial", "--unlocked-groups", 1) == 0
    resumed = ("--resume-from-checkpoint", "auto", "--num-train-epochs", 3)
    assert run(tmp_path / "out", *resumed) == 1
    assert "something else frozen" in capsys.readouterr().err
    assert run(tmp_path / "out", *resumed, "--mode", "partial", "--unlocked-groups", 1) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--mode", "partial"), "--unlocked-groups or --until"),
        (("--until", "layer2.0"), "--mode partial"),
        (("--mode", "probe", "--unfreeze-schedule", "0:0"), "leave --mode out"),
        (("--tower", "test_resne"), "near: test_resnet"),
        (("--image-folder", "nowhere"), "no such folder"),
        (("--hub-strategy", "every_save"), "only end"),
        (("--unfreeze-schedule", "1:0"), "from epoch 0"),
        (("--mode", "partial", "--until", "layer9"), "layer4.0"),
    ],
)
def test_wrong_options_are_refused_with_the_way_out(
    options: tuple[str, ...], says: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *options) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "tower").exists()


# --- the digits, whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run without options."""
    output = tmp_path_factory.mktemp("trained") / "out"
    finish(start_process("--output-dir", output))
    return output


NOISE = 4.5 / 360
"""Four images of those held out; two seeds differ by one or two."""


@pytest.mark.slow
def test_digits_from_scratch(trained: Path) -> None:
    assert figures(trained)["eval_accuracy"] >= 0.97


@pytest.mark.slow
@pytest.mark.turn(1)
def test_killed_and_resumed_it_ends_where_it_would_have(trained: Path, tmp_path: Path) -> None:
    options = ("--output-dir", tmp_path / "out", "--resume-from-checkpoint", "auto")
    options += ("--save-strategy", "steps", "--save-steps", "40")  # in the middle of epochs
    process = start_process(*options)
    until = time.monotonic() + 600
    while not (tmp_path / "out" / "checkpoint-160").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # most likely while it writes that checkpoint
    process.communicate()
    assert not (tmp_path / "out" / "tower").exists()
    finish(start_process(*options))
    assert figures(tmp_path / "out")["eval_accuracy"] == pytest.approx(figures(trained)["eval_accuracy"], abs=NOISE)


@pytest.mark.slow
@pytest.mark.turn(0)
def test_two_processes_end_where_one_does(trained: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = ("--output-dir", tmp_path / "out", "--per-device-train-batch-size", "32")
    finish(start_process(*options, before=torchrun))
    assert figures(tmp_path / "out")["eval_accuracy"] == pytest.approx(figures(trained)["eval_accuracy"], abs=NOISE)

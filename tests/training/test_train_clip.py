"""`scripts/train_clip.py` ends in a zero-shot classifier and a tower that anybody can load and get the same from."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ..hub_worker import ROOT, HubWorker
from ..local_hub import LocalHub

SCRIPT = ROOT / "scripts" / "train_clip.py"
LABELS = ["zero", "three", "seven"]
TEMPLATE = "a photo of the digit {}."


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    """Starts processes that talk to a loopback Hub."""
    root = tmp_path_factory.mktemp("hub")
    with LocalHub(root / "store") as hub:
        worker = HubWorker(hub.env(root / "cache"))
        yield worker
        worker.close()


def an_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


# --- what runs in processes of their own


def train(**given: Any) -> Any:
    """`train_clip.py` with these options, as a function."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from _train_clip.main import run
    from _train_clip.options import Options
    from _train_clip.publishing import NotTheSame

    try:
        return run(Options(**{"epochs": 1, "batch_size": 32, "embed_dim": 16, "cpu": True, **given}))
    except NotTheSame as error:
        raise AssertionError(str(error)) from error  # the test's own process does not know the class


def train_only(**given: Any) -> None:
    """Train; what was trained stays behind. (The script itself compares it with what it saved.)"""
    train(**given)


def train_with_text(**given: Any) -> tuple[dict[str, float], torch.Tensor]:
    """Train; what the trained model, still in memory, gives an image: a score for each label, and an embedding."""
    trained = train(**given).trained
    texts = [TEMPLATE.format(label) for label in LABELS]
    model = trained.module.model
    assert not model.training
    pixels = trained.image_processor([an_image()], return_tensors="pt")["pixel_values"]
    tokens = trained.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        chances = model(pixel_values=pixels, **tokens).logits_per_image.softmax(-1)
        return dict(zip(LABELS, chances[0].tolist(), strict=True)), model.vision_model(pixels).pooler_output


def classify(place: str) -> dict[str, float]:
    """What the pipeline of a folder or repository gives the image."""
    from transformers import pipeline

    pipe = pipeline("zero-shot-image-classification", place)
    given = pipe(an_image(), candidate_labels=LABELS, hypothesis_template=TEMPLATE)
    return {each["label"]: each["score"] for each in given}


@torch.no_grad()
def embed(*places: tuple[str, str]) -> list[torch.Tensor]:
    """The image's embeddings by towers, each in a sub-folder of a folder or repository."""
    from hf_timm_tower import TimmModel

    towers = [TimmModel.from_pretrained(place, subfolder=subfolder) for place, subfolder in places]
    return [tower(tower.transform()(an_image())[None]) for tower in towers]


def look(folder: str, repo_id: str) -> dict[str, Any]:
    """What folder and repository give, in a process that has not trained."""
    return {
        "scores": [classify(place) for place in (folder, repo_id)],
        "embeddings": embed((folder, "vision"), (repo_id, "vision")),
        "other weights": other_weights(folder),
    }


def other_weights(place: str) -> list[str]:
    """Names of the whole model's weights that lie at odd addresses, or are not those of the tower by itself."""
    from transformers import VisionTextDualEncoderModel

    from hf_timm_tower import TimmTowerModel

    both, info = VisionTextDualEncoderModel.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    alone = TimmTowerModel.from_pretrained(place, subfolder="vision")
    tensors = [{**dict(each.state_dict()), **dict(each.named_buffers())} for each in (both.vision_model, alone)]
    assert tensors[0].keys() == tensors[1].keys()
    misplaced = [name for name, weight in both.named_parameters() if weight.numel() > 64 and weight.data_ptr() % 64]
    return misplaced + [name for name, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][name])]


# --- the promises


@pytest.mark.parametrize(("loss", "architecture"), [("clip", "test_resnet"), ("siglip", "test_vit3")])
def test_folder_and_repository_give_the_trained_models_scores(
    loss: str, architecture: str, ann: HubWorker, tmp_path: Path
) -> None:
    folder, repo_id = str(tmp_path / "clip"), f"ann/{loss}"
    options = {"loss": loss, "architecture": architecture, "output": folder, "push_to_hub": repo_id, "limit": 128}
    scores, embedding = ann.call(train_with_text, **options)
    assert len(set(scores.values())) == len(LABELS), "scores that are all the same show nothing"
    found = ann.call(look, folder, repo_id)
    assert found["scores"] == [scores, scores]
    assert all(torch.equal(each, embedding) for each in found["embeddings"])
    assert found["other weights"] == []
    card = (tmp_path / "clip" / "README.md").read_text()
    assert "zero-shot-image-classification" in card
    assert repo_id in card
    bias = json.loads((tmp_path / "clip" / "config.json").read_text()).get("logit_bias")
    assert (bias is None) == (loss == "clip")


def test_a_locked_tower_with_captions_from_a_folder_keeps_its_trunk(ann: HubWorker, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from hf_timm_tower import TimmModel

    start = TimmModel("test_resnet", 16, image_size=32)
    start.save_pretrained(tmp_path / "start")
    (tmp_path / "data").mkdir()
    lines = []
    for number, colour in enumerate(["red", "green", "blue", "white"] * 10):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"all {colour}"}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    options = {"data": str(tmp_path / "data"), "tower": str(tmp_path / "start"), "lock_image": True}
    ann.call(train_with_text, **options, batch_size=8, output=str(tmp_path / "clip"))
    trunk, head = (
        [load_file(tmp_path / place / f"{part}.safetensors") for place in ("start", "clip/vision")]
        for part in ("trunk", "head")
    )
    assert all(torch.equal(tensor, trunk[1][key]) for key, tensor in trunk[0].items()), "statistics are in it too"
    assert not any(torch.equal(tensor, head[1][key]) for key, tensor in head[0].items())
    assert not any(p.requires_grad for p in TimmModel.from_pretrained(tmp_path / "clip" / "vision").trunk.parameters())


def test_two_image_towers_come_back_each_by_itself(ann: HubWorker, tmp_path: Path) -> None:
    folder = str(tmp_path / "pair")
    ann.call(train_only, second_tower="test_convnext", output=folder, push_to_hub="ann/pair", limit=64)
    places = [(place, name) for name in ("image", "second") for place in (folder, "ann/pair")]
    image, image_of_hub, second, second_of_hub = ann.call(embed, *places)
    assert torch.equal(image, image_of_hub)
    assert torch.equal(second, second_of_hub)
    assert not torch.equal(image, second)


def test_help_does_not_pay_for_torch(fresh_process: Callable[..., str]) -> None:
    code = f"""
        import runpy, sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        sys.argv = [{str(SCRIPT)!r}, "--help"]
        try:
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        except SystemExit as done:
            assert done.code == 0
        ours = "torch" in sys.modules
        import subprocess
        theirs = "import sys; from transformers import HfArgumentParser; sys.exit('torch' in sys.modules)"
        # the parser of older transformers (5.4) brings torch along
        assert not ours or subprocess.run([sys.executable, "-c", theirs]).returncode
    """
    assert "--lock-image" in fresh_process(code)


def run_script(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The script as people start it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


LOSSES = ("clip", "siglip")
TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.turn(1)
def test_digits_never_seen_are_read_by_the_pipeline(ann: HubWorker, tmp_path: Path) -> None:
    done = run_script("--output", str(tmp_path / "clip"))
    assert done.returncode == 0, done.stderr
    assert ann.call(share_read, str(tmp_path / "clip")) > 0.95


def share_read(place: str) -> float:
    """Share of the digits held out that the pipeline reads."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from transformers import pipeline

    data = load_digits()
    held_out = train_test_split(range(len(data.images)), test_size=0.2, random_state=0, stratify=data.target)[1]
    names = "zero one two three four five six seven eight nine".split()
    pipe = pipeline("zero-shot-image-classification", place)
    images = [Image.fromarray((data.images[i] * 255 / 16).round().astype(np.uint8)).convert("RGB") for i in held_out]
    given = pipe(images, candidate_labels=names, hypothesis_template=TEMPLATE)
    right = [found[0]["label"] == names[data.target[i]] for found, i in zip(given, held_out, strict=True)]
    return sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param(loss, marks=pytest.mark.turn(n)) for n, loss in enumerate(LOSSES)])
def test_two_processes_train_as_one(loss: str, tmp_path: Path) -> None:
    # A trunk without batch statistics, which are of a process's own images.
    arguments = ("--cpu", "--architecture", "test_vit3", "--loss", loss, "--epochs", "3", "--limit", "128")
    arguments += ("--lr", "1e-3", "--warmup", "0")
    alone = run_script(*arguments, "--output", str(tmp_path / "alone"))
    shared = run_script(*arguments, "--output", str(tmp_path / "shared"), launcher=TOGETHER)
    assert alone.returncode == shared.returncode == 0, alone.stderr + shared.stderr
    assert "on 2 process(es)" in shared.stdout
    losses = [[float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)] for done in (alone, shared)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=2.1e-4), "printed with four decimals"


@pytest.mark.slow
@pytest.mark.turn(1)
def test_processes_that_would_train_apart_are_refused(tmp_path: Path) -> None:
    done = run_script("--output", str(tmp_path / "clip"), launcher=TOGETHER)
    assert done.returncode != 0
    assert "add --cpu" in done.stderr

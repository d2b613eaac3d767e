"""The table: {folder, repository} x {this package imported, this package absent} x Auto classes and pipelines.

Each column is a process of a virtual environment that has transformers and timm and not this package, which comes onto
its path or not. The process forks for each place, compares nothing, and writes down what it got; `TimmModel` says here
what that must be.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, VisionTextDualEncoderModel

from hf_timm_tower import ConfigError, TimmModel, make_self_contained
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel
from hf_timm_tower.reader.image_processor import TimmTowerImageProcessor

from ..home_processes import Environment, make_environment
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

LABELS = ["cat", "dog", "owl"]
TASKS = {
    "tower": "image-feature-extraction",
    "single": "image-classification",
    "multi": "image-classification",
    "both": "zero-shot-image-classification",
}
COLUMNS = ("package imported", "package absent")
PLACES = ("folder", "repository")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tower/` (its head as data), `single/` and `multi/` (with classifiers), `both/` (a text model), `image.png`."""
    root = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.LayerNorm(16))
    tower = TimmModel("test_vit", 16, pool="token", custom_head=head)
    tower.save_pretrained(root / "tower")
    for problem in ("single", "multi"):
        with pytest.warns(UserWarning, match="fresh"):
            model = TimmTowerForImageClassification.from_pretrained(
                root / "tower", id2label=dict(enumerate(LABELS)), problem_type=f"{problem}_label_classification"
            )
        nn.init.normal_(model.classifier.weight)
        model.save_pretrained(root / problem)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", ".", *LABELS]
    (root / "vocab.txt").write_text("\n".join(words))
    text = BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    both = VisionTextDualEncoderModel(vision_model=TimmTowerModel.from_pretrained(root / "tower"), text_model=text)
    both.save_pretrained(root / "both")
    make_self_contained(root / "both")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "both")
    TimmTowerImageProcessor.from_pretrained(root / "tower").save_pretrained(root / "both")
    # A repository of several models says itself what it is for.
    data = ModelCardData(library_name="transformers", pipeline_tag=TASKS["both"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n").save(root / "both" / "README.md")
    pixels = np.random.default_rng(0).integers(0, 256, (190, 240, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


def push(home: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Push all of it through the client; runs in a process that talks to the loopback Hub.

    Returns:
        Name -> metadata of the card, and config, as they then lie on the Hub.
    """
    TimmModel.from_pretrained(f"{home}/tower").push_to_hub("ann/tower")
    for name in ("single", "multi"):
        TimmTowerForImageClassification.from_pretrained(f"{home}/{name}").push_to_hub(f"ann/{name}")
    HfApi().create_repo("ann/both")
    HfApi().upload_folder(repo_id="ann/both", folder_path=f"{home}/both")
    found = {}
    for name in TASKS:
        card = ModelCard.load(f"ann/{name}").data.to_dict()
        found[name] = (card, json.loads(Path(hf_hub_download(f"ann/{name}", "config.json")).read_text()))
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub") / "store") as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(home: Path, hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `push` returned: the Hub has `ann/tower`, `ann/single`, `ann/multi` and `ann/both`."""
    worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
    found: dict[str, Any] = worker.start(push, str(home)).result(timeout=300)
    worker.close()
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


# Runs in either column.
ROWS = """
import builtins, json, os, sys, traceback
import torch

job = json.loads(sys.argv[1])
absent = job["column"] == "package absent"
assert sys.prefix != sys.base_prefix, "this is no virtual environment"
try:
    import hf_timm_tower
except ImportError:
    assert absent
else:
    assert not absent, hf_timm_tower.__file__

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

def asks(prompt=""):
    raise SystemExit("transformers asks whether it may run code: " + prompt)

builtins.input = asks
torch.set_num_threads(1)
code = {"trust_remote_code": True} if absent else {}
zero_shot = {"candidate_labels": job["labels"], "hypothesis_template": "this is a photo of a {}."}

def scores(given):
    return {each["label"]: each["score"] for each in given}

def auto_classes(repos, result):
    config = AutoConfig.from_pretrained(repos["tower"], **code)
    model = AutoModel.from_pretrained(repos["tower"], **code)
    processor = AutoImageProcessor.from_pretrained(repos["tower"], **code)
    pixels = processor(Image.open(job["image"]), return_tensors="pt")
    found = {
        "AutoConfig": [config.model_type, config.architecture, config.embed_dim, list(config.image_size)],
        "AutoImageProcessor": pixels["pixel_values"],
        "modules": [type(each).__module__ for each in (config, model, processor)],
    }
    with torch.no_grad():
        output = model(**pixels)
        found["AutoModel"], found["AutoModel features"] = output.pooler_output, output.last_hidden_state
        for name in ("single", "multi"):
            labelled = AutoModelForImageClassification.from_pretrained(repos[name], **code)
            found["AutoModelForImageClassification " + name] = labelled(**pixels).logits
            found["labels " + name] = labelled.config.id2label
        both = AutoModel.from_pretrained(repos["both"], **code)
        found["AutoModel both"] = both.vision_model(**pixels).pooler_output
    model.save_pretrained(result + "/again")
    both.save_pretrained(result + "/both again")
    return found

def pipelines(repos, named):
    found = {}
    for name, task in job["tasks"].items():
        pipe = pipeline(task if named else None, repos[name], **code)
        assert pipe.task == task, pipe.task
        if name == "tower":
            found[name] = pipe(job["image"], pool=True, return_tensors=True)
            found["features"] = pipe(job["image"], return_tensors=True)
        else:
            found[name] = scores(pipe(job["image"], **(zero_shot if name == "both" else {})))
    return found

def rows(place, repos, result):
    found = auto_classes(repos, result)
    found["named"] = pipelines(repos, True)
    try:
        found["not named"] = pipelines(repos, False)
    except RuntimeError as error:
        found["not named"] = str(error)
    os.makedirs(result, exist_ok=True)
    torch.save(found, result + "/found.pt")

failed = []
for place, repos in job["places"].items():
    pid = os.fork()  # what one place taught transformers, the other shall not know
    if pid == 0:
        try:
            rows(place, repos, job["result"] + "/" + place)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != 0:
        failed.append(place)
assert not failed, failed
"""


@pytest.fixture(scope="module")
def run_column(
    home: Path,
    hub: LocalHub,
    pushed: dict[str, Any],
    environment: Environment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Runs a column, once; a folder with a folder for each place, in which lies what that cell gave."""

    @functools.cache
    def run(column: str) -> Path:
        result = tmp_path_factory.mktemp("result")
        job = {
            "column": column,
            "image": str(home / "image.png"),
            "labels": LABELS,
            "tasks": TASKS,
            "result": str(result),
            "places": {
                "folder": {name: str(home / name) for name in TASKS},
                "repository": {name: f"ann/{name}" for name in pushed},
            },
        }
        variables = hub.env(tmp_path_factory.mktemp("cache"))
        environment.run(ROWS, json.dumps(job), with_package=column == "package imported", env=variables)
        return result

    return run


@dataclass(frozen=True)
class Cell:
    """What one cell of the table gave.

    Attributes:
        column: One of COLUMNS.
        place: One of PLACES.
        folder: What was written there.
        found: What `ROWS` found.
    """

    column: str
    place: str
    folder: Path
    found: dict[str, Any]

    def pipelines(self) -> list[dict[str, Any]]:
        """What the pipelines gave: with the task named, and without where transformers can learn it."""
        runs = [self.found["named"], self.found["not named"]]
        return runs[:1] if self.place == "folder" else runs


@pytest.fixture(scope="module", params=[(column, place) for column in COLUMNS for place in PLACES], ids=", ".join)
def cell(request: pytest.FixtureRequest, run_column: Callable[[str], Path]) -> Cell:
    column, place = request.param
    folder = run_column(column) / place
    return Cell(column, place, folder, torch.load(folder / "found.pt"))


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, torch.Tensor]:
    """What `TimmModel` gives, and linear layers on its embedding."""
    tower = TimmModel.from_pretrained(home / "tower")
    pixels = tower.transform()(Image.open(home / "image.png"))[None]
    logits = {}
    with torch.no_grad():
        embedding, features = tower(pixels), tower.forward_features(pixels)
        for name in ("single", "multi"):
            weights = TimmTowerForImageClassification.from_pretrained(home / name).classifier
            logits[name] = nn.functional.linear(embedding, weights.weight, weights.bias)
    assert not torch.equal(logits["single"], logits["multi"])
    return {"pixels": pixels, "embedding": embedding, "features": features, **logits}


def test_auto_classes_give_the_towers_bits(cell: Cell, expected: dict[str, torch.Tensor], home: Path) -> None:
    found = cell.found
    assert torch.equal(found["AutoImageProcessor"], expected["pixels"])
    assert torch.equal(found["AutoModel"], expected["embedding"])
    assert torch.equal(found["AutoModel features"], expected["features"])
    assert torch.equal(found["AutoModel both"], expected["embedding"])
    for name in ("single", "multi"):
        assert torch.equal(found[f"AutoModelForImageClassification {name}"], expected[name])
        assert found[f"labels {name}"] == dict(enumerate(LABELS))
    config = TimmModel.from_pretrained(home / "tower").config
    assert found["AutoConfig"] == ["timm_tower", config.architecture, config.embed_dim, list(config.image_size)]
    origin = "transformers_modules." if cell.column == "package absent" else "hf_timm_tower."
    assert all(module.startswith(origin) for module in found["modules"])


def test_feature_extraction_gives_the_towers_bits(cell: Cell, expected: dict[str, torch.Tensor]) -> None:
    for run in cell.pipelines():
        assert torch.equal(run["tower"], expected["embedding"])
        assert torch.equal(run["features"], expected["features"])


def test_classification_gives_labels_and_scores(cell: Cell, expected: dict[str, torch.Tensor]) -> None:
    scores = {"single": expected["single"][0].softmax(-1), "multi": expected["multi"][0].sigmoid()}
    for run in cell.pipelines():
        for name, right in scores.items():
            assert set(run[name]) == set(LABELS)
            assert [run[name][label] for label in LABELS] == pytest.approx(right.tolist(), rel=1e-5)


def test_zero_shot_classification_with_a_text_model(cell: Cell, expected: dict[str, torch.Tensor], home: Path) -> None:
    both = VisionTextDualEncoderModel.from_pretrained(home / "both")
    tokenizer = BertTokenizerFast.from_pretrained(home / "both")
    tokens = tokenizer([f"this is a photo of a {label}." for label in LABELS], return_tensors="pt", padding=True)
    with torch.no_grad():
        image = both.visual_projection(expected["embedding"])
        text = both.text_projection(both.text_model(**tokens).pooler_output)
        image, text = (each / each.norm(dim=-1, keepdim=True) for each in (image, text))
        right = (both.logit_scale.exp() * image @ text.T).softmax(-1)[0]
    for run in cell.pipelines():
        assert [run["both"][label] for label in LABELS] == pytest.approx(right.tolist(), rel=1e-5)


def test_the_task_of_a_folder_is_not_guessed(cell: Cell) -> None:
    if cell.place == "folder":
        assert "Instantiating a pipeline without a task set raised an error" in cell.found["not named"]
    else:
        assert set(cell.found["not named"]) == {*TASKS, "features"}


def test_a_tower_saved_there_comes_back(cell: Cell, home: Path) -> None:
    again = cell.folder / "again"
    if cell.column == "package absent":  # transformers' own save, with the reader beside it
        names = {file.name for file in again.iterdir()}
        assert names >= {"config.json", "model.safetensors", "modeling_timm_tower.py"}
        assert not names & {"fingerprint.json", "trunk.safetensors"}
        assert_same_outputs(again, home / "tower")
        return
    names = {file.relative_to(again) for file in again.rglob("*") if file.is_file()}
    expected = {file.relative_to(home / "tower") for file in (home / "tower").rglob("*") if file.is_file()}
    assert names - {Path("README.md")} == expected - {Path("README.md")}
    changed = [name for name in names if (again / name).read_bytes() != (home / "tower" / name).read_bytes()]
    assert [name for name in changed if name.name != "README.md"] == []
    assert_same_outputs(again, home / "tower")


def assert_same_outputs(*folders: Path) -> None:
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(*(TimmModel.from_pretrained(folder)(image) for folder in folders))


def test_two_models_saved_where_the_package_is_absent_are_self_contained_again(cell: Cell, home: Path) -> None:
    if cell.column == "package absent":
        folders = (home / "both", cell.folder / "both again")
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        for config in configs:
            for part in ("vision_config", "text_config"):
                for name in ("dtype", "_name_or_path"):  # of the loading, which transformers notes in each part
                    config[part].pop(name, None)
        assert configs[0] == configs[1]
        code = [(folder / "modeling_timm_tower.py").read_bytes() for folder in folders]
        assert code[0] == code[1]
        states = [VisionTextDualEncoderModel.from_pretrained(folder).state_dict() for folder in folders]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_folder_without_two_models_is_refused_as_self_contained(home: Path) -> None:
    before = (home / "tower" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="carries its code already"):
        make_self_contained(home / "tower")
    assert (home / "tower" / "config.json").read_bytes() == before


def test_what_was_pushed_has_a_card_and_names_its_class(pushed: dict[str, Any]) -> None:
    classes = dict.fromkeys(("single", "multi"), "TimmTowerForImageClassification")
    for name, architecture in {"tower": "TimmTowerModel", **classes}.items():
        card, config = pushed[name]
        assert config["architectures"] == [architecture]
        assert card["library_name"] == "transformers"
        assert "timm" in card["tags"]
        assert card["pipeline_tag"] == TASKS[name]

"""In transformers a tower is one of its own: Auto classes and pipelines, with this package and where it is absent.

Every row runs in a process of its own, which either imports this package or has an environment without it, and
compares nothing: it writes down what it got, and `TimmModel` says here what that must be.
"""

import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast, VisionTextDualEncoderModel

import hf_timm_tower
from hf_timm_tower import TimmModel
from hf_timm_tower.core.image_processor import TimmTowerImageProcessor
from hf_timm_tower.core.modeling import TimmTowerForImageClassification, TimmTowerModel

from .test_comes_back import QUICK, pools_of, randomise, size_to_test
from .timm_classes import smallest_of_each_class

LABELS = ["cat", "dog", "owl"]
Fresh = Callable[..., str]


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
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "both")
    TimmTowerImageProcessor.from_pretrained(root / "tower").save_pretrained(root / "both")
    pixels = np.random.default_rng(0).integers(0, 256, (190, 240, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


def run_python(flags: str, path: Path, code: str, args: tuple[object, ...], scratch: Path) -> str:
    """What a new process prints, with one folder on its path and caches of its own."""
    (scratch / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, flags, "-P", "-c", textwrap.dedent(code), *map(str, args)],
        cwd=scratch / "cwd",
        env={**os.environ, "PYTHONPATH": str(path), "HF_HOME": str(scratch / "hf")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise AssertionError(f"it ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def package_process(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """`package_process(code, *args)`: what a new process prints that has this package on its path."""

    def run(code: str, *args: object) -> str:
        path = Path(hf_timm_tower.__file__).parents[1]
        return run_python("-u", path, code, args, tmp_path_factory.mktemp("process"))

    return run


@pytest.fixture(scope="module")
def bare_process(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """The same in an environment that has what is installed here, but not this package, and not `without`."""

    def run(code: str, *args: object, without: tuple[str, ...] = ()) -> str:
        scratch = tmp_path_factory.mktemp("process")
        packages = scratch / "packages"
        packages.mkdir()
        left_out = ("hf_timm_tower", "__editable__", *without)
        for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in os.scandir(folder):
                if not entry.name.lower().startswith(left_out) and not entry.name.endswith(".pth"):
                    (packages / entry.name).symlink_to(entry.path)
        return run_python("-S", packages, code, args, scratch)  # -S: the installed packages themselves stay hidden

    return run


# Runs in either environment; `trust` is what it passes to everything that may run a repository's code.
ROWS = """
import builtins, sys, torch
def asks(prompt=""): raise SystemExit("transformers asks whether it may run code: " + prompt)
builtins.input = asks
torch.set_num_threads(1)
home, result, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
if not trust:
    import hf_timm_tower
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, BertModel, pipeline,
)
code = {"trust_remote_code": True} if trust else {}
found = {}
config = AutoConfig.from_pretrained(home + "/tower", **code)
model = AutoModel.from_pretrained(home + "/tower", **code)
processor = AutoImageProcessor.from_pretrained(home + "/tower", **code)
from PIL import Image
image = Image.open(home + "/image.png")
pixels = processor(image, return_tensors="pt")
with torch.no_grad():
    found["AutoModel"] = model(**pixels).pooler_output
    labelled = AutoModelForImageClassification.from_pretrained(home + "/single", **code)
    found["AutoModelForImageClassification"] = labelled(**pixels).logits
found["AutoImageProcessor"] = pixels["pixel_values"]
found["AutoConfig"] = config.embed_dim
extract = pipeline("image-feature-extraction", home + "/tower", **code)
found["extract"] = extract(home + "/image.png", pool=True, return_tensors=True)
found["extract features"] = extract(home + "/image.png", return_tensors=True)
for name in ("single", "multi"):
    classify = pipeline("image-classification", home + "/" + name, **code)
    found[name] = {each["label"]: each["score"] for each in classify(home + "/image.png")}
if trust:
    # A model inside another one's folder has no code there: the tower's own code is made known first.
    AutoConfig.register("timm_tower", type(model).config_class)
    AutoModel.register(type(model).config_class, type(model))
pair = pipeline("zero-shot-image-classification", home + "/both", image_processor=processor, **code)
asked = {"candidate_labels": ["cat", "dog", "owl"], "hypothesis_template": "this is a photo of a {}."}
scores = pair(home + "/image.png", **asked)
found["zero-shot"] = {each["label"]: each["score"] for each in scores}
model.save_pretrained(result + "/again")
torch.save(found, result + "/found.pt")
print("hf_timm_tower" in sys.modules, type(model).__module__)
"""


def expectations(home: Path) -> dict[str, Any]:
    tower = TimmModel.from_pretrained(home / "tower")
    image = Image.open(home / "image.png")
    pixels = tower.transform()(image)[None]
    with torch.no_grad():
        embedding, features = tower(pixels), tower.forward_features(pixels)
        weights = TimmTowerForImageClassification.from_pretrained(home / "single").classifier
        logits = nn.functional.linear(embedding, weights.weight, weights.bias)
    return {
        "AutoConfig": 16,
        "AutoImageProcessor": pixels,
        "AutoModel": embedding,
        "AutoModelForImageClassification": logits,
        "extract": embedding,
        "extract features": features,
    }


@pytest.fixture(scope="module", params=["package imported", "package absent"])
def row(
    request: pytest.FixtureRequest,
    home: Path,
    bare_process: Fresh,
    package_process: Fresh,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], str, Path]:
    """What one environment gave, what it printed, and the folder into which it saved the tower again."""
    result = tmp_path_factory.mktemp("result")
    absent = request.param == "package absent"
    printed = (bare_process if absent else package_process)(ROWS, home, result, "trust" if absent else "local")
    return torch.load(result / "found.pt"), printed, result


def test_auto_classes_and_feature_extraction_give_the_towers_bits(
    home: Path, row: tuple[dict[str, Any], str, Path]
) -> None:
    found, printed, _ = row
    for name, expected in expectations(home).items():
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found[name], expected), name
        else:
            assert found[name] == expected, name
    assert printed.split()[0] in ("True", "False")
    assert printed.split()[1].startswith("hf_timm_tower." if printed.split()[0] == "True" else "transformers_modules.")


def test_classification_pipelines_give_labels_and_scores(home: Path, row: tuple[dict[str, Any], str, Path]) -> None:
    logits = expectations(home)["AutoModelForImageClassification"][0]
    multi = TimmTowerForImageClassification.from_pretrained(home / "multi").classifier
    embedding = expectations(home)["AutoModel"]
    with torch.no_grad():
        other = multi(embedding)[0].sigmoid()
    for name, expected in (("single", logits.softmax(-1)), ("multi", other)):
        scores = row[0][name]
        assert set(scores) == set(LABELS)
        assert [scores[label] for label in LABELS] == pytest.approx(expected.tolist(), rel=1e-5)


def test_zero_shot_classification_with_a_text_model(home: Path, row: tuple[dict[str, Any], str, Path]) -> None:
    both = VisionTextDualEncoderModel.from_pretrained(home / "both")
    tokenizer = BertTokenizerFast.from_pretrained(home / "both")
    pixels = expectations(home)["AutoImageProcessor"]
    tokens = tokenizer([f"this is a photo of a {label}." for label in LABELS], return_tensors="pt", padding=True)
    with torch.no_grad():
        image = both.visual_projection(expectations(home)["AutoModel"])
        text = both.text_projection(both.text_model(**tokens).pooler_output)
        image, text = (each / each.norm(dim=-1, keepdim=True) for each in (image, text))
        expected = (both.logit_scale.exp() * image @ text.T).softmax(-1)[0]
        assert pixels.shape[0] == 1
    assert [row[0]["zero-shot"][label] for label in LABELS] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_tower_saved_there_is_the_same_folder(home: Path, row: tuple[dict[str, Any], str, Path]) -> None:
    again = row[2] / "again"
    names = {file.relative_to(again) for file in again.rglob("*") if file.is_file()}
    expected = {file.relative_to(home / "tower") for file in (home / "tower").rglob("*") if file.is_file()}
    assert names - {Path("README.md")} == expected - {Path("README.md")}
    changed = [name for name in names if (again / name).read_bytes() != (home / "tower" / name).read_bytes()]
    assert [name for name in changed if name.name != "README.md"] == []
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(
            TimmModel.from_pretrained(again)(image), TimmModel.from_pretrained(home / "tower")(image)
        )


def test_without_package_and_trust_the_error_is_transformers_own_and_without_timm_it_names_timm(
    home: Path, bare_process: Fresh
) -> None:
    refused = bare_process(
        """
        import sys
        from transformers import AutoModel
        try:
            AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
        except ValueError as error:
            print(error)
        try:
            AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        except ImportError as error:
            print(error)
        """,
        home / "tower",
        without=("timm",),
    )
    assert "pass the argument `trust_remote_code=True`" in refused
    assert "not found in your environment: timm" in refused


def test_the_package_may_be_imported_last(home: Path, package_process: Fresh) -> None:
    printed = package_process(
        """
        import sys
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
        import hf_timm_tower
        for auto in (AutoConfig, AutoImageProcessor, AutoModel):
            print(type(auto.from_pretrained(sys.argv[1])).__name__)
        """,
        home / "tower",
    )
    assert printed.split() == ["TimmTowerConfig", "TimmTowerImageProcessor", "TimmTowerModel"]


def check_auto_model(architecture: str, folder: Path) -> None:
    """Both faces give the same bits, with and without the features of inner layers."""
    pool, proj = pools_of(architecture)[0]
    width = 16 if proj == "linear" else None
    tower = TimmModel(architecture, width, pool=pool, proj=proj, image_size=size_to_test(architecture))
    randomise(tower)
    tower.save_pretrained(folder)
    image = torch.randn(1, tower.config.in_chans, *tower.config.image_size)
    del tower
    with torch.no_grad():
        expected = TimmModel.from_pretrained(folder)(image)
        model = AutoModel.from_pretrained(folder)
        found = [model(image).pooler_output]
        if hasattr(model.trunk, "forward_intermediates"):
            found.append(model(image, output_hidden_states=True).pooler_output)
    assert torch.isfinite(expected).all()
    assert all(torch.equal(embedding, expected) for embedding in found)


@pytest.mark.parametrize("architecture", QUICK)
def test_auto_model_equals_timm_model(architecture: str, tmp_path: Path) -> None:
    check_auto_model(architecture, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("name", list(smallest_of_each_class()))
def test_auto_model_equals_timm_model_for_every_timm_class(name: str, tmp_path: Path) -> None:
    check_auto_model(smallest_of_each_class()[name], tmp_path)

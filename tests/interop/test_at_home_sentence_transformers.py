"""`SentenceTransformer(tower).encode(images)` gives the tower's embedding, from a folder and from the Hub."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_timm_tower import TimmModel
from hf_timm_tower.modeling import TimmTowerForImageClassification

from ..local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(50, 60), (200, 170), (96, 31), (160, 160), (33, 90)]


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0)
    return [Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def expected(tower: TimmModel, batch: int = len(SIZES)) -> torch.Tensor:
    """What the tower gives for the pictures, in batches of this many."""
    images = torch.stack([tower.transform()(picture) for picture in pictures()])
    with torch.no_grad():
        return torch.cat([tower(part) for part in images.split(batch)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower whose embedding is neither a mean nor a trunk's own vector; its head is data."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.LayerNorm(16))
    path = tmp_path_factory.mktemp("tower") / "tower"
    TimmModel("test_vit", 16, pool="token", custom_head=head).save_pretrained(path)
    return path


@pytest.mark.parametrize("batch", [5, 2])
def test_encode_gives_the_embeddings_bits(folder: Path, batch: int) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(pictures(), batch_size=batch, convert_to_tensor=True)
    assert torch.equal(found, expected(TimmModel.from_pretrained(folder), batch))
    assert (model.get_embedding_dimension(), model.modalities) == (16, ["image"])


def test_encode_takes_what_it_takes_of_other_models(folder: Path, tmp_path: Path) -> None:
    model, wanted = SentenceTransformer(str(folder), device="cpu"), expected(TimmModel.from_pretrained(folder))
    unit = nn.functional.normalize(wanted, dim=1)
    found = model.encode(pictures(), normalize_embeddings=True, convert_to_tensor=True)
    assert torch.equal(found, unit)
    torch.testing.assert_close(model.similarity(found, found), unit @ unit.T)
    one, path = pictures()[0], tmp_path / "one.png"
    one.save(path)
    assert np.array_equal(model.encode(one), expected(TimmModel.from_pretrained(folder), 1)[0].numpy())
    assert np.array_equal(model.encode(str(path)), model.encode(one))
    with pytest.raises(ValueError, match="image"):
        model.encode(["a photo of a cat"])


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_convolutional_towers_are_not_pooled_again(name: str, tmp_path: Path) -> None:
    tower = TimmModel(name, 8, proj="mlp").eval()
    tower.save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(model.encode(pictures(), convert_to_tensor=True), expected(tower))


def test_a_classifier_is_left_out_of_the_embedding(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fresh"):
        labelled = TimmTowerForImageClassification.from_pretrained(folder, num_labels=3)
    labelled.save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(model.encode(pictures(), convert_to_tensor=True), expected(TimmModel.from_pretrained(folder)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.fc(x), "norm": x.norm(dim=1)}


@pytest.mark.parametrize(
    ("tower", "error"),
    [
        (lambda: TimmModel("test_vit", 8, pool="none"), KeyError),
        (lambda: TimmModel("test_convnext", None, pool="none", proj="none"), KeyError),
        (lambda: TimmModel("test_vit", None, pool="avg", custom_head=Pair()), AttributeError),
    ],
    ids=["tokens", "map", "dict"],
)
def test_what_is_no_vector_is_never_averaged_silently(tower, error: type[Exception], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tower().save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises(error):
        model.encode(pictures())


def test_what_sentence_transformers_saves_is_a_tower(folder: Path, tmp_path: Path) -> None:
    wanted = expected(TimmModel.from_pretrained(folder))
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert torch.equal(expected(TimmModel.from_pretrained(tmp_path / "again")), wanted)
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert torch.equal(again.encode(pictures(), convert_to_tensor=True), wanted)


def test_a_module_that_somebody_added_outlives_a_save(folder: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Normalize())
    model.save_pretrained(str(tmp_path))
    tower = TimmModel.from_pretrained(tmp_path)
    nn.init.normal_(tower.head[2].bias)
    tower.save_pretrained(tmp_path)
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(pictures(), convert_to_tensor=True)
    assert torch.equal(found, nn.functional.normalize(expected(tower), dim=1))
    (tmp_path / "modules.json").unlink()
    (tmp_path / "sentence_bert_config.json").write_text("{}")
    tower.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {}


def test_a_tower_that_becomes_a_vector_is_taken_for_one(tmp_path: Path) -> None:
    TimmModel("test_vit", 8, pool="none").save_pretrained(tmp_path)
    tower = TimmModel("test_vit", 8, pool="avg").eval()
    tower.save_pretrained(tmp_path)
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(pictures(), convert_to_tensor=True)
    assert torch.equal(found, expected(tower))


# Pushes a tower, edits what sentence-transformers reads on the Hub, and pushes again.
PUSH = """
import sys
from huggingface_hub import HfApi, hf_hub_download
from hf_timm_tower import TimmModel
tower, plain, edited = TimmModel.from_pretrained(sys.argv[1]), *sys.argv[2:]
tower.push_to_hub(plain)
tower.push_to_hub(edited)
modules = open(hf_hub_download(edited, "modules.json")).read().rstrip("]\\n ")
modules += ', {"idx": 1, "name": "1", "path": "", "type": "sentence_transformers.models.Normalize"}]'
HfApi().upload_file(path_or_fileobj=modules.encode(), path_in_repo="modules.json", repo_id=edited)
tower.push_to_hub(edited)
"""

# Runs by repository id, with this package imported and in an environment that does not have it.
ENCODE = """
import sys, torch
torch.set_num_threads(1)
where, images, result, how = sys.argv[1:]
if how == "imported":
    import hf_timm_tower
from sentence_transformers import SentenceTransformer
from PIL import Image
code = {}
if how == "trusted":
    code = {"trust_remote_code": True}
    try:
        raise SystemExit(f"it ran code without being trusted: {SentenceTransformer(where)}")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
pictures = [Image.open(f"{images}/{index}.png") for index in range(5)]
def encode(name):
    model = SentenceTransformer(name, device="cpu", **code)
    return model, model.encode(pictures, batch_size=5, convert_to_tensor=True)
model, found = encode(where)
torch.save([found, encode(where + "-edited")[1]], result)
print(type(model[0].model).__module__)
if how == "trusted":
    model.save_pretrained(result + ".saved")
"""


def without_this_package(scratch: Path) -> Path:
    """A folder with all that is installed here but this package."""
    packages = scratch / "packages"
    packages.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in os.scandir(place):
            if not entry.name.lower().startswith(("hf_timm_tower", "__editable__")) and not entry.name.endswith(".pth"):
                (packages / entry.name).symlink_to(entry.path)
    return packages


def python(environment: dict[str, str | None], flag: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    env = {name: value for name, value in everything.items() if value is not None}
    command = [sys.executable, flag, "-c", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """With `ann/tower`, and `ann/tower-edited`, to which somebody added a module that normalises."""
    with LocalHub(tmp_path_factory.mktemp("hub"), users={"ann": "hf_ann"}) as hub:
        environment = {**hub.env(tmp_path_factory.mktemp("hf")), "PYTHONPATH": str(ROOT)}
        done = python(environment, "-u", PUSH, folder, "ann/tower", "ann/tower-edited")
        assert done.returncode == 0, done.stderr
        yield hub


@pytest.mark.parametrize("how", ["imported", "trusted"])
def test_encode_by_repository_id(how: str, hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{index}.png")
    bare, result = how != "imported", tmp_path / "found.pt"
    path = without_this_package(tmp_path) if bare else ROOT
    environment = {**hub.env(tmp_path / "hf"), "PYTHONPATH": str(path)}
    done = python(environment, "-S" if bare else "-u", ENCODE, "ann/tower", tmp_path, result, how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules." if bare else "hf_timm_tower.")
    wanted = expected(TimmModel.from_pretrained(folder))
    found, edited = torch.load(result)
    assert torch.equal(found, wanted)
    assert torch.equal(edited, nn.functional.normalize(wanted, dim=1)), "a push keeps what was edited on the Hub"
    if bare:
        assert torch.equal(expected(TimmModel.from_pretrained(f"{result}.saved")), wanted)

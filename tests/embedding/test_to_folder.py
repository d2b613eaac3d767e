"""Folders of embeddings: readable by everybody, gone on with after a kill, refused for another tower."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import lancedb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn as nn
from PIL import Image

from hf_timm_tower import ArgumentError, FolderError, FormatError, TimmModel, TowerError
from hf_timm_tower.embedding.embedder import flattened
from hf_timm_tower.embedding.manifest import outputs_of, read_manifest
from hf_timm_tower.embedding.search import embed_query, nearest
from hf_timm_tower.embedding.stored import StoredEmbeddings

COUNT = 30


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small noise; two of the files are broken."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
    for number in (4, 17):
        (folder / f"{number:03}.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tower")
    TimmModel("test_resnet", embed_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture
def tower(saved: Path) -> TimmModel:
    return TimmModel.from_pretrained(saved)


def embed_to(tower: TimmModel, images: Any, folder: Path, **options: Any) -> StoredEmbeddings:
    return tower.embed_to(images, folder, **{"num_workers": 0, "progress": False, "rows_per_shard": 8, **options})


def test_everybody_reads_the_folder_as_it_is(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    expected = tower.embed(images, num_workers=0, progress=False, errors="collect")
    for dtype in (None, torch.float16):
        folder = tmp_path / str(dtype)
        stored = embed_to(tower, images, folder, dtype=dtype)
        rows = expected.embeddings.to(dtype or torch.float32)
        ids, values = stored.load()
        assert ids == expected.ids
        assert torch.equal(values, rows)
        assert [failure.id for failure in stored.failures] == ["004.png", "017.png"]

        table = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")
        assert table["id"][:] == ids
        assert torch.equal(torch.tensor(np.array(table["embedding"][:])), rows.to(torch.float32)) or dtype
        assert table.features["embedding"].length == 16

        frame = polars.read_parquet(folder / "*.parquet")
        assert frame["id"].to_list() == ids
        assert (frame["embedding"].to_numpy() == rows.numpy()).all()

        found = duckdb.sql(f"select id, embedding from '{folder}/*.parquet' order by id").fetchall()
        assert [row[0] for row in found] == ids
        assert np.array_equal(np.array([row[1] for row in found], np.float32), rows.float().numpy())

        database = lancedb.connect(tmp_path / f"{dtype}.lance")
        lance = database.create_table("images", pq.read_table(sorted(folder.glob("*.parquet"))[0]))
        for part in sorted(folder.glob("*.parquet"))[1:]:
            lance.add(pq.read_table(part))
        hit = lance.search(rows[9].float().numpy()).limit(1).to_list()[0]
        assert hit["id"] == ids[9]
    assert nearest(stored, expected.embeddings[9], 3)[0] == (ids[9], pytest.approx(1.0, abs=1e-3))

    stored.save_npy(tmp_path / "all.npy")
    assert np.array_equal(np.load(tmp_path / "all.npy", mmap_mode="r"), rows.numpy())
    assert [json.loads(line) for line in (tmp_path / "all.ids.jsonl").read_text().splitlines()] == ids


def test_the_manifest_says_what_made_them(tower: TimmModel, saved: Path, images: Path, tmp_path: Path) -> None:
    stored = embed_to(tower, images, tmp_path / "out", normalize=True)
    manifest = stored.manifest
    assert manifest["tower"]["loaded_from"] == str(saved)
    assert manifest["tower"]["architecture"] == "test_resnet"
    assert len(manifest["tower"]["fingerprint"]) == 64
    assert manifest["weights"] == json.loads((saved / "fingerprint.json").read_text())["weights"]
    assert manifest["preprocessing"]["exif"] == "turned upright"
    assert manifest["preprocessing"]["mean"] == tower.config.preprocess["mean"]
    assert manifest["options"]["normalize"] is True
    assert manifest["columns"] == {"embedding": {"shape": [16], "dtype": "float32"}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["complete"], manifest["images"], manifest["failures"]) == (True, COUNT, 2)
    assert manifest["source"] == {"kind": "folder", "place": str(images), "images": None}
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["004.png", "017.png"]


class Stop(Exception):
    """What stands for a kill."""


def stopping(images: Path, after: int) -> Iterator[dict[str, Any]]:
    for number, path in enumerate(sorted(images.iterdir())):
        if number == after:
            raise Stop
        yield {"id": path.name, "image": path}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_broke_off_goes_on_and_gives_what_an_undisturbed_one_gives(
    tower: TimmModel, images: Path, tmp_path: Path, workers: int
) -> None:
    embed_to(tower, images, tmp_path / "whole")
    folder = tmp_path / "broken"
    for after in (0, 3, 11, 11, 27):
        with pytest.raises(Stop):
            embed_to(tower, stopping(images, after), folder, num_workers=workers)
        assert not StoredEmbeddings(folder).complete
    (folder / ".embeddings-00003.parquet.partial").write_bytes(b"what a kill left")
    embed_to(tower, stopping(images, COUNT + 1), folder, num_workers=workers)
    for name in ("embeddings-00000.parquet", "embeddings-00003.parquet", "failures.jsonl", "README.md"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list(folder.glob("embeddings-*.parquet"))) == 4
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert embed_to(tower, stopping(images, COUNT + 1), folder).complete
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")} == before


def test_new_images_at_the_end_are_added(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    paths = sorted(images.iterdir())
    embed_to(tower, paths[:13], tmp_path / "out")
    grown = embed_to(tower, paths, tmp_path / "out")
    assert torch.equal(grown.load()[1], embed_to(tower, paths, tmp_path / "whole").load()[1])
    assert grown.manifest["images"] == COUNT


def test_another_tower_other_options_or_other_images_are_refused(
    tower: TimmModel, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    embed_to(tower, images, folder)
    content = {path: path.read_bytes() for path in folder.iterdir()}
    torch.manual_seed(1)
    other = TimmModel("test_resnet", embed_dim=16)
    resized = TimmModel.from_pretrained(tower._origin["loaded_from"], image_size=96)
    cropped = TimmModel.from_pretrained(tower._origin["loaded_from"])
    cropped.config.preprocess["crop_pct"] = 0.5
    cases: list[tuple[TimmModel, dict[str, Any], str]] = [
        (other, {}, "the tower has other weights"),
        (resized, {}, "preprocessing is another"),
        (cropped, {}, "preprocessing is another"),
        (tower, {"normalize": True}, "options were"),
        (tower, {"dtype": torch.float16}, "columns were"),
        (tower, {"batch_size": 5}, "options were"),
    ]
    for model, options, words in cases:
        with pytest.raises(FolderError, match=words):
            embed_to(model, images, folder, **options)
    paths = sorted(images.iterdir())
    for changed, words in ((paths[1:], "image 0 was '000.png'"), (paths[:5], "the source ends there")):
        with pytest.raises(FolderError, match=words):
            embed_to(tower, ({"id": path.name, "image": path} for path in changed), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == content


def test_folders_that_cannot_be_used_say_so(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FolderError, match=r"other files \(\['thesis.tex'\]\)"):
        embed_to(tower, images, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="there are none in this folder"):
        embed_to(tower, tmp_path / "empty", tmp_path / "of_nothing")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="is a file"):
        embed_to(tower, images, tmp_path / "file")
    with pytest.raises(FolderError, match="no embeddings"):
        StoredEmbeddings(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match=r"images\[4\] \(004.png\): not an image"):
        embed_to(tower, images, tmp_path / "strict", errors="raise")
    with pytest.raises(Stop):
        embed_to(tower, stopping(images, 20), tmp_path / "failing")
    (tmp_path / "failing" / "failures.jsonl").mkdir()
    with pytest.raises(FolderError, match=r"failures\.jsonl: cannot be written: Is a directory"):
        embed_to(tower, stopping(images, COUNT + 1), tmp_path / "failing")
    embed_to(tower, images, tmp_path / "damaged")
    damaged = tmp_path / "damaged" / "embeddings-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(FormatError, match="not a whole shard"):
        StoredEmbeddings(tmp_path / "damaged")
    damaged.unlink()
    with pytest.raises(FormatError, match="not a whole shard"):
        StoredEmbeddings(tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text('{"manifest_version": 99}')
    with pytest.raises(FormatError, match="version 99"):
        StoredEmbeddings(tmp_path / "damaged")


def test_an_error_of_the_source_is_raised_as_it_is(tower: TimmModel, tmp_path: Path) -> None:
    def unreachable() -> Iterator[Any]:
        raise TimeoutError("the store does not answer")
        yield

    with pytest.raises(TimeoutError, match="the store does not answer"):
        embed_to(tower, unreachable(), tmp_path / "out")


def test_tokens_and_layers_are_columns(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    few = sorted(images.iterdir())[:3]
    stored = embed_to(tower, few, tmp_path / "out", return_tokens=True, layers=[1])
    direct = tower.embed(few, num_workers=0, progress=False, return_tokens=True, layers=[1])
    assert set(stored.columns) == {"embedding", "layers.0", "tokens"}
    assert torch.equal(stored.load()[1], direct["embedding"])
    assert torch.equal(stored.load("tokens")[1], direct["tokens"])
    assert torch.equal(stored.load("layers.0")[1], direct["layers"][0])


class Outputs(nn.Module):
    """A head whose output is what `made` makes of `[B, 6]`."""

    def __init__(self, in_features: int, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.made = nn.Linear(in_features, 6), made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(self.linear(x))


def headed(made: Callable[[torch.Tensor], Any]) -> TimmModel:
    torch.manual_seed(0)
    head = lambda width, _: Outputs(width, made)  # noqa: E731
    return TimmModel("test_resnet", embed_dim=None, custom_head=head).eval()


@pytest.mark.parametrize(
    ("made", "columns"),
    [
        (lambda y: {"embedding": y}, ["embedding"]),
        (lambda y: {"": y, "x": y}, ["embedding", "x"]),
        (lambda y: (y, y.mean(1)), ["0", "1"]),
        (lambda y: {"a": {"b": y, "c": y > 0}}, ["a.b", "a.c"]),
    ],
)
def test_any_output_of_a_head_is_stored_and_searched(
    made: Callable[[torch.Tensor], Any], columns: list[str], images: Path, tmp_path: Path
) -> None:
    tower, few = headed(made), [str(images / f"{number:03}.png") for number in range(4)]
    stored = embed_to(tower, few, tmp_path / "out")
    assert stored.columns == columns
    expected: dict[str, torch.Tensor] = {}
    flattened(tower.embed(few, num_workers=0, progress=False), "", expected)
    for name, rows in zip(columns, expected.values(), strict=True):
        assert torch.equal(stored.load(name)[1], rows)
    found = nearest(stored, embed_query(tower, stored, few[2]), 2)
    assert found[0] == (few[2], pytest.approx(1))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda y: {"id": y, "embedding": y}, "none called 'id'"),
        (lambda y: {"": y, "embedding": y}, "outputs of the names"),
        (lambda y: {}, "expected at least one"),
        (lambda y: torch.complex(y, y), "real numbers, at least one"),
        (lambda y: y[:, :0], "real numbers, at least one"),
    ],
)
def test_what_no_table_can_hold_is_refused_before_anything_is_written(
    made: Callable[[torch.Tensor], Any], words: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(TowerError, match=words):
        embed_to(headed(made), images, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_tower_whose_weights_are_no_tensors_is_refused(images: Path, tmp_path: Path) -> None:
    tower = TimmModel("test_vit", embed_dim=8).eval()
    quantized = torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TowerError, match="quantization_config="):
        embed_to(quantized, images, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_only_vectors_of_finite_numbers_are_searched(images: Path, tmp_path: Path) -> None:
    few = [images / f"{number:03}.png" for number in range(3)]
    maps = headed(lambda y: y[:, :, None].expand(-1, -1, 2))
    stored = embed_to(maps, few, tmp_path / "maps")
    with pytest.raises(ArgumentError, match="expected one vector of floats"):
        nearest(stored, embed_query(maps, stored, few[0]), 2)
    noughts = embed_to(headed(lambda y: (y - y[:1]) / (y - y[:1])), few, tmp_path / "nan")
    with pytest.raises(ArgumentError, match=r"embeddings-00000.parquet\[0\] holds a number that is not finite"):
        nearest(noughts, torch.ones(6), 2)


def test_every_bit_of_a_shard_counts(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    stored = embed_to(tower, images, tmp_path / "out")
    stored.save_npy(tmp_path / "all.npy")
    before = {path: path.read_bytes() for path in tmp_path.glob("all*")}
    shard = stored.shards[1].path
    content = bytearray(shard.read_bytes())
    place = bytes(content).index(stored.load()[1][8].numpy().tobytes())
    content[place + 5] ^= 1
    shard.write_bytes(content)
    damaged = "not a whole shard of embeddings: .* Delete it and those of higher numbers"
    with pytest.raises(FormatError, match=damaged):
        StoredEmbeddings(tmp_path / "out").load()
    with pytest.raises(FormatError, match=damaged):
        StoredEmbeddings(tmp_path / "out").save_npy(tmp_path / "all.npy")
    assert {path: path.read_bytes() for path in tmp_path.glob("all*")} == before


def test_a_damaged_footer_is_refused_or_changes_nothing(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    ids, rows = embed_to(tower, sorted(images.iterdir())[:3], tmp_path / "out").load()
    shard = tmp_path / "out" / "embeddings-00000.parquet"
    content = shard.read_bytes()
    start, draw, refused = len(content) - 8 - int.from_bytes(content[-8:-4], "little"), random.Random(0), 0
    for _ in range(500):
        changed = bytearray(content)
        changed[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
        shard.write_bytes(changed)
        try:
            found = StoredEmbeddings(tmp_path / "out").load()
        except FormatError:
            refused += 1
        else:
            assert found[0] == ids
            assert torch.equal(found[1], rows)
    assert 100 < refused < 500


def test_a_missing_last_shard_is_noticed_and_made_again(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    stored = embed_to(tower, images, tmp_path / "out")
    ids, rows = stored.load()
    stored.shards[-1].path.unlink()
    with pytest.raises(FormatError, match=f"of 24 images, and manifest.json says that there are {COUNT}"):
        StoredEmbeddings(tmp_path / "out")
    again = embed_to(tower, images, tmp_path / "out")
    assert again.load()[0] == ids
    assert torch.equal(again.load()[1], rows)


def test_a_folder_that_grows_is_not_complete_until_it_is(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    first = [{"id": path.name, "image": path} for path in sorted(images.iterdir())[:10]]
    assert embed_to(tower, first, tmp_path / "out").complete
    with pytest.raises(Stop):
        embed_to(tower, stopping(images, 26), tmp_path / "out")
    half = StoredEmbeddings(tmp_path / "out")
    assert len(half) == 24, "two of the 26 are broken"
    assert not half.complete
    whole = embed_to(tower, stopping(images, COUNT + 1), tmp_path / "out")
    assert whole.complete
    assert whole.load()[0] == embed_to(tower, images, tmp_path / "whole").load()[0]


def test_folders_and_towers_may_have_any_name(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n%")
    tower.save_pretrained(place + "/tower")
    stored = embed_to(TimmModel.from_pretrained(place + "/tower"), images, place + "/split=train")
    assert len(stored) == len(stored.load()[0]) == COUNT - 2
    assert stored.manifest["tower"]["loaded_from"] == str(tmp_path) + "/caf\\xe9\n%/tower"


@pytest.mark.slow
@pytest.mark.turn(1)
def test_kill_9_of_the_group_or_a_replica_at_any_moment(
    tower: TimmModel, saved: Path, images: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for copy in range(20):
        for path in images.iterdir():
            shutil.copy(path, many / f"{copy:02}-{path.name}")
    whole = embed_to(tower, many, tmp_path / "whole", rows_per_shard=32)
    folder, kills = tmp_path / "killed", 0
    call = "from hf_timm_tower.cli import main; main()"
    command = [sys.executable, "-c", call, "embed", str(many), "--to", str(folder), "--tower", str(saved)]
    command += ["--workers", "2", "--rows-per-shard", "32", "--quiet", "--json"]
    while kills < 5:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        shards = len(list(folder.glob("*.parquet"))) if folder.exists() else 0
        while len(list(folder.glob("*.parquet")) if folder.exists() else []) <= shards and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        if kills % 2:  # one replica: the run goes on, and is then killed as a whole
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3, "two of the images are broken"
    again = StoredEmbeddings(folder)
    assert again.complete
    assert again.load()[0] == whole.load()[0]
    assert torch.equal(again.load()[1], whole.load()[1])
    assert again.failures == whole.failures


def test_a_manifest_of_somebody_else_is_read_with_care(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    written = json.loads((embed_to(tower, images, tmp_path / "emb").path / "manifest.json").read_text())
    column = written["columns"]["embedding"]
    for change in (
        {"options": {**written["options"], "dtype": "torch.load"}},
        {"options": {**written["options"], "layers": "x"}},
        {"options": 3},
        {"source": []},
        {"columns": {}},
        {"columns": {"embedding": None}},
        {"columns": {"embedding": {**column, "dtype": "load"}}},
        {"columns": {"embedding": {**column, "shape": None}}},
        {"rows_per_shard": None},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**written, **change}))
        with pytest.raises(FormatError):
            outputs_of(read_manifest(tmp_path) or {})
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(FormatError, match="not a regular file"):
        read_manifest(tmp_path)


def test_a_card_that_somebody_wrote_stays(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    embed_to(tower, images, tmp_path / "emb")
    (tmp_path / "emb" / "README.md").write_text("Mine.")
    embed_to(tower, images, tmp_path / "emb")
    assert (tmp_path / "emb" / "README.md").read_text() == "Mine."


def test_the_images_of_another_folder_are_refused_even_if_they_have_the_same_names(
    tower: TimmModel, images: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(images, tmp_path / "first")
    embed_to(tower, first, tmp_path / "out")
    with pytest.raises(FolderError, match=r"holds embeddings of '.*first', not of"):
        embed_to(tower, images, tmp_path / "out")
    (tmp_path / "link").symlink_to(first)
    embed_to(tower, tmp_path / "link", tmp_path / "out")
    first.rename(tmp_path / "moved")
    embed_to(tower, tmp_path / "moved", tmp_path / "out")


def test_failures_that_were_mended_are_not_listed_any_more(tower: TimmModel, images: Path, tmp_path: Path) -> None:
    mended = shutil.copytree(images, tmp_path / "images")
    embed_to(tower, mended, tmp_path / "out")
    for number in (4, 17):
        shutil.copy(mended / "000.png", mended / f"{number:03}.png")
    for shard in (tmp_path / "out").glob("*.parquet"):
        shard.unlink()
    assert len(embed_to(tower, mended, tmp_path / "out")) == COUNT
    assert (tmp_path / "out" / "failures.jsonl").read_text() == ""


def test_a_full_disk_leaves_no_part_of_a_shard(saved: Path, images: Path, tmp_path: Path) -> None:
    program = """
import resource, sys
from hf_timm_tower import FolderError, TimmModel
tower = TimmModel.from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    tower.embed_to(sys.argv[2], sys.argv[3], layers=[0], num_workers=0, progress=False)
except FolderError as error:
    print(error)
"""
    words = [sys.executable, "-c", program, saved, images, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "embeddings-00000.parquet cannot be written: File too large" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "change", [{"versions": 5}, {"source": {"kind": "folder", "place": 7}}, {"tower": {"loaded_from": 5}}]
)
def test_a_manifest_with_other_kinds_of_values_is_refused(
    tower: TimmModel, images: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    stored = embed_to(tower, images, tmp_path / "out")
    (stored.path / "manifest.json").write_text(json.dumps({**stored.manifest, **change}))
    with pytest.raises(FormatError, match=r"manifest\.json.*expected an? (object|text)"):
        StoredEmbeddings(stored.path)

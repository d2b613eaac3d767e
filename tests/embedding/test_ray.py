"""Ray Data: the bits of `tower.embed`, and complete after an actor or the driver was killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_timm_tower import ArgumentError, FolderError, TimmModel
from hf_timm_tower.embedding.embedder import Outputs

ray = pytest.importorskip("ray", reason="ray is not installed (extra ray)")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra embed)")

pq = pytest.importorskip("pyarrow.parquet")
ours = pytest.importorskip("hf_timm_tower.embedding.ray")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 120


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("tower") / "tower")
    TimmModel("test_resnet", embed_dim=8, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Noise of different sizes as JPEG files."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        paths.append(str(folder / f"{number:03}.jpg"))
        Image.fromarray(random.integers(0, 256, (40 + number % 7, 50, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def expected(tower_folder: str, photos: list[str]) -> torch.Tensor:
    return TimmModel.from_pretrained(tower_folder).embed(photos, num_workers=0, progress=False)


def actor(tower: str, column: str = "path", id_column: str = "id", errors: Any = "raise", **changes: Any) -> Any:
    """One actor, here instead of in a process of Ray's."""
    given = {"outputs": Outputs(4), "device": "cpu", "threads": 1, **changes}
    return ours.EmbeddingActor(tower, {}, columns=(column, id_column), errors=errors, **given)


def embeddings_of(table: Any) -> torch.Tensor:
    return torch.tensor(table["embedding"].to_pylist())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_table_gets_the_bits_of_tower_embed_however_it_is_cut(
    threads: int, tower_folder: str, photos: list[str], expected: torch.Tensor
) -> None:
    table = pa.table({"id": range(11), "path": photos[:11], "label": list("abcdefghijk")})
    work = actor(tower_folder, threads=threads)
    found = work(table)
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert found.drop_columns("embedding").equals(table)
    assert torch.equal(embeddings_of(found), expected[:11])
    assert torch.equal(embeddings_of(work(table.slice(3, 3))), expected[3:6])
    large = table.set_column(1, "path", table["path"].cast(pa.large_string()))  # as Polars writes them
    assert work(large).column_names == found.column_names


def test_bytes_and_arrays_give_the_same_and_do_not_stay(
    tower_folder: str, photos: list[str], expected: torch.Tensor
) -> None:
    files = pa.table({"id": photos[:5], "image": [Path(path).read_bytes() for path in photos[:5]]})
    found = actor(tower_folder, "image")(files)
    assert found.column_names == ["id", "embedding"]
    assert torch.equal(embeddings_of(found), expected[:5])

    arrays = [np.asarray(Image.open(path)) for path in photos[:5]]  # what ray.data.read_images makes of files
    tensors = ray.data.block.BlockAccessor.batch_to_arrow_block({"id": np.arange(5), "image": np.array(arrays, object)})
    found = actor(tower_folder, "image")(tensors)
    assert found.column_names == ["id", "embedding"]
    assert torch.equal(embeddings_of(found), expected[:5])


def test_an_image_that_cannot_be_used_costs_its_row_or_is_raised(
    tower_folder: str, photos: list[str], expected: torch.Tensor, tmp_path: Path
) -> None:
    paths = [photos[0], str(tmp_path / "missing.jpg"), None, photos[3]]
    table = pa.table({"id": list("abcd"), "path": paths})
    found = actor(tower_folder, errors="collect")(table).to_pylist()
    assert [row["embedding"] is None for row in found] == [False, True, True, False]
    assert torch.equal(torch.tensor([found[0]["embedding"], found[3]["embedding"]]), expected[[0, 3]])
    assert [row["error"] for row in found][:2] == [None, "No such file or directory"]
    assert "no image in this row" in found[2]["error"]
    nothing = actor(tower_folder, errors="collect")(table.slice(1, 2))
    assert nothing.schema == actor(tower_folder, errors="collect")(table.slice(0, 1)).schema, "blocks fit together"
    with pytest.raises(ArgumentError, match=r"images\[1\] \(b\): No such file"):
        actor(tower_folder)(table)
    with pytest.raises(ArgumentError, match="no column 'uri', it has"):
        actor(tower_folder, "uri")(table)


def test_no_column_stands_twice(tower_folder: str, photos: list[str]) -> None:
    table = pa.table({"id": range(3), "path": photos[:3]})
    once = actor(tower_folder, errors="collect")(table)
    with pytest.raises(ArgumentError, match=r"the tower adds \['embedding'\]: each may stand once"):
        actor(tower_folder)(once.drop_columns("error"))
    with pytest.raises(ArgumentError, match=r"the tower adds \['embedding', 'error'\]: each may stand once"):
        actor(tower_folder, errors="collect")(once.drop_columns("embedding"))


def test_the_output_belongs_to_one_tower(tower_folder: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ours.claim_output(out, tower_folder)
    ours.claim_output(out, tower_folder)
    assert json.loads((tmp_path / "out" / "_tower.json").read_text())["tower"]["architecture"] == "test_resnet"
    with pytest.raises(FolderError, match="options"):
        ours.claim_output(out, tower_folder, normalize=True)
    other = str(tmp_path / "other")
    torch.manual_seed(1)
    TimmModel("test_resnet", embed_dim=8, image_size=32).save_pretrained(other)
    with pytest.raises(FolderError, match="other weights"):
        ours.claim_output(out, other)


class DiesOnce(ours.EmbeddingActor):
    """An actor that is killed at its first batch, if no other was before."""

    flag: Path

    def __call__(self, table: Any) -> Any:
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().__call__(table)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[None]:
    """A cluster on this machine, with cores for two actors and for what feeds them."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.turn(1)
def test_two_actors_one_of_them_killed_give_all_rows_with_the_same_bits(
    cluster: None,
    tower_folder: str,
    photos: list[str],
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    DiesOnce.flag = tmp_path / "killed"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
    monkeypatch.setattr(ours, "EmbeddingActor", DiesOnce)
    dataset = ray.data.from_items([{"id": row, "path": path} for row, path in enumerate(photos)]).repartition(7)
    table = pa.concat_tables(ray.get(ours.embed_dataset(dataset, tower_folder, actors=2).to_arrow_refs()))
    assert DiesOnce.flag.exists(), "one was killed"
    assert sorted(table["id"].to_pylist()) == list(range(IMAGES)), "every image once"
    assert torch.equal(embeddings_of(table.sort_by("id")), expected)


def whole_rows(folder: Path) -> int:
    """Rows of the files that are written to their end: only then they have a footer."""
    rows = 0
    for path in folder.glob("*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):
            rows += pq.read_metadata(path).num_rows
    return rows


@pytest.mark.slow
@pytest.mark.turn(0)
def test_a_killed_driver_is_gone_on_with_by_the_same_command(
    tower_folder: str, photos: list[str], expected: torch.Tensor, tmp_path: Path
) -> None:
    manifest, out = tmp_path / "manifest.parquet", tmp_path / "out"
    pq.write_table(pa.table({"id": range(IMAGES), "path": photos}), manifest)
    code = "import runpy, sys; main = runpy.run_path(sys.argv[1])['main']; sys.exit(main(sys.argv[2:]) or {})"
    arguments = [str(ROOT / "scripts" / "embed_ray.py"), tower_folder, "manifest.parquet", "out"]
    arguments += ["--rows-per-file", "8", "--address", "local"]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    # Ray's reader of Parquet starts 32 processes for the footers, whatever there is to read
    environment = {**os.environ, "PYTHONPATH": path, "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1"}

    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", code.format(0), *arguments], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
        deadline = time.monotonic() + 300
        while not whole_rows(out) and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    assert 0 < whole_rows(out) < IMAGES, (tmp_path / "log").read_text()[-3000:]

    # once more after the end, in the same process: nothing is left to do, and nothing is added
    twice = [sys.executable, "-c", code.format("main(sys.argv[2:])"), *arguments]
    again = subprocess.run(twice, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=450)
    assert again.returncode == 0, again.stderr[-3000:]
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet")))
    assert sorted(table["id"].to_pylist()) == list(range(IMAGES)), "every image once"
    assert torch.equal(embeddings_of(table.sort_by("id")), expected)

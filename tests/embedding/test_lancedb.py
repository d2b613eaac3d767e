"""LanceDB: `timm-tower` in its registry, and a folder of embeddings as its table."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_timm_tower import ArgumentError, TimmModel
from hf_timm_tower.embedding.stored import StoredEmbeddings

lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed (extra test)")


@pytest.fixture
def tower_folder(tmp_path: Path) -> str:
    folder = str(tmp_path / "tower")
    TimmModel("test_resnet", embed_dim=8, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    random, paths = np.random.default_rng(0), [str(tmp_path / f"{number}.png") for number in range(6)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


def test_a_model_names_a_repository_and_its_table_embeds_and_searches(
    tower_folder: str, photos: list[str], tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    import hf_timm_tower.embedding.lancedb  # noqa: F401

    function: Any = get_registry().get("timm-tower").create(name=tower_folder, num_workers=0)

    class Photo(LanceModel):
        path: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(str(tmp_path / "db")).create_table("photos", schema=Photo)
    table.add([{"path": path} for path in photos])
    stored = table.to_arrow().to_pylist()
    expected = TimmModel.from_pretrained(tower_folder).embed(photos, normalize=True, num_workers=0, progress=False)
    assert [row["path"] for row in stored] == photos
    assert torch.equal(torch.tensor([row["vector"] for row in stored]), expected)
    assert table.search(Image.open(photos[4])).limit(1).to_list()[0]["path"] == photos[4]

    # Another process knows the tower from the table, once it has imported the module.
    found = fresh_process(
        """
        import json, sys
        import lancedb
        import hf_timm_tower.embedding.lancedb
        table = lancedb.connect(sys.argv[1]).open_table("photos")
        print(json.dumps([row["path"] for row in table.search(sys.argv[2]).limit(1).to_list()]))
        """,
        tmp_path / "db",
        photos[2],
    )
    assert json.loads(found) == [photos[2]]


def test_a_table_cannot_ask_for_remote_code() -> None:
    import hf_timm_tower.embedding.lancedb as module

    with pytest.raises(ValueError, match="trust_remote_code"):
        module.TimmTowerEmbeddings.create(name="org/tower", trust_remote_code=True)


def test_a_folder_becomes_a_lance_table_or_stays_what_it_was(
    tower_folder: str, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = TimmModel.from_pretrained(tower_folder)
    how: dict[str, Any] = {"num_workers": 0, "progress": False, "rows_per_shard": 4, "return_tokens": True}
    stored = tower.embed_to(photos[:5], tmp_path / "out", **how)
    stored.save_lance(tmp_path / "db" / "photos.lance")
    table = lancedb.connect(tmp_path / "db").open_table("photos")

    def holds(stored: StoredEmbeddings) -> bool:
        table.checkout_latest()
        rows = table.to_arrow().to_pydict()
        return rows["id"] == stored.load()[0] and torch.equal(torch.tensor(rows["embedding"]), stored.load()[1])

    assert holds(stored)
    assert json.loads(table.schema.metadata[b"hf_timm_tower"]) == stored.manifest
    assert table.search(stored.load()[1][3].numpy()).limit(1).to_list()[0]["id"] == photos[3]
    stored.save_lance(tmp_path / "db" / "dense.lance", "tokens")
    dense = lancedb.connect(tmp_path / "db").open_table("dense").to_arrow()["tokens"].to_pylist()
    assert torch.equal(torch.tensor(dense), stored.load("tokens")[1].flatten(1))

    grown = tower.embed_to(photos, tmp_path / "out", **how)
    batches = StoredEmbeddings.batches

    def broken(self: StoredEmbeddings, column: str | None = None) -> Iterator[Any]:
        yield next(batches(self, column))
        raise OSError("what stands for a kill")

    with monkeypatch.context() as patch:
        patch.setattr(StoredEmbeddings, "batches", broken)
        with pytest.raises(Exception, match="stands for a kill"):
            grown.save_lance(tmp_path / "db" / "photos.lance")
    assert holds(stored)
    grown.save_lance(tmp_path / "db" / "photos.lance")
    assert holds(grown)
    with pytest.raises(ArgumentError, match=r"ends in \.lance"):
        grown.save_lance(tmp_path / "photos")

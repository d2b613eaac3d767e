"""`timm-tower` in LanceDB's registry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_timm_tower import TimmModel

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

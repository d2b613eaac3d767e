"""`timm-tower` in LanceDB's registry of embedding functions.

    import hf_timm_tower.embedding.lancedb
    tower = lancedb.embeddings.get_registry().get("timm-tower").create(name="org/tower")

    class Photo(LanceModel):
        path: str = tower.SourceField()
        vector: Vector(tower.ndims()) = tower.VectorField()

    table.add([{"path": "cat.jpg"}])
    table.search("dog.jpg").limit(5)

A table remembers name and options. A process that opens it imports this module first.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ..reader.errors import ArgumentError

try:
    import pyarrow as pa
    from lancedb.embeddings import EmbeddingFunction, register
except ImportError as missing:
    raise ImportError(f'{missing}: pip install "hf_timm_tower[search]"') from missing


@register("timm-tower")
class TimmTowerEmbeddings(EmbeddingFunction):  # type: ignore[misc]  # lancedb carries no types
    """Images -> embeddings of a tower; images are paths or bytes of files, queries also PIL images.

    There is no `trust_remote_code`: options come out of a table's metadata, which anybody may have written, so a tower
    whose head is stored as code is refused.

    Attributes:
        name: Repository id or folder of the tower.
        revision: Branch, tag or commit.
        device: Where to run; None: on the CPU.
        normalize: Scale embeddings to length 1.
        batch_size: Images that run at once; None: 8 on a CPU, 32 elsewhere.
        num_workers: Processes beside this one; None: as `tower.embed` chooses.
    """

    name: str
    revision: str | None = None
    device: str | None = None
    normalize: bool = True
    batch_size: int | None = None
    num_workers: int | None = None
    model_config = {"extra": "forbid"}  # noqa: RUF012  # pydantic's way

    max_retries: int = 0  # of lancedb, for services; a file that cannot be read will not be readable in a minute

    @cached_property
    def _tower(self) -> Any:
        from ..timm_model import TimmModel

        tower = TimmModel.from_pretrained(self.name, revision=self.revision)
        return tower if self.device is None else tower.to(self.device)

    def ndims(self) -> int:
        """Width of an embedding.

        Raises:
            ArgumentError: the tower's head gives something else than one vector for each image.
        """
        width = self._tower.config.embed_dim
        if width is None:
            raise ArgumentError(f"{self.name}: its head does not give one vector for each image")
        return int(width)

    def compute_source_embeddings(self, images: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Paths or bytes, a list or an Arrow array -> one vector each; one that cannot be used is an error."""
        return self._embed(images.to_pylist() if isinstance(images, (pa.Array, pa.ChunkedArray)) else images)

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """One image -> its vector."""
        return self._embed([query])

    def _embed(self, images: Any) -> list[Any]:
        listed = [images] if isinstance(images, (str, bytes, Image.Image)) else list(_each(images))
        workers: Any = "auto" if self.num_workers is None else self.num_workers
        found = self._tower.embed(
            listed, batch_size=self.batch_size, num_workers=workers, normalize=self.normalize, progress=False
        )
        return list(found.float().numpy())


def _each(images: Iterable[Any]) -> Iterable[Any]:
    return (str(image) if isinstance(image, np.str_) else image for image in images)

"""`TimmTowerBackbone` as this package has it: the reader's, with strict reading, saving and pushing."""

from collections.abc import Sequence

from .hub.trunk_source import refuse_as_part
from .pretrained import SavesTower
from .reader import backbone
from .reader.loading import TowerLoading
from .reader.weights import StoredTower


class TimmTowerBackbone(backbone.TimmTowerBackbone, SavesTower):  # type: ignore[no-untyped-call]
    __doc__ = backbone.TimmTowerBackbone.__doc__

    def _read(self, files: Sequence[str], loading: TowerLoading) -> StoredTower:  # type: ignore[override]
        refuse_as_part(self.config)  # before the trunk is fetched
        return super()._read(files, loading)

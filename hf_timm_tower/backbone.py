"""`TimmTowerBackbone` as this package has it: the reader's, with strict reading, saving and pushing."""

from .modeling import SavesTower
from .reader import backbone


class TimmTowerBackbone(backbone.TimmTowerBackbone, SavesTower):  # type: ignore[no-untyped-call]
    __doc__ = backbone.TimmTowerBackbone.__doc__

"""What open_clip asks of an image tower from version 4 on, and 3.3 does not: decided here, for a tower that it made.

A tower that open_clip's `create_model` made has open_clip's `preprocess_cfg`. There `lock(n)`, which open_clip's
`lock_image_tower` calls, counts as the open_clip that is running counts: up to 3.3 n groups of the trunk stay open and
the head always trains, as in any other tower; from 4 on the head is the last of the groups, so that `lock(0)` closes
all and `lock(1)` leaves the head alone open.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from ..reader.errors import ArgumentError
from ..training.layer_groups import LayerGroup, layer_groups


def counts_head(tower: Any) -> bool:
    """Whether `lock(n)` of this tower counts the head among its n groups: open_clip 4 made it."""
    running = sys.modules.get("open_clip")
    version = str(getattr(running, "__version__", "0")).partition(".")[0]
    return bool(tower.preprocess_cfg) and version.isdigit() and int(version) >= 4


def counted(tower: Any, unlocked_groups: int, head: bool | None) -> tuple[int, bool]:
    """What `lock(unlocked_groups, head=head)` means for this tower.

    Returns:
        How many groups of the trunk stay open, and whether the head is closed.
    """
    if head is not None or not counts_head(tower):
        return unlocked_groups, bool(head)
    if not any(group.part == "head" and group.parameters for group in layer_groups(tower)):
        return unlocked_groups, False  # the last of the trunk's groups is then the last of all
    return (unlocked_groups - 1, False) if unlocked_groups else (0, True)


def group_pairs(tower: nn.Module, groups: Sequence[LayerGroup]) -> list[tuple[str, list[nn.Parameter]]]:
    """Layer groups as open_clip 4 takes them for its layer-wise learning rates: `(name, parameters)`, input first."""
    return [(group.name, [tower.get_parameter(name) for name in group.parameters]) for group in groups]


def check_checkpointing(impl: str) -> None:
    """open_clip 4 asks for `composable` checkpointing under FSDP2; timm has one kind, as in its own `TimmModel`.

    Raises:
        ArgumentError: another kind.
    """
    if impl == "composable":
        warnings.warn(
            "impl='composable': timm checkpoints activations inline, and so it is done, as in open_clip's own class",
            stacklevel=3,
        )
    elif impl != "inline":
        raise ArgumentError(f"impl={impl!r}: expected 'inline' or 'composable'")

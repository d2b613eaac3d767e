"""One tower for each timm model class, for the sweeps over all of them: other values than fresh, and its pools."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from hf_timm_tower import TimmModel
from hf_timm_tower.reader.config import TimmTowerConfig
from hf_timm_tower.reader.trunk import native_cfg
from hf_timm_tower.trunk_facts import ALL_POOLS, offered_pools

WIDTH = 24

# Trunks of such a native size take minutes for every forward on one thread, so they are tested at about half of it;
# the patches and the windows they merge divide both.
SMALLER = {512: 256, 546: 252, 768: 384, 896: 448}


@dataclass(frozen=True)
class ClassTower:
    """A tower of one class, saved.

    Attributes:
        architecture: timm's name.
        pools: (pool, proj) of everything that the trunk offers; the tower has the first.
        tower: In eval mode.
        folder: Where it was saved.
        images: `[2, C, H, W]`.
        expected: What the tower gives for them.
    """

    architecture: str
    pools: list[tuple[str, str | None]]
    tower: TimmModel
    folder: Path
    images: torch.Tensor
    expected: torch.Tensor


def randomise(module: torch.nn.Module) -> None:
    """Other values in every parameter and floating-point buffer, gently: outputs stay finite, nothing is as built."""
    generator = torch.Generator().manual_seed(7)
    persistent = module.state_dict().keys()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                continue  # clipping limits of infinity stay what they are
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.mul_(1 + 0.1 * noise.abs())
            elif name in persistent:
                tensor.add_(noise * (0.05 * tensor.float().std(correction=0).item() + 0.01))


@lru_cache(maxsize=4)
def pools_of(architecture: str) -> list[tuple[str, str | None]]:
    """(pool, proj) of everything the trunk offers: with a projection, and without one where only that offers it."""
    with_proj = offered_pools(TimmTowerConfig(architecture=architecture, proj="linear", embed_dim=WIDTH))
    others = [pool for pool in ALL_POOLS if pool not in with_proj]
    without = offered_pools(TimmTowerConfig(architecture=architecture, proj="none"), among=others)
    return [(pool, "linear") for pool in with_proj] + [(pool, "none") for pool in without]


def size_to_test(architecture: str) -> int | None:
    """The image size for the sweeps, None for the native one."""
    return SMALLER.get(max(native_cfg(architecture)["input_size"][1:]))


def build(architecture: str, pool: str, proj: str | None) -> TimmModel:
    """A tower at the size of the sweeps."""
    width = WIDTH if proj == "linear" else None
    return TimmModel(architecture, width, pool=pool, proj=proj, image_size=size_to_test(architecture))


def build_and_save(architecture: str, folder: Path) -> ClassTower:
    """The tower of a class with the first pool that it offers."""
    pools = pools_of(architecture)
    assert pools, f"{architecture} offers no pool at all"
    tower = build(architecture, *pools[0])
    randomise(tower)
    shape = (2, tower.config.in_chans, *tower.config.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    tower.save_pretrained(folder)
    with torch.no_grad():
        expected = tower.eval()(images)
    assert torch.isfinite(expected).all(), f"{architecture}: the comparisons need finite outputs"
    return ClassTower(architecture, pools, tower, folder, images, expected)

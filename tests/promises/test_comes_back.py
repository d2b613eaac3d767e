"""What was saved is what is loaded: every timm model class, every pool that its trunk offers, in a fresh process."""

import shutil
from pathlib import Path

import pytest
import torch

from hf_timm_tower import TimmModel
from hf_timm_tower.reader.config import TimmTowerConfig
from hf_timm_tower.reader.trunk import native_cfg
from hf_timm_tower.trunk_facts import ALL_POOLS, offered_pools

from ..fresh import outputs_in_fresh_process
from ..timm_classes import find_smallest, smallest_of_each_class

# One of each kind of trunk: maps in both orders, tokens, attention pool, non-persistent buffers, wide heads.
QUICK = ("test_resnet", "test_vit", "test_mambaout", "test_coatnet", "mobilenetv3_small_050", "efficientvim_m1")

# Towers wait on disk for one fresh process to load them all, up to this many bytes.
MOST_ON_DISK = 2**30


def randomise(module: torch.nn.Module) -> None:
    """Other values in every parameter and floating-point buffer, gently: outputs stay finite, nothing is as built."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                continue  # clipping limits of infinity stay what they are
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.mul_(1 + 0.1 * noise.abs())
            elif name in persistent(module):
                tensor.add_(noise * (0.05 * tensor.float().std(correction=0).item() + 0.01))


def persistent(module: torch.nn.Module) -> frozenset[str]:
    return frozenset(module.state_dict().keys())


def pools_of(architecture: str) -> list[tuple[str, str | None]]:
    """(pool, proj) of everything the trunk offers: with a projection, and without one where only that offers it."""
    with_proj = offered_pools(TimmTowerConfig(architecture=architecture, proj="linear", embed_dim=24))
    others = [pool for pool in ALL_POOLS if pool not in with_proj]
    without = offered_pools(TimmTowerConfig(architecture=architecture, proj="none"), among=others)
    return [(pool, "linear") for pool in with_proj] + [(pool, "none") for pool in without]


# Trunks of such a native size take minutes for every forward on one thread, so they are tested at about half of it;
# the patches and the windows they merge divide both.
SMALLER = {512: 256, 546: 252, 768: 384, 896: 448}


def size_to_test(architecture: str) -> int | None:
    """The image size for the sweep, None for the native one."""
    return SMALLER.get(max(native_cfg(architecture)["input_size"][1:]))


def check_comes_back(architecture: str, folder: Path) -> int:
    """Every pool of one architecture: saved here, loaded in a fresh process, equal outputs. Returns how many."""
    pools = pools_of(architecture)
    assert pools, f"{architecture} offers no pool at all"
    image, expected, size, image_size = None, {}, 0, size_to_test(architecture)
    for number, (pool, proj) in enumerate(pools, start=1):
        tower = TimmModel(
            architecture, embed_dim=24 if proj == "linear" else None, pool=pool, proj=proj, image_size=image_size
        )
        randomise(tower)
        if image is None:
            shape = (2, tower.config.in_chans, *tower.config.image_size)
            image = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        target = folder / f"{pool}-{proj}"
        tower.save_pretrained(target)
        with torch.no_grad():
            expected[target] = tower.eval()(image)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tower.state_dict().values())
        if size > MOST_ON_DISK or number == len(pools):
            compare_in_fresh_process(architecture, expected, image, folder)
            expected, size = {}, 0
    return len(pools)


def compare_in_fresh_process(
    architecture: str, expected: dict[Path, torch.Tensor], image: torch.Tensor, scratch: Path
) -> None:
    """Load the folders in one new process, compare what they give, and take them away."""
    got = outputs_in_fresh_process(list(expected), image, scratch)
    for (target, ours), theirs in zip(expected.items(), got, strict=True):
        assert torch.isfinite(ours).all(), f"{architecture} {target.name}: the comparison needs finite outputs"
        assert torch.equal(ours, theirs), f"{architecture} {target.name}: other bits in a fresh process"
        shutil.rmtree(target)


@pytest.mark.parametrize("architecture", QUICK)
def test_tower_comes_back_bit_for_bit_with_every_pool(architecture: str, tmp_path: Path) -> None:
    assert check_comes_back(architecture, tmp_path) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list(smallest_of_each_class()))
def test_every_timm_class_comes_back_with_every_pool(name: str, tmp_path: Path) -> None:
    architecture = smallest_of_each_class()[name]
    count = check_comes_back(architecture, tmp_path)
    print(f"{name}: {architecture}, {count} pools equal")


@pytest.mark.slow
def test_the_sweep_covers_every_class_of_this_timm() -> None:
    assert smallest_of_each_class() == find_smallest()

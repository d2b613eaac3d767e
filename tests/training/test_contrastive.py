"""Processes that share a batch learn what one would, with open_clip's losses as `train_clip.py` sets them up."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BATCH, WIDTH, PROCESSES = 6, 5, 2
SCALE, BIAS = 7.5, -3.0


def make_loss(name: str, rank: int, processes: int) -> nn.Module:
    """The script's own."""
    sys.path.insert(0, str(SCRIPTS))
    from _train_clip.training import make_loss

    return make_loss(name, rank, processes)


class Towers(nn.Module):
    """Two small nets, a scale and for SigLIP a bias; the same ones in every process."""

    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.text = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.bias = nn.Parameter(torch.tensor(BIAS)) if with_bias else None
        self.double()  # in which another order of summation leaves no room for a wrong factor

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> list[torch.Tensor | None]:
        return [F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), self.scale, self.bias]


def learn(towers: Towers, model: nn.Module, loss: Any, part: slice) -> dict[str, torch.Tensor]:
    """The loss of a part of the batch and every parameter's gradient after the backward pass."""
    generator = torch.Generator().manual_seed(4)
    images, texts = (torch.randn(BATCH, width, generator=generator, dtype=torch.float64) for width in (8, 4))
    value = loss(*model(images[part], texts[part]))
    value.backward()
    return {"loss": value.detach(), **{name: weight.grad for name, weight in towers.named_parameters()}}


def share_a_batch(rank: int, folder: str) -> None:
    """One of the processes: both losses on its part, under DistributedDataParallel."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    own = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    found = {}
    for name in ("clip", "siglip"):
        towers = Towers(with_bias=name == "siglip")
        found[name] = learn(towers, DistributedDataParallel(towers), make_loss(name, rank, PROCESSES), own)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_processes_that_share_a_batch_get_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share_a_batch, (str(tmp_path),), nprocs=PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for name in ("clip", "siglip"):
        towers = Towers(with_bias=name == "siglip")
        alone = learn(towers, towers, make_loss(name, 0, 1), slice(None))
        assert all(gradient.abs().max() > 1e-3 for gradient in alone.values()), "nothing to compare"
        losses = torch.stack([shared[name].pop("loss") for shared in ranks])
        torch.testing.assert_close(losses.mean(), alone.pop("loss"), rtol=0, atol=1e-12)
        for shared in ranks:
            for key, expected in alone.items():
                found = shared[name][key]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")

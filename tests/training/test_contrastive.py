"""Contrastive losses are open_clip's, and processes that share a batch learn what one process would."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_timm_tower import ArgumentError
from hf_timm_tower.training.contrastive import clip_loss, gathered_clip_loss, gathered_siglip_loss, siglip_loss

BATCH, WIDTH, PROCESSES = 6, 5, 2
SCALE, BIAS = 7.5, -3.0


def unit_vectors(seed: int) -> torch.Tensor:
    vectors = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=-1).requires_grad_()


def loss_and_gradients(loss: Any, *numbers: float) -> list[torch.Tensor]:
    """A loss of two sets of vectors and of numbers, and its gradients to all of them."""
    inputs = [unit_vectors(1), unit_vectors(2), *(torch.tensor(number, requires_grad=True) for number in numbers)]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def test_clip_loss_is_open_clips() -> None:
    from open_clip.loss import ClipLoss

    theirs = loss_and_gradients(ClipLoss(), SCALE)
    for ours in (loss_and_gradients(clip_loss, SCALE), loss_and_gradients(gathered_clip_loss, SCALE)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_siglip_loss_is_open_clips() -> None:
    from open_clip.loss import SigLipLoss

    theirs = loss_and_gradients(SigLipLoss(), SCALE, BIAS)
    for ours in (loss_and_gradients(siglip_loss, SCALE, BIAS), loss_and_gradients(gathered_siglip_loss, SCALE, BIAS)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4, 1, 3), (4, 1, 3)), ((0, 3), (0, 3))])
def test_embeddings_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    images, texts = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ArgumentError, match=r"expected \[B, D\] of both"):
        clip_loss(images, texts, SCALE)
    with pytest.raises(ArgumentError, match=r"expected \[B, D\] of both"):
        gathered_siglip_loss(images, texts, SCALE, BIAS)


# --- several processes


class Towers(nn.Module):
    """Two small nets, a scale and for SigLIP a bias; the same ones in every process."""

    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.text = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        numbers = (SCALE, BIAS) if with_bias else (SCALE,)
        self.numbers = nn.ParameterList([torch.tensor(number) for number in numbers])
        self.double()  # in which another order of summation leaves no room for a wrong factor

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> list[torch.Tensor]:
        return [F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), *self.numbers]


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(BATCH, width, generator=generator, dtype=torch.float64) for width in (8, 4))


def learn(towers: Towers, model: nn.Module, loss: Any, part: slice) -> dict[str, torch.Tensor]:
    """The loss of a part of the batch and every parameter's gradient after the backward pass."""
    images, texts = inputs()
    value = loss(*model(images[part], texts[part]))
    value.backward()
    return {"loss": value.detach(), **{name: weight.grad for name, weight in towers.named_parameters()}}


def share_a_batch(rank: int, folder: str) -> None:
    """One of the processes: both losses on its part, under DistributedDataParallel; then parts of unequal sizes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    own = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    found = {}
    for name, loss, with_bias in (("clip", gathered_clip_loss, False), ("siglip", gathered_siglip_loss, True)):
        towers = Towers(with_bias)
        found[name] = learn(towers, DistributedDataParallel(towers), loss, own)
    images, texts = (each[: rank + 1] for each in (unit_vectors(1), unit_vectors(2)))
    for loss, numbers in ((gathered_clip_loss, (SCALE,)), (gathered_siglip_loss, (SCALE, BIAS))):
        with pytest.raises(ArgumentError, match=r"\[1, 5\], \[2, 5\] on the processes"):
            loss(images, texts, *numbers)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_share_a_batch_get_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share_a_batch, (str(tmp_path),), nprocs=PROCESSES)
    for name, loss, with_bias in (("clip", clip_loss, False), ("siglip", siglip_loss, True)):
        towers = Towers(with_bias)
        alone = learn(towers, towers, loss, slice(None))
        assert all(gradient.abs().max() > 1e-3 for gradient in alone.values()), "nothing to compare"
        for rank in range(PROCESSES):
            shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            for key, expected in alone.items():
                torch.testing.assert_close(shared[key], expected, rtol=0, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")

"""Verification tells a head from one that only looks like it, and leaves no trace."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_timm_tower.heads.verify import verify_head
from hf_timm_tower.reader.errors import HeadError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.fc(x))


class Reversed(Base):
    """Equal outputs, weights and weight gradients; only the input's gradient tells."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(2 * x.detach() - x)


class CountsSteps(Base):
    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            self.count += 1
        return super().forward(x)


class DropsInTraining(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(F.dropout(x, 0.2, self.training))


class DrawsOnce(Base):
    """Same numbers, but one more draw: whatever is random after it differs."""

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            torch.rand(())
        return super().forward(x) + (torch.rand(()) if self.training else 0)


class DrawsPlain(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + (torch.rand(()) if self.training else 0)


class AsTuple(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return (super().forward(x),)


class Detached(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).detach()


class BakedBatch(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * (1.0 if x.shape[0] == 2 else 2.0)


class SecondStep(Base):
    """Right in evaluation and in the first step, wrong in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.steps += self.training
        return super().forward(x) * (1.0 if self.steps < 2 else 1.5)


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc.bias.requires_grad_(False)


class Renamed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = self.fc
        del self.fc

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.linear(x))


class GivesNaN(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(
    ("original", "rebuilt", "reason"),
    [
        (Base, Reversed, "input's gradient"),
        (CountsSteps, Base, "buffer count"),
        (DropsInTraining, Base, "training"),
        (DrawsPlain, DrawsOnce, "training"),
        (Base, AsTuple, "tuple"),
        (Base, Detached, "gradient"),
        (Base, BakedBatch, "in evaluation on a batch of"),
        (Base, SecondStep, "step 2"),
        (Base, Frozen, "frozen"),
        (Base, Renamed, "keys"),
        (Base, GivesNaN, "differs"),
        (GivesNaN, Base, "differs"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_difference_is_found_and_named(original: type[Base], rebuilt: type[Base], reason: str) -> None:
    with pytest.raises(HeadError, match=reason):
        verify_head(original(), rebuilt(), torch.zeros(2, 8))


@pytest.mark.parametrize("cls", [Base, CountsSteps, DropsInTraining, DrawsPlain, GivesNaN, Frozen])
def test_equal_heads_pass_whatever_their_weights(cls: type[Base]) -> None:
    verify_head(cls(), cls(), torch.zeros(7, 8))


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        if tie:
            self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_lost_tie_is_found() -> None:
    with pytest.raises(HeadError, match="one tensor"):
        verify_head(Tied(True), Tied(False), torch.zeros(2, 8))


def test_other_shapes_and_dtypes_are_found() -> None:
    with pytest.raises(HeadError, match="weight"):
        verify_head(nn.Linear(8, 4), nn.Linear(8, 5), torch.zeros(2, 8))
    with pytest.raises(HeadError, match="bfloat16"):
        verify_head(nn.Linear(8, 4), nn.Linear(8, 4).bfloat16(), torch.zeros(2, 8))


def test_head_that_fails_by_itself_is_named() -> None:
    class Even(Base):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x.view(x.shape[0] // 2 * 2, 8))

    with pytest.raises(HeadError, match="original head fails"):
        verify_head(Even(), Even(), torch.zeros(2, 8))


def test_verification_leaves_no_trace() -> None:
    heads = [DropsInTraining().train(), DropsInTraining().eval()]
    heads[0].norm.eval()
    heads[0].fc.weight.grad = torch.ones_like(heads[0].fc.weight)
    before = copy.deepcopy([head.state_dict() for head in heads])
    states = torch.get_rng_state(), random.getstate()
    verify_head(*heads, torch.zeros(2, 8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for head, saved in zip(heads, before, strict=True):
        assert all(torch.equal(value, saved[key]) for key, value in head.state_dict().items())
    assert (heads[0].training, heads[0].norm.training, heads[1].training) == (True, False, False)
    assert torch.equal(heads[0].fc.weight.grad, torch.ones_like(heads[0].fc.weight))
    assert heads[1].fc.weight.grad is None

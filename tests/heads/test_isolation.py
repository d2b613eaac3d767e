"""A head is examined as it is by itself: whatever the training loop around it left in it or switched on."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_timm_tower import TimmModel
from hf_timm_tower.files.private_draws import PrivateDraws
from hf_timm_tower.heads.isolation import isolated
from hf_timm_tower.heads.stored_form import store_head


class Remembers(nn.Module):
    """Keeps tensors of the last step, as people do for a loss or a plot."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 4), nn.Dropout(0.3)
        self.seen: dict[str, list[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.fc(x))
        self.last, self.seen = y, {"y": [y]}
        return y


class OldNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.weight_norm(nn.Linear(8, 4, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("cls", [Remembers, OldNorm, Checkpointed])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_a_head_is_stored_after_a_step_and_inside_autocast_and_stays_as_it_is(cls: type[nn.Module]) -> None:
    head = cls().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(torch.randn(3, 8)).sum().backward()
        kept = vars(head).get("last")
        before = torch.get_rng_state()
        spec, _ = store_head(head, torch.zeros(2, 8))
    assert spec["form"] == "graph"
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(head).get("last") is kept
    assert head.training
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_an_old_weight_norm_goes_on_a_tower() -> None:
    class Prototypes(OldNorm):
        def __init__(self, width: int, embed_dim: int) -> None:
            nn.Module.__init__(self)
            self.fc = nn.utils.weight_norm(nn.Linear(width, embed_dim, bias=False))

    assert TimmModel("test_resnet", 8, custom_head=Prototypes).config.embed_dim == 8


DRAWS = [
    lambda: torch.rand(4),
    lambda: torch.randn(4),
    lambda: torch.randint(100, (4,)),
    lambda: torch.randint(3, 100, (4,)),
    lambda: torch.randperm(9),
    lambda: torch.rand_like(torch.ones(4)),
    lambda: torch.randn_like(torch.ones(4)),
    lambda: torch.normal(torch.zeros(4), torch.ones(4)),
    lambda: torch.normal(0.0, 1.0, (4,)),
    lambda: torch.bernoulli(torch.full((20,), 0.5)),
    lambda: torch.poisson(torch.full((4,), 9.0)),
    lambda: torch.multinomial(torch.ones(9), 4),
    lambda: torch.zeros(4).exponential_(),
    lambda: torch.zeros(4).random_(100),
    lambda: nn.functional.dropout(torch.ones(20)),
    lambda: nn.functional.alpha_dropout(torch.ones(20), training=True),
    lambda: nn.functional.rrelu(-torch.ones(4), training=True),
    lambda: nn.functional.gumbel_softmax(torch.zeros(4)),
    lambda: torch.distributions.Beta(torch.ones(4), torch.ones(4)).rsample(),
    lambda: torch.distributions.Dirichlet(torch.ones(4)).rsample(),
    lambda: nn.LSTM(2, 2, num_layers=2, dropout=0.5)(torch.ones(3, 2))[0],
    lambda: nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 4, 4), dropout_p=0.5),
]


@pytest.mark.parametrize("draw", DRAWS, ids=range(len(DRAWS)))
def test_every_draw_comes_from_the_block_s_own_generator(draw: Any) -> None:
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        with PrivateDraws(seed):
            found.append((draw(), draw()))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1]) or not torch.equal(found[0][0], found[2][0])


def test_other_threads_checkpoint_as_ever() -> None:
    head, x = Checkpointed().train(), torch.ones(2, 8, requires_grad=True)
    runs: list[int] = []
    head.body.register_forward_pre_hook(lambda *_: runs.append(1))

    def step() -> None:
        head(x).sum().backward()

    with isolated(0):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        assert len(runs) == 2  # forward, and again in the backward pass
        step()
        assert len(runs) == 3
    step()
    assert len(runs) == 5

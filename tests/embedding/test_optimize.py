"""Faster copies: measured, never exact by assumption, and the tower itself untouched."""

import shutil
from pathlib import Path

import pytest
import torch

from hf_timm_tower import ArgumentError, TimmModel, TowerError


def noise(tower: TimmModel) -> torch.Tensor:
    return torch.rand(4, 3, *tower.config.image_size)


def test_a_reparameterized_trunk_has_no_branches_and_about_the_same_outputs(tmp_path: Path) -> None:
    tower = TimmModel("repghostnet_050", embed_dim=8, image_size=64).eval()
    images, state = noise(tower), {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    exact = tower(images)
    done = tower.optimize("reparameterize", "channels_last")
    assert [each.step for each in done.measured] == ["reparameterize", "channels_last"]
    assert all(each.changed and each.speedup > 0 for each in done.measured)
    assert len(list(done.tower.trunk.modules())) < len(list(tower.trunk.modules()))

    found = done.tower(images)
    assert not torch.equal(found, exact), "folding rounds elsewhere"
    assert torch.allclose(found, exact, rtol=1e-3, atol=1e-4)
    assert 0 < done.measured[0].relative_difference < 1e-3
    assert done.measured[0].cosine > 0.9999

    assert torch.equal(tower(images), exact), "the tower is as it was"
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.state_dict().items())
    with pytest.raises(TowerError):
        done.tower.save_pretrained(tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_what_is_reported_is_the_distance_from_the_exact_output() -> None:
    tower = TimmModel("test_resnet", embed_dim=8, image_size=32).eval()
    nothing, half = tower.optimize("reparameterize", "bfloat16").measured
    assert not nothing.changed, "timm has nothing to fold there"
    assert nothing.relative_difference == 0
    assert nothing.cosine == pytest.approx(1)
    assert 1e-4 < half.relative_difference < 0.1, "bfloat16 has three digits"


def test_an_optimized_tower_embeds() -> None:
    tower = TimmModel("repghostnet_050", embed_dim=8, image_size=64).eval()
    pictures = torch.randint(0, 256, (5, 3, 70, 80), dtype=torch.uint8)
    exact = tower.embed(pictures, num_workers=0, progress=False)
    found = tower.optimize("reparameterize").tower.embed(pictures, num_workers=0, progress=False)
    assert torch.allclose(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.wide  # a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_tower_is_measured_like_the_others() -> None:
    tower = TimmModel("test_resnet", embed_dim=8, image_size=32).eval()
    images = noise(tower)
    done = tower.optimize("compile")
    assert done.measured[0].relative_difference < 1e-4
    assert torch.allclose(done.tower(images), tower(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [(), ("fast",), ("compile", "compile")])
def test_unknown_steps_are_refused(steps: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match="expected some of reparameterize, channels_last"):
        TimmModel("test_resnet", embed_dim=8, image_size=32).optimize(*steps)


def test_a_head_that_gives_a_number_for_each_image_is_measured() -> None:
    class Score(torch.nn.Module):
        def __init__(self, width: int, _: int | None) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)[:, 0]

    (step,) = TimmModel("test_vit", embed_dim=None, custom_head=Score).optimize("bfloat16", batch_size=2).measured
    assert 0 < step.relative_difference < 0.1

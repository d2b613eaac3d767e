"""`verify()`: equal, close or different, and what changed."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import TimmModel, TowerError
from hf_timm_tower.files.fingerprint import make_fingerprint, probe_image, run_probe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("saved") / "t"
    TimmModel("test_resnet", 8).save_pretrained(folder)
    return folder


def test_probe_is_the_closed_formula() -> None:
    probe = probe_image(3, [20, 30])
    assert probe.shape == (1, 3, 20, 30)
    for c, y, x in ((0, 0, 0), (1, 2, 3), (2, 19, 29)):
        assert probe[0, c, y, x].item() == ((31 * y + 17 * x + 13 * y * x + 101 * c) % 257) / 128 - 1
    assert probe.min() >= -1
    assert probe.max() <= 1 + 1 / 128


def test_equal_here(saved: Path) -> None:
    found = TimmModel.from_pretrained(saved).verify()
    assert (found.status, found.largest_difference, dict(found.changed)) == ("equal", 0.0, {})


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_changed_weight_is_different_and_its_part_is_named(saved: Path, part: str) -> None:
    tower = TimmModel.from_pretrained(saved)
    with torch.no_grad():
        (tower.trunk.conv1[0].weight if part == "trunk" else tower.head.proj.weight).mul_(2)
    found = tower.verify()
    assert found.status == "different"
    assert set(found.changed) == {f"weights of {part}"}
    assert found.largest_difference > 0
    assert f"weights of {part}" in str(found)


def test_the_last_bits_are_close_and_not_equal(saved: Path) -> None:
    tower = TimmModel.from_pretrained(saved)
    with torch.no_grad():
        tower.head.proj.weight.mul_(1 + 1e-6)
    found = tower.verify()
    assert found.status == "close"
    assert 0 < found.relative_difference <= found.tolerance
    assert "weights of head" in found.changed


def test_other_weights_with_the_same_numbers_are_named(saved: Path) -> None:
    tower = TimmModel.from_pretrained(saved)
    tower.trunk.bn1.num_batches_tracked += 1
    found = tower.verify()
    assert found.status == "equal"
    assert "weights of trunk" in found.changed


def test_threads_and_versions_that_changed_are_named(saved: Path, tmp_path: Path) -> None:
    tower = TimmModel.from_pretrained(saved)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found = tower.verify()
    finally:
        torch.set_num_threads(threads)
    assert found.changed["threads"] == (str(threads), str(threads + 1))
    assert found.status in ("equal", "close")
    target = tmp_path / "t"
    shutil.copytree(saved, target)
    fingerprint = json.loads((target / "fingerprint.json").read_text())
    fingerprint["made_with"]["timm"] = "0.0.1"
    (target / "fingerprint.json").write_text(json.dumps(fingerprint))
    assert TimmModel.from_pretrained(target).verify().changed["timm"][0] == "0.0.1"


def test_another_dtype_is_different_and_named(saved: Path) -> None:
    found = TimmModel.from_pretrained(saved, dtype=torch.bfloat16).verify()
    assert found.status == "different"
    assert "bfloat16" in str(found)


def test_another_input_size_is_different_and_named(saved: Path) -> None:
    found = TimmModel.from_pretrained(saved, image_size=96).verify()
    assert found.status == "different"
    assert "96" in str(found)


def test_verify_true_raises_on_other_numbers(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    shutil.copytree(saved, target)
    TimmModel.from_pretrained(target, verify=True)
    config = json.loads((target / "config.json").read_text())
    config["pool"] = "max"
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match="different"):
        TimmModel.from_pretrained(target, verify=True)


def test_verify_leaves_modes_and_random_state_alone(saved: Path) -> None:
    tower = TimmModel.from_pretrained(saved).train()
    tower.trunk.layer1.eval()
    modes = [module.training for module in tower.modules()]
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    before = torch.get_rng_state()
    assert tower.verify().status == "equal"
    assert [module.training for module in tower.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in tower.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_is_deterministic_and_of_the_tower_alone() -> None:
    tower = TimmModel("test_resnet", 8)
    first = make_fingerprint(run_probe(tower, 3, [160, 160]), tower, 3, [160, 160])
    torch.manual_seed(99)
    twin = copy.deepcopy(tower)
    assert make_fingerprint(run_probe(twin, 3, [160, 160]), twin, 3, [160, 160]) == first
    json.dumps(first, allow_nan=False)


def test_a_tower_that_gives_nan_is_saved_and_verified(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", custom_head=nn.Linear(96, 8))
    with torch.no_grad():
        tower.head.weight[3].fill_(float("nan"))
        tower.head.bias[4] = float("inf")
    tower.save_pretrained(tmp_path / "t")
    again = TimmModel.from_pretrained(tmp_path / "t", verify=True)
    assert again.verify().status == "equal"
    with torch.no_grad():
        again.head.weight[3].fill_(1.0)
    assert again.verify().status == "different"


class Noisy(torch.nn.Module):
    """A head that draws in eval, by an operation that takes a generator and by some that do not."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        x = x + torch.rand_like(x) + torch.randn(x.shape) + torch.nn.functional.dropout(x, 0.5, training=True)
        return x + torch.nn.functional.rrelu(-x, training=True) + torch.randperm(x.shape[1]) + random.random()


def test_a_probe_draws_what_seed_0_gives_and_takes_no_random_number_from_others() -> None:
    tower = TimmModel("test_resnet", 8, custom_head=Noisy(96, 8)).eval()
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        expected = tower(probe_image(3, [160, 160]))
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    found = run_probe(tower, 3, [160, 160])[""]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(found, expected)
    assert torch.equal(run_probe(tower, 3, [160, 160])[""], found)


def test_torchs_generator_is_never_seeded_during_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads draw from it meanwhile."""

    class Watching(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_rng_state())
            return super().forward(torch.nn.functional.dropout(x, 0.1, training=True))

    seen: list[torch.Tensor] = []
    tower = TimmModel("test_resnet", 8, custom_head=Watching(96, 8))
    state = torch.get_rng_state()
    seen.clear()
    run_probe(tower, 3, [160, 160])
    assert len(seen) == 1
    assert torch.equal(seen[0], state)


def test_a_probe_is_of_the_class_without_autocast() -> None:
    tower = TimmModel("test_resnet", 8).eval()
    expected = run_probe(tower, 3, [160, 160])[""]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run_probe(tower, 3, [160, 160])[""], expected)
    tower.forward = lambda x: x.mean()  # type: ignore[method-assign]
    assert torch.equal(run_probe(tower, 3, [160, 160])[""], expected)
    del tower.forward
    with torch.device("meta"):
        assert torch.equal(run_probe(tower, 3, [160, 160])[""], expected)

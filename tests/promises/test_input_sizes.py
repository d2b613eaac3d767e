"""`image_size` is what timm is told: the outputs are timm's for that size, and the tower comes back at it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from hf_timm_tower import ConfigError, TimmModel, TimmTowerConfig, TowerError
from hf_timm_tower.reader.trunk import BUILD_ERRORS, create_trunk
from hf_timm_tower.trunk_changes import compare_training
from hf_timm_tower.trunk_facts import takes_img_size

from ..class_towers import size_to_test
from ..timm_classes import smallest_of_each_class

SMALL_SWIN = {"depths": (2, 2, 2, 2), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
QUICK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("test_vit", {}),
    ("test_vit", {"dynamic_img_size": True}),
    ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}),
    ("eva02_tiny_patch14_224", {"dynamic_img_size": True, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"strict_img_size": False, **SMALL_SWIN}),
    ("swinv2_tiny_window8_256", {"strict_img_size": False, **SMALL_SWIN}),
    ("test_byobnet", {}),
)


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def sizes_for(name: str) -> list[tuple[int, int]]:
    """The native size or that of the sweeps, a larger one, and one that is not square."""
    side = size_to_test(name) or timm.get_pretrained_cfg(name).input_size[1]
    step = 112 if side % 112 == 0 else 64 if side % 64 == 0 else 32
    return [(side, side), (side + step, side + step), (side, side + step)]


def check_size(name: str, arguments: dict[str, Any], size: tuple[int, int], folder: Path | None) -> bool:
    """Equal to timm, and it comes back; or refused where timm cannot. Returns whether timm can."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    pool = "none" if name.endswith("_enc") else "default"
    try:
        reference = timm.create_model(name, img_size=size, num_classes=0, **arguments)
        with torch.no_grad():
            wanted = shaken(reference)(image)
    except BUILD_ERRORS:
        with pytest.raises(TowerError):
            TimmModel(name, image_size=size, pool=pool, proj="none", model_kwargs=arguments)
        return False
    tower = TimmModel(name, image_size=size, pool=pool, proj="none", model_kwargs=arguments).eval()
    tower.trunk.load_state_dict(reference.state_dict())
    assert tower.config.image_size == list(size)
    with torch.no_grad():
        assert torch.equal(tower(image), wanted)
        if folder is None:
            again = create_trunk(TimmTowerConfig(**json.loads(tower.config.to_json_string()))).eval()
            again.load_state_dict(tower.trunk.state_dict())
            assert not compare_training(tower.trunk, again)
            assert torch.equal(again(image), wanted)
        else:
            tower.save_pretrained(folder)
            again = TimmModel.from_pretrained(folder)
            assert again.config.image_size == list(size)
            assert torch.equal(again(image), wanted)
    return True


@pytest.mark.parametrize(("name", "arguments"), QUICK, ids=str)
def test_the_trunk_is_timm_s_for_the_size(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    done = [check_size(name, arguments, size, tmp_path / str(size)) for size in sizes_for(name)]
    assert sum(done) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_class().values())
def test_every_class_that_takes_a_size_is_timm_s_for_it(name: str) -> None:
    if not takes_img_size(name):
        return
    assert any(check_size(name, {}, size, None) for size in sizes_for(name))


@pytest.mark.parametrize(("name", "arguments"), QUICK, ids=str)
def test_a_size_set_later_comes_back(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    tower = TimmModel(name, pool="default", proj="none", model_kwargs=arguments).eval()
    shaken(tower)
    size = sizes_for(name)[1]
    tower.set_input_size(size)
    image = torch.rand(1, 3, *size)
    tower.save_pretrained(tmp_path / "a")
    again = TimmModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(image), tower(image))
    assert again.config.image_size == list(size)


def check_set_later(name: str) -> None:
    """Another size is refused at once, and then nothing has changed, or the tower can be built again at it."""
    tower = TimmModel(name, pool="none" if name.endswith("_enc") else "default", proj="none").eval()
    shaken(tower.trunk)
    before, size = tower.config.to_dict(), sizes_for(name)[1]
    state = {key: value.clone() for key, value in tower.trunk.state_dict().items()}
    try:
        tower.set_input_size(size)
    except ConfigError:
        assert tower.config.to_dict() == before
        assert all(torch.equal(state[key], value) for key, value in tower.trunk.state_dict().items())
        return
    again = create_trunk(TimmTowerConfig(**json.loads(tower.config.to_json_string()))).eval()
    again.load_state_dict(tower.trunk.state_dict())
    assert not compare_training(tower.trunk, again)
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(again(image), tower.trunk(image))


@pytest.mark.parametrize("name", ["test_resnet", "crossvit_tiny_240", "gmlp_ti16_224"])
def test_a_size_set_later_is_refused_or_can_be_built_again(name: str) -> None:
    check_set_later(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_class().values())
def test_every_class_refuses_a_size_or_can_be_built_again_at_it(name: str) -> None:
    check_set_later(name)


def test_what_timm_cannot_be_built_again_for_is_refused_when_the_size_is_set() -> None:
    tower = TimmModel("crossvit_tiny_240", embed_dim=8, pool="token")
    with pytest.raises(ConfigError, match=r"crossvit_tiny_240 cannot take image_size=\[320, 320\]"):
        tower.set_input_size(320)
    assert tower.config.image_size == [240, 240]


@pytest.mark.parametrize("told", [False, True])
def test_a_dynamic_model_is_wrapped_as_it_was_made(told: bool, tmp_path: Path) -> None:
    size = {"img_size": 96} if told else {}
    model = timm.create_model("test_vit", dynamic_img_size=True, **size)
    grid = model.pos_embed.shape
    tower = TimmModel.from_trunk(model, embed_dim=8).eval()
    assert tower.config.image_size == ([96, 96] if told else [160, 160])
    tower.save_pretrained(tmp_path / "a")
    again = TimmModel.from_pretrained(tmp_path / "a")
    assert again.trunk.pos_embed.shape == grid
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(image), tower(image))


def test_a_dynamic_tower_saved_when_timm_was_not_told_the_size_still_loads(tmp_path: Path) -> None:
    """Configs of before had the size in `image_size` alone, and timm built the trunk for its native one."""
    model = timm.create_model("test_vit", dynamic_img_size=True, num_classes=0).eval()
    tower = TimmModel.from_trunk(model, proj="none").eval()
    tower.save_pretrained(tmp_path / "a")
    stored = json.loads((tmp_path / "a/config.json").read_text())
    del stored["model_args"]["img_size"]
    old = TimmTowerConfig(**{key: value for key, value in stored.items() if key != "auto_map"})
    old.image_size = [96, 96]
    again = create_trunk(old).eval()
    again.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))

"""Every pool with every projection on every kind of trunk: a shape, or a refusal whose offers work."""

from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from hf_timm_tower import ConfigError, TimmModel, TimmTowerConfig
from hf_timm_tower.reader.trunk import create_trunk
from hf_timm_tower.trunk_facts import shapes_of

from ..timm_classes import chosen_part, smallest_of_each_class

WIDTH = 8
POOLS = ("default", "", None, "avg", "max", "token", "map", "catavgmax", "token_avg", "abs_attn", "rot_attn", "none")
PROJECTIONS = ("linear", "mlp", "none", None)
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "CNN": ("test_resnet", {}),
    "ViT": ("test_vit", {}),
    "channels last": ("test_mambaout", {}),
    "hybrid": ("test_coatnet", {}),
    "encoder": ("qwen3_vit_88m_enc", {"depth": 1}),
}
QUICK = (("CNN", None), ("ViT", None))
OTHERS = [(kind, proj) for kind in TRUNKS for proj in PROJECTIONS if kind != "encoder" and (kind, proj) not in QUICK]


def offers(error: Exception) -> list[str]:
    found = str(error).partition("Supported pools: ")[2].rstrip(".")
    return found.split(", ") if found else []


def build(kind: str, pool: str | None, proj: str | None) -> TimmModel:
    name, arguments = TRUNKS[kind]
    width = None if proj == "none" and pool not in ("abs_attn", "rot_attn") else WIDTH * 8
    size = 64 if kind == "encoder" else None
    return TimmModel(name, embed_dim=width, image_size=size, pool=pool, proj=proj, model_kwargs=arguments)


@pytest.mark.parametrize(
    ("kind", "proj"),
    [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in chosen_part(OTHERS))],
)
def test_each_cell_is_a_shape_or_a_refusal_whose_offers_work(kind: str, proj: str | None) -> None:
    built, checked = 0, set[str]()
    for pool in POOLS:
        try:
            tower = build(kind, pool, proj).eval()
        except ConfigError as error:
            offered = offers(error)
            if not offered or pool in offered:
                raise AssertionError(f"{kind}, {pool!r}, {proj!r} is refused with these offers: {offered}") from error
            for other in set(offered) - checked:
                build(kind, other, proj)
            checked |= set(offered)
            continue
        built += 1
        with torch.no_grad():
            given = tower(torch.rand(2, 3, *tower.config.image_size))
        assert given.shape[0] == 2
        unpooled = pool in ("none", None)
        assert (given.dim() > 2) == unpooled, f"{kind}, {pool!r}, {proj!r} gives {tuple(given.shape)}"
        if proj is None or proj in ("linear", "mlp"):
            at = 1 if given.dim() == 4 else -1
            assert tower.config.embed_dim == WIDTH * 8
            assert given.shape[at] == WIDTH * 8 or unpooled
    assert built >= 2


@pytest.mark.slow
def test_a_trunk_that_does_not_pool_says_so_and_its_offer_works() -> None:
    for pool in ("default", ""):
        with pytest.raises(ConfigError, match=r"no pool of its own.*pool='none'") as caught:
            build("encoder", pool, "linear")
        offered = offers(caught.value)
        assert "none" in offered
        for other in offered:
            given = build("encoder", other, "linear").eval()(torch.rand(2, 3, 64, 64))
            assert tuple(given.shape[:: given.dim() - 1]) == (2, WIDTH * 8), other
            assert given.dim() == (3 if other == "none" else 2), other
    assert build("encoder", "none", "linear").config.layout == "NLC"
    with pytest.raises(ConfigError, match="No pool works with proj=None"):
        build("encoder", "default", None)


@pytest.mark.parametrize("pool", ["default", "", "avg"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
def test_the_own_classifier_has_the_width_of_the_embedding(name: str, pool: str) -> None:
    tower = TimmModel(name, embed_dim=24, pool=pool, proj=None).eval()
    native = timm.create_model(name).eval()
    reference = timm.create_model(name, num_classes=24, **({} if pool != "avg" else {"global_pool": "avg"})).eval()
    assert native.num_classes != 24
    reference.load_state_dict(tower.trunk.state_dict())
    image = torch.rand(2, 3, *tower.config.image_size)
    with torch.no_grad():
        assert torch.equal(tower(image), reference(image))


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_class().values())
def test_every_class_projects_with_its_own_classifier(name: str) -> None:
    try:
        tower = TimmModel(name, embed_dim=24, pool="default", proj=None)
    except ConfigError as error:
        if not name.endswith("_enc"):
            raise AssertionError(name) from error
        return
    assert tower.config.embed_dim == 24
    again = create_trunk(tower.config, initialise=False)
    assert shapes_of(again.state_dict()) == shapes_of(tower.trunk.state_dict())


class Head(nn.Module):
    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x if x.dim() == 2 else x.mean(1))


@pytest.mark.parametrize(
    "given",
    [
        {"pool": "avg", "proj": "linear"},
        {"pool": "avg", "proj": "mlp"},
        {"pool": "avg", "custom_head": Head},
        {"pool": "none", "custom_head": Head},
        {"pool": "max", "proj": "linear"},
    ],
    ids=str,
)
def test_a_vit_without_a_class_token_is_built_with_the_tower_s_pool(given: dict[str, Any], tmp_path: Any) -> None:
    arguments = {"class_token": False}
    tower = TimmModel("test_vit", embed_dim=WIDTH, model_kwargs=arguments, **given).eval()
    pool = "" if given["pool"] == "none" else given["pool"]
    reference = timm.create_model("test_vit", class_token=False, global_pool=pool, num_classes=0).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    image = torch.rand(2, 3, 160, 160)
    tower.save_pretrained(tmp_path / "a")
    again = TimmModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(tower.trunk(image), reference(image))
        assert torch.equal(again(image), tower(image))


def test_a_pool_that_needs_the_class_token_is_refused_with_offers() -> None:
    for pool in ("token", "default", "token_avg"):
        with pytest.raises(ConfigError) as caught:
            TimmModel("test_vit", embed_dim=WIDTH, pool=pool, model_kwargs={"class_token": False})
        assert "avg" in offers(caught.value), caught.value
        assert pool not in offers(caught.value)


@pytest.mark.parametrize("name", ["drop_path_rate", "drop_rate", "attn_drop_rate", "patch_drop_rate"])
@pytest.mark.parametrize("rate", [-3, -0.1, 1.5, True, "0.1", [0.1]])
def test_a_rate_that_is_none_is_refused(name: str, rate: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TimmModel("test_vit", embed_dim=WIDTH, model_kwargs={name: rate})
    with pytest.raises(ConfigError, match=name):
        TimmTowerConfig(architecture="test_vit", model_args={name: rate})

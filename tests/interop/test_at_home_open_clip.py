"""At home in open_clip: the same weight keys, the same bits, over trunks, pools and projections."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip.timm_model
import pytest
import torch

from hf_timm_tower import ArgumentError, TimmModel

from ..timm_classes import chosen_part

# In the order in which a failure is easiest to read; the second are larger, and a run takes a sixth of their cells.
TRUNKS = ("test_resnet", "test_convnext", "test_vit", "test_vit3", "mobilenetv3_small_050")
LARGER = ("swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "fastvit_t8", "vit_base_patch16_siglip_224")
POOLS = ("", "avg", "max", "avgmax", "token", "map", "abs_attn", "rot_attn")
PROJECTIONS = ("linear", "mlp", "none", None, "")


def theirs(name: str, embed_dim: int, pool: str, proj: str | None, bias: bool) -> torch.nn.Module | Exception:
    """open_clip's own tower, or what it raises for these arguments."""
    try:
        return open_clip.timm_model.TimmModel(name, embed_dim, pool=pool, proj=proj, proj_bias=bias)
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return error


def size_of(tower: torch.nn.Module) -> tuple[int, int, int]:
    return tuple(tower.trunk.pretrained_cfg["input_size"])


def works(tower: torch.nn.Module | Exception) -> bool:
    """Whether open_clip's tower gives an embedding at all: a matrix, or tokens where its pool leaves them."""
    if isinstance(tower, Exception):
        return False
    try:
        with torch.no_grad():
            return tower.eval()(torch.zeros(1, *size_of(tower))).ndim == 2
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError):
        return False


def cells(name: str) -> list[tuple[str, str | None]]:
    pools = POOLS if name != "vit_base_patch16_siglip_224" else ("", "map", "avg")
    return list(itertools.product(pools, PROJECTIONS))


# --- what open_clip 4 asks, with the callers of 3.3: they are the same lines

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
    "custom_text": True,
}


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`inside(version, **vision)`: open_clip of that version makes a model with our tower in it."""

    def make(version: str, embed_dim: int = 16, **vision: Any) -> Any:
        monkeypatch.setattr(open_clip, "__version__", version)
        monkeypatch.setattr(open_clip.model, "TimmModel", TimmModel)
        config = {**TINY, "embed_dim": embed_dim, "vision_cfg": {**TINY["vision_cfg"], **vision}}
        (tmp_path / "tiny-tower.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-tower.json")
        return open_clip.create_model("tiny-tower")

    return make


def open_parts(tower: TimmModel) -> tuple[int, bool]:
    """How many groups of the trunk train, and whether the head does."""
    trains = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    groups = [group for group in tower.layer_groups() if trains & set(group.parameters)]
    return sum(group.part == "trunk" for group in groups), any(group.part == "head" for group in groups)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.3.0", [(0, True), (1, True), (2, True)]), ("4.2.0.dev0", [(0, False), (0, True), (1, True)])],
)
def test_lock_counts_the_head_where_the_open_clip_that_made_the_tower_does(
    version: str, expected: list[tuple[int, bool]], inside: Callable[..., Any]
) -> None:
    model = inside(version)
    for count, parts in enumerate(expected):
        model.lock_image_tower(unlocked_groups=count, freeze_bn_stats=False)
        assert open_parts(model.visual) == parts
    model.visual.lock(1, head=False)
    assert open_parts(model.visual) == (1, True), "what is said holds"
    outside = TimmModel.from_open_clip(model)
    outside.lock()
    assert open_parts(outside) == (0, True), "outside of open_clip nothing changed"


def test_a_tower_without_a_head_of_its_own_counts_the_trunk_in_open_clip_4_too(inside: Callable[..., Any]) -> None:
    model = inside("4.2.0", embed_dim=64, timm_proj="none")
    model.lock_image_tower(unlocked_groups=1)
    assert open_parts(model.visual) == (1, False)


def test_layer_groups_are_pairs_for_open_clip_4() -> None:
    tower = TimmModel("test_vit", 16, image_size=64)
    pairs, groups = tower.layer_groups(True), tower.layer_groups()
    assert [name for name, _ in pairs] == [group.name for group in groups]
    held = [parameter for _, members in pairs for parameter in members]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in tower.parameters()}
    assert len(held) == len(list(tower.parameters()))


def test_checkpointing_takes_open_clip_4_s_kinds() -> None:
    tower = TimmModel("test_vit", 16, image_size=64)
    tower.set_grad_checkpointing(impl="inline")
    with pytest.warns(UserWarning, match="inline"):
        tower.set_grad_checkpointing(impl="composable")
    assert tower.trunk.grad_checkpointing
    with pytest.raises(ArgumentError, match="impl='other'"):
        tower.set_grad_checkpointing(impl="other")


def equals_open_clip(name: str, pool: str, proj: str | None) -> bool:
    """Weights, embedding and features of ours are those of open_clip's tower; False where that one does not work."""
    bias = proj == "mlp"
    width = 32
    their = theirs(name, width, pool, proj, bias)
    if not works(their):
        return False
    if proj == "none" and pool not in ("abs_attn", "rot_attn"):
        # open_clip takes any embed_dim here and ignores it; ours wants the true one
        width = their(torch.zeros(1, *size_of(their))).shape[1]
    our = TimmModel(name, width, pool=pool, proj=proj, proj_bias=bias).eval()
    assert our.state_dict().keys() == their.state_dict().keys(), (pool, proj)
    our.load_state_dict(their.state_dict(), strict=True)
    image = torch.randn(2, *size_of(their), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(our(image), their(image)), (pool, proj)
        features, intermediates = our.forward_intermediates(image), their.forward_intermediates(image)
    assert torch.equal(features["image_features"], intermediates["image_features"]), (pool, proj)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNKS)
def test_equal_to_open_clip_wherever_open_clip_works(name: str) -> None:
    equal = {cell: equals_open_clip(name, *cell) for cell in cells(name)}
    print(f"{name}: {sum(equal.values())} equal, open_clip itself fails on {[key for key in equal if not equal[key]]}")
    assert equal["avg", "none"]


@pytest.mark.slow
def test_larger_towers_equal_open_clip_s_wherever_open_clip_works() -> None:
    larger = [(name, *cell) for name in LARGER for cell in cells(name)]
    equal = {cell: equals_open_clip(*cell) for cell in chosen_part(larger)}
    print(f"{sum(equal.values())} equal, open_clip itself fails on {[key for key in equal if not equal[key]]}")
    assert any(equal.values())


@pytest.mark.parametrize(
    ("pool", "proj"), [("avg", "linear"), ("avg", "mlp"), ("avg", None), ("rot_attn", ""), ("", "linear")]
)
def test_resnet_tower_equals_open_clip(pool: str, proj: str | None) -> None:
    their = theirs("resnet18", 32, pool, proj, False)
    our = TimmModel("resnet18", 32, pool=pool, proj=proj).eval()
    our.load_state_dict(their.eval().state_dict(), strict=True)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(our(image), their(image))

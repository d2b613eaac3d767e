"""At home in open_clip: the same weight keys, the same bits, over trunks, pools and projections."""

import itertools

import open_clip.timm_model
import pytest
import torch

from hf_timm_tower import TimmModel

# trunk -> arguments that keep it small, in the order in which a failure is easiest to read
TRUNKS = {
    "resnet18": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {},
    "swin_tiny_patch4_window7_224": {},
    "eva02_tiny_patch14_224": {},
    "fastvit_t8": {},
    "vit_base_patch16_siglip_224": {},
    "mobilenetv3_small_050": {},
}
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


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNKS)
def test_equal_to_open_clip_wherever_open_clip_works(name: str) -> None:
    equal, not_theirs = [], []
    for pool, proj in cells(name):
        bias = proj == "mlp"
        width = 32
        probe = theirs(name, width, pool, proj, bias)
        if proj == "none" and works(probe) and pool not in ("abs_attn", "rot_attn"):
            # open_clip takes any embed_dim here and ignores it; ours wants the true one
            width = probe(torch.zeros(1, *size_of(probe))).shape[1]
        their = theirs(name, width, pool, proj, bias)
        if not works(their):
            not_theirs.append((pool, proj))
            continue
        our = TimmModel(name, width, pool=pool, proj=proj, proj_bias=bias).eval()
        assert our.state_dict().keys() == their.state_dict().keys(), (pool, proj)
        our.load_state_dict(their.state_dict(), strict=True)
        image = torch.randn(2, *size_of(their), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(our(image), their(image)), (pool, proj)
            features, intermediates = our.forward_intermediates(image), their.forward_intermediates(image)
        assert torch.equal(features["image_features"], intermediates["image_features"]), (pool, proj)
        equal.append((pool, proj))
    print(f"{name}: {len(equal)} equal, open_clip itself fails on {not_theirs}")
    assert ("avg", "none") in equal


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

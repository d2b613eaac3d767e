"""Towers in half precision have the buffers that timm gives a model that is cast, in both faces."""

import copy
from pathlib import Path

import pytest
import timm
import timm.data
import torch
import torch.nn as nn

from hf_timm_tower import TimmModel, TimmTowerModel
from hf_timm_tower.reader.trunk import buffers_as_timm

from ..timm_classes import chosen_turn, smallest_of_each_class

# Trunks that timm keeps tables for outside the state dict, in floating point: RoPE with and without a cache of sines,
# with learned frequencies (mixed), DINOv3's periods.
QUICK = (
    ("vit_small_patch16_dinov3", {"depth": 2}),
    ("eva02_tiny_patch14_224", {"depth": 2}),
    ("eva02_tiny_patch14_224", {"depth": 2, "dynamic_img_size": True}),
    ("vit_small_patch16_rope_mixed_224", {"depth": 2}),
)
HALVES = (torch.bfloat16, torch.float16)


def computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point buffers that are in no state dict."""
    stored = module.state_dict().keys()
    return {
        name: buffer for name, buffer in module.named_buffers() if name not in stored and buffer.is_floating_point()
    }


def assert_same_buffers(ours: nn.Module, reference: nn.Module) -> None:
    found, wanted = computed_buffers(ours), computed_buffers(reference)
    assert wanted, "this trunk has no such buffers, so it shows nothing"
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in wanted.items()}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def check_half(name: str, arguments: dict[str, object], dtype: torch.dtype, folder: Path) -> None:
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    reference.to(dtype)
    built = copy.deepcopy(reference)  # ConViT computes its table anew when it first runs
    image = torch.rand(1, *timm.data.resolve_model_data_config(reference)["input_size"]).to(dtype)
    with torch.no_grad():
        wanted = reference(image)
    pool = "default" if wanted.ndim == 2 else "none"  # a few trunks give their tokens as they are
    tower = TimmModel(name, pool=pool, proj="none", model_kwargs=arguments).eval()
    tower.trunk.load_state_dict(state)

    tower.save_pretrained(folder / "full")
    tower.to(dtype).save_pretrained(folder / "half")
    for loaded in (
        TimmModel.from_pretrained(folder / "half"),
        TimmModel.from_pretrained(folder / "full", dtype=dtype),
        TimmModel.from_pretrained(folder / "full").to(dtype),
        TimmTowerModel.from_pretrained(folder / "half"),
        TimmTowerModel.from_pretrained(folder / "full", dtype=dtype),
    ):
        assert_same_buffers(loaded.trunk, built)
        with torch.no_grad():
            given = loaded(image)
        assert torch.equal(given if isinstance(loaded, TimmModel) else given.pooler_output, wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "arguments"), QUICK, ids=str)
def test_a_half_tower_has_timm_s_buffers(
    name: str, arguments: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    check_half(name, arguments, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_class().values())
def test_every_class_keeps_its_buffers_when_it_is_cast(name: str, tmp_path: Path) -> None:
    """Buffers by themselves for every class; those that have any, and are not
    too large for this stage (gemma4 is), are saved and loaded as well."""
    for dtype in chosen_turn(HALVES, 2):
        cast = timm.create_model(name, num_classes=0).to(dtype)
        ours = timm.create_model(name, num_classes=0)
        full = {key: value.float() if value.is_floating_point() else value for key, value in cast.state_dict().items()}
        ours.load_state_dict(full, assign=True)
        for parameter in (*ours.parameters(), *ours.buffers()):
            if parameter.is_floating_point() and id(parameter) not in {id(b) for b in computed_buffers(ours).values()}:
                parameter.data = parameter.data.to(dtype)
        buffers_as_timm(ours, dtype)
        assert {key: value.dtype for key, value in ours.named_buffers()} == {
            key: value.dtype for key, value in cast.named_buffers()
        }
        if computed_buffers(cast):
            assert_same_buffers(ours, cast)
            if sum(parameter.numel() for parameter in cast.parameters()) < 100_000_000:
                check_half(name, {}, dtype, tmp_path / str(dtype))


def test_one_buffer_that_several_modules_hold_stays_one_and_weights_stay_theirs() -> None:
    shared = torch.rand(3)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for part in module:
        part.register_buffer("table", shared, persistent=False)
    weights = dict(module.state_dict(keep_vars=True))
    buffers_as_timm(module, torch.bfloat16)
    assert module[0].table is module[1].table
    assert module[0].table.dtype == torch.bfloat16
    after = module.state_dict(keep_vars=True)
    assert all(after[key] is weights[key] and after[key].dtype != torch.bfloat16 for key in weights)

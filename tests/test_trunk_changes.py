"""What was done to a trunk after it was built is found, saved where timm can be told, and else refused in its words."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import timm.layers
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune

from hf_timm_tower import ConfigError, TimmModel, TowerError
from hf_timm_tower.reader.trunk import create_trunk
from hf_timm_tower.trunk_changes import compare_training, what_changed

from .class_towers import size_to_test
from .timm_classes import smallest_of_each_class


def vit(**arguments: object) -> TimmModel:
    return TimmModel("test_vit", embed_dim=8, pool="token", **arguments)


def without_rate(tower: TimmModel) -> None:
    tower.trunk.patch_drop.prob = 0.0


def with_patch_drop(tower: TimmModel) -> None:
    tower.trunk.patch_drop = timm.layers.PatchDropout(0.5, num_prefix_tokens=1)


def with_another_path(tower: TimmModel) -> None:
    tower.trunk.blocks[1].drop_path1.drop_prob = 0.7


def without_scaling(tower: TimmModel) -> None:
    tower.trunk.blocks[1].drop_path2.scale_by_keep = False


def with_dropout(tower: TimmModel) -> None:
    tower.trunk.blocks[0].attn.attn_drop.p = 0.3


def ordered(tower: TimmModel) -> None:
    tower.trunk.patch_drop.ordered = True


def a_layer_more(tower: TimmModel) -> None:
    tower.trunk.blocks.append(nn.Dropout(0.5))


def epsilon(tower: TimmModel) -> None:
    tower.trunk.norm.eps = 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_rate, r"patch_drop \(PatchDropout\): prob is 0.0, built again 0.5"),
        (with_patch_drop, "patch_drop"),
        (with_another_path, "drop_prob is 0.7"),
        (without_scaling, "scale_by_keep is False"),
        (with_dropout, "p is 0.3"),
        (ordered, "ordered is True"),
        (a_layer_more, "is Dropout, built again not there"),
    ],
)
def test_what_acts_in_training_alone_is_not_lost(
    change: Callable[[TimmModel], None], said: str, tmp_path: Path
) -> None:
    tower = vit(patch_drop=None if change is with_patch_drop else 0.5, drop_path=0.2)
    change(tower)
    again = create_trunk(tower.config)
    assert compare_training(tower.trunk, again)
    with pytest.raises(TowerError, match=said):
        tower.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_rates_given_when_the_tower_is_built_come_back(tmp_path: Path) -> None:
    arguments = {"attn_drop_rate": 0.1, "proj_drop_rate": 0.2, "pos_drop_rate": 0.3}
    tower = vit(patch_drop=0.5, drop_path=0.2, model_kwargs=arguments)
    tower.save_pretrained(tmp_path / "a")
    again = TimmModel.from_pretrained(tmp_path / "a")
    assert compare_training(tower.trunk, again.trunk) == compare_training(again.trunk, tower.trunk) == []
    assert again.trunk.patch_drop.prob == 0.5


def test_how_it_runs_and_what_the_user_wrote_beside_are_no_changes() -> None:
    tower = vit()
    again = create_trunk(tower.config)
    tower.trunk.set_grad_checkpointing(True)
    tower.trunk.eval()
    tower.trunk.blocks[0].attn.fused_attn = False
    tower.trunk.note = "mine"
    tower.trunk.blocks[0].seen = 3
    assert not compare_training(tower.trunk, again)


def test_synchronised_batchnorm_is_batchnorm() -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    again = create_trunk(tower.config)
    assert not compare_training(timm.layers.convert_sync_batchnorm(tower.trunk), again)
    tower.trunk.bn1.momentum = 0.3
    assert compare_training(tower.trunk, again) == [
        f"bn1 ({type(tower.trunk.bn1).__name__}): momentum is 0.3, built again 0.1"
    ]


def check_fresh(name: str) -> None:
    pool = "none" if name.endswith("_enc") else "default"
    tower = TimmModel(name, pool=pool, proj="none", image_size=size_to_test(name))
    again = create_trunk(tower.config, initialise=False)
    assert compare_training(tower.trunk, again) == compare_training(again, tower.trunk) == []
    image = torch.rand(2, 3, *tower.config.image_size)
    tower(image)
    with torch.no_grad():
        tower.eval()(image)
    assert not compare_training(tower.trunk, again)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_coatnet", "test_efficientnet", "levit_128s"])
def test_a_tower_that_was_only_run_is_as_it_was_built(name: str) -> None:
    check_fresh(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_class().values())
def test_a_tower_of_every_class_that_was_only_run_is_as_it_was_built(name: str) -> None:
    check_fresh(name)


# --- refusals


def frozen(tower: TimmModel) -> None:
    timm.utils.freeze(tower, ["trunk.conv1", "trunk.bn1"])


def compiled(tower: TimmModel) -> None:
    tower.trunk = torch.compile(tower.trunk, backend="eager")


def block_compiled(tower: TimmModel) -> None:
    tower.trunk.layer1[0] = torch.compile(tower.trunk.layer1[0], backend="eager")


def adapted(tower: TimmModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer1.0.conv1"]), tower.trunk)


def parametrized(tower: TimmModel) -> None:
    parametrizations.weight_norm(tower.trunk.layer1[0].conv1)


def pruned(tower: TimmModel) -> None:
    prune.l1_unstructured(tower.trunk.layer1[0].conv1, "weight", 0.3)


def exchanged(tower: TimmModel) -> None:
    tower.trunk.act1 = nn.PReLU()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (frozen, r"BatchNorm was exchanged.*trunk\.bn1.*timm\.utils\.unfreeze"),
        (compiled, r"the trunk is compiled.*_orig_mod"),
        (block_compiled, r"trunk\.layer1\.0 is compiled"),
        (adapted, r"adapters of peft.*merge_and_unload"),
        (parametrized, r"parametrized.*trunk\.layer1\.0\.conv1.*remove_parametrizations"),
        (pruned, r"pruned.*trunk\.layer1\.0\.conv1.*prune\.remove"),
        (exchanged, r"act1 is PReLU, built again.*_create_trunk"),
    ],
)
def test_a_refusal_says_what_was_done_and_the_way_out(
    change: Callable[[TimmModel], None], said: str, tmp_path: Path
) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    change(tower)
    with pytest.raises(ConfigError, match=said) as caught:
        tower.save_pretrained(tmp_path / "a")
    assert ".tower-save-" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_blocks_that_timm_cannot_be_told_to_fuse_are_refused_by_name(tmp_path: Path) -> None:
    tower = TimmModel("repvgg_a0", embed_dim=8)
    tower.trunk = timm.utils.reparameterize_model(tower.trunk)
    with pytest.raises(ConfigError, match=r"fused for inference.*trunk\.stem"):
        tower.save_pretrained(tmp_path / "a")


@pytest.mark.parametrize("name", ["fastvit_t8", "lcnetv2_small"])
def test_blocks_that_timm_can_be_told_to_fuse_come_back_fused(name: str, tmp_path: Path) -> None:
    tower = TimmModel(name, embed_dim=8).eval()
    tower.trunk = timm.utils.reparameterize_model(tower.trunk)
    image = torch.rand(1, 3, *tower.config.image_size)
    tower.save_pretrained(tmp_path / "a")
    again = TimmModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(image), tower(image))
    assert len(again.trunk.state_dict()) == len(tower.trunk.state_dict()) < len(TimmModel(name, 8).trunk.state_dict())


def test_tables_that_were_cast_down_and_up_are_named() -> None:
    trunk = timm.create_model("eva02_tiny_patch14_224", depth=1)
    again = timm.create_model("eva02_tiny_patch14_224", depth=1)
    trunk.bfloat16().float()
    assert "cast down and up" in what_changed(trunk, again)
    for part in trunk.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    assert "cast down and up" not in what_changed(trunk, again)


# --- used before


def test_layers_whose_forward_is_another_method_of_their_own_come_back(tmp_path: Path) -> None:
    """FasterNet's choose one when they are built."""
    tower = TimmModel("fasternet_t0", embed_dim=8, image_size=64)
    assert any("forward" in vars(part) for part in tower.trunk.modules())
    tower.save_pretrained(tmp_path / "tower")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(TimmModel.from_pretrained(tmp_path / "tower")(images), tower.eval()(images))


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformerv2_s0", "efficientformer_l1"])
def test_a_forward_in_eval_mode_before_does_not_matter(name: str) -> None:
    model = timm.create_model(name).eval()
    image = torch.rand(1, 3, 224, 224)
    model(image)  # with gradients: attention biases are kept with their graph
    tower = TimmModel.from_trunk(model, embed_dim=8).eval()
    before = tower(image)
    tower.set_input_size(224)
    assert torch.equal(tower(image), before)

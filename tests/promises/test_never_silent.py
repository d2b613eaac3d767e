"""Never silently wrong: a tower that is not what its user believes is an error, or the belief is made true."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import load, load_file, save_file

import hf_timm_tower.heads.registry as registry
from hf_timm_tower import (
    ArgumentError,
    ConfigError,
    HeadError,
    TimmModel,
    TimmTowerConfig,
    TowerError,
    WeightsError,
    register_head,
)
from hf_timm_tower.reader.config import ATTENTION_POOLS
from hf_timm_tower.trunk_facts import offered_pools


class Head(nn.Module):
    """The head of the documentation: a class of one's own, built by hand, which stores no arguments."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.linear(x))


class SameKeysOtherForward(Head):
    """The keys and shapes of `Head`, another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class NotTraceable(nn.Module):
    """Looks at values: no graph holds it."""

    def __init__(self, in_features: int, embed_dim: int, cut: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if float(y.mean()) > self.cut else -2 * y


@pytest.fixture
def registered_names() -> Iterator[dict[str, Any]]:
    """The registry, as it was again after the test."""
    before = dict(registry.HEAD_FACTORIES)
    yield registry.HEAD_FACTORIES
    registry.HEAD_FACTORIES.clear()
    registry.HEAD_FACTORIES.update(before)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet with the documentation's head; tests that change files copy it first."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("saved") / "tower"
    TimmModel("test_resnet", embed_dim=8, custom_head=Head).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test may spoil."""
    target = tmp_path / "tower"
    shutil.copytree(saved, target)
    return target


def run(tower: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tower.eval()(image)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def drop_keys(folder: Path, *, starts: str) -> int:
    """Take every weight whose key starts so out of files and index, as if it had never been there."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    dropped = 0
    for name in sorted(set(index["weight_map"].values())):
        tensors = load((folder / name).read_bytes())
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(starts)}
        dropped += len(tensors) - len(kept)
        save_file(kept, folder / name, metadata={"format": "pt"})
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if not key.startswith(starts)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return dropped


# --- the head is dropped


def test_head_dropped_its_weights_are_asked_for(folder: Path) -> None:
    assert drop_keys(folder, starts="head.") == 2
    for strict in (True, False):
        with pytest.raises(WeightsError, match=r"head\.linear\.weight"):
            TimmModel.from_pretrained(folder, strict=strict)


def test_head_dropped_from_the_config_is_not_replaced_by_a_projection(folder: Path) -> None:
    # what the plain mixin does: the module becomes null, and another head with random weights takes its place
    edit_config(folder, head=None, proj="linear")
    for strict in (True, False):
        with pytest.raises(TowerError):
            TimmModel.from_pretrained(folder, strict=strict)
    edit_config(folder, head=None, proj="none", embed_dim=None)
    with pytest.raises(WeightsError, match=r"head\.linear"):
        TimmModel.from_pretrained(folder)


def test_head_comes_back_and_not_another(saved: Path, image: torch.Tensor) -> None:
    tower = TimmModel.from_pretrained(saved)
    weights = load_file(saved / "head.safetensors")
    with torch.no_grad():
        features = tower.trunk(image)
        expected = torch.relu(features @ weights["head.linear.weight"].T + weights["head.linear.bias"])
    torch.testing.assert_close(run(tower, image), expected)


# --- the head is of another class


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_head_of_another_class_with_the_same_keys_is_refused(saved: Path, dtype: torch.dtype | None) -> None:
    with pytest.raises(HeadError, match="SameKeysOtherForward"):
        TimmModel.from_pretrained(saved, custom_head=SameKeysOtherForward(96, 8), dtype=dtype)
    tower = TimmModel.from_pretrained(saved, custom_head=Head, dtype=dtype)
    assert isinstance(tower.head, Head)


def test_head_of_another_class_is_not_taken_in_silence_where_the_fingerprint_is_gone(folder: Path) -> None:
    (folder / "fingerprint.json").unlink()
    with pytest.raises(HeadError, match="SameKeysOtherForward"):
        TimmModel.from_pretrained(folder, custom_head=SameKeysOtherForward(96, 8))


def test_head_of_another_class_with_other_keys_is_refused(saved: Path) -> None:
    with pytest.raises(WeightsError, match=r"head\.(linear\.)?weight"):
        TimmModel.from_pretrained(saved, custom_head=nn.Linear(96, 8))
    with pytest.raises(WeightsError, match=r"head\.linear\.weight"):
        TimmModel.from_pretrained(saved, custom_head=Head(96, 9))


def test_head_of_another_class_under_the_same_registered_name_is_refused(
    registered_names: dict[str, Any], tmp_path: Path
) -> None:
    register_head("tests/same-name")(type("First", (NotTraceable,), {}))
    TimmModel("test_resnet", embed_dim=8, custom_head="tests/same-name").save_pretrained(tmp_path / "t")
    TimmModel.from_pretrained(tmp_path / "t")
    del registered_names["tests/same-name"]
    other = type("First", (NotTraceable,), {"forward": lambda self, x: 3 * self.linear(x)})
    register_head("tests/same-name")(other)
    with pytest.raises(HeadError, match=r"First|tests/same-name"):
        TimmModel.from_pretrained(tmp_path / "t")


def test_subclass_of_the_same_name_that_makes_another_head_is_refused(tmp_path: Path) -> None:
    def make(head: type[nn.Module]) -> type[TimmModel]:
        return type("Mine", (TimmModel,), {"_create_head": lambda self, width, dim: head(width, dim)})

    make(Head)("test_resnet", embed_dim=8).save_pretrained(tmp_path / "t")
    make(Head).from_pretrained(tmp_path / "t")
    with pytest.raises(TowerError):
        make(SameKeysOtherForward).from_pretrained(tmp_path / "t")


# --- embed_dim


def test_wrong_embed_dim_of_a_custom_head_is_an_error_at_construction() -> None:
    with pytest.raises(HeadError, match=r"embed_dim=7.*width 8"):
        TimmModel("test_resnet", embed_dim=7, custom_head=Head(96, 8))
    assert TimmModel("test_resnet", custom_head=Head(96, 8)).config.embed_dim == 8


def test_wrong_embed_dim_without_a_projection_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"embed_dim=7.*96"):
        TimmModel("test_resnet", embed_dim=7, proj="none")
    assert TimmModel("test_resnet", proj="none").config.embed_dim == 96


def test_wrong_embed_dim_in_the_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, embed_dim=9)
    with pytest.raises(TowerError, match="embed_dim"):
        TimmModel.from_pretrained(folder)
    TimmModel("test_resnet", embed_dim=8).save_pretrained(tmp_path / "linear")
    edit_config(tmp_path / "linear", embed_dim=9)
    with pytest.raises(ConfigError, match="embed_dim"):
        TimmModel.from_pretrained(tmp_path / "linear")
    (tmp_path / "linear" / "fingerprint.json").unlink()
    with pytest.raises(WeightsError, match=r"head\.proj\.weight"):
        TimmModel.from_pretrained(tmp_path / "linear")


@pytest.mark.parametrize("head", [None, Head], ids=["linear", "custom"])
def test_wrong_embed_dim_after_the_head_was_replaced_does_not_stay_in_the_config(
    head: Any, tmp_path: Path, image: torch.Tensor
) -> None:
    tower = TimmModel("test_resnet", embed_dim=8, custom_head=head)
    tower.head = nn.Linear(96, 5)
    tower.save_pretrained(tmp_path / "t")
    again = TimmModel.from_pretrained(tmp_path / "t")
    assert torch.equal(run(again, image), run(tower, image))
    assert again.config.embed_dim == 5
    assert again.config.hidden_size == 5


# --- sizes of trunk, config and transform


FIXED_VIT = ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)})
SIZES = [("test_resnet", None), ("test_vit", None), ("test_mambaout", None), FIXED_VIT, SWIN]


def sizes_of(tower: TimmModel) -> tuple[list[int], list[int]]:
    """What the transform makes of a photograph, and what the config says: [height, width]."""
    made = tower.transform()(Image.new("RGB", (300, 200)))
    return list(made.shape[1:]), list(tower.config.image_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kwargs"), SIZES, ids=[name for name, _ in SIZES])
def test_image_size_of_trunk_config_and_transform_is_one(
    name: str, kwargs: dict[str, Any] | None, tmp_path: Path
) -> None:
    towers = [TimmModel(name, embed_dim=8, image_size=(128, 96), model_kwargs=kwargs)]
    towers.append(TimmModel(name, embed_dim=8, model_kwargs=kwargs))
    towers[1].set_input_size((128, 96))
    for number, tower in enumerate(towers):
        tower.save_pretrained(tmp_path / str(number))
        back = TimmModel.from_pretrained(tmp_path / str(number))
        for one in (tower, back):
            assert sizes_of(one) == ([128, 96], [128, 96])
        x = torch.randn(2, 3, 128, 96)
        assert torch.equal(run(back, x), run(tower, x))


def test_image_size_changes_the_trunk_and_not_only_the_record() -> None:
    name, kwargs = FIXED_VIT
    tower = TimmModel(name, embed_dim=8, image_size=96, model_kwargs=kwargs).eval()
    assert tower.trunk.patch_embed.img_size == (96, 96)
    assert tower.trunk.pos_embed.shape[1] == 1 + 6 * 6
    assert tower(torch.randn(1, 3, 96, 96)).shape == (1, 8)
    with pytest.raises(AssertionError, match="224"):  # timm's own check of what an image must be
        tower(torch.randn(1, 3, 224, 224))


def test_image_size_changed_by_hand_in_the_file_of_a_fixed_trunk_is_refused(tmp_path: Path) -> None:
    TimmModel("test_vit", embed_dim=8).save_pretrained(tmp_path / "t")
    edit_config(tmp_path / "t", image_size=[96, 96])
    with pytest.raises(ConfigError, match="image_size"):
        TimmModel.from_pretrained(tmp_path / "t")
    (tmp_path / "t" / "fingerprint.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json and config\.json disagree: size"):
        TimmModel.from_pretrained(tmp_path / "t")
    (tmp_path / "t" / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="pos_embed"):
        TimmModel.from_pretrained(tmp_path / "t")


def test_image_size_changed_by_hand_in_the_config_does_not_part_trunk_and_transform(tmp_path: Path) -> None:
    tower = TimmModel("test_vit", embed_dim=8)
    tower.config.image_size = [96, 96]
    with pytest.raises(TowerError):
        tower.save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_image_size_given_at_load_reaches_trunk_config_and_transform(tmp_path: Path) -> None:
    TimmModel("test_vit", embed_dim=8).save_pretrained(tmp_path / "t")
    tower = TimmModel.from_pretrained(tmp_path / "t", image_size=96)
    assert sizes_of(tower) == ([96, 96], [96, 96])
    assert tower.trunk.patch_embed.img_size == (96, 96)


def test_size_that_the_head_does_not_take_is_refused_and_the_tower_is_as_before(image: torch.Tensor) -> None:
    tower = TimmModel("test_vit", pool="none", custom_head=nn.Sequential(nn.Flatten(), nn.Linear(101 * 64, 8)))
    before = run(tower, image)
    with pytest.raises(TowerError):
        tower.set_input_size(96)
    assert torch.equal(run(tower, image), before)
    assert sizes_of(tower) == ([160, 160], [160, 160])


@pytest.mark.parametrize(("name", "kwargs"), [SWIN, FIXED_VIT], ids=["swin", "vit"])
def test_size_that_the_trunk_does_not_take_leaves_the_tower_as_before(name: str, kwargs: dict[str, Any]) -> None:
    tower = TimmModel(name, embed_dim=8, model_kwargs=kwargs)
    x = torch.randn(1, 3, 224, 224)
    before, config = run(tower, x), tower.config.to_dict()
    with pytest.raises(ConfigError, match="image_size"):
        tower.set_input_size(1)
    assert tower.config.to_dict() == config
    assert torch.equal(run(tower, x), before)


def test_size_under_an_attention_pool_is_honoured_or_refused(tmp_path: Path) -> None:
    tower = TimmModel("test_convnext", embed_dim=8, pool="abs_attn")
    try:
        tower.set_input_size(96)
    except TowerError:
        assert sizes_of(tower) == ([160, 160], [160, 160])
        tower.save_pretrained(tmp_path / "t")
        return
    x = torch.randn(1, 3, 96, 96)
    tower.save_pretrained(tmp_path / "t")
    assert torch.equal(run(TimmModel.from_pretrained(tmp_path / "t"), x), run(tower, x))


# --- BatchNorm


def statistics(tower: nn.Module, under: str = "trunk.") -> dict[str, torch.Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in tower.named_buffers()
        if name.startswith(under) and ("running" in name or "num_batches" in name)
    }


def moved(tower: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    now = dict(tower.named_buffers())
    return [name for name, value in before.items() if not torch.equal(now[name], value)]


@pytest.mark.parametrize("through", ["tower", "parent", "copy", "trunk", "eval_and_back", "set_input_size"])
def test_batchnorm_does_not_drift_under_lock_through_train(through: str, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    tower.lock(freeze_bn_stats=True)
    if through == "copy":
        tower = copy.deepcopy(tower)
    if through == "set_input_size":
        tower.set_input_size(96)
    before = statistics(tower)
    assert before
    if through == "parent":
        nn.ModuleDict({"vision": tower}).train()
    elif through == "trunk":
        tower.trunk.train()
    elif through == "eval_and_back":
        tower.eval().train()
    else:
        tower.train()
    tower(image)
    assert moved(tower, before) == []
    assert tower.head.training


def test_batchnorm_of_the_unlocked_part_and_of_the_head_goes_on(image: torch.Tensor) -> None:
    head = nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8))
    tower = TimmModel("test_resnet", custom_head=head)
    tower.lock(1, freeze_bn_stats=True)
    tower.train()
    before, of_head = statistics(tower), statistics(tower, "head.")
    trainable = {name.rpartition(".")[0] for name, p in tower.trunk.named_parameters() if p.requires_grad}
    assert trainable, "one group is open"
    tower(image)
    assert len(moved(tower, of_head)) == 3
    open_buffers = {name for name in before if name.removeprefix("trunk.").rpartition(".")[0] in trainable}
    assert set(moved(tower, before)) == open_buffers


def test_batchnorm_without_the_argument_moves_as_torch_does(image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    tower.lock(freeze_bn_stats=True)
    tower.lock(freeze_bn_stats=False)
    before = statistics(tower)
    tower.train()(image)
    assert len(moved(tower, before)) == len(before)


def test_locked_tower_keeps_all_its_keys_and_comes_back(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    keys = list(tower.state_dict())
    tower.lock(freeze_bn_stats=True)
    assert list(tower.state_dict()) == keys
    assert any(key.endswith("num_batches_tracked") for key in keys)
    tower.save_pretrained(tmp_path / "t")
    assert torch.equal(run(TimmModel.from_pretrained(tmp_path / "t"), image), run(tower, image))


# --- weights left random


@pytest.mark.parametrize("starts", ["trunk.conv1.", "trunk.layer1.0.bn1.running_mean", "trunk."])
@pytest.mark.parametrize("strict", [True, False])
def test_weights_left_random_by_missing_keys_are_an_error(folder: Path, starts: str, strict: bool) -> None:
    dropped = drop_keys(folder, starts=starts)
    assert dropped >= 1
    with pytest.raises(TowerError) as caught:
        TimmModel.from_pretrained(folder, strict=strict)
    assert str(dropped) in str(caught.value)
    assert starts in str(caught.value)


def test_weights_left_random_by_a_deeper_config_are_an_error(tmp_path: Path) -> None:
    TimmModel("test_vit", embed_dim=8).save_pretrained(tmp_path / "t")
    edit_config(tmp_path / "t", model_args={"depth": 9})
    with pytest.raises(WeightsError, match=r"trunk\.blocks\."):
        TimmModel.from_pretrained(tmp_path / "t", strict=False)


def test_weights_left_random_by_another_architecture_are_an_error(folder: Path) -> None:
    edit_config(folder, architecture="test_vit")
    with pytest.raises(TowerError):
        TimmModel.from_pretrained(folder)


def test_every_tensor_of_a_loaded_tower_is_the_file_s(saved: Path) -> None:
    tower = TimmModel.from_pretrained(saved)
    files = load_file(saved / "trunk.safetensors") | load_file(saved / "head.safetensors")
    state = tower.state_dict()
    assert state.keys() == files.keys()
    assert all(torch.equal(state[key], files[key]) for key in files)


def test_surplus_weights_are_an_error_and_only_strict_false_lets_them_pass_with_a_warning(folder: Path) -> None:
    tensors = load((folder / "head.safetensors").read_bytes())
    save_file(tensors | {"head.extra": torch.zeros(3)}, folder / "head.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["head.extra"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"head\.extra"):
        TimmModel.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"head\.extra"):
        TimmModel.from_pretrained(folder, strict=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_weights_of_another_kind_of_number_are_not_taken_in_silence(folder: Path, dtype: torch.dtype) -> None:
    tensors = load((folder / "head.safetensors").read_bytes())
    changed = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(changed, folder / "head.safetensors", metadata={"format": "pt"})
    if dtype.is_floating_point:
        assert TimmModel.from_pretrained(folder).head.linear.weight.dtype == dtype
    else:
        with pytest.raises(TowerError, match=r"head\.linear"):
            TimmModel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "int64", "float31", 32])
def test_dtype_that_would_ruin_the_weights_is_refused(saved: Path, dtype: Any) -> None:
    with pytest.raises(TowerError, match="dtype"):
        TimmModel.from_pretrained(saved, dtype=dtype)


# --- unknown keywords


def test_unknown_keyword_of_the_constructor_is_an_error() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        TimmModel("test_resnet", embed_dims=8)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
def test_unknown_model_kwarg_is_an_error(name: str) -> None:
    with pytest.raises(ArgumentError, match="drop_path_raet"):
        TimmModel(name, embed_dim=8, model_kwargs={"drop_path_raet": 0.1})


@pytest.mark.parametrize("keyword", ["drop_path_raet", "init_values"])
def test_model_kwarg_that_is_none_is_not_dropped_in_silence(keyword: str) -> None:
    # timm's create_model takes arguments that are None away before any model sees them: no LayerScale asked for,
    # LayerScale given
    with pytest.raises(TowerError, match=keyword):
        TimmModel("vit_tiny_patch16_224", 8, model_kwargs={"depth": 1, keyword: None})


def test_unknown_keyword_of_from_pretrained_is_an_error(saved: Path) -> None:
    for keyword in ({"poool": "avg"}, {"torch_dtype": torch.float32}, {"pool": "max"}):
        with pytest.raises(TypeError, match=next(iter(keyword))):
            TimmModel.from_pretrained(saved, **keyword)  # type: ignore[arg-type]


def test_unknown_keyword_of_save_pretrained_is_an_error(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    with pytest.raises(ArgumentError, match="safe_serialization"):
        tower.save_pretrained(tmp_path / "t", safe_serialization=False)
    with pytest.raises(ArgumentError, match="poool"):
        tower.save_pretrained(tmp_path / "t", poool=None)
    assert not (tmp_path / "t").exists()


def test_unknown_key_of_the_config_is_an_error_with_near_names(folder: Path) -> None:
    edit_config(folder, image_sise=96)
    with pytest.raises(ConfigError, match=r"image_sise=96.*image_size"):
        TimmModel.from_pretrained(folder)


@pytest.mark.parametrize("ignored", [{"drop": 0.5}, {"proj_bias": True}, {"proj": "mlp"}], ids=str)
def test_argument_of_the_projection_beside_a_custom_head_is_not_ignored(ignored: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(ignored))):
        TimmModel("test_resnet", embed_dim=8, custom_head=Head, **ignored)


# --- pools that are taken and ignored


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_offered_pool_is_another_vector(name: str, image: torch.Tensor) -> None:
    seen: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for pool in offered_pools(TimmTowerConfig(architecture=name, proj="none")):
        tower = TimmModel(name, pool=pool, proj="none")
        if pool in ("default", "fast", *ATTENTION_POOLS) or pool.removeprefix("fast") in seen:
            continue  # other names of the same; pools with weights of their own
        for key, value in tower.state_dict().items():
            weights.setdefault(key, value)
        tower.load_state_dict({key: weights[key] for key in tower.state_dict()})
        seen[pool] = run(tower, image)
    assert len(seen) >= 3
    names = sorted(seen)
    for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        same = seen[first].shape == seen[second].shape and torch.equal(seen[first], seen[second])
        assert not same, f"{name}: pool={first!r} and {second!r} are one pool under two names"


def test_pool_that_the_trunk_takes_and_ignores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pool='map'.*Supported pools: .*avg"):
        TimmModel("test_resnet", embed_dim=8, pool="map")
    # reset_classifier of timm's levit takes the name and keeps its average
    with pytest.raises(ConfigError, match="Supported pools"):
        TimmModel("levit_128s", embed_dim=8, pool="max")


# --- changed after construction, then saved


def test_head_replaced_after_construction_comes_back(tmp_path: Path, image: torch.Tensor) -> None:
    for number, first in enumerate((None, Head)):
        tower = TimmModel("test_resnet", embed_dim=8, custom_head=first)
        tower.head = SameKeysOtherForward(96, 8)
        tower.save_pretrained(tmp_path / str(number))
        again = TimmModel.from_pretrained(tmp_path / str(number))
        assert torch.equal(run(again, image), run(tower, image))
        written = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert written["head"]["class"] == "SameKeysOtherForward"


def test_layer_inside_the_built_in_head_replaced_comes_back(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    tower.head.proj = nn.Sequential(nn.Linear(96, 8), nn.Tanh())
    tower.head.drop = nn.Dropout(0.25)
    tower.save_pretrained(tmp_path / "t")
    again = TimmModel.from_pretrained(tmp_path / "t")
    assert torch.equal(run(again, image), run(tower, image))
    assert "p=0.25" in repr(again.head)


def test_head_whose_forward_was_patched_is_refused_or_comes_back(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    tower.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(TowerError):
        tower.save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_head_with_the_print_of_the_built_in_one_and_another_backward_is_refused_or_comes_back(
    tmp_path: Path, image: torch.Tensor
) -> None:
    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y.detach() * 2 - y  # equal in value, its gradient turned around

    tower = TimmModel("test_resnet", embed_dim=8)
    tower.head.proj = Linear(96, 8, bias=False)
    try:
        tower.save_pretrained(tmp_path / "t")
    except TowerError:
        return
    again = TimmModel.from_pretrained(tmp_path / "t")
    gradients = []
    for one in (tower, again):
        one.eval()(image).sum().backward()
        gradients.append(one.head.proj.weight.grad)
    assert torch.equal(*gradients)


def change_activation(trunk: nn.Module) -> None:
    trunk.act1 = nn.SiLU()


def change_layer(trunk: nn.Module) -> None:
    trunk.layer4 = nn.Sequential(nn.LazyConv2d(96, 1))
    trunk(torch.zeros(2, 3, 64, 64))


def add_layer(trunk: nn.Module) -> None:
    trunk.extra = nn.Linear(3, 3)


def hook_output(trunk: nn.Module) -> None:
    trunk.register_forward_hook(lambda module, inputs, output: output * 2)


def unsaved_buffer(trunk: nn.Module) -> None:
    norm = trunk.layer4[-1].bn1
    value = norm.running_mean + 1
    del norm.running_mean
    norm.register_buffer("running_mean", value, persistent=False)


def change_momentum(trunk: nn.Module) -> None:
    trunk.bn1.momentum = 0.9


def add_dropout(trunk: nn.Module) -> None:
    trunk.drop_rate = 0.7


@pytest.mark.parametrize(
    "change",
    [change_activation, change_layer, add_layer, hook_output, unsaved_buffer, change_momentum, add_dropout],
    ids=lambda change: change.__name__,
)
def test_trunk_changed_by_hand_is_refused_at_save(change: Any, tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    change(tower.trunk)
    with pytest.raises(TowerError, match="trunk"):
        tower.save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("field", [{"pool": "max"}, {"proj": "mlp"}, {"embed_dim": 9}, {"in_chans": 4}], ids=str)
def test_config_changed_by_hand_is_refused_at_save_or_mended(
    field: dict[str, Any], tmp_path: Path, image: torch.Tensor
) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    for name, value in field.items():
        setattr(tower.config, name, value)
    try:
        tower.save_pretrained(tmp_path / "t")
    except TowerError:
        assert not (tmp_path / "t").exists()
        return
    again = TimmModel.from_pretrained(tmp_path / "t")
    assert torch.equal(run(again, image), run(tower, image))
    assert again.config.embed_dim == 8
    assert again.config.in_chans == 3


# --- memory layout is not meaning


def test_channels_last_tower_can_be_saved(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", embed_dim=8).to(memory_format=torch.channels_last)
    tower.save_pretrained(tmp_path / "t")
    torch.testing.assert_close(run(TimmModel.from_pretrained(tmp_path / "t"), image), run(tower, image))


def test_tower_on_unaligned_memory_can_be_saved(tmp_path: Path) -> None:
    # what other loaders leave: tensors mapped at odd offsets, on which kernels may give other last bits
    tower = TimmModel("test_efficientnet", embed_dim=8)
    for parameter in tower.parameters():
        room = torch.empty(parameter.numel() + 1)
        view = room[1:].view(parameter.shape)
        parameter.data = view.copy_(parameter.data)
    tower.save_pretrained(tmp_path / "t")
    state = TimmModel.from_pretrained(tmp_path / "t").state_dict()
    assert all(torch.equal(state[key], value) for key, value in tower.state_dict().items())


# --- what loading and saving leave alone


class Drifting(nn.Module):
    """Dropout, BatchNorm and a counter: everything that training moves."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.norm = nn.BatchNorm1d(embed_dim)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.linear(x)))


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_save_in_train_mode_moves_nothing_of_the_user_s(tmp_path: Path, image: torch.Tensor) -> None:
    head = Drifting(96, 8)
    attributes = set(vars(head))
    tower = TimmModel("test_resnet", custom_head=head)
    assert tower.head is head
    tower.train()
    tower(image).sum().backward()
    tower.trunk.layer1.eval()
    tower.head.linear.weight.requires_grad_(False)
    modes = {name: module.training for name, module in tower.named_modules()}
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    needs = {name: p.requires_grad for name, p in tower.named_parameters()}
    config, random_before = tower.config.to_dict(), random_states()

    tower.save_pretrained(tmp_path / "t")

    assert random_states() == random_before
    assert {name: module.training for name, module in tower.named_modules()} == modes
    assert all(torch.equal(state[key], value) for key, value in tower.state_dict().items())
    assert {name: p.requires_grad for name, p in tower.named_parameters()} == needs
    assert all(torch.equal(p.grad, gradients[name]) for name, p in tower.named_parameters() if p.grad is not None)
    assert tower.config.to_dict() == config
    assert tower.head is head
    assert set(vars(head)) == attributes


def test_load_leaves_the_random_states_alone(saved: Path) -> None:
    before = random_states()
    TimmModel.from_pretrained(saved, verify=True)
    TimmModel.from_pretrained(saved, custom_head=Head(96, 8))
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    TimmModel.from_pretrained(saved, custom_head=Head, dtype=torch.bfloat16)
    TimmModel.from_pretrained(saved)
    assert random_states()[1:] == before[1:]


def test_load_leaves_the_random_state_alone(saved: Path) -> None:
    before = random_states()
    TimmModel.from_pretrained(saved, verify=True)
    assert random_states() == before


def test_training_a_loaded_tower_does_not_reach_the_file(saved: Path, image: torch.Tensor) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir() if file.is_file()}
    tower = TimmModel.from_pretrained(saved).train()
    optimizer = torch.optim.SGD(tower.parameters(), lr=10.0)
    tower(image).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in tower.state_dict().values():
            tensor.zero_()
    assert {file.name: file.read_bytes() for file in saved.iterdir() if file.is_file()} == before
    assert TimmModel.from_pretrained(saved).verify().status == "equal"


def test_timm_s_global_registry_keeps_no_trace_of_a_tower() -> None:
    TimmModel("test_resnet", embed_dim=8, image_size=96)
    assert tuple(timm.get_pretrained_cfg("test_resnet").input_size) == (3, 160, 160)

"""Bad input: an error of its own kind that names the thing, at once, and nothing left behind."""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load, save_file

from hf_timm_tower import (
    ArgumentError,
    ConfigError,
    FolderError,
    FormatError,
    HeadError,
    TimmModel,
    TimmTowerConfig,
    TimmTowerModel,
    TowerError,
    WeightsError,
)
from hf_timm_tower.reader.model_args import FROM_TRUNK


class Unstorable(nn.Module):
    """A closure decides what it does: no graph, no registered name."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)
        self.choose = lambda y: y if float(y.detach().sum()) > 0 else -y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.choose(self.linear(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tower; tests that spoil files copy it first."""
    folder = tmp_path_factory.mktemp("saved") / "tower"
    torch.manual_seed(1)
    TimmModel("test_resnet", embed_dim=8).save_pretrained(folder)
    return folder


def copy_of(saved: Path, target: Path) -> Path:
    shutil.copytree(saved, target)
    return target


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return copy_of(saved, tmp_path / "tower")


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    data.update(changes)
    (folder / name).write_text(json.dumps(data))


LONG = "\nFORGED \x1b[31m" + "y" * 50_000
STRANGE: dict[str, dict[str, Any]] = {
    "key of an argument": {"model_args": {"a": {LONG: {"class": "zz"}}}},
    "class": {"model_args": {"act_layer": {"class": LONG}}},
    "argument of a class": {"model_args": {"act_layer": {"class": "torch.nn.SiLU", "kwargs": {LONG: {"class": "z"}}}}},
    "entry of a class": {"model_args": {"act_layer": {"class": "torch.nn.SiLU", LONG: 1}}},
    "argument that timm refuses": {"model_args": {"act_layer": LONG}},
    "unknown argument": {"model_args": {"q" * 50_000: 1}},
    "tag": {"architecture": f"test_resnet.{LONG}"},
    "layout": {"layout": LONG},
    "proj": {"proj": LONG},
    "classifier": {"classifier": LONG},
    "tower_class": {"tower_class": LONG},
    "hidden_size": {"hidden_size": LONG},
    "drop": {"drop": LONG},
    "enormous drop": {"drop": 10**4000},
    "format_version": {"format_version": 10**4000},
    "feat_size": {"feat_size": [LONG]},
    "dtype": {"dtype": LONG},
    "dtype that is a function of torch": {"dtype": "load"},
    "torch_dtype": {"torch_dtype": "int8"},
    "problem_type": {"problem_type": LONG},
    "architectures": {"architectures": {LONG: 1}},
    "labels": {"id2label": {"0": {"a": LONG}}},
    "hidden states": {"output_hidden_states": LONG},
    "attention": {"attn_implementation": "eager"},
    "attention, hidden": {"_attn_implementation": LONG},
    "quantization": {"quantization_config": {"quant_method": LONG}},
    "mean that is no list": {"preprocess": -1},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_text_of_a_config_is_short_and_on_one_line_in_the_error_of_either_face(folder: Path, kind: str) -> None:
    edit(folder, **STRANGE[kind])
    for face in (TimmModel, TimmTowerModel):
        with pytest.raises(TowerError) as caught:
            face.from_pretrained(folder)
        assert len(str(caught.value)) < 1500
        assert "\nFORGED" not in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_no_error_is_a_book() -> None:
    assert 4000 < len(str(TowerError("a" * 10**6 + "the end"))) < 10_000
    assert str(TowerError("a" * 10**6 + "the end")).endswith("the end")


def test_what_a_reader_chooses_is_not_stored(folder: Path, tmp_path: Path) -> None:
    model = TimmTowerModel.from_pretrained(folder, attn_implementation="eager", dtype="bfloat16")
    # older transformers (5.4) know no indices
    model.config.output_hidden_states = [0, 1] if Version(transformers.__version__) >= Version("5.24") else True
    model.save_pretrained(tmp_path / "again")
    assert "attn_implementation" not in (tmp_path / "again" / "config.json").read_text()
    assert TimmTowerModel.from_pretrained(tmp_path / "again").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", {"quant_method": "none"}),
        ("problem_type", "guess the species"),
        ("output_hidden_states", "all"),
        ("architectures", "ours"),
    ],
)
def test_what_no_file_may_hold_costs_no_save(name: str, value: Any, tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    vars(tower.config)[name] = value  # older transformers (5.4) check what is assigned
    with warnings.catch_warnings(record=True):
        tower.save_pretrained(tmp_path / "tower")
    assert TimmModel.from_pretrained(tmp_path / "tower").verify().status == "equal"
    assert json.loads((tmp_path / "tower" / "config.json").read_text()).get(name) != value


def test_preprocessing_that_timm_cannot_take_is_refused_by_either_face(folder: Path) -> None:
    preprocess = json.loads((folder / "config.json").read_text())["preprocess"]
    edit(folder, preprocess={**preprocess, "mean": -1})
    for face in (TimmModel, TimmTowerModel):
        with pytest.raises(ConfigError, match=r"preprocess\.mean=-1"):
            face.from_pretrained(folder)


def test_the_meta_device_as_the_default_one_is_refused_by_the_transformers_models(folder: Path) -> None:
    with torch.device("meta"):
        with pytest.raises(ArgumentError, match="meta device"):
            TimmTowerModel.from_pretrained(folder)
        tower = TimmModel.from_pretrained(folder)  # which takes no default device
    assert tower.verify().status == "equal"


def test_an_index_that_names_a_pickle_is_refused_before_transformers_opens_it(folder: Path) -> None:
    """transformers looks for a dtype in the first file that the index names, by torch.load if it is no safetensors."""
    (folder / "weights.bin").write_bytes(b"no pickle either")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "weights.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"'weights\.bin' is not the plain name"):
        TimmTowerModel.from_pretrained(folder)


def test_an_index_without_metadata_is_named_where_transformers_fails_on_it(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert TimmModel.from_pretrained(folder).verify().status == "equal"
    with pytest.raises(FormatError, match="metadata"):
        TimmTowerModel.from_pretrained(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the constructor


def test_unknown_architecture_offers_near_names() -> None:
    with pytest.raises(ConfigError, match=r"resnet81.*Near names: .*resnet18"):
        TimmModel("resnet81", embed_dim=8)


def test_unknown_architecture_of_a_file_says_which_timm_has_it(folder: Path) -> None:
    edit(folder, architecture="resnet_of_tomorrow", timm_version="9.9.9")
    with pytest.raises(ConfigError, match=r"resnet_of_tomorrow.*timm 9\.9\.9"):
        TimmModel.from_pretrained(folder)


def test_unknown_pretrained_tag_lists_the_tags_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"tag 'b9_in1k'.*a1_in1k"):
        TimmModel("resnet18.b9_in1k", embed_dim=8)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "resnet18/..", "hf-hubs:a/b"])
def test_architecture_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="architecture"):
        TimmModel(name, embed_dim=8)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:a/b", "local-dir:/etc", "../x", "/etc/passwd", "a/b", "resnet18/.."],
)
def test_stored_architecture_that_names_a_place_is_refused(name: str, folder: Path) -> None:
    edit(folder, architecture=name)
    with pytest.raises(ConfigError, match="architecture"):
        TimmModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["", " ", "resnet18 ", "RESNET18", "resnet18\n", "\0", "é" * 100_000, None, 7, ["a"], {}]
)
def test_architecture_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="architecture") as caught:
        TimmModel(name, embed_dim=8)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("test_resnet", "token"),
        ("test_resnet", "token_avg"),
        ("test_resnet", "maxx"),
        ("test_vit", "catavgmax"),
        ("test_vit", "abs_attn"),
        ("test_mambaout", "map"),
        ("test_resnet", "a\nb"),
    ],
)
def test_impossible_pool_lists_the_pools_that_there_are(name: str, pool: str) -> None:
    with pytest.raises(ConfigError, match="pool=") as caught:
        TimmModel(name, embed_dim=8, pool=pool)
    if pool.isprintable():
        assert name in str(caught.value)
        offers = str(caught.value).partition("Supported pools: ")[2].rstrip(".").split(", ")
        assert "avg" in offers
        assert pool not in offers


@pytest.mark.parametrize("pool", [0, True, ["avg"], {"a": 1}, "a" * 10_000])
def test_pool_that_is_no_name_is_refused(pool: Any) -> None:
    with pytest.raises(TowerError, match="pool"):
        TimmModel("test_resnet", embed_dim=8, pool=pool)


@pytest.mark.parametrize("value", [0, -1, "a", 10**12, True, False, 2.5, float("nan"), [8], "8", 2**63])
@pytest.mark.parametrize("proj", ["linear", "none", None])
def test_impossible_embed_dim_names_field_and_value(value: Any, proj: str | None) -> None:
    with pytest.raises(ConfigError, match="embed_dim") as caught:
        TimmModel("test_resnet", embed_dim=value, proj=proj)
    assert repr(value) in str(caught.value)


def test_missing_embed_dim_is_asked_for() -> None:
    for proj in ("linear", "mlp", None):
        with pytest.raises(ConfigError, match="embed_dim=None"):
            TimmModel("test_resnet", proj=proj)


@pytest.mark.parametrize("value", [0, -1, (0, 224), (224, 224, 3), (), "224", 1.5, True, 10**9, (96, "a"), (96, None)])
def test_impossible_image_size_names_field_and_value(value: Any) -> None:
    with pytest.raises(ConfigError, match="image_size"):
        TimmModel("test_resnet", embed_dim=8, image_size=value)
    tower = TimmModel("test_resnet", embed_dim=8)
    with pytest.raises(ConfigError, match="image_size"):
        tower.set_input_size(value)
    assert tower.config.image_size == [160, 160]


def test_image_size_that_the_trunk_cannot_take_is_refused() -> None:
    fixed = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match="9"):
        TimmModel("vit_tiny_patch16_224", embed_dim=8, image_size=9, model_kwargs=fixed)


@pytest.mark.parametrize(
    "bad",
    [
        {"proj": "liner"},
        {"proj": 3},
        {"drop": 1.0},
        {"drop": -0.1},
        {"drop": "a"},
        {"drop": float("nan")},
        {"drop": True},
        {"proj_bias": "yes"},
        {"proj_bias": 1},
        {"drop_path": "a"},
        {"drop_path": -1.0},
        {"drop_path": 2.0},
        {"drop_path": float("nan")},
        {"model_kwargs": {"in_chans": 0}},
        {"model_kwargs": {"in_chans": "3"}},
        {"model_kwargs": {"in_chans": 10**6}},
        {"model_kwargs": {"in_chans": True}},
    ],
    ids=str,
)
def test_other_impossible_arguments_are_refused_by_name(bad: dict[str, Any]) -> None:
    name = next(iter(bad))
    if name == "model_kwargs":
        name = "in_chans"
    with pytest.raises(TowerError, match=name):
        TimmModel("test_resnet", 8, **bad)


@pytest.mark.parametrize("kwargs", [[], "in_chans=1", 3, {1: 2}, {"a b": 1}, {"": 1}], ids=str)
def test_model_kwargs_that_are_no_arguments_are_refused(kwargs: Any) -> None:
    if kwargs == []:
        kwargs = [1]
    with pytest.raises(TowerError, match="model_"):
        TimmModel("test_resnet", 8, model_kwargs=kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained": True},
        {"features_only": True},
        {"num_classes": 10},
        {"pretrained_cfg": {"file": "/x"}},
        {"pretrained_cfg_overlay": {"url": "http://x"}},
        {"global_pool": "max"},
        {"img_size": 96},
        {"cache_dir": "/tmp"},
        {"out_indices": [1]},
        {"pretrained_strict": False},
        {"device": "cpu"},
        {"dtype": "float16"},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_model_kwargs_that_fetch_read_or_belong_elsewhere_are_refused(kwargs: dict[str, Any], folder: Path) -> None:
    name = next(iter(kwargs))
    with pytest.raises(ConfigError, match=name):
        TimmModel("test_resnet", 8, model_kwargs=kwargs)
    if name in FROM_TRUNK:
        return  # a tower made by from_trunk holds them: how the trunk was made before its classifier went
    edit(folder, model_args=kwargs)
    with pytest.raises(ConfigError, match=name):
        TimmModel.from_pretrained(folder)


class Mine(nn.SiLU):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Mine,
        torch.relu,
        lambda x: x,
        nn.SiLU(),
        object(),
        b"a",
        {1, 2},
        int,
        partial(nn.LayerNorm, 8),
        partial(torch.relu),
        2**40,
        torch.zeros(2),
        torch.float32,
        {1: 2},
        os,
    ],
    ids=lambda value: type(value).__name__,
)
def test_model_kwargs_value_that_cannot_be_stored_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="act_layer"):
        TimmModel("test_resnet", 8, model_kwargs={"act_layer": value})


@pytest.mark.parametrize("head", [3, b"a", [nn.Linear(96, 8)], {"a": 1}, torch.zeros(3), Ellipsis], ids=repr)
def test_custom_head_of_a_wrong_type_is_refused(head: Any, saved: Path) -> None:
    with pytest.raises(ArgumentError, match="custom_head"):
        TimmModel("test_resnet", custom_head=head)
    with pytest.raises(ArgumentError, match="custom_head"):
        TimmModel.from_pretrained(saved, custom_head=head)


@pytest.mark.parametrize(
    "head",
    [
        "no/such-head",
        lambda width, dim: 3,
        lambda: None,
        lambda width, dim: nn.Linear,
        nn.Linear(3, 3),
        nn.Conv2d(96, 3, 3),
    ],
)
def test_custom_head_that_does_not_fit_is_refused(head: Any) -> None:
    with pytest.raises(HeadError):
        TimmModel("test_resnet", custom_head=head)


@pytest.mark.parametrize(
    "arguments",
    [
        {"proj": "mlp", "custom_head": nn.Linear(96, 8)},
        {"drop_path": 0.1, "model_kwargs": {"drop_path_rate": 0.2}},
        {"pool": "abs_attn", "custom_head": nn.Linear(96, 8)},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_contradictory_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        TimmModel("test_resnet", **arguments)


def test_contradictory_devices_are_refused(saved: Path) -> None:
    with pytest.raises(ArgumentError, match="map_location"):
        TimmModel.from_pretrained(saved, device="cpu", map_location="meta")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_device_that_there_is_not_is_refused(device: Any, saved: Path) -> None:
    with pytest.raises(TowerError, match="device"):
        TimmModel.from_pretrained(saved, device=device)


# --- the folder


def test_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a")
    with pytest.raises(FolderError, match=r"config\.json"):
        TimmModel.from_pretrained(tmp_path / "empty")
    with pytest.raises(FolderError, match="file"):
        TimmModel.from_pretrained(tmp_path / "file")
    for name in (tmp_path / "gone", "no/such", "no such id", "", "a/b/c", "..//..", "nul\0l"):
        with pytest.raises(FolderError):
            TimmModel.from_pretrained(name)


@pytest.mark.parametrize("subfolder", ["..", "../tower", "a/../..", "/etc", "gone"])
def test_subfolder_that_leads_out_or_nowhere(subfolder: str, folder: Path) -> None:
    with pytest.raises(FolderError):
        TimmModel.from_pretrained(folder, subfolder=subfolder)


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FolderError, match=r"config\.json"):
        TimmModel.from_pretrained(folder)


def _large(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b'{"a": "')
        file.truncate(200 * 2**20)  # sparse: no disk is used


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "fingerprint.json"])
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_text("not json"), "not JSON"),
        (lambda path: path.write_text(""), "not JSON"),
        (lambda path: path.write_text("[1, 2]"), "array"),
        (lambda path: path.write_text("null"), "null"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "UTF-8"),
        (lambda path: path.write_text('{"a":' * 100_000), "deep"),
        (lambda path: path.write_text('{"drop": NaN}'), "NaN"),
        (lambda path: path.write_text('{"drop": 0, "drop": 1}'), "twice"),
        (lambda path: path.write_text('{"a": ' + "9" * 100_000 + "}"), "not JSON"),
        (_large, "bytes"),
    ],
    ids=["text", "empty", "array", "null", "utf8", "deep", "nan", "twice", "digits", "200MB"],
)
def test_json_file_that_is_none(name: str, write: Callable[[Path], Any], says: str, folder: Path) -> None:
    write(folder / name)
    with pytest.raises(FormatError, match=says) as caught:
        TimmModel.from_pretrained(folder)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_config_of_another_model(folder: Path) -> None:
    for kind in ("bert", "timm_wrapper", None, 3, ["timm_tower"]):
        edit(folder, model_type=kind)
        with pytest.raises(ConfigError, match="model_type"):
            TimmModel.from_pretrained(folder)


@pytest.mark.parametrize("version", [2, 999, 0, -1, "1", None, 1.0, True, [1]])
def test_format_version_that_this_package_does_not_read(version: Any, folder: Path) -> None:
    edit(folder, format_version=version)
    with pytest.raises(FormatError, match=r"format_version.*") as caught:
        TimmModel.from_pretrained(folder)
    if version in (2, 999) and version is not True:
        assert "Upgrade" in str(caught.value)


WRONG_FIELDS: list[dict[str, Any]] = [
    {"architecture": 3},
    {"architecture": None},
    {"in_chans": "3"},
    {"in_chans": 0},
    {"in_chans": 10**9},
    {"pool": 3},
    {"pool": "nope"},
    {"proj": "nope"},
    {"proj": []},
    {"proj_bias": "no"},
    {"drop": "a"},
    {"drop": 7},
    {"embed_dim": 0},
    {"embed_dim": "8"},
    {"embed_dim": 10**12},
    {"embed_dim": None},
    {"head": 3},
    {"head": []},
    {"head": {}},
    {"head": {"form": "pickle", "path": "x"}},
    {"head": {"form": "registered"}},
    {"head": {"form": "registered", "name": "torch.nn.Linear", "kwargs": {}}},
    {"head": {"form": "graph"}},
    {"head": {"form": "graph", "graph": {}}},
    {"head": {"form": ["graph"]}},
    {"head": {"form": "live"}},
    {"image_size": [0, 0]},
    {"image_size": [160]},
    {"image_size": "160"},
    {"preprocess": {}},
    {"preprocess": 3},
    {"preprocess": {"mean": 1}},
    {"classifier": "eval"},
    {"num_features": -1},
    {"num_features": "a"},
    {"layout": "XYZ"},
    {"feat_size": [0]},
    {"tower_class": 3},
    {"tower_class": "Nobody"},
    {"tower_kwargs": []},
    {"tower_kwargs": {"a": 1}},
    {"tower_kwargs": {"self": 1}},
    {"tower_kwargs": {"pretrained": True, "model_name": "resnet18"}},
    {"hidden_size": 9},
    {"model_args": []},
    {"model_args": {"block": {"class": "os.system"}}},
    {"model_args": {"act_layer": {"class": "torch.nn.utils"}}},
    {"model_args": {"act_layer": {"class": "timm.layers.create_act"}}},
    {"model_args": {"act_layer": {"class": ["a"]}}},
    {"model_args": {"act_layer": {"class": "torch.nn.SiLU", "kwargs": 3}}},
    {"model_args": {"act_layer": {"class": "torch.nn.SiLU", "evil": 3}}},
    {"model_args": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": {"j": 1}}}}}}}}}}},
    {"model_args": {"layers": [1] * 100_000}},
    {"model_args": {"layers": "abc"}},
    {"model_args": {"__class__": 1}},
    {"pretrained_cfg": {"architecture": "resnet18"}},
    {"auto_magic": True},
]


@pytest.mark.parametrize("wrong", WRONG_FIELDS, ids=lambda wrong: str(wrong)[:60])
def test_wrong_field_of_the_config_is_an_error_of_ours(wrong: dict[str, Any], folder: Path) -> None:
    edit(folder, **wrong)
    with pytest.raises(TowerError) as caught:
        TimmModel.from_pretrained(folder)
    assert len(str(caught.value)) < 3000
    [(field, value)] = wrong.items()
    named = {field, *value} if isinstance(value, dict) else {field, str(value)}
    assert any(name in str(caught.value) for name in named) or isinstance(caught.value, WeightsError | HeadError)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [0.1]},
        {"std": [0, 1, 1]},
        {"std": [-1, 1, 1]},
        {"mean": ["a", 1, 1]},
        {"mean": None},
        {"crop_pct": 0},
        {"crop_pct": "a"},
        {"crop_pct": 1e9},
        {"interpolation": "cubic"},
        {"interpolation": ["bicubic"]},
        {"crop_mode": 1},
        {"padding": -1},
        {"padding": 1.5},
        {"value_range": [0]},
        {"channel_order": "GBR"},
        {"extra": 1},
        {"std": [True] * 3},
    ],
    ids=str,
)
def test_wrong_entry_of_preprocess_is_refused_before_an_image_meets_it(wrong: dict[str, Any], folder: Path) -> None:
    block = json.loads((folder / "config.json").read_text())["preprocess"]
    edit(folder, preprocess={**block, **wrong})
    with pytest.raises(ConfigError, match=f"preprocess.*{next(iter(wrong))}"):
        TimmModel.from_pretrained(folder)


HUGE = [
    ("vit_tiny_patch16_224", {"embed_dim": 10**9}),
    ("vit_tiny_patch16_224", {"depth": 10**6}),
    ("vit_tiny_patch16_224", {"embed_dim": 3 * 2**20, "depth": 2**20}),
    ("test_resnet", {"base_width": 10**8}),
    ("test_resnet", {"layers": [10**5] * 4}),
    ("test_resnet", {"channels": [2**28] * 4}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2**30}),
    ("vit_tiny_patch16_224", {"mlp_ratio": 1e300}),
]


@pytest.mark.parametrize(("architecture", "model_args"), HUGE, ids=str)
def test_config_that_asks_for_a_huge_model_is_refused_before_it_is_built(
    architecture: str, model_args: dict[str, Any], folder: Path
) -> None:
    resource = pytest.importorskip("resource")
    edit(folder, architecture=architecture, model_args=model_args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(TowerError):
        TimmModel.from_pretrained(folder)
    # not a measure of speed: far above what a refusal costs, orders below what building costs
    assert time.process_time() - started < 15
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * 2**30


# --- weight files


@pytest.mark.parametrize("name", ["trunk.safetensors", "head.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 9, 100, 0.5, -1])
def test_truncated_weight_file(name: str, keep: float, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(FormatError, match=name):
        TimmModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["trunk.safetensors", "head.safetensors"])
def test_missing_weight_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FolderError, match=name):
        TimmModel.from_pretrained(folder)


def test_missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FolderError, match=r"model\.safetensors"):
        TimmModel.from_pretrained(folder)


def test_weight_file_that_is_a_pickle_is_not_opened(folder: Path) -> None:
    torch.save(load((folder / "head.safetensors").read_bytes()), folder / "head.safetensors")
    with pytest.raises(FormatError, match="head"):
        TimmModel.from_pretrained(folder)


def rewrite_head(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load((folder / "head.safetensors").read_bytes()))
    save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {key: name for key, name in index["weight_map"].items() if name != "head.safetensors"}
    edit(folder, "model.safetensors.index.json", weight_map=kept | dict.fromkeys(tensors, "head.safetensors"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {f"head.x{i}": torch.zeros(1) for i in range(30)}, r"(?s)30.*head\.x0"),
        (lambda t: {k: v[:, :5].clone() for k, v in t.items()}, r"(?s)head\.proj\.weight.*\[8, 5\].*\[8, 96\]"),
        (lambda t: {k: v.reshape(-1) for k, v in t.items()}, r"head\.proj\.weight"),
        (lambda t: {k.upper(): v for k, v in t.items()}, r"(?s)head\.proj\.weight.*HEAD\.PROJ\.WEIGHT"),
        (lambda t: t | {"trunk.conv1.0.weight.": torch.zeros(1)}, "unexpected"),
    ],
    ids=["extra", "shape", "flat", "case", "stranger"],
)
def test_weights_that_do_not_fit_are_listed(change: Any, says: str, folder: Path) -> None:
    rewrite_head(folder, change)
    with pytest.raises(WeightsError, match=says) as caught:
        TimmModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "name", ["../head.safetensors", "/etc/passwd", "head.bin", "", "a/head.safetensors", 3, None, ".."]
)
def test_index_that_names_other_places(name: Any, folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    mapped = {key: name if key.startswith("head.") else file for key, file in index["weight_map"].items()}
    edit(folder, "model.safetensors.index.json", weight_map=mapped)
    with pytest.raises(TowerError, match=r"index\.json"):
        TimmModel.from_pretrained(folder)


# --- fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint_version": 2},
        {"outputs": []},
        {"outputs": {}},
        {"outputs": {"": {}}},
        {"outputs": {"": 3}},
        {"outputs": {"": {"shape": [1, 8], "dtype": "torch.float32", "sha256": "0", "values": ["a"]}}},
        {"outputs": {"": {"shape": [1, 8], "dtype": "torch.float32", "sha256": "0", "values": [1.0, 2.0, 3.0]}}},
        {"outputs": {"": {"shape": [1, 8], "dtype": "torch.float32", "sha256": "0", "values": [None] * 8}}},
        {"outputs": {"": {"shape": [1, 8], "dtype": "torch.float32", "sha256": "0", "values": []}}},
        {"weights": 3},
        {"made_with": ["torch"]},
        {"made_with": None},
    ],
    ids=str,
)
def test_malformed_fingerprint_is_an_error_of_ours_and_never_says_close(change: dict[str, Any], folder: Path) -> None:
    edit(folder, "fingerprint.json", **change)
    with pytest.raises(TowerError):
        TimmModel.from_pretrained(folder, verify=True)


def test_verify_without_a_fingerprint_is_asked_for_in_vain(folder: Path) -> None:
    (folder / "fingerprint.json").unlink()
    tower = TimmModel.from_pretrained(folder)
    with pytest.raises(FolderError, match="fingerprint"):
        tower.verify()
    with pytest.raises(FolderError, match="fingerprint"):
        TimmModel.from_pretrained(folder, verify=True)
    with pytest.raises(FolderError, match="fingerprint"):
        TimmModel("test_resnet", embed_dim=8).verify()


# --- saving


def cannot_be_stored() -> TimmModel:
    return TimmModel("test_resnet", custom_head=Unstorable())


def test_head_that_cannot_be_stored_gives_every_reason_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(HeadError) as caught:
        cannot_be_stored().save_pretrained(tmp_path / "t")
    for part in ("Unstorable", "as data", "registered", "Remedies", "Nothing was written"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_earlier_save_still_loads_after_a_refused_one(saved: Path, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(HeadError):
        cannot_be_stored().save_pretrained(folder)
    hooked = TimmModel("test_resnet", embed_dim=8)
    hooked.trunk.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(TowerError):
        hooked.save_pretrained(folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert TimmModel.from_pretrained(folder).verify().status == "equal"


def test_saving_over_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=8)
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FolderError, match="file"):
            tower.save_pretrained(target)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("target", ["/proc/tower", "/proc/self/tower", "/sys/tower"])
def test_saving_where_nobody_may_write_is_refused(target: str) -> None:
    with pytest.raises(FolderError, match="cannot"):
        TimmModel("test_resnet", embed_dim=8).save_pretrained(target)


@pytest.mark.parametrize("target", ["a" * 300, "nul\0l", ""])
def test_saving_under_an_impossible_name_is_refused(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError):
        TimmModel("test_resnet", embed_dim=8).save_pretrained(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -1, "5 apples", None, 1.5, True, [], ""])
def test_impossible_shard_size_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        TimmModel("test_resnet", embed_dim=8).save_pretrained(tmp_path / "t", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


# --- anything at all


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(name for name in TimmTowerConfig.__annotations__ if name not in ("attribute_map", "format_version"))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_json_in_any_field_is_a_config_or_an_error_of_ours(saved: Path, field: str, value: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    config[field] = value
    try:
        made = TimmTowerConfig.from_dict(config)
    except TowerError:
        return
    assert TimmTowerConfig.from_dict(json.loads(made.to_json_string())).to_dict() == made.to_dict()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_json_in_any_field_loads_or_is_an_error_of_ours(
    saved: Path, field: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy_of(saved, tmp_path_factory.mktemp("any") / "t")
    edit(folder, **{field: value})
    try:
        tower = TimmModel.from_pretrained(folder)
    except TowerError:
        return
    assert timm.is_model(tower.config.architecture.partition(".")[0])
    tower.transform()

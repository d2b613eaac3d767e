"""The weights of a folder: planned, written, read and assigned, strictly."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_timm_tower import TimmModel, TimmTowerModel
from hf_timm_tower.files.json import MAX_JSON_BYTES, write_json
from hf_timm_tower.files.names import CONFIG_NAME, FINGERPRINT_NAME, HEAD_NAME, INDEX_NAME, SINGLE_NAME, TRUNK_NAME
from hf_timm_tower.files.open_folder import OpenFolder, read_json, read_text
from hf_timm_tower.files.safetensors_layout import write_aligned
from hf_timm_tower.files.same_save import mismatch, tie_digests
from hf_timm_tower.files.staging import read_folder
from hf_timm_tower.files.ties import same_bits
from hf_timm_tower.files.weights import plan_weights, read_weights, write_weights
from hf_timm_tower.reader.errors import ConfigError, FolderError, FormatError, WeightsError
from hf_timm_tower.reader.weights import assign_weights


class Tower(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 4)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not same_bits(ours[key], theirs[key])] == []


def reload(folder: Path, module: nn.Module) -> nn.Module:
    """The same, built without values and loaded from the folder."""
    assign_weights(module.to("meta"), read_weights(folder), source=str(folder))
    return module


# Plan


@given(
    sizes=st.dictionaries(st.text("ab.", min_size=1).map(lambda s: f"head.{s}") | st.text("hd.", min_size=1),
                          st.integers(0, 40)),
    limit=st.integers(1, 100),
)  # fmt: skip
def test_a_plan_has_each_key_once_head_and_trunk_apart_and_no_file_too_large(sizes: dict[str, int], limit: int) -> None:
    plan = plan_weights({key: torch.empty(size, device="meta") for key, size in sizes.items()}, limit)
    assert sorted(key for keys in plan.files.values() for key in keys) == sorted(sizes)
    assert plan.total_bytes == 4 * sum(sizes.values())
    for name, keys in plan.files.items():
        assert all(key.startswith("head.") == name.startswith("head") for key in keys)
        assert len(keys) == 1 or sum(4 * sizes[key] for key in keys) <= limit


def test_shards_are_numbered_and_a_limit_can_be_text() -> None:
    state = {f"trunk.{i}": torch.empty(256, device="meta") for i in range(4)} | {"head.w": torch.empty(1)}
    names = ["trunk-00001-of-00002.safetensors", "trunk-00002-of-00002.safetensors", HEAD_NAME]
    assert list(plan_weights(state, "2.048kb").files) == names
    assert list(plan_weights(state, 2048).files) == names
    assert list(plan_weights(state, "1GB").files) == [TRUNK_NAME, HEAD_NAME]


@pytest.mark.parametrize("limit", [0, -1, "", "5 lightyears", "-5GB", "0GB", True, "2GiB"])
def test_an_impossible_shard_size_is_refused(limit: int | str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        plan_weights({}, limit)


# Round trips


@pytest.mark.parametrize("limit", ["5GB", 300])
def test_what_was_written_is_read_and_the_reference_reads_the_same(tmp_path: Path, limit: int | str) -> None:
    tower = Tower()
    write_weights(tmp_path, tower, limit)
    assert_same_state(reload(tmp_path, Tower()), tower)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    reference = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    for key, tensor in tower.state_dict().items():
        assert same_bits(reference[index["weight_map"][key]][key], tensor)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tower.state_dict().values())


def test_transformers_own_loader_reads_a_sharded_folder(tmp_path: Path) -> None:
    from transformers import PretrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.trunk = Tower().trunk
            self.head = Tower().head
            self.post_init()

    tower = Tower()
    write_weights(tmp_path, tower, 300)
    assert len(list(tmp_path.glob("trunk-*"))) > 1
    model, info = Model.from_pretrained(tmp_path, config=PretrainedConfig(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(model, tower)


def test_after_a_head_only_change_the_trunks_file_is_byte_identical(tmp_path: Path) -> None:
    tower = Tower()
    write_weights(tmp_path, tower)
    trunk, head = (tmp_path / TRUNK_NAME).read_bytes(), (tmp_path / HEAD_NAME).read_bytes()
    nn.init.ones_(tower.head.weight)
    write_weights(tmp_path, tower)
    assert (tmp_path / TRUNK_NAME).read_bytes() == trunk
    assert (tmp_path / HEAD_NAME).read_bytes() != head


def test_a_head_without_parameters_needs_no_file_and_may_have_an_empty_one(tmp_path: Path) -> None:
    tower = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.ReLU()})
    write_weights(tmp_path, tower)
    assert sorted(os.listdir(tmp_path)) == [INDEX_NAME, TRUNK_NAME]
    write_aligned(tmp_path / HEAD_NAME, {})
    assert_same_state(reload(tmp_path, nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.ReLU()})), tower)


def test_a_plain_model_file_by_another_writer_loads(tmp_path: Path) -> None:
    tower = Tower()
    save_file(tower.state_dict(), tmp_path / SINGLE_NAME)
    assert_same_state(reload(tmp_path, Tower()), tower)


def test_writing_removes_weight_files_that_the_new_save_does_not_have(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower(), 300)
    save_file(Tower().state_dict(), tmp_path / SINGLE_NAME)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"somebody else's")
    write_weights(tmp_path, Tower())
    assert sorted(os.listdir(tmp_path)) == ["adapter_model.safetensors", HEAD_NAME, INDEX_NAME, TRUNK_NAME]


def test_a_value_that_no_file_can_hold_is_refused_by_key(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None: ...

    with pytest.raises(WeightsError, match="_extra_state"):
        write_weights(tmp_path, Extra(2, 2))


# Ties


class Autoencoder(nn.Module):
    """`tie` is how `b.weight` comes by the memory of `a.weight`."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("again", self.table)
        if tie == "object":
            self.b.weight = self.a.weight
        elif tie == "memory":
            self.b.weight = nn.Parameter(self.a.weight.detach())
        elif tie == "transposed":
            self.b.weight = nn.Parameter(self.a.weight.detach().t())
        elif tie == "part":
            self.b.weight = nn.Parameter(self.a.weight.detach()[:2])


@pytest.mark.parametrize("built", ["object", "none"])
@pytest.mark.parametrize("how", [{}, {"dtype": torch.float64}])
def test_a_tied_parameter_stays_one_however_the_new_module_was_built(
    tmp_path: Path, built: str, how: dict[str, torch.dtype]
) -> None:
    saved = Autoencoder("object")
    write_weights(tmp_path, saved)
    loaded = Autoencoder(built)
    assign_weights(loaded, read_weights(tmp_path), source="x", **how)
    assert loaded.a.weight is loaded.b.weight
    assert loaded.table is loaded.again
    assert torch.equal(loaded.b.weight, saved.b.weight.to(loaded.b.weight.dtype))
    assert len(list(loaded.parameters())) == len(list(saved.parameters()))


@pytest.mark.parametrize("how", [{}, {"dtype": torch.float64}])
def test_parameters_on_the_same_memory_stay_so(tmp_path: Path, how: dict[str, torch.dtype]) -> None:
    write_weights(tmp_path, Autoencoder("memory"))
    loaded = Autoencoder("none")
    assign_weights(loaded, read_weights(tmp_path), source="x", **how)
    assert loaded.a.weight is not loaded.b.weight
    with torch.no_grad():
        loaded.a.weight.fill_(5)
    assert (loaded.b.weight == 5).all()


@pytest.mark.parametrize("tie", ["transposed", "part"])
def test_overlapping_views_that_a_file_would_separate_are_refused(tmp_path: Path, tie: str) -> None:
    with pytest.raises(WeightsError, match=r"a\.weight, b\.weight overlap"):
        write_weights(tmp_path, Autoencoder(tie))


def test_a_foreign_file_may_lack_the_aliases_of_a_tie_and_may_not_contradict_it(tmp_path: Path) -> None:
    saved = Autoencoder("object")
    state = {key: value.clone() for key, value in saved.state_dict().items()}
    assign_weights(Autoencoder("object"), state, source="x")
    del state["b.weight"]
    loaded = Autoencoder("object")
    assign_weights(loaded, state, source="x")
    assert loaded.b.weight is loaded.a.weight
    assert_same_state(loaded, saved)
    state["b.weight"] = state["a.weight"] + 1
    with pytest.raises(WeightsError, match=r"b\.weight and a\.weight"):
        assign_weights(Autoencoder("object"), state, source="x")


@pytest.mark.parametrize(
    "tied", [3, ["a.weight"], [["a.weight"]], [["a.weight", 3]], [["a.weight", "nowhere"]], [["a.bias", "b.bias"]],
             [["a.weight", "b.bias"]], [["a.weight", "a.weight"]]],
)  # fmt: skip
def test_a_wrong_list_of_ties_is_refused(tmp_path: Path, tied: object) -> None:
    write_weights(tmp_path, Autoencoder("object"))
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["metadata"]["tied"] = tied
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FormatError, match="tied"):
        read_weights(tmp_path)


# Assigning


def test_everything_that_does_not_fit_is_one_error_and_nothing_is_assigned() -> None:
    tower = Tower()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    state = {key: value + 1 for key, value in tower.state_dict().items()}
    del state["trunk.1.bias"], state["trunk.0.bias"]
    state |= {f"extra{i}": torch.ones(1) for i in range(20)}
    state["head.weight"] = torch.ones(4, 9)
    state["head.bias"] = torch.ones(4, dtype=torch.int64)
    with pytest.raises(WeightsError) as caught:
        assign_weights(tower, state, source="some/file.safetensors")
    text = str(caught.value)
    for part in ("some/file.safetensors", "2 missing", "trunk.0.bias", "20 unexpected", "extra0", "head.weight",
                 "[4, 9]", "[4, 8]", "head.bias", "int64"):  # fmt: skip
        assert part in text
    assert text.count("extra") < 10  # the first few, not all
    assert all(same_bits(before[key], value) for key, value in tower.state_dict().items())


def test_missing_keys_that_are_allowed_keep_their_values() -> None:
    tower = Tower()
    head = tower.head.weight
    state = {key: value + 1 for key, value in tower.state_dict().items() if not key.startswith("head.")}
    assign_weights(tower, state, source="x", allow_missing={"head.weight", "head.bias"})
    assert torch.equal(tower.head.weight, head)
    with pytest.raises(WeightsError, match=r"head\.bias"):
        assign_weights(tower, state, source="x", allow_missing={"head.weight"})


def test_assigning_replaces_parameters_keeps_frozen_ones_frozen_and_copies_nothing(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower())
    tower = Tower()
    tower.trunk.requires_grad_(False)
    old = {id(value) for value in tower.state_dict(keep_vars=True).values()}
    weights = read_weights(tmp_path)
    assign_weights(tower, weights, source="x")
    new = tower.state_dict(keep_vars=True)
    assert not old & {id(value) for value in new.values()}
    assert {key for key, value in new.items() if value.requires_grad} == {"head.weight", "head.bias"}
    assert all(value.data_ptr() == weights[key].data_ptr() for key, value in new.items())


def test_dtype_casts_floating_tensors_only_and_reaches_non_persistent_buffers() -> None:
    tower = Tower()
    tower.register_buffer("angles", torch.ones(2), persistent=False)
    tower.register_buffer("places", torch.ones(2, dtype=torch.int64), persistent=False)
    assign_weights(tower, Tower().state_dict(), source="x", dtype=torch.bfloat16)
    expected = Tower()
    expected.register_buffer("angles", torch.ones(2))
    expected.register_buffer("places", torch.ones(2, dtype=torch.int64))
    expected.to(torch.bfloat16)
    assert {n: b.dtype for n, b in tower.named_buffers()} == {n: b.dtype for n, b in expected.named_buffers()}
    assert {n: p.dtype for n, p in tower.named_parameters()} == {n: p.dtype for n, p in expected.named_parameters()}


def test_device_moves_everything() -> None:
    tower = Tower()
    tower.register_buffer("angles", torch.ones(2), persistent=False)
    assign_weights(tower, Tower().state_dict(), source="x", device="meta")
    assert {t.device.type for t in [*tower.parameters(), *tower.buffers()]} == {"meta"}


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(4, 4), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))]
)
def test_modules_that_keep_references_to_their_weights_use_the_new_ones(make: Callable[[], nn.Module]) -> None:
    saved, loaded = make(), make()
    assign_weights(loaded, saved.state_dict(), source="x")
    x = torch.randn(2, 4)
    found, expected = loaded(x), saved(x)
    assert torch.equal(*(y[0] if isinstance(y, tuple) else y for y in (found, expected)))


class Transposing(nn.Linear):
    """Keeps its weight the other way round in the state dict."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        turned = state_dict | {prefix + "weight": nn.Parameter(state_dict[prefix + "weight"].detach().t())}
        super()._load_from_state_dict(turned, prefix, *arguments)


class Copying(nn.Linear):
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        self.weight.data.copy_(state_dict[prefix + "weight"])


def hooked(width: int, height: int) -> nn.Linear:
    """Stores its weight the other way round, by hooks alone."""

    def turn(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        state[prefix + "weight"] = nn.Parameter(state[prefix + "weight"].detach().t())

    layer = nn.Linear(width, height)
    layer.register_state_dict_post_hook(turn)
    layer.register_load_state_dict_pre_hook(turn)
    return layer


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [Transposing, Copying, hooked])
def test_a_module_whose_state_dict_is_not_its_tensors_is_never_silently_wrong(
    kind: Callable[[int, int], nn.Module], inside: bool
) -> None:
    saved, loaded = (nn.Sequential(kind(4, 4)) if inside else kind(4, 4) for _ in range(2))
    with pytest.raises(WeightsError, match="did not reach"):
        assign_weights(loaded, saved.state_dict(), source="x")


def test_a_lazy_module_takes_the_shape_it_is_given() -> None:
    lazy = nn.LazyLinear(3)
    saved = nn.Linear(5, 3)
    assign_weights(lazy, saved.state_dict(), source="x")
    assert torch.equal(lazy(torch.ones(1, 5)), saved(torch.ones(1, 5)))


def test_a_save_into_the_same_folder_does_not_disturb_a_loaded_module(tmp_path: Path) -> None:
    first, second = Tower(64), Tower(64)
    write_weights(tmp_path, first)
    loaded = reload(tmp_path, Tower(64))
    write_weights(tmp_path, second)
    assert_same_state(loaded, first)
    for parameter in loaded.parameters():
        parameter.data.add_(1)
    assert_same_state(reload(tmp_path, Tower(64)), second)


# What is not right on disk


def edit_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_a_missing_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no such folder"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(FolderError, match="no weights"):
        read_weights(tmp_path)
    write_weights(tmp_path, Tower())
    (tmp_path / HEAD_NAME).unlink()
    with pytest.raises(FolderError, match=r"head\.safetensors is missing.*again"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "name", ["../trunk.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors",
             "C:x.safetensors", "trunk.bin", "x\0.safetensors"],
)  # fmt: skip
def test_an_index_may_name_plain_safetensors_files_only(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path, Tower())
    edit_index(tmp_path, lambda index: index["weight_map"].update({"head.bias": name}))  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match=r"index\.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[]),
        lambda index: index.update(weight_map={"a": 3}),
        lambda index: index.update(metadata=[]),
        lambda index: index["weight_map"].update(unknown=HEAD_NAME),
        lambda index: index["weight_map"].pop("head.bias"),
        lambda index: index["weight_map"].update({"head.bias": TRUNK_NAME}),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, change: Callable[..., object]) -> None:
    write_weights(tmp_path, Tower())
    edit_index(tmp_path, change)
    with pytest.raises(FormatError, match=r"index|head\.safetensors|trunk\.safetensors"):
        read_weights(tmp_path)


def test_a_key_in_two_files_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower())
    write_aligned(tmp_path / HEAD_NAME, load_file(tmp_path / HEAD_NAME) | {"trunk.0.bias": torch.ones(8)})
    with pytest.raises(FormatError, match=r"head\.safetensors.*trunk\.0\.bias"):
        read_weights(tmp_path)


def test_a_stale_model_file_beside_an_index_is_refused_for_readers_would_differ(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower())
    save_file(Tower().state_dict(), tmp_path / SINGLE_NAME)
    with pytest.raises(FormatError, match="stale"):
        read_weights(tmp_path)


def test_links_inside_a_hub_cache_are_followed_and_links_out_of_it_are_not(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "sub"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tower = Tower()
    write_weights(blobs, tower)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert_same_state(reload(snapshot, Tower()), tower)

    outside = tmp_path / "elsewhere.safetensors"
    os.rename(blobs / HEAD_NAME, outside)
    with pytest.raises(FolderError, match="missing"):
        read_weights(snapshot)
    (snapshot / HEAD_NAME).unlink()
    (snapshot / HEAD_NAME).symlink_to(outside)
    with pytest.raises(FolderError, match="outside"):
        read_weights(snapshot)


# JSON


def test_json_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    cases = {
        b"{": "not JSON",
        b"": "not JSON",
        b"[1]": "an array",
        b"3": "a number",
        b'"a"': "a text",
        b"null": "null",
        b'{"a": 1, "a": 2}': "twice",
        b'{"a": {"b": 1, "b": 2}}': "twice",
        b'{"a": NaN}': "NaN",
        b'{"a": -Infinity}': "Infinity",
        b'{"a": 1e999}': "too large",
        b'{"a": "\xff"}': "UTF-8",
        b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}": "71 levels",
        b"[" * 1_000_000: "levels",
        b'{"a": ' + b"9" * 5000 + b"}": "not JSON",
    }
    for content, said in cases.items():
        path.write_bytes(content)
        with pytest.raises(FormatError, match=rf"config\.json.*{said}"):
            read_json(path)
    path.write_bytes(b'{"brackets in text do not count": "%s"}' % (b"[" * 1000))
    assert read_json(path)
    with pytest.raises(FolderError, match="missing"):
        read_json(tmp_path / "nowhere.json")


def test_an_enormous_json_file_is_refused_by_its_size_before_it_is_read(tmp_path: Path) -> None:
    for name in ("config.json", INDEX_NAME):
        with (tmp_path / name).open("wb") as file:
            file.truncate(200 * 1000**2)
    with pytest.raises(FormatError, match="200000000 bytes"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FormatError, match="200000000 bytes"):
        read_weights(tmp_path)


@given(st.binary(max_size=60) | st.text(alphabet='[]{},:"\\ antrue1-.', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_our_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        found = read_json(path)
    except FormatError:
        return
    assert found == json.loads(content)


def test_json_is_written_so_that_it_can_be_read(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    with pytest.raises(FormatError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert read_json(tmp_path / "x.json") == data
    assert os.listdir(tmp_path) == ["x.json"]


# Reading while somebody saves


def write_version(folder: Path, version: float) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"version": version})
    write_weights(
        folder, nn.ModuleDict({"trunk": nn.Linear(2, 2)}), state={"trunk.weight": torch.full((2, 2), version)}
    )


def read_version(folder: Path, between: Callable[[], None]) -> tuple[float, Tensor]:
    calls = iter([between])

    def read(opened: OpenFolder) -> tuple[float, Tensor]:
        version = opened.read_json("config.json")["version"]
        next(calls, lambda: None)()
        return version, read_weights(opened)["trunk.weight"]

    return read_folder(folder, read)


def test_a_folder_swapped_while_it_is_read_is_read_as_one_save(tmp_path: Path) -> None:
    folder, new = tmp_path / "tower", tmp_path / "new"
    write_version(folder, 1.0)
    write_version(new, 2.0)

    def swap() -> None:
        folder.rename(tmp_path / "old")
        new.rename(folder)

    version, weight = read_version(folder, swap)
    assert weight.unique().tolist() == [version]


def test_a_folder_swapped_and_removed_while_it_is_read_is_read_anew(tmp_path: Path) -> None:
    folder, new = tmp_path / "tower", tmp_path / "new"
    write_version(folder, 1.0)
    write_version(new, 2.0)

    def swap() -> None:
        folder.rename(tmp_path / "old")
        new.rename(folder)
        for path in (tmp_path / "old").iterdir():
            path.unlink()

    version, weight = read_version(folder, swap)
    assert (version, weight.unique().tolist()) == (2.0, [2.0])


def test_files_replaced_one_by_one_while_they_are_read_are_read_anew(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    write_version(folder, 1.0)
    version, weight = read_version(folder, lambda: write_version(folder, 2.0))
    assert (version, weight.unique().tolist()) == (2.0, [2.0])


def test_a_folder_that_never_rests_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    write_version(folder, 0.0)

    def read(opened: OpenFolder) -> None:
        version = opened.read_json("config.json")["version"]
        write_json(folder / "config.json", {"version": version + 1})

    with pytest.raises(FolderError, match="changed"):
        read_folder(folder, read)


# The files of one save


CONFIG = {"model_type": "timm_tower", "architecture": "resnet18", "pool": "avg", "model_args": {"act_layer": "relu"}}


def write_tower(folder: Path, limit: int | str = "5GB") -> Path:
    folder.mkdir()
    write_json(folder / CONFIG_NAME, CONFIG)
    write_weights(folder, Tower(64), limit)
    write_json(folder / FINGERPRINT_NAME, tie_digests(folder))
    return folder


def words_about(folder: Path, **edit: Any) -> str | None:
    digests: dict[str, str] = {}
    read_weights(folder, digests=digests)
    return mismatch(read_json(folder / FINGERPRINT_NAME), {**CONFIG, **edit}, digests, "x")


@pytest.mark.parametrize("limit", ["5GB", 300])
@pytest.mark.parametrize("part", ["head", "trunk"])
def test_a_file_of_another_save_is_named(tmp_path: Path, limit: int | str, part: str) -> None:
    torch.manual_seed(1)
    first, second = write_tower(tmp_path / "a", limit), write_tower(tmp_path / "b", limit)
    assert words_about(first) is None
    (name, *_) = sorted(path.name for path in first.glob(f"{part}*"))
    (first / name).write_bytes((second / name).read_bytes())
    assert f"{name} is not of the save" in str(words_about(first))


@pytest.mark.parametrize("size", [1, 2**18 - 200, 2**18 + 4096, 10 * 2**20])
def test_a_files_digest_tells_other_weights_of_the_same_shape_apart(tmp_path: Path, size: int) -> None:
    found = set()
    for seed in range(3):
        weights = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            write_aligned(tmp_path / "a.safetensors", {"a": weights})
            with OpenFolder(tmp_path) as folder:
                found.add((seed, folder.digest("a.safetensors")))
    assert len(found) == len({digest for _, digest in found}) == 3


def test_a_fingerprint_without_digests_says_nothing() -> None:
    assert mismatch(None, CONFIG, {HEAD_NAME: "x"}, "x") is None
    assert mismatch({"outputs": {}}, CONFIG, {HEAD_NAME: "x"}, "x") is None


@pytest.mark.parametrize("digests", [3, [], None, {"files": 3}, {"files": []}, {"config": "x"}])
def test_a_wrong_list_of_digests_is_refused(digests: object) -> None:
    with pytest.raises(FormatError, match=r"fingerprint\.json: digests"):
        mismatch({"digests": digests}, CONFIG, {}, "x")


@pytest.mark.parametrize(
    "edit",
    [{"pool": "max"}, {"architecture": "resnet34"}, {"model_args": {}}, {"model_args": None},
     {"head": {"form": "graph"}}, {"proj_bias": True}, {"layout": "NHWC"}, {"model_args": {"act_layer": "gelu"}}],
)  # fmt: skip
def test_a_config_that_was_edited_in_what_changes_outputs_is_named_by_field(
    tmp_path: Path, edit: dict[str, Any]
) -> None:
    words = str(words_about(write_tower(tmp_path / "a"), **edit))
    assert f"config.json: {next(iter(edit))}=" in words
    assert "Undo it" in words


@pytest.mark.parametrize(
    "edit",
    [{"id2label": {"0": "cat"}}, {"_name_or_path": "x"}, {"frozen": None}, {"auto_map": {}}, {"dtype": "float32"},
     {"timm_version": "9"}, {"head": None}, {"model_args": {"act_layer": "relu"}}, {"preprocess": {"mean": [0.5]}}],
)  # fmt: skip
def test_other_edits_of_a_config_are_the_users_business(tmp_path: Path, edit: dict[str, Any]) -> None:
    assert words_about(write_tower(tmp_path / "a"), **edit) is None


@pytest.mark.parametrize("face", [TimmModel, TimmTowerModel])
def test_no_face_takes_an_edited_tower_or_a_mix_without_a_word(tmp_path: Path, face: Any) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        TimmModel("test_vit", 8, pool="token").save_pretrained(tmp_path / name, include_code=False)
    config = read_json(tmp_path / "a" / CONFIG_NAME)
    write_json(tmp_path / "a" / CONFIG_NAME, {**config, "id2label": {"0": "cat"}, "label2id": {"cat": 0}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        face.from_pretrained(tmp_path / "a")
    write_json(tmp_path / "a" / CONFIG_NAME, {**config, "model_args": {**config["model_args"], "act_layer": "relu"}})
    with pytest.warns(UserWarning, match="model_args=.* is not what the weights were saved with"):
        face.from_pretrained(tmp_path / "a")
    write_json(tmp_path / "a" / CONFIG_NAME, config)
    for name in (TRUNK_NAME, HEAD_NAME):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
        with pytest.warns(UserWarning, match=f"{name}.*files of two saves"):
            face.from_pretrained(tmp_path / "a")


# Files as they should not be


def test_without_mmap_a_change_in_place_reaches_no_tensor(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower(64))
    for mmap in (False, True):
        tensors = read_weights(tmp_path, mmap=mmap)
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        content = (tmp_path / TRUNK_NAME).read_bytes()
        with open(tmp_path / TRUNK_NAME, "r+b") as file:
            file.seek(-2000, os.SEEK_END)
            file.write(bytes(2000))
        assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items()) == (not mmap)
        with open(tmp_path / TRUNK_NAME, "r+b") as file:
            file.write(content)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    write_weights(tmp_path, Tower())
    (tmp_path / TRUNK_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(FormatError, match=r"trunk\.safetensors: a pointer of git-lfs.*git lfs pull"):
        read_weights(tmp_path)


def test_text_of_a_folder_is_read_bounded_and_from_files_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    assert read_text(folder / "README.md") is None
    folder.mkdir()
    assert read_text(folder / "README.md") is None
    (folder / "README.md").write_text("grün", encoding="utf-8")
    assert read_text(folder / "README.md") == "grün"
    (tmp_path / "secret").write_text("secret")
    (folder / "inner.md").write_text("inner")

    def refused(make: Callable[[Path], object], match: str) -> None:
        (folder / "README.md").unlink()
        make(folder / "README.md")
        with pytest.raises((FolderError, FormatError), match=match):
            read_text(folder / "README.md")

    refused(lambda path: path.symlink_to("../secret"), "outside of the tower's folder")
    refused(lambda path: path.symlink_to("/dev/zero"), "outside of the tower's folder")
    refused(lambda path: path.symlink_to("missing"), "which is missing")
    refused(os.mkfifo, "not a regular file")
    refused(lambda path: path.write_bytes(b"\xff"), "not UTF-8")
    refused(lambda path: path.write_bytes(b"x" * (2**20 + 1)), "at most 1048576")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("inner.md")
    assert read_text(folder / "README.md") == "inner"


@pytest.mark.parametrize("name", ["\x1b[2J.safetensors", "a\nb.safetensors", "\u202ea.safetensors", "a\0.safetensors"])
def test_a_file_name_that_a_terminal_would_act_on_is_refused_and_shown_escaped(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path, Tower())
    index = read_json(tmp_path / INDEX_NAME)
    index["weight_map"]["trunk.x"] = name
    write_json(tmp_path / INDEX_NAME, index)
    with pytest.raises(FormatError, match="not the plain name of a") as caught:
        read_weights(tmp_path)
    assert str(caught.value).isprintable()


def test_json_beyond_the_limit_is_refused_before_it_is_parsed_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [' + "{}," * (MAX_JSON_BYTES // 3) + "{}]}")
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", None)
        with pytest.raises(FormatError, match="at most"):
            read_json(path)
    with pytest.raises(FormatError, match="at most"):
        write_json(path, {"a": "x" * MAX_JSON_BYTES})
    write_json(path, {"a": "x" * (MAX_JSON_BYTES - 20)})
    assert len(read_json(path)["a"]) == MAX_JSON_BYTES - 20

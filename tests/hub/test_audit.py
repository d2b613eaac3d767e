"""Files and keys that transformers acts on by itself: each face of a tower refuses them, or says what they do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hf_timm_tower import (
    ConfigError,
    FolderError,
    FormatError,
    TimmModel,
    TimmTowerConfig,
    TimmTowerEncoder,
    TimmTowerImageProcessor,
    TimmTowerModel,
    TowerError,
)

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "tower"
    TimmModel("test_vit", embed_dim=8).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tower: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tower, tmp_path / "copy")


def writes(name: str, content: Any) -> Damage:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(data)


def sets(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return damage


def in_place_of(name: str, make: Damage) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def only_a_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"trunk.norm.weight": torch.ones(4)}, folder / "pytorch_model.bin")


def another_config(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    sets(configuration_files=["config.4.0.0.json"])(folder)


OTHER_MODEL: dict[str, tuple[Damage, str]] = {
    "an adapter": (writes("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "/etc"}), "adapter"),
    "a shard": (
        lambda folder: shutil.copy(
            folder / "trunk.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors"
        ),
        "distributed training",
    ),
    "another config": (another_config, "configuration_files"),
    "other weights": (sets(transformers_weights="model.safetensors"), "transformers_weights"),
    "experts": (sets(experts_implementation="eager"), "experts_implementation"),
}
DAMAGED: dict[str, Damage] = {
    "auto_map of a number": sets(auto_map=3),
    "auto_map of numbers": sets(auto_map={"AutoModel": 3}),
    "no model_type": sets(model_type=None),
    "another model_type": sets(model_type="bert"),
    "configuration_files of a number": sets(configuration_files=5),
    "a list": writes("config.json", []),
    "null": writes("config.json", None),
    "deep": writes("config.json", b"[" * 100_000),
    "no JSON": writes("config.json", b"\xff\xfe"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no index": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "no head": lambda folder: (folder / "head.safetensors").unlink(),
    "head of no bytes": writes("head.safetensors", b""),
    "a pipe": in_place_of("head.safetensors", os.mkfifo),
    "a device": in_place_of("trunk.safetensors", lambda place: place.symlink_to("/dev/zero")),
    "a loop": in_place_of("trunk.safetensors", lambda place: place.symlink_to(place.name)),
    "only a pickle": only_a_pickle,
}


@pytest.mark.parametrize("case", OTHER_MODEL)
def test_what_would_make_another_model_of_a_folder_is_refused(copy: Path, case: str) -> None:
    damage, told = OTHER_MODEL[case]
    damage(copy)
    for load in (TimmTowerModel.from_pretrained, AutoModel.from_pretrained, TimmTowerEncoder.from_pretrained):
        with pytest.raises((ConfigError, FormatError), match=told):
            load(copy)


def test_an_adapter_beside_a_tower_that_leads_to_another_tower_is_refused(copy: Path, tower: Path) -> None:
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tower)}))
    with pytest.raises(ConfigError, match="adapter"):  # as AutoModel asks, where the place is a repository
        TimmTowerModel.from_pretrained(tower, adapter_kwargs={"_adapter_model_path": str(copy)})


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_told_by_our_errors_and_nothing_is_waited_for(copy: Path, case: str) -> None:
    DAMAGED[case](copy)
    for cls in (TimmTowerModel, TimmTowerEncoder, *(() if case.startswith("auto_map") else (TimmModel,))):
        with pytest.raises(TowerError):
            cls.from_pretrained(copy)


@pytest.mark.parametrize("content", [[], None, b"", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_file_that_is_read_alone_is_told_by_our_errors(copy: Path, content: Any) -> None:
    writes("config.json", content)(copy)
    writes("preprocessor_config.json", content)(copy)
    with pytest.raises((FolderError, FormatError)):
        TimmTowerConfig.from_pretrained(copy)
    with pytest.raises((FolderError, FormatError)):
        TimmTowerImageProcessor.from_pretrained(copy)


@pytest.mark.parametrize("load", [TimmModel.from_pretrained, TimmTowerModel.from_pretrained], ids=["timm", "face"])
def test_an_image_processor_that_transformers_prefers_is_told(copy: Path, load: Callable[[Path], Any]) -> None:
    own = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    load(copy)
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": {**own, "image_mean": [0.1, 0.2, 0.3]}}))
    with pytest.warns(UserWarning, match=r"processor_config\.json .*image_mean"):
        load(copy)

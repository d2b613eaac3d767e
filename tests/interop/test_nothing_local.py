"""What is exported or saved to be given away names nothing of the machine and the person that made it."""

import importlib.util
import inspect
import os
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, VisionTextDualEncoderModel

from hf_timm_tower import TimmModel, TimmTowerModel
from hf_timm_tower.hub.dual_encoder import make_self_contained
from hf_timm_tower.interop.onnx import export_onnx
from hf_timm_tower.interop.peft import add_lora, load_lora
from hf_timm_tower.interop.torch_export import export_torch

HEAD = """
import torch.nn as nn

class Head(nn.Module):
    def __init__(self, width, embed_dim):
        super().__init__()
        self.layer = nn.Linear(width, embed_dim)

    def forward(self, x):
        a_line_of_the_users_own_source = self.layer(x)
        return a_line_of_the_users_own_source.relu()
"""
WAYS: dict[str, Callable[[TimmModel, Path], Any]] = {
    "onnx": lambda tower, folder: export_onnx(tower, folder / "m.onnx", check=False),
    "onnx, checked": lambda tower, folder: export_onnx(tower, folder / "m.onnx"),
    "torch.export": lambda tower, folder: export_torch(tower, folder / "m.pt2"),
    "timm": lambda tower, folder: tower.export_timm(folder / "timm", head="drop"),
    "save": lambda tower, folder: tower.save_pretrained(folder / "tower"),
}


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file and every member of an archive, with its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield f"{path.name}:{name}", archive.read(name)


def secrets(folder: Path) -> dict[str, str]:
    """What must not be found -> what it is."""
    found = {value: f"the environment's {name}" for name, value in os.environ.items() if len(value) > 7}
    found |= {
        str(folder): "the folder of the user's code",
        str(Path.cwd()): "the working directory",
        str(Path.home()) + "/": "the home folder",
        sys.prefix: "the environment's folder",
        sysconfig.get_path("purelib"): "site-packages",
        "site-packages": "site-packages",
        f"{os.getpid()}-": "the process",
        "a_line_of_the_users_own_source": "the user's source",
    }
    if len(os.uname().nodename) > 4:
        found[os.uname().nodename] = "the host"
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", [False, True])
def test_nothing_of_this_machine_is_in_what_is_written(
    way: str, head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way.startswith("onnx") and "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("this torch cannot write ONNX from a program")
    code, written = tmp_path / "zaphod", tmp_path / "out"
    code.mkdir(), written.mkdir()
    monkeypatch.setenv("USER", "zaphod-beeblebrox")
    monkeypatch.setenv("HF_TOKEN", "hf_zaphodzaphodzaphod")
    (code / "heads_of_zaphod.py").write_text(HEAD)
    spec = importlib.util.spec_from_file_location("heads", code / "heads_of_zaphod.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = {"custom_head": module.Head} if head else {}
    WAYS[way](TimmModel("test_vit", 16, pool="token", **more).eval(), written)
    looked_at = 0
    for name, data in contents(written):
        for secret, what in secrets(code).items():
            for spelling in {secret, secret.replace("/", "\\/")}:
                assert spelling.encode() not in name.encode() + data, f"{what} stands in {name}"
        looked_at += len(data)
    assert looked_at > 10_000


def test_the_search_finds_what_torch_s_own_export_leaves_in_its_file(tmp_path: Path) -> None:
    tower = TimmModel("test_vit", 16, pool="token").eval()
    torch.export.save(torch.export.export(tower, (torch.zeros(1, 3, 160, 160),)), tmp_path / "m.pt2")
    found = {
        what for _, data in contents(tmp_path) for secret, what in secrets(tmp_path).items() if secret.encode() in data
    }
    assert "site-packages" in found


def test_a_tower_inside_a_pair_of_models_does_not_say_where_it_was_loaded_from(tmp_path: Path) -> None:
    own, given = tmp_path / "zaphod", tmp_path / "given"
    TimmModel("test_vit", 16, pool="token").save_pretrained(own / "tower")
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=30, hidden_size=16, **small)).save_pretrained(own / "text")
    pair = VisionTextDualEncoderModel.from_vision_text_pretrained(str(own / "tower"), str(own / "text"))
    pair.save_pretrained(given)
    assert "zaphod/tower" not in (given / "config.json").read_text()
    make_self_contained(given)
    assert "zaphod" not in (given / "config.json").read_text()
    assert VisionTextDualEncoderModel.from_pretrained(given).config.vision_config.architecture == "test_vit"


def test_an_adapter_does_not_say_which_folder_its_tower_was_loaded_from(tmp_path: Path) -> None:
    own, given, again = tmp_path / "zaphod", tmp_path / "given", tmp_path / "again"
    TimmModel("test_vit", 16, pool="token").save_pretrained(own)
    add_lora(TimmTowerModel.from_pretrained(own)).save_pretrained(given)
    load_lora(TimmTowerModel.from_pretrained(own), given).save_pretrained(again)
    for name, data in (*contents(given), *contents(again)):
        assert b"zaphod" not in data, name

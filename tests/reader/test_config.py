"""The config: validated once, complete, and the same after JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch.nn as nn
from transformers import PreTrainedConfig

from hf_timm_tower import ConfigError, FolderError, FormatError, TimmModel, TimmTowerConfig, TowerError

NAMED_BY_TRANSFORMERS = pytest.mark.skipif(
    not hasattr(PreTrainedConfig, "per_layer_config"), reason="a name like any other to this transformers"
)


def test_a_config_comes_back_from_json_and_from_a_folder(tmp_path: Path) -> None:
    config = TimmTowerConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"act_layer": nn.SiLU, "mlp_layer": timm.layers.SwiGLUPacked},
        image_size=(96, 128), in_chans=1, pool="token", proj="mlp", proj_bias=True, drop=0.5, embed_dim=7,
    )  # fmt: skip
    assert TimmTowerConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert TimmTowerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.image_size == [96, 128]


def test_a_completed_config_builds_a_tower_with_an_equal_config() -> None:
    for name in ("test_resnet", "test_vit", "test_mambaout"):
        done = TimmModel(name, 8).config
        again = TimmModel.from_config(done).config
        assert again.to_dict() == done.to_dict()
        assert None not in (done.num_features, done.layout, done.preprocess, done.image_size, done.timm_version)


def test_the_default_config_is_one() -> None:
    # transformers makes a config without arguments to find out what was changed
    assert TimmTowerConfig().to_dict()["model_type"] == "timm_tower"


def test_hidden_size_is_embed_dim() -> None:
    assert TimmTowerConfig(hidden_size=7).embed_dim == 7
    config = TimmTowerConfig(embed_dim=7)
    assert config.hidden_size == 7
    with pytest.raises(ConfigError, match=r"hidden_size=8.*embed_dim=7"):
        TimmTowerConfig(embed_dim=7, hidden_size=8)
    for wrong in (0, "a", 2.5, True):
        with pytest.raises(ConfigError, match=r"embed_dim|hidden_size"):
            TimmTowerConfig(hidden_size=wrong)


def test_keys_that_transformers_writes_are_accepted_and_no_others() -> None:
    TimmTowerConfig(num_labels=3, id2label={0: "a"}, dtype="bfloat16", architectures=["TimmTowerModel"])
    with pytest.raises(ConfigError, match=r"pooll='avg' \(did you mean pool"):
        TimmTowerConfig(pooll="avg")


@pytest.mark.parametrize("given", [{"image_size": 96}, {"model_args": {"depth": 2}}, {"image_size": [96, 96]}], ids=str)
def test_what_was_passed_in_is_not_changed_and_not_shared(given: dict[str, Any]) -> None:
    before = json.loads(json.dumps(given))
    config = TimmTowerConfig(architecture="test_vit", **given)
    if config.model_args:
        config.model_args["depth"] = 9
    if isinstance(config.image_size, list):
        config.image_size[0] = 1
    assert given == before


def test_versions() -> None:
    assert TimmTowerConfig(format_version=1).format_version == 1
    with pytest.raises(FormatError, match="Upgrade"):
        TimmTowerConfig(format_version=2)


@pytest.mark.parametrize("field", ["embed_dim", "in_chans", "image_size", "pool", "drop"])
def test_a_value_set_later_is_checked_as_one_given_at_once(field: str) -> None:
    config = TimmTowerConfig(embed_dim=7)
    with pytest.raises(Exception, match=field):
        setattr(config, field, {"not": "a value"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "x"),
        ("torch_dtype", "x"),
        ("id2label", [1]),
        ("use_return_dict", True),
        pytest.param("per_layer_config", {}, marks=NAMED_BY_TRANSFORMERS),
        ("self", 1),
        ("model_args", {"mlp_ratio": 1e308}),
    ],
)
def test_a_value_that_transformers_or_timm_cannot_take_is_our_error(key: str, value: Any, tmp_path: Path) -> None:
    TimmModel("test_vit", 4, pool="token").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TowerError):
        TimmModel.from_pretrained(tmp_path)


def test_nothing_in_the_text_of_an_error_acts_on_a_terminal() -> None:
    error = FolderError("a\x1b]0;b\x07\u202ec\nd\\ü")
    assert str(error) == "a\\x1b]0;b\\x07\\u202ec\nd\\ü"

"""What timm's own training and data code asks of a model, asked of a tower: the answers are those of the bare trunk."""

from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import group_modules, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_timm_tower import ConfigError, TimmModel, TimmTowerForImageClassification, TimmTowerModel
from hf_timm_tower.training.param_groups import group_matcher
from tests.timm_classes import smallest_of_each_class

FACES = ("timm", "transformers", "classifier")
PICTURE = Image.effect_noise((210, 170), 80).convert("RGB")


def faces(tower: TimmModel, folder: Any) -> dict[str, Any]:
    tower.save_pretrained(folder)
    return {
        "timm": tower,
        "transformers": TimmTowerModel.from_pretrained(folder),
        "classifier": TimmTowerForImageClassification.from_pretrained(folder, num_labels=3),
    }


def rates(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Parameter of the trunk -> its scale and weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group.get("lr_scale"), group["weight_decay"]) for group in groups for p in group["params"]}
    return {name.removeprefix("trunk."): pair for name, pair in found.items()}


@pytest.fixture(scope="module", params=["test_vit", "test_resnet", "test_convnext"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    tower = TimmModel(request.param, 16, pool="default")
    return timm.create_model(request.param, num_classes=16), faces(tower, tmp_path_factory.mktemp("t") / "t")


@pytest.mark.parametrize("face", FACES)
def test_timm_s_optimizers_decay_as_for_the_bare_model(pair: Any, face: str) -> None:
    bare, towers = pair
    ours = towers[face]
    trunk = {name for name, _ in ours.trunk.named_parameters()}
    undecayed = bare.no_weight_decay() if hasattr(bare, "no_weight_decay") else ()
    calls = [
        lambda model, _: create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups,
        lambda model, _: create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.05).param_groups,
        lambda model, names: param_groups_layer_decay(model, 0.05, names, layer_decay=0.7, min_scale=0.1),
        lambda model, names: param_groups_weight_decay(model, 0.05, no_weight_decay_list=names),
    ]
    for call in calls:
        expected = {name: value for name, value in rates(bare, call(bare, undecayed)).items() if name in trunk}
        found = rates(ours, call(ours, ours.no_weight_decay()))
        assert {name: value for name, value in found.items() if name in trunk} == expected
        after = {value[0] for name, value in found.items() if name not in trunk}
        assert after <= {None, 1.0}
        assert after


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_are_timm_s_by_parameters_and_by_modules(pair: Any, coarse: bool) -> None:
    bare, towers = pair
    ours = towers["timm"]
    for group in (group_parameters, group_modules):
        expected = group(bare, bare.group_matcher(coarse=coarse), reverse=True)
        found = group(ours, ours.group_matcher(coarse=coarse), reverse=True)
        names = [name for name in expected if f"trunk.{name}" in found]
        assert len(names) > 5
        assert {name: found[f"trunk.{name}"] for name in names} == {name: expected[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(smallest_of_each_class().values()))
def test_every_class_decays_as_bare(name: str) -> None:
    with torch.device("meta"):
        bare, tower = timm.create_model(name), torch.nn.Module()
        tower.trunk, tower.head = timm.create_model(name, num_classes=0), torch.nn.Linear(2, 2)
    tower.group_matcher = lambda coarse: group_matcher(tower, coarse)
    expected = rates(bare, param_groups_layer_decay(bare, layer_decay=0.5))
    found = rates(tower, param_groups_layer_decay(tower, layer_decay=0.5))
    names = found.keys() & expected.keys()
    assert len(names) > 0.8 * len(found)
    # where timm gives no classifier (encoders), the tower's head may be one layer more
    more = max(found[key][0] for key in names) / max(expected[key][0] for key in names)
    assert more == 1.0 or (more == 0.5 and expected.keys() <= {key for key, _ in tower.trunk.named_parameters()})
    assert {key: found[key] for key in names} == {key: (more * expected[key][0], expected[key][1]) for key in names}
    assert found["head.weight"][0] == 1.0


@pytest.mark.parametrize("face", FACES)
def test_timm_s_data_config_is_the_tower_s_own(face: str, tmp_path: Any) -> None:
    tower = TimmModel("test_vit", 16, image_size=(96, 128), pool="token")
    tower.config.preprocess |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 0.8}
    ours = faces(tower, tmp_path / "t")[face]
    for resolve in (resolve_model_data_config, lambda model: resolve_data_config({}, model=model)):
        data = resolve(ours)
        assert data["input_size"] == (3, 96, 128)
        assert (data["mean"], data["std"], data["crop_pct"]) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 0.8)
        assert torch.equal(create_transform(**data)(PICTURE), tower.transform()(PICTURE))
    assert ours.default_cfg == ours.pretrained_cfg
    text = (tmp_path / "t" / "config.json").read_text()
    assert "pretrained_cfg" not in text
    assert "default_cfg" not in text
    ours.save_pretrained(tmp_path / "again")
    assert "pretrained_cfg" not in (tmp_path / "again" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "again").model_type == "timm_tower"
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is TimmTowerModel
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "again")).__name__ == "TimmTowerImageProcessor"


def test_the_data_config_follows_a_new_size() -> None:
    tower = TimmModel("test_vit", 16, pool="token")
    tower.set_input_size(64)
    assert resolve_model_data_config(tower)["input_size"] == (3, 64, 64)


def test_preprocessing_that_timm_cannot_say_is_refused_and_not_approximated() -> None:
    for change in (
        {"channel_order": "BGR"},
        {"value_range": [0, 255]},
        {"padding": {"mode": "square", "color": [0] * 3}},
    ):
        tower = TimmModel("test_vit", 16, pool="token")
        tower.config.preprocess |= change
        with pytest.raises(ConfigError, match=next(iter(change))):
            resolve_model_data_config(tower)


def test_a_tower_is_no_timm_model_to_save(tmp_path: Any) -> None:
    # timm would write the tower's keys under the trunk's name
    with pytest.raises((KeyError, TypeError, AttributeError)):
        timm.models.save_for_hf(TimmModel("test_vit", 16, pool="token"), tmp_path / "t")
    with pytest.raises(ConfigError, match="not a model that"):
        TimmModel.from_trunk(TimmModel("test_vit", 16, pool="token"), 8)

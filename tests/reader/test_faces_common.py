"""What transformers tests of every model of its own, where test_modeling asks only one of the two faces."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import ConfigError, TimmModel, TimmTowerConfig
from hf_timm_tower.modeling import TimmTowerForImageClassification, TimmTowerModel

FACES = [TimmTowerModel, TimmTowerForImageClassification]
Classifier = TimmTowerForImageClassification
Face = type[TimmTowerModel] | type[TimmTowerForImageClassification]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower with attention, saved by `TimmModel`."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    TimmModel("test_vit", 16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tower with a classifier of three labels, several of which may hold."""
    folder = tmp_path_factory.mktemp("labelled")
    with pytest.warns(UserWarning, match="fresh"):
        model = Classifier.from_pretrained(
            plain, id2label={0: "cat", 1: "dog", 2: "owl"}, problem_type="multi_label_classification"
        )
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


def load(face: Face, labelled: Path, plain: Path, **kwargs: Any) -> Any:
    return face.from_pretrained(labelled if face is Classifier else plain, **kwargs)


def result(output: Any) -> torch.Tensor:
    """The one tensor that a face is used for."""
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output.pooler_output
    return found


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(labelled: Path, plain: Path, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A linear layer on what `TimmModel` gives, loaded in that dtype."""
    layer = Classifier.from_pretrained(labelled).classifier
    embedding = TimmModel.from_pretrained(plain, dtype=dtype)(pixels.to(dtype))
    return nn.functional.linear(embedding, layer.weight.to(dtype), layer.bias.to(dtype))


def test_no_weight_of_a_saved_classifier_is_missing(labelled: Path, plain: Path) -> None:
    model, info = Classifier.from_pretrained(labelled, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert torch.equal(model(images()).logits, logits_of(labelled, plain, images()))


def test_the_config_of_a_classifier_comes_back(labelled: Path, tmp_path: Path) -> None:
    config = TimmTowerConfig.from_pretrained(labelled)
    assert config.problem_type == "multi_label_classification"
    assert config.architectures == ["TimmTowerForImageClassification"]
    config.save_pretrained(tmp_path)
    again = TimmTowerConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() == TimmTowerConfig.from_dict(config.to_dict()).to_dict()
    assert again.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert again.num_labels == 3


def test_hidden_states_of_a_classifier_are_the_towers(labelled: Path, plain: Path) -> None:
    model = Classifier.from_pretrained(labelled)
    with torch.no_grad():
        output, quiet = model(images(), output_hidden_states=True), model(images())
        expected = TimmTowerModel.from_pretrained(plain)(images(), output_hidden_states=True).hidden_states
        picked = model(images(), output_hidden_states=[0])
        model.config.output_hidden_states = True
        asked_by_config = model(images())
    assert quiet.hidden_states is None
    assert torch.equal(output.logits, quiet.logits)
    for found in (output, asked_by_config):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.hidden_states, expected, strict=True))
    assert torch.equal(picked.hidden_states[0], expected[0])
    with pytest.raises(ConfigError, match="output_attentions"):
        model(images(), output_attentions=True)


@pytest.mark.parametrize("face", FACES)
def test_a_loss_on_a_hidden_state_trains_what_lies_below(face: Face, labelled: Path, plain: Path) -> None:
    model = load(face, labelled, plain)
    model(images(), output_hidden_states=[1]).hidden_states[1].square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"trunk.patch_embed.proj.weight", "trunk.blocks.0.attn.qkv.weight"} <= reached
    assert not any(name.startswith(("trunk.blocks.1.", "head.", "classifier.")) for name in reached)


@pytest.mark.parametrize("face", FACES)
def test_a_tuple_holds_what_the_output_holds_also_when_the_config_asks_for_it(
    face: Face, labelled: Path, plain: Path
) -> None:
    model = load(face, labelled, plain)
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
        values = [model(images(), output_hidden_states=True, return_dict=False)]
        model.config.return_dict = False
        values.append(model(images(), output_hidden_states=True))
        assert type(model(images(), return_dict=True)) is type(output)
    for found in values:
        assert type(found) is tuple
        assert len(found) == len(output.to_tuple())
        for ours, theirs in zip(found[:-1], output.to_tuple()[:-1], strict=True):
            assert torch.equal(ours, theirs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[-1], output.hidden_states, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # newer transformers has a newer name too
@pytest.mark.parametrize("face", FACES)
def test_gradient_checkpointing_goes_on_and_off_and_keeps_the_gradients(
    face: Face, labelled: Path, plain: Path
) -> None:
    model = load(face, labelled, plain).train()
    assert not model.is_gradient_checkpointing
    found = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        result(model(images())).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    assert model.trunk.grad_checkpointing
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6) for name in found[0])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not model.trunk.grad_checkpointing


@pytest.mark.parametrize("device_map", ["auto", {"trunk": "cpu", "head": "cpu", "classifier": "cpu"}])
def test_device_map_of_a_classifier(device_map: Any, labelled: Path, plain: Path) -> None:
    model = Classifier.from_pretrained(labelled, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(model(images()).logits, logits_of(labelled, plain, images()))


@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}])
def test_dtype_of_a_classifier_also_under_its_old_name(asked: dict[str, Any], labelled: Path, plain: Path) -> None:
    model = Classifier.from_pretrained(labelled, **asked)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(images()).logits, logits_of(labelled, plain, images(), torch.bfloat16))


def test_attention_implementation_of_a_classifier(labelled: Path) -> None:
    fused, eager = (Classifier.from_pretrained(labelled, attn_implementation=name) for name in ("sdpa", "eager"))
    for model, flag in ((fused, True), (eager, False)):
        flags = [module.fused_attn for module in model.trunk.modules() if hasattr(module, "fused_attn")]
        assert flags
        assert set(flags) == {flag}
    with torch.no_grad():
        assert torch.allclose(fused(images()).logits, eager(images()).logits, rtol=1e-4, atol=1e-5)


def test_compiling_changes_no_loss_and_no_gradient(labelled: Path) -> None:
    model = Classifier.from_pretrained(labelled).train()
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):  # in how many graphs, older torch decides
        model.zero_grad()
        loss = run(images(), labels=labels).loss
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (plain_loss, grads), (compiled_loss, again) = found
    assert torch.allclose(plain_loss, compiled_loss)
    assert all(torch.allclose(grads[name], again[name], rtol=1e-4, atol=1e-6) for name in grads)


def test_a_training_step_moves_every_part_of_a_plain_tower(plain: Path) -> None:
    model = TimmTowerModel.from_pretrained(plain).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    target, losses = torch.randn(4, 16), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        loss = (model(images(4)).pooler_output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []

"""The registry, the built-in heads, and which form a custom head is stored in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from hf_timm_tower import ArgumentError, ConfigError, HeadError, TimmModel, TimmTowerConfig, register_head
from hf_timm_tower.heads.registry import HEAD_FACTORIES, rebuild_stored
from hf_timm_tower.heads.stored_form import store_head
from hf_timm_tower.reader.head import builtin_head


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    before = dict(HEAD_FACTORIES)
    yield
    HEAD_FACTORIES.clear()
    HEAD_FACTORIES.update(before)


class ByValue(nn.Module):
    """No graph holds it: it looks at values."""

    def __init__(self, in_features: int, embed_dim: int, *, scale: float = 1.0, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y * self.scale if float(y.detach().sum()) > 0 else -y * self.scale


class Traceable(nn.Sequential):
    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__(nn.Linear(in_features, embed_dim), nn.ReLU())


def fresh(cls: type) -> Any:
    """A class of one's own with the same body: decorating it leaves the original alone."""
    return type(cls.__name__, (cls,), {"__module__": __name__, "__qualname__": f"fresh.{cls.__name__}"})


def test_head_that_no_graph_holds_is_stored_by_name_with_its_arguments() -> None:
    cls = register_head("tests/by-value")(fresh(ByValue))
    head = cls(6, embed_dim=3, scale=2.5, names=("a",))
    spec, _ = store_head(head, torch.randn(2, 6))
    assert spec == {
        "form": "registered",
        "name": "tests/by-value",
        "kwargs": {"in_features": 6, "embed_dim": 3, "scale": 2.5, "names": ["a"]},
    }
    again = rebuild_stored(spec)
    assert type(again) is cls
    again.load_state_dict(head.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(again(x), head(x))


def test_head_that_a_graph_holds_is_data_although_it_is_registered() -> None:
    cls = register_head("tests/traceable")(fresh(Traceable))
    assert store_head(cls(6, 3), torch.randn(2, 6))[0]["form"] == "graph"


def test_name_that_is_not_registered_at_load_says_what_to_import(tmp_path: Path) -> None:
    register_head("tests/gone")(fresh(ByValue))
    TimmModel("test_resnet", 8, custom_head="tests/gone").save_pretrained(tmp_path / "t")
    del HEAD_FACTORIES["tests/gone"]
    with pytest.raises(HeadError, match=r"(?s)'tests/gone'.*Import the module.*custom_head="):
        TimmModel.from_pretrained(tmp_path / "t")
    TimmModel.from_pretrained(tmp_path / "t", custom_head=ByValue)


def test_subclass_of_a_registered_head_is_not_taken_for_it() -> None:
    cls = register_head("tests/base")(fresh(ByValue))

    class Child(cls):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    with pytest.raises(HeadError, match="not registered"):
        store_head(Child(6, 3), torch.randn(2, 6))


def test_registered_head_that_was_changed_after_it_was_made_is_refused() -> None:
    head = register_head("tests/changed")(fresh(ByValue))(6, 3)
    head.scale = 9.0
    with pytest.raises(HeadError, match="by registered name"):
        store_head(head, torch.randn(2, 6))


@pytest.mark.parametrize("make", [lambda cls: cls(6, 3, names={1}), lambda cls: cls(6, 3, scale=torch.tensor(2.0))])
def test_registered_head_with_arguments_that_are_not_json_is_refused(make: Any) -> None:
    with pytest.raises(HeadError, match="not JSON"):
        store_head(make(register_head("tests/json")(fresh(ByValue))), torch.randn(2, 6))


def test_registered_function_is_stored_by_name() -> None:
    @register_head("tests/function")
    def make(in_features: int, embed_dim: int) -> nn.Module:
        return ByValue(in_features, embed_dim, scale=4.0)

    assert store_head(make(6, 3), torch.randn(2, 6))[0]["kwargs"] == {"in_features": 6, "embed_dim": 3}


def test_name_belongs_to_one_class() -> None:
    register_head("tests/one")(fresh(ByValue))
    register_head("tests/one")(fresh(ByValue))  # the same class again: a module that was reloaded
    with pytest.raises(ArgumentError, match="tests/one"):
        register_head("tests/one")(fresh(Traceable))
    for name in ("", "a b", "a\n", 3, None, "é;"):
        with pytest.raises(ArgumentError, match="register_head"):
            register_head(name)  # type: ignore[arg-type]


def test_storing_a_head_leaves_it_as_it_was() -> None:
    head = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    head[1].eval()
    state = {key: value.clone() for key, value in head.state_dict().items()}
    before = torch.get_rng_state()
    store_head(head, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in head] == [True, False, True]
    assert all(torch.equal(state[key], value) for key, value in head.state_dict().items())
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize(
    ("proj", "keys"),
    [
        ("linear", {"proj.weight", "proj.bias"}),
        ("mlp", {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}),
        ("none", set()),
    ],
)
def test_built_in_heads_have_open_clip_s_keys(proj: str, keys: set[str]) -> None:
    head = builtin_head(TimmTowerConfig(proj=proj, proj_bias=True, embed_dim=3, num_features=6))
    assert set(head.state_dict()) == keys
    with pytest.raises(ConfigError, match="num_features"):
        builtin_head(TimmTowerConfig(proj=proj, embed_dim=3))

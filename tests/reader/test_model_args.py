"""Arguments of timm as JSON: what goes in comes out, and no class comes in by another way."""

import json
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_timm_tower.reader.errors import ConfigError
from hf_timm_tower.reader.model_args import FORBIDDEN, allowed_classes, check_names, decode, encode

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31) + 1, 2**31 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: key != "class"), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(value=plain)
@settings(deadline=None)
def test_plain_values_come_back_through_json(value: Any) -> None:
    try:
        stored = json.loads(json.dumps(encode(value, "x")))
    except ConfigError as error:
        assert "deeper" in str(error)  # noqa: PT017
        return
    assert decode(stored, "x") == value
    assert encode(decode(stored, "x"), "x") == stored


@pytest.mark.parametrize(
    "cls", [nn.SiLU, nn.LayerNorm, timm.layers.SwiGLU, timm.layers.LayerNorm2d, timm.layers.GluMlp]
)
def test_classes_come_back_as_themselves(cls: type) -> None:
    stored = json.loads(json.dumps(encode(cls, "x")))
    assert set(stored) == {"class"}
    assert decode(stored, "x") is cls


def test_a_partial_keeps_its_class_and_keywords() -> None:
    stored = json.loads(json.dumps(encode(partial(nn.LayerNorm, eps=1e-6, bias=False), "x")))
    back = decode(stored, "x")
    assert (back.func, back.keywords, back.args) == (nn.LayerNorm, {"eps": 1e-6, "bias": False}, ())
    nested = decode(encode(partial(timm.layers.GluMlp, norm_layer=partial(nn.LayerNorm, eps=1.0)), "x"), "x")
    assert nested.keywords["norm_layer"].keywords == {"eps": 1.0}


@given(
    name=st.text() | st.sampled_from(["os.system", "torch.nn.init", "torch.nn.Module.__init__", "timm.layers.helpers"])
)
@settings(deadline=None)
def test_a_name_off_the_list_is_never_a_class(name: str) -> None:
    if name in allowed_classes():
        return
    for stored in ({"class": name}, {"class": name, "kwargs": {}}, [{"class": name}], {"deep": {"class": name}}):
        with pytest.raises(ConfigError, match="class"):
            decode(stored, "x")


def test_the_list_holds_modules_of_torch_and_timm_only() -> None:
    for name, cls in allowed_classes().items():
        assert issubclass(cls, nn.Module), name
        assert cls.__module__.split(".")[0] in ("torch", "timm"), name


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_a_forbidden_name_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not accepted here: "):
        check_names({name: 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_does_not_have_is_refused_when_it_is_given(value: float) -> None:
    with pytest.raises(ConfigError, match=r"x\[0\]"):
        encode([value], "x")

"""`TimmModel`: what it gives, how it is built, wrapped, changed, saved and loaded."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.timm_model
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from skimage import data as photographs

from hf_timm_tower import ArgumentError, ConfigError, HeadError, TimmModel, TimmTowerConfig, TowerError

TRUNKS = ("test_resnet", "test_vit", "test_convnext", "test_mambaout", "test_coatnet")


class ConvHead(nn.Module):
    """Only works on `[B, C, H, W]`."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, embed_dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


class Scaled(TimmModel):
    """Adds an argument and changes the forward."""

    def __init__(self, model_name: str, embed_dim: int | None = None, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(model_name, embed_dim, **kwargs)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class PassesAllOn(TimmModel):
    """The usual way to add an argument."""

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class OwnArguments(TimmModel):
    """Fixes the trunk, takes arguments of its own only."""

    def __init__(self, width: int, *, layers: int = 1) -> None:
        self.layers = layers
        super().__init__("test_resnet", width)

    def _create_head(self, in_features: int, embed_dim: int | None) -> nn.Module:
        assert embed_dim is not None
        return nn.Sequential(nn.Linear(in_features, embed_dim), *[nn.Linear(embed_dim, embed_dim)] * self.layers)


class OwnTrunk(TimmModel):
    """A trunk that timm's arguments cannot give."""

    def _create_trunk(self, pretrained: bool = False) -> nn.Module:
        trunk = super()._create_trunk(pretrained)
        trunk.act1 = nn.SiLU()
        return trunk


class WithTeacher(TimmModel):
    """Builds another tower in its constructor."""

    def __init__(self, model_name: str, embed_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(model_name, embed_dim, **kwargs)
        self.teacher = TimmModel("test_resnet", 8, pool="max")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.teacher(x)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(photographs.astronaut()).crop((20, 0, 320, 201))


def run(tower: nn.Module, image: torch.Tensor) -> Any:
    with torch.no_grad():
        return tower.eval()(image)


def round_trip(tower: TimmModel, folder: Path, image: torch.Tensor, **arguments: Any) -> TimmModel:
    """Save, load with the tower's own class, and compare."""
    tower.save_pretrained(folder)
    again = type(tower).from_pretrained(folder, **arguments)
    assert not again.training
    assert all(not module.training for module in again.modules())
    assert torch.equal(run(again, image), run(tower, image))
    assert again.config.to_dict().keys() == tower.config.to_dict().keys()
    return again


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# --- what it gives


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("proj", ["linear", "mlp", "none"])
def test_forward_is_head_after_features(name: str, proj: str, image: torch.Tensor) -> None:
    tower = TimmModel(name, embed_dim=None if proj == "none" else 8, proj=proj)
    whole = run(tower, image)
    with torch.no_grad():
        features = tower.forward_features(image)
        assert torch.equal(tower.forward_head(features), whole)
        assert torch.equal(features, tower.trunk.forward_features(image))
    assert whole.shape == (2, tower.config.embed_dim)
    assert tower.config.hidden_size == tower.config.embed_dim


@pytest.mark.parametrize(
    ("name", "pool", "head"),
    [("test_vit", "token_avg", None), ("test_mambaout", "none", ConvHead), ("test_convnext", "none", None),
     ("test_convnext", "rot_attn", None), ("test_vit", "none", None)],
)  # fmt: skip
def test_forward_is_head_after_features_for_every_arrangement(
    name: str, pool: str, head: Any, image: torch.Tensor
) -> None:
    tower = TimmModel(name, embed_dim=64, pool=pool, custom_head=head)
    whole = run(tower, image)
    with torch.no_grad():
        assert torch.equal(tower.forward_head(tower.forward_features(image)), whole)


# open_clip sizes its projection by trunk.num_features, which is not what test_mambaout gives
@pytest.mark.parametrize("name", [name for name in TRUNKS if name != "test_mambaout"])
def test_equal_to_open_clip_on_the_same_weights(name: str, image: torch.Tensor) -> None:
    for proj in ("linear", "mlp"):
        ours = TimmModel(name, 8, pool="avg", proj=proj)
        theirs = open_clip.timm_model.TimmModel(name, 8, image_size=160, pool="avg", proj=proj)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(run(ours, image), run(theirs, image))


def test_positional_arguments_are_open_clip_s() -> None:
    import inspect

    ours = list(inspect.signature(TimmModel.__init__).parameters.values())
    theirs = list(inspect.signature(open_clip.timm_model.TimmModel.__init__).parameters.values())
    assert [p.name for p in ours][: len(theirs)] == [p.name for p in theirs]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2, "normalize_intermediates": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"indices": 1, "output_fmt": "NLC"},
        {"output_extra_tokens": True},
    ],
    ids=str,
)
def test_intermediates_are_open_clip_s(name: str, arguments: dict[str, Any], image: torch.Tensor) -> None:
    ours = TimmModel(name, 8).eval()
    theirs = open_clip.timm_model.TimmModel(name, 8, image_size=160, pool="avg").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        try:
            expected = theirs.forward_intermediates(image, **arguments)
        except (AssertionError, TypeError) as error:
            with pytest.raises((type(error), TowerError)):
                ours.forward_intermediates(image, **arguments)
            return
        found = ours.forward_intermediates(image, **arguments)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        pairs = zip(value, found[key], strict=True) if isinstance(value, list) else [(value, found[key])]
        assert all(torch.equal(one, other) for one, other in pairs), key


def test_token_avg_is_what_virchow_code_computes(image: torch.Tensor) -> None:
    tower = TimmModel("test_vit", pool="token_avg", proj="none", model_kwargs={"reg_tokens": 4})
    bare = timm.create_model("test_vit", num_classes=0, reg_tokens=4)
    bare.load_state_dict(tower.trunk.state_dict())
    with torch.no_grad():
        output = bare.eval()(image) if bare.global_pool == "" else bare.eval().forward_features(image)
        class_token, patch_tokens = output[:, 0], output[:, 5:]
        expected = torch.cat([class_token, patch_tokens.mean(1)], dim=-1)
    assert output.shape[1] == 1 + 4 + 100
    assert torch.equal(run(tower, image), expected)
    assert tower.config.embed_dim == 128


def test_pool_none_gives_tokens_or_the_map(image: torch.Tensor) -> None:
    vit = TimmModel("test_vit", pool=None, proj="none")
    assert torch.equal(run(vit, image), vit.trunk.forward_features(image))
    assert vit.config.pool == "none"
    resnet = TimmModel("test_resnet", pool="none", proj="none")
    assert run(resnet, image).shape == (2, 96, 5, 5)
    projected = TimmModel("test_resnet", 8, pool="none")
    assert run(projected, image).shape == (2, 8, 5, 5)
    with torch.no_grad():
        features = projected.forward_features(image)
        expected = torch.einsum("bchw,dc->bdhw", features, projected.head.proj.weight)
    torch.testing.assert_close(run(projected, image), expected)


def test_proj_none_the_word_is_no_projection_and_none_the_value_the_trunk_s_classifier(image: torch.Tensor) -> None:
    word = TimmModel("test_resnet", proj="none")
    assert not [key for key in word.state_dict() if key.startswith("head.")]
    assert run(word, image).shape == (2, 96)
    for value in (None, ""):
        classifier = TimmModel("test_resnet", 8, proj=value)
        assert classifier.trunk.fc.weight.shape == (8, 96)
        assert run(classifier, image).shape == (2, 8)


def test_short_forms_of_pool_are_stored_resolved() -> None:
    assert TimmModel("test_vit", 8, pool="").config.pool == timm.create_model("test_vit").global_pool
    assert TimmModel("test_vit4", 8, pool="default").config.pool == timm.create_model("test_vit4").global_pool
    assert TimmModel("test_vit", pool="", custom_head=nn.Flatten()).config.pool == "none"
    assert TimmModel("test_resnet", 8, pool="").config.pool == "avg"


def test_nhwc_trunk_hands_a_custom_head_a_map_with_channels_first(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_mambaout", embed_dim=8, pool="none", custom_head=ConvHead)
    seen: list[torch.Size] = []
    handle = tower.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        features = tower.eval().trunk(image)
        expected = tower.head(features.permute(0, 3, 1, 2))
        torch.testing.assert_close(tower(image), expected)
    handle.remove()
    assert seen[-1] == (2, features.shape[-1], *features.shape[1:3])
    round_trip(tower, tmp_path / "t", image)


@pytest.mark.parametrize("chans", [1, 4])
def test_other_numbers_of_channels(chans: int, tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 8, model_kwargs={"in_chans": chans})
    assert tower.config.in_chans == chans
    assert tower.trunk.conv1[0].weight.shape[1] == chans
    again = round_trip(tower, tmp_path / "t", torch.randn(2, chans, 160, 160))
    assert len(again.config.preprocess["mean"]) == chans  # type: ignore[index]
    picture = Image.fromarray(np.zeros((200, 300, 4), np.uint8), "CMYK") if chans == 4 else Image.new("L", (300, 200))
    assert again.transform()(picture).shape == (chans, 160, 160)


@pytest.mark.parametrize(
    ("name", "kwargs", "look"),
    [
        ("test_vit", {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU},
         lambda trunk: (type(trunk.blocks[0].mlp), type(trunk.blocks[0].mlp.act)) == (timm.layers.GluMlp, nn.SiLU)),
        ("test_vit", {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)}, lambda trunk: trunk.norm.eps == 1e-3),
        ("test_resnet", {"act_layer": nn.SiLU}, lambda trunk: isinstance(trunk.act1, nn.SiLU)),
        ("test_vit", {"depth": 2, "reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True},
         lambda trunk: len(trunk.blocks) == 2 and trunk.reg_token.shape[1] == 4),
        ("test_resnet", {"layers": [1, 2, 1, 1]}, lambda trunk: len(trunk.layer2) == 2),
    ],
    ids=["swiglu", "partial", "act", "uni", "list"],
)  # fmt: skip
def test_model_kwargs_reach_the_trunk_and_come_back(
    name: str, kwargs: dict[str, Any], look: Callable[[Any], bool], tmp_path: Path, image: torch.Tensor
) -> None:
    given = copy.copy(kwargs)
    tower = TimmModel(name, 8, model_kwargs=kwargs)
    assert kwargs == given
    assert look(tower.trunk)
    assert look(round_trip(tower, tmp_path / "t", image).trunk)


def test_drop_rates_reach_the_trunk_and_come_back(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_vit", 8, drop=0.25, drop_path=0.3, patch_drop=0.5)
    for one in (tower, round_trip(tower, tmp_path / "t", image)):
        rates = [m.drop_prob for m in one.trunk.modules() if isinstance(m, timm.layers.DropPath)]
        assert max(rates) == pytest.approx(0.3)
        assert one.trunk.patch_drop.prob == 0.5
        assert one.head.drop.p == 0.25


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_gradient_checkpointing_changes_no_gradient(name: str, image: torch.Tensor) -> None:
    plain = TimmModel(name, 8)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert any(getattr(part, "grad_checkpointing", False) for part in checkpointed.trunk.modules())
    gradients = []
    for tower in (plain, checkpointed):
        tower.train()(image).square().sum().backward()
        gradients.append({key: p.grad for key, p in tower.named_parameters()})
    assert all(torch.allclose(gradients[0][key], gradients[1][key], rtol=1e-4, atol=1e-6) for key in gradients[0])
    assert all(value is not None for value in gradients[0].values())
    checkpointed.set_grad_checkpointing(False)
    assert not any(getattr(part, "grad_checkpointing", False) for part in checkpointed.trunk.modules())


def test_summary_counts_what_there_is() -> None:
    tower = TimmModel("test_resnet", 8)
    tower.lock()
    text = tower.summary()
    total = sum(parameter.numel() for parameter in tower.parameters())
    assert f"{total:,}" in text
    assert f"{8 * 96:,}" in text
    for word in ("test_resnet", "avg", "160", "trunk", "head"):
        assert word in text


# --- custom heads at construction


def test_custom_head_in_every_form_is_the_same_tower(image: torch.Tensor) -> None:
    def build(head: Any, dim: int | None = 8) -> TimmModel:
        torch.manual_seed(3)
        return TimmModel("test_resnet", dim, custom_head=head)

    for head in (
        nn.Linear,
        lambda width, dim: nn.Linear(width, dim),
        nn.Linear(96, 8),
        functools.partial(nn.Linear, bias=True),
    ):
        tower = build(head)
        assert type(tower.head) is nn.Linear
        assert tower.config.embed_dim == 8
        with torch.no_grad():
            torch.testing.assert_close(run(tower, image), tower.head(tower.trunk(image)))


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(96, 4), nn.Linear(96, 6)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "dict":
            return {"b": self.one(x), "a": (self.two(x), x)}
        if self.kind == "tuple":
            return self.one(x), self.two(x)
        return [self.one(x), self.two(x)]


@pytest.mark.parametrize("kind", ["dict", "tuple", "list"])
def test_head_that_returns_several_tensors_comes_back_in_the_same_form(
    kind: str, tmp_path: Path, image: torch.Tensor
) -> None:
    tower = TimmModel("test_resnet", custom_head=Several(kind))
    assert tower.config.embed_dim is None
    tower.save_pretrained(tmp_path / "t")
    ours, theirs = run(tower, image), run(TimmModel.from_pretrained(tmp_path / "t", verify=True), image)

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, dict):
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))

    assert same(ours, theirs)


# --- from_trunk, from_config


def test_from_trunk_wraps_a_model_with_its_weights(tmp_path: Path, image: torch.Tensor) -> None:
    trunk = timm.create_model("test_resnet", num_classes=7, drop_path_rate=0.2, act_layer=nn.SiLU)
    weights = {key: value.clone() for key, value in trunk.state_dict().items() if not key.startswith("fc.")}
    tower = TimmModel.from_trunk(trunk, 8)
    assert tower.trunk is trunk
    assert all(torch.equal(trunk.state_dict()[key], value) for key, value in weights.items())
    again = round_trip(tower, tmp_path / "t", image)
    assert isinstance(again.trunk.act1, nn.SiLU)
    assert max(m.drop_prob for m in again.trunk.modules() if isinstance(m, timm.layers.DropPath)) > 0


def test_from_trunk_keeps_the_classifier_as_the_projection(tmp_path: Path, image: torch.Tensor) -> None:
    trunk = timm.create_model("test_resnet", num_classes=7)
    expected = run(trunk, image)
    tower = TimmModel.from_trunk(trunk, 7, proj=None)
    assert torch.equal(run(tower, image), expected)
    round_trip(tower, tmp_path / "t", image)


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_from_trunk_after_set_input_size(name: str, tmp_path: Path) -> None:
    kwargs = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)} if "swin" in name else {}
    trunk = timm.create_model(name, **kwargs)
    trunk.set_input_size(img_size=(96, 128))
    x = torch.randn(2, 3, 96, 128)
    tower = TimmModel.from_trunk(trunk, 8)
    assert tower.config.image_size == [96, 128]
    round_trip(tower, tmp_path / "t", x)


def test_from_trunk_of_one_channel_and_of_tokens(tmp_path: Path) -> None:
    trunk = timm.create_model("test_vit", in_chans=1, num_classes=0, global_pool="token")
    tower = TimmModel.from_trunk(trunk, 8)
    assert (tower.config.pool, tower.config.in_chans) == ("token", 1)
    round_trip(tower, tmp_path / "t", torch.randn(2, 1, 160, 160))


def test_from_trunk_in_half_precision_makes_a_head_that_fits(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel.from_trunk(timm.create_model("test_resnet").bfloat16(), 8)
    again = round_trip(tower, tmp_path / "t", image.bfloat16())
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_from_trunk_of_a_changed_model_is_refused_at_once_or_at_save(tmp_path: Path) -> None:
    wider = timm.create_model("test_resnet")
    wider.layer4 = nn.Conv2d(192, 96, 1)
    with pytest.raises(ConfigError, match=r"layer4"):
        TimmModel.from_trunk(wider, 8)
    other = timm.create_model("test_resnet")
    other.act1 = nn.SiLU()
    with pytest.raises(TowerError):
        TimmModel.from_trunk(other, 8).save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t").exists()
    for model in (nn.Linear(3, 3), timm.create_model("test_resnet", features_only=True)):
        with pytest.raises(ConfigError):
            TimmModel.from_trunk(model, 8)


def test_from_trunk_with_a_custom_head_and_conflicts(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel.from_trunk(timm.create_model("test_mambaout"), pool="none", custom_head=ConvHead, embed_dim=8)
    round_trip(tower, tmp_path / "t", image)
    with pytest.raises(ArgumentError, match="proj"):
        TimmModel.from_trunk(timm.create_model("test_resnet"), 8, proj="mlp", custom_head=nn.Linear)
    with pytest.raises(ConfigError, match="embed_dim=0"):
        TimmModel.from_trunk(timm.create_model("test_resnet"), 0)


def test_from_config_builds_the_same_tower_with_fresh_weights(image: torch.Tensor) -> None:
    first = TimmModel("test_vit", 8, image_size=96, drop=0.5, model_kwargs={"depth": 2})
    before = first.config.to_dict()
    second = TimmModel.from_config(first.config)
    assert first.config.to_dict() == before
    assert second.config is not first.config
    assert second.training
    assert {key: value.shape for key, value in first.state_dict().items()} == {
        key: value.shape for key, value in second.state_dict().items()
    }
    assert not torch.equal(first.head.proj.weight, second.head.proj.weight)
    fresh = TimmModel.from_config(TimmTowerConfig(architecture="test_resnet", embed_dim=8))
    assert run(fresh, image).shape == (2, 8)


def test_from_config_of_a_saved_custom_head_and_of_a_live_one(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", 8, custom_head=lambda width, dim: nn.Sequential(nn.Linear(width, dim), nn.Tanh()))
    tower.save_pretrained(tmp_path / "t")
    fresh = TimmModel.from_config(TimmModel.from_pretrained(tmp_path / "t").config)
    assert run(fresh, image).abs().max() <= 1
    assert torch.isfinite(fresh.head[0].weight if hasattr(fresh.head, "__getitem__") else run(fresh, image)).all()
    with pytest.raises(HeadError, match="custom_head"):
        TimmModel.from_config(tower.config)


# --- subclasses


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scaled("test_resnet", 8, 3.0, pool="max"),
        lambda: PassesAllOn("test_resnet", 8, scale=3.0),
        lambda: OwnArguments(8, layers=2),
        lambda: OwnTrunk("test_resnet", 8),
        lambda: WithTeacher("test_resnet", 8),
    ],
    ids=["scaled", "passes_all_on", "own_arguments", "own_trunk", "with_teacher"],
)
def test_subclass_comes_back_through_its_own_class_only(
    build: Callable[[], TimmModel], tmp_path: Path, image: torch.Tensor
) -> None:
    tower = build()
    again = round_trip(tower, tmp_path / "t", image)
    assert type(again) is type(tower)
    for name in ("scale", "layers"):
        assert getattr(again, name, None) == getattr(tower, name, None)
    with pytest.raises(ConfigError, match=type(tower).__name__):
        TimmModel.from_pretrained(tmp_path / "t")
    round_trip(again, tmp_path / "second", image)


def test_subclass_argument_that_is_not_json_is_refused_at_save(tmp_path: Path) -> None:
    class Takes(TimmModel):
        def __init__(self, model_name: str, extra: nn.Module) -> None:
            super().__init__(model_name, 8)

    with pytest.raises(HeadError, match="extra"):
        Takes("test_resnet", nn.Linear(1, 1)).save_pretrained(tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- saving and loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saved_in_a_precision_comes_back_in_it(dtype: torch.dtype, tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_vit4", 8, custom_head=lambda w, d: nn.Sequential(nn.Linear(w, d), nn.LayerNorm(d))).to(
        dtype
    )
    again = round_trip(tower, tmp_path / "t", image.to(dtype), verify=True)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_dtype_and_device_are_honoured(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.save_pretrained(tmp_path / "t")
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        half = TimmModel.from_pretrained(tmp_path / "t", dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in half.buffers()} == {torch.bfloat16, torch.int64}  # counters stay whole numbers
    assert torch.equal(run(half, image.bfloat16()), run(copy.deepcopy(tower).bfloat16(), image.bfloat16()))
    for arguments in ({"device": "meta"}, {"map_location": torch.device("meta")}):
        there = TimmModel.from_pretrained(tmp_path / "t", **arguments)
        assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"meta"}
    widened = TimmModel.from_pretrained(tmp_path / "t", dtype=torch.float64)
    torch.testing.assert_close(run(widened, image.double()), run(tower, image).double(), rtol=1e-3, atol=1e-4)


def test_the_same_tower_saved_twice_gives_the_same_bytes(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", 8, custom_head=lambda w, d: nn.Sequential(nn.Linear(w, d), nn.BatchNorm1d(d)))
    tower.save_pretrained(tmp_path / "a")
    tower.save_pretrained(tmp_path / "b")
    TimmModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    tower.train()
    tower.save_pretrained(tmp_path / "a")
    first = contents(tmp_path / "a")
    assert len(first) >= 5
    assert contents(tmp_path / "b") == first
    assert contents(tmp_path / "c") == first


def test_fine_tuning_the_head_alone_leaves_the_trunk_s_file_as_it_was(tmp_path: Path, image: torch.Tensor) -> None:
    TimmModel("test_resnet", 8).save_pretrained(tmp_path / "t")
    before = contents(tmp_path / "t")
    tower = TimmModel.from_pretrained(tmp_path / "t")
    tower.lock(freeze_bn_stats=True)
    tower.train()
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    tower(image).square().sum().backward()
    optimizer.step()
    tower.save_pretrained(tmp_path / "t")
    after = contents(tmp_path / "t")
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert {"head.safetensors", "fingerprint.json"} <= changed
    assert changed <= {"head.safetensors", "fingerprint.json", "config.json", "README.md"}, "what is frozen, at most"
    assert torch.equal(run(TimmModel.from_pretrained(tmp_path / "t"), image), run(tower, image))


def test_saving_another_tower_into_the_folder_leaves_nothing_of_the_first(tmp_path: Path, image: torch.Tensor) -> None:
    loaded = round_trip(TimmModel("test_resnet", 8), tmp_path / "t", image)
    before = run(loaded, image)
    (tmp_path / "t" / "notes.txt").write_text("mine")
    round_trip(TimmModel("test_vit", proj="none"), tmp_path / "t", image)
    assert not (tmp_path / "t" / "head.safetensors").exists()
    assert (tmp_path / "t" / "notes.txt").read_text() == "mine"
    assert torch.equal(run(loaded, image), before), "a tower loaded before is not disturbed"


def test_head_shared_with_itself_stays_tied(tmp_path: Path, image: torch.Tensor) -> None:
    layer = nn.Linear(96, 96)
    tower = TimmModel("test_resnet", custom_head=nn.Sequential(layer, nn.ReLU(), layer))
    again = round_trip(tower, tmp_path / "t", image)
    names = [name for name, _ in again.named_parameters() if name.startswith("head.")]
    assert len(names) == 2


def test_large_tower_is_cut_into_shards_and_comes_back(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.save_pretrained(tmp_path / "t", max_shard_size="500KB")
    assert len(list((tmp_path / "t").glob("trunk-*.safetensors"))) >= 2
    assert torch.equal(run(TimmModel.from_pretrained(tmp_path / "t"), image), run(tower, image))


def test_subfolder_is_loaded(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", 8)
    tower.save_pretrained(tmp_path / "repo" / "inner")
    assert torch.equal(run(TimmModel.from_pretrained(tmp_path / "repo", subfolder="inner"), image), run(tower, image))


def test_lazy_layer_as_head_learns_its_width(tmp_path: Path, image: torch.Tensor) -> None:
    tower = TimmModel("test_resnet", custom_head=nn.Sequential(nn.LazyLinear(8), nn.ReLU()))
    tower(image)
    assert tower.config.embed_dim == 8
    round_trip(tower, tmp_path / "t", image)


def test_config_of_a_tower_is_json_and_says_what_the_tower_is(tmp_path: Path) -> None:
    TimmModel("test_vit", 8, image_size=96, pool="avg", model_kwargs={"act_layer": nn.SiLU}).save_pretrained(
        tmp_path / "t"
    )
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["model_type"] == "timm_tower"
    assert "pretrained_cfg" not in config
    assert (config["architecture"], config["pool"], config["embed_dim"], config["image_size"]) == (
        "test_vit", "avg", 8, [96, 96],
    )  # fmt: skip
    assert config["model_args"] == {"act_layer": {"class": "torch.nn.SiLU"}}


def test_transform_is_for_this_tower(photograph: Image.Image) -> None:
    tower = TimmModel("test_resnet", 8, image_size=96)
    x = tower.transform()(photograph).unsqueeze(0)
    assert x.shape == (1, 3, 96, 96)
    assert run(tower, x).shape == (1, 8)
    assert tower.transform(is_training=True)(photograph).shape == (3, 96, 96)


# --- regularisation for the next fine-tune


def test_rates_given_at_loading_replace_the_stored_ones_and_change_no_weight(tmp_path: Path) -> None:
    made = TimmModel("test_vit", 16, image_size=64, pool="token", drop_path=0.1, patch_drop=0.2)
    made.save_pretrained(tmp_path / "made")
    tower = TimmModel.from_pretrained(tmp_path / "made", drop=0.3, drop_path=0.4)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(tower(images), made.eval()(images))
    assert tower.head.drop.p == 0.3
    rates = [part.drop_prob for part in tower.trunk.modules() if type(part).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.4)
    assert tower.trunk.patch_drop.prob == 0.2
    tower.save_pretrained(tmp_path / "again")
    for name in ("trunk.safetensors", "head.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    stored = TimmModel.from_pretrained(tmp_path / "again").config
    assert (stored.drop, stored.model_args) == (0.3, {"drop_path_rate": 0.4, "patch_drop_rate": 0.2})
    off = TimmModel.from_pretrained(tmp_path / "again", patch_drop=0.0)
    assert not hasattr(off.trunk.patch_drop, "prob") or off.trunk.patch_drop.prob == 0.0


def test_a_rate_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    TimmModel("test_vit", image_size=64, proj="none").save_pretrained(tmp_path / "bare")
    with pytest.raises(ArgumentError, match="projection, which this tower does not have"):
        TimmModel.from_pretrained(tmp_path / "bare", drop=0.1)
    with pytest.raises(ConfigError, match="drop_path_rate=1"):
        TimmModel.from_pretrained(tmp_path / "bare", drop_path=1)
    TimmModel("efficientnet_b0", 4, image_size=32).save_pretrained(tmp_path / "convolutions")
    with pytest.raises(ArgumentError, match="patch_drop_rate"):
        TimmModel.from_pretrained(tmp_path / "convolutions", patch_drop=0.1)


def test_the_mixin_s_card_is_the_card_that_saving_writes(tmp_path: Path) -> None:
    tower = TimmModel("test_vit", 16, image_size=64)
    tower.save_pretrained(tmp_path / "tower", repo_id="me/tower", license="mit")
    card = tower.generate_model_card(repo_id="me/tower", license="mit")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert str(card) == (tmp_path / "tower" / "README.md").read_text()

"""Every recipe of docs/recipes.md against the code that the model's users are told to write; those inside others run.

At full size keys and shapes are compared (the meta device: some have a billion parameters), on a narrow model of the
same arguments the bits. Their code is written here from the facts of the public sources that the document names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.layers
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from hf_timm_tower import TimmModel, TimmTowerConfig

DOCUMENT, _, INSIDE = (
    (Path(__file__).resolve().parents[2] / "docs" / "recipes.md")
    .read_text(encoding="utf-8")
    .partition("# Inside trans")
)
BICUBIC = T.InterpolationMode.BICUBIC
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
NARROW = {"embed_dim": 96, "num_heads": 4}
VLM = "The tower of a vision-language model"


def recipes(document: str = DOCUMENT) -> dict[str, str]:
    """Heading -> its Python."""
    parts = re.split(r"^## (.+)$", document, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: "".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)) for name, text in found.items()}


def run(name: str) -> dict[str, Any]:
    """What a recipe's Python defines."""
    preamble = "".join(re.findall(r"^```python\n(.*?)^```$", DOCUMENT.split("\n## ")[0], re.M | re.S))
    names: dict[str, Any] = {"__name__": "recipes"}
    exec(compile(preamble + recipes()[name], f"docs/recipes.md: {name}", "exec"), names)
    return names


def class_and_mean(skip: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Virchow's embedding."""

    def embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        output = model(images)
        return torch.cat([output[:, 0], output[:, skip:].mean(1)], dim=-1)

    return embed


def second_last(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A vision-language model's patch tokens."""
    return model.get_intermediate_layers(images, n={len(model.blocks) - 2})[0]


def resized(
    size: int, crop: int, interpolation: T.InterpolationMode, norm: Any = IMAGENET
) -> Callable[[Image.Image], torch.Tensor]:
    return T.Compose([T.Resize(size, interpolation), T.CenterCrop(crop), T.ToTensor(), T.Normalize(*norm)])


def tagged(image: Image.Image) -> torch.Tensor:
    """The tagger's pixels: white square, 448, [-1, 1], BGR."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = T.Compose([T.Resize(448, BICUBIC), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])(canvas)
    return pixels[[2, 1, 0]]


@dataclass(frozen=True)
class Theirs:
    """Their code: how they build the model, what they do with it, how they prepare an image, of which sizes."""

    name: str | Callable[..., nn.Module]
    arguments: dict[str, Any]
    transform: Callable[[Image.Image], torch.Tensor]
    embed: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, images: model(images)
    sizes: tuple[tuple[int, int], ...] = ((320, 240), (224, 224), (190, 250))

    def model(self, **narrow: Any) -> nn.Module:
        arguments = {**self.arguments, **narrow}
        model = timm.create_model(self.name, **arguments) if isinstance(self.name, str) else self.name(**arguments)
        return model.eval()


VIRCHOW = {"img_size": 224, "init_values": 1e-5, "num_classes": 0, "mlp_ratio": 5.3375, "global_pool": "",
           "dynamic_img_size": True, **GATED}  # fmt: skip
THEIRS = {
    "UNI": Theirs(
        "vit_large_patch16_224",
        {"img_size": 224, "patch_size": 16, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True},
        resized(224, 224, T.InterpolationMode.BILINEAR),
    ),
    "UNI2-h": Theirs(
        "vit_giant_patch14_224",
        {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
         "mlp_ratio": 2.66667 * 2, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8,
         "dynamic_img_size": True, **GATED},
        resized(224, 224, T.InterpolationMode.BILINEAR),
    ),
    "Virchow": Theirs("vit_huge_patch14_224", VIRCHOW, resized(224, 224, BICUBIC), class_and_mean(1)),
    "Virchow2": Theirs(
        "vit_huge_patch14_224", {**VIRCHOW, "reg_tokens": 4}, resized(224, 224, BICUBIC), class_and_mean(5)
    ),
    "H-optimus": Theirs(
        timm.models.VisionTransformer,
        {"patch_size": 14, "embed_dim": 1536, "depth": 40, "num_heads": 24, "init_values": 1e-5, "mlp_ratio": 5.33334,
         "mlp_layer": partial(timm.layers.GluMlp, act_layer=nn.SiLU, gate_last=False), "act_layer": nn.SiLU,
         "reg_tokens": 4, "no_embed_class": True, "img_size": 224, "num_classes": 0, "in_chans": 3},
        T.Compose([T.ToTensor(), T.Normalize(*OPTIMUS)]),
        sizes=((224, 224),),
    ),
    "Prov-GigaPath": Theirs(
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "in_chans": 3, "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24,
         "init_values": 1e-5, "mlp_ratio": 5.33334, "num_classes": 0},
        resized(256, 224, BICUBIC),
    ),
    "wd-v3 tagger": Theirs(
        "vit_base_patch16_224",
        {"img_size": 448, "class_token": False, "global_pool": "avg", "fc_norm": False, "act_layer": "gelu_tanh",
         "num_classes": 10861},
        tagged,
    ),
    VLM: Theirs(
        "vit_large_patch14_reg4_dinov2",
        {"img_size": 224},
        T.Compose([T.Resize((224, 224), BICUBIC), T.ToTensor(), T.Normalize(*IMAGENET)]),
        second_last,
    ),
}  # fmt: skip


def make_tower(names: dict[str, Any], **narrow: Any) -> TimmModel:
    """A recipe's tower; `narrow` goes over the arguments of its trunk."""
    config: TimmTowerConfig = names["config"]
    config.model_args = {**config.model_args, **narrow}
    head = names["DropPrefix"]() if "DropPrefix" in names else None
    return TimmModel.from_config(config, custom_head=head).eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def test_every_recipe_is_compared() -> None:
    assert set(recipes()) == set(THEIRS)


@pytest.mark.parametrize("name", THEIRS)
def test_recipe_has_the_weights_of_their_code(name: str) -> None:
    with torch.device("meta"):
        theirs, tower = THEIRS[name].model(), make_tower(run(name))
    ours, expected = shapes(tower.trunk), shapes(theirs)
    if name == VLM:
        unused = {key for key in expected if key.startswith(("blocks.23.", "norm."))}
        expected = {key: shape for key, shape in expected.items() if key not in unused}
    assert ours == expected


@pytest.mark.parametrize("name", THEIRS)
def test_recipe_gives_the_bits_of_their_code_and_comes_back(name: str, tmp_path: Path) -> None:
    depth = 2
    theirs = THEIRS[name].model(**NARROW, depth=depth + (name == VLM))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)  # timm's own leaves layer scales and class tokens near zero
    names = run(name)
    tower = make_tower(names, **NARROW, depth=depth)
    left_over = [f"blocks.{depth}.*", "norm.*"] if name == VLM else []
    tower.load_trunk(theirs.state_dict(), ignore=left_over)
    images = torch.randn(2, 3, *tower.config.image_size)
    with torch.no_grad():
        expected = THEIRS[name].embed(theirs, images)
        assert expected.std() > 0.01
        assert torch.equal(tower(images), expected)
        if name == VLM:
            full = TimmModel.from_trunk(theirs, pool="none", proj="none").eval()
            assert torch.equal(names["penultimate"](full, images), expected)
    tower.save_pretrained(tmp_path / "tower")
    back = TimmModel.from_pretrained(tmp_path / "tower")
    with torch.no_grad():
        assert torch.equal(back(images), expected)
    assert back.config.preprocess == names["config"].preprocess


@pytest.mark.parametrize("name", THEIRS)
def test_recipe_prepares_the_pixels_of_their_code(name: str) -> None:
    transform = make_tower(run(name), **NARROW, depth=1).transform()
    for size in THEIRS[name].sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        assert torch.equal(transform(image), THEIRS[name].transform(image)), size


@pytest.mark.parametrize("name", recipes(INSIDE))
def test_recipe_inside_a_model_of_transformers_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = "test_resnet" if "segmentation" in name else "test_vit"
    TimmModel(architecture, 8, image_size=64).save_pretrained(tmp_path / "org" / "tower")
    monkeypatch.chdir(tmp_path)
    masks = torch.randint(0, 3, (2, 64, 64))
    names: dict[str, Any] = {"images": torch.rand(2, 3, 64, 64), "masks": masks, "words": torch.tensor([[5, 6]] * 2)}
    with pytest.warns(UserWarning, match=r"leaves out: head\.proj\.weight"):
        exec(compile(recipes(INSIDE)[name], f"docs/recipes.md: {name}", "exec"), names)
    if "features" in names:
        assert [tuple(each.shape) for each in names["features"]] == [(17, 64)] * 2
    else:
        assert names["loss"].isfinite()

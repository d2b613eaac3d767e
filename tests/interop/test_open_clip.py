"""open_clip's models as towers and towers inside open_clip: the same keys, the same bits, the same pixels."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import hf_timm_tower
from hf_timm_tower import (
    ArgumentError,
    ConfigError,
    FolderError,
    FormatError,
    HubError,
    TimmModel,
    TimmTowerConfig,
    WeightsError,
)
from hf_timm_tower.interop.open_clip_config import preprocess_entries, vision_arguments
from hf_timm_tower.interop.to_open_clip import to_open_clip_config, to_open_clip_state_dict
from hf_timm_tower.reader.skip_init import skip_init
from hf_timm_tower.training.transform import make_transform

from ..open_clip_calls import SIGLIP, TEXT, TINY
from ..timm_classes import chosen_part

CONFIGS = {
    name: config
    for name in open_clip.list_models()
    if (config := open_clip.get_model_config(name))["vision_cfg"].get("timm_model_name")
}
SMALL = ("MobileCLIP2-S0", "PE-Core-T-16-384", "ViTamin-S", "convnext_tiny")
MOST_PARAMETERS = 200_000_000
# Those with at most 200 million parameters in the vision tower; a test counts.
UP_TO_200_MILLION = (
    "convnext_base convnext_base_w convnext_base_w_320 convnext_large convnext_large_d convnext_large_d_320 "
    "convnext_small convnext_tiny EVA02-B-16 MobileCLIP2-B MobileCLIP2-S0 MobileCLIP2-S2 MobileCLIP2-S3 "
    "MobileCLIP-B MobileCLIP-S1 MobileCLIP-S2 nllb-clip-base-siglip PE-Core-B-16 PE-Core-S-16-384 "
    "PE-Core-T-16-384 swin_base_patch4_window7_224 ViT-B-16-SigLIP ViT-B-16-SigLIP2 ViT-B-16-SigLIP2-256 "
    "ViT-B-16-SigLIP2-384 ViT-B-16-SigLIP2-512 ViT-B-16-SigLIP-256 ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512 "
    "ViT-B-16-SigLIP-i18n-256 ViT-B-32-SigLIP2-256 vit_medium_patch16_gap_256 vit_relpos_medium_patch16_cls_224 "
    "ViTamin-B ViTamin-B-LTT ViTamin-S ViTamin-S-LTT "
).split()
# The smallest of open_clip's own configs, over all of its ways to pool and to project.
SMALLEST = (
    "PE-Core-T-16-384",
    "MobileCLIP2-S0",
    "MobileCLIP-S1",
    "ViTamin-S",
    "PE-Core-S-16-384",
    "convnext_tiny",
    "MobileCLIP-S2",
    "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224",
)


def their_tower(config: dict[str, Any]) -> torch.nn.Module:
    return _build_vision_tower(config["embed_dim"], dict(config["vision_cfg"])).eval()


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """No weight stays at a value (zero, one) that would hide where it went."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.02)
    return module


def under_visual(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"visual.{key}": value for key, value in module.state_dict().items()}


def photo(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height))


PHOTOS = [photo(400, 300), photo(211, 389), photo(90, 77), photo(256, 256)]


def outputs(module: torch.nn.Module, size: list[int] | tuple[int, ...]) -> torch.Tensor:
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module.eval()(image)


def assert_same_tower(ours: TimmModel, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    assert torch.equal(outputs(ours, ours.config.image_size), outputs(theirs, ours.config.image_size))


def assert_same_pixels(config: TimmTowerConfig, preprocess_cfg: dict[str, Any]) -> None:
    theirs = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    ours = make_transform(config)
    for image in PHOTOS:
        assert torch.equal(ours(image), theirs(image)), (image.size, preprocess_cfg)


# configs -> towers


@pytest.mark.slow
def test_every_timm_config_of_open_clip_has_its_keys_and_shapes() -> None:
    assert len(CONFIGS) == 78
    small, taken = [], chosen_part(CONFIGS)
    for name in taken:
        config = CONFIGS[name]
        with torch.device("meta"):
            theirs = their_tower(config)
        with skip_init():
            ours = TimmModel(**vision_arguments(config, name).arguments)
        assert {key: value.shape for key, value in ours.state_dict().items()} == {
            key: value.shape for key, value in theirs.state_dict().items()
        }, name
        if sum(parameter.numel() for parameter in theirs.parameters()) <= MOST_PARAMETERS:
            small.append(name)
    assert small == [name for name in UP_TO_200_MILLION if name in taken]


def assert_config_gives_equal_bits(name: str) -> None:
    torch.manual_seed(0)
    theirs = shake(their_tower(CONFIGS[name]))
    ours = TimmModel.from_open_clip(under_visual(theirs), model_config=name, preprocess_cfg={})
    assert_same_tower(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen_part(UP_TO_200_MILLION))
def test_every_config_up_to_200_million_parameters_gives_equal_bits(name: str) -> None:
    assert_config_gives_equal_bits(name)


@pytest.mark.parametrize("name", SMALL)
def test_small_configs_give_equal_bits(name: str) -> None:
    assert_config_gives_equal_bits(name)


def preprocessings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every preprocessing that open_clip's list of weights names for a timm config, once, with the config's size."""
    seen = []
    for name, config in CONFIGS.items():
        tags = open_clip.list_pretrained_tags_by_model(name)
        listed = [open_clip.get_pretrained_cfg(name, tag) for tag in tags] or [{}]
        for overlay in listed:
            cfg = merge_preprocess_dict(PreprocessCfg(), overlay)
            cfg["size"] = config["vision_cfg"]["image_size"]
            if cfg not in seen:
                seen.append(cfg)
                yield name, cfg


def small_config(cfg: dict[str, Any], size: Any) -> TimmTowerConfig:
    """A tower of this size and preprocessing; the trunk does not matter for pixels."""
    with skip_init():
        config = TimmModel("test_resnet", 16, image_size=size).config
    config.preprocess = {**config.preprocess, **preprocess_entries(cfg, "test")}
    return config


def test_every_preprocessing_of_open_clip_s_list_gives_equal_pixels() -> None:
    found = list(preprocessings())
    assert {cfg["resize_mode"] for _, cfg in found} == {"shortest", "squash"}
    assert len(found) > 10
    for _, cfg in found:
        assert_same_pixels(small_config(cfg, cfg["size"]), cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        {"interpolation": "bilinear"},
        {"interpolation": "bilinear", "resize_mode": "squash"},
        {"interpolation": "random"},
        {"mean": (0.5, 0.5, 0.5), "resize_mode": "longest", "fill_color": 128, "interpolation": "bilinear"},
        {"size": (96, 160)},
        {"size": (96, 160), "resize_mode": "squash"},
    ],
)
def test_further_preprocessing_gives_equal_pixels(cfg: dict[str, Any]) -> None:
    assert_same_pixels(small_config(cfg, cfg.get("size", 224)), cfg)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"resize_mode": "longest"}, "resize_mode='longest' with fill_color=0"),
        ({"resize_mode": "keep"}, "resize_mode='keep'"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos'"),
        ({"mode": "L"}, "open_clip knows RGB only"),
        ({"crop_pct": 0.9}, "preprocess_cfg has crop_pct"),
        ({"mean": [0.5, 0.5]}, "mean=.*expected three numbers"),
    ],
)
def test_preprocessing_that_cannot_be_equal_is_an_error(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess_entries(cfg, "test")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dim": 16}, "expected an open_clip model config"),
        ({"embed_dim": 16, "vision_cfg": {"layers": 2, "width": 64}}, "open_clip's own VisionTransformer"),
        ({"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1]}}, "open_clip's own ModifiedResNet"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "timm_pol": "avg"}}, "timm_pol, which open_clip"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "timm_proj": "cubic"}}, "proj='cubic'"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "timm_model_name": "hf-hub:a/b"}}, "without a scheme"),
    ],
)
def test_configs_that_are_no_timm_tower_are_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmModel.from_open_clip({"visual.x": torch.ones(1)}, model_config=config, preprocess_cfg={})


# open_clip's repository form


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> open_clip.tokenizer.HFTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=8)


def register(folder: Path, name: str, config: dict[str, Any]) -> str:
    """Make a config known to open_clip under a name, by its own means."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


@pytest.fixture
def published(tmp_path: Path, tokenizer: Any) -> tuple[Path, torch.nn.Module]:
    """A folder in open_clip's repository form, written by open_clip, and the model in it."""
    name = register(tmp_path / "configs", "tiny-tower", TINY)
    model = shake(open_clip.create_model(name, force_preprocess_cfg=SIGLIP)).eval()
    save_for_hf(model, tokenizer, open_clip.get_model_config(name), tmp_path / "published")
    return tmp_path / "published", model


def test_open_clip_s_own_folder_comes_back_with_its_preprocessing(
    published: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, model = published
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    for source in (folder, str(folder), f"local-dir:{folder}"):
        tower = TimmModel.from_open_clip(source)
        assert not tower.training
        assert_same_tower(tower, model.visual)
        assert all(torch.equal(tower.transform()(image), transform(image)) for image in PHOTOS)
    tower.save_pretrained(tmp_path / "tower")
    again = TimmModel.from_pretrained(tmp_path / "tower", verify=True)
    assert_same_tower(again, model.visual)
    assert all(torch.equal(again.transform()(image), transform(image)) for image in PHOTOS)


def test_the_folder_needs_no_open_clip(
    published: tuple[Path, torch.nn.Module], fresh_process: Callable[..., str], tmp_path: Path
) -> None:
    folder, model = published
    torch.save(outputs(model.visual, (160, 160)), tmp_path / "expected.pt")
    fresh_process(
        """
        import sys
        sys.modules["open_clip"] = None
        import torch
        from hf_timm_tower import TimmModel
        tower = TimmModel.from_open_clip(sys.argv[1])
        torch.set_num_threads(1)
        image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(tower(image), torch.load(sys.argv[2]))
        try:
            TimmModel.from_open_clip({}, model_config="ViT-B-16-SigLIP")
        except TypeError as error:
            assert "not installed" in str(error), error
        else:
            raise SystemExit("a name was looked up without open_clip")
        """,
        folder,
        tmp_path / "expected.pt",
    )


def test_the_tower_s_own_methods_do_the_same(published: tuple[Path, torch.nn.Module]) -> None:
    folder, model = published
    assert_same_tower(TimmModel.from_open_clip(folder), model.visual)
    half = TimmModel.from_open_clip(f"local-dir:{folder}", dtype="float16", image_size=192)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert half.image_size == (192, 192)
    tower = TimmModel("test_vit", 16, pool="token")
    report = tower.load_trunk(folder / "open_clip_model.safetensors", ignore=["text.*", "logit_scale", "visual.head.*"])
    assert report.prefix == "visual.trunk."
    assert torch.equal(tower.trunk.pos_embed, model.visual.trunk.pos_embed)
    with pytest.raises(ArgumentError, match="device="):
        TimmModel.from_open_clip(folder, device="nowhere")


@pytest.mark.parametrize("forced", [192, (128, 192)])
def test_image_size_resamples_as_open_clip_s_force_image_size(
    published: tuple[Path, torch.nn.Module], forced: Any
) -> None:
    folder, _ = published
    theirs = open_clip.create_model(f"local-dir:{folder}", force_image_size=forced)
    ours = TimmModel.from_open_clip(folder, image_size=forced)
    assert ours.config.image_size == list(forced if isinstance(forced, tuple) else (forced, forced))
    assert_same_tower(ours, theirs.visual)


def test_weights_decide_where_the_config_names_another_size(
    published: tuple[Path, torch.nn.Module], tmp_path: Path, tokenizer: Any
) -> None:
    folder, model = published
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 192
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"image_size=\[192, 192\], but open_clip builds test_vit for \[160, 160\]"):
        tower = TimmModel.from_open_clip(folder)
    assert tower.config.image_size == [160, 160]
    assert_same_tower(tower, model.visual)
    model.visual.set_input_size(192)
    save_for_hf(model, tokenizer, config["model_cfg"], tmp_path / "resized")
    resized = TimmModel.from_open_clip(tmp_path / "resized")
    assert resized.config.image_size == [192, 192]
    assert_same_tower(resized, model.visual)


def test_pickled_weights_are_read_only_when_asked_for(published: tuple[Path, torch.nn.Module]) -> None:
    folder, model = published
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"open_clip_pytorch_model\.bin is a pickle.*allow_pickle=True"):
        TimmModel.from_open_clip(folder)
    assert_same_tower(TimmModel.from_open_clip(folder, allow_pickle=True), model.visual)
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(FolderError, match="no weights that are read here"):
        TimmModel.from_open_clip(folder, allow_pickle=True)


def test_what_does_not_fit_is_an_error(published: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    state = published[1].state_dict()
    for change, message in (
        ({"visual.trunk.extra": torch.ones(1)}, "unexpected: trunk.extra"),
        ({"visual.trunk.cls_token": torch.ones(1, 1, 3)}, "of another shape: trunk.cls_token"),
    ):
        with pytest.raises(WeightsError, match=message):
            TimmModel.from_open_clip({**state, **change}, model_config=TINY, preprocess_cfg={})
    short = {key: value for key, value in state.items() if key != "visual.head.proj.weight"}
    with pytest.raises(WeightsError, match=r"missing: head\.proj\.weight"):
        TimmModel.from_open_clip(short, model_config=TINY, preprocess_cfg={})
    with pytest.raises(WeightsError, match=r"keys of a vision tower \(visual\.\*\) are missing"):
        TimmModel.from_open_clip({"text.x": torch.ones(1)}, model_config=TINY, preprocess_cfg={})
    with pytest.raises(ArgumentError, match="pass model_config="):
        TimmModel.from_open_clip(state)
    with pytest.raises(ArgumentError, match="pass preprocess_cfg="):
        TimmModel.from_open_clip(state, model_config=TINY)
    with pytest.raises(ArgumentError, match=r"not in open_clip\.list_models"):
        TimmModel.from_open_clip(state, model_config="ViT-Z", preprocess_cfg={})
    with pytest.raises(FolderError, match=r"open_clip_config\.json is missing"):
        TimmModel.from_open_clip(tmp_path)
    for wrong in ({"model_cfg": [1]}, {"model_cfg": TINY, "preprocess_cfg": None}):
        with pytest.raises(FormatError, match="must be an object"):
            TimmModel.from_open_clip(state, model_config=wrong, preprocess_cfg={})
    with pytest.raises(HubError, match="nobody/nothing"):
        TimmModel.from_open_clip("hf-hub:nobody/nothing")


def test_a_training_checkpoint_of_open_clip_is_read(published: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    _, model = published
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    tower = TimmModel.from_open_clip(
        tmp_path / "epoch_3.pt", model_config=TINY, preprocess_cfg=SIGLIP, allow_pickle=True
    )
    assert_same_tower(tower, model.visual)
    whole = {"model_cfg": TINY, "preprocess_cfg": SIGLIP}
    assert tower.config.to_dict() == TimmModel.from_open_clip(state, model_config=whole).config.to_dict()


def test_only_the_vision_tower_comes_into_memory(fresh_process: Callable[..., str], tmp_path: Path) -> None:
    config = {**CONFIGS["convnext_tiny"], "custom_text": True}
    model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": SIGLIP}))
    vision = sum(tensor.nbytes for tensor in model.visual.state_dict().values())
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert whole > 3 * vision  # reading it all would show
    del model
    printed = fresh_process(
        """
        import sys
        from pathlib import Path
        import torch
        from hf_timm_tower import TimmModel

        def status(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

        TimmModel("test_convnext", 16)(torch.zeros(1, 3, 64, 64))  # what loads late is loaded
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = status("VmRSS")
        tower = TimmModel.from_open_clip(sys.argv[1])
        print(status("VmHWM") - before)
        """,
        folder,
    )
    print(f"vision {vision}, whole {whole}, peak {int(printed)}, ratio {int(printed) / vision:.3f}")
    assert vision < int(printed) < 1.2 * vision


# a model in memory


IN_MEMORY = [
    {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
    {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160, "patch_dropout": 0.5},
    {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "mlp", "timm_proj_bias": True, "timm_drop": 0.1},
    {"timm_model_name": "resnet18", "timm_pool": "rot_attn", "timm_proj": ""},
    {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "timm_drop_path": 0.2},
    {"timm_model_name": "resnet18", "timm_pool": "abs_attn", "timm_proj": "linear"},
]


@pytest.mark.parametrize("vision", IN_MEMORY, ids=lambda vision: "-".join(str(value) for value in vision.values()))
def test_a_model_in_memory_gives_the_same_tower_as_its_config(vision: dict[str, Any], tmp_path: Path) -> None:
    width = 64 if vision["timm_proj"] == "none" else 16
    config = {**TINY, "embed_dim": width, "vision_cfg": {"image_size": 224, **vision}}
    name = register(tmp_path / "configs", f"live-{abs(hash(str(vision)))}", config)
    model = shake(open_clip.create_model(name, force_preprocess_cfg=SIGLIP))
    model.train()
    tower = TimmModel.from_open_clip(model)
    assert model.visual.training
    assert_same_tower(tower, model.visual)
    both = zip(tower.parameters(), model.visual.parameters(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in both)
    by_config = TimmModel.from_open_clip(model.state_dict(), model_config=config, preprocess_cfg=SIGLIP)
    same = ("pool", "proj", "proj_bias", "drop", "embed_dim", "image_size", "layout", "num_features", "preprocess")
    assert {key: getattr(tower.config, key) for key in same} == {key: getattr(by_config.config, key) for key in same}
    assert {key: tower.config.model_args.get(key) for key in ("drop_path_rate", "patch_drop_rate")} == {
        key: by_config.config.model_args.get(key) for key in ("drop_path_rate", "patch_drop_rate")
    }
    tower.save_pretrained(tmp_path / "tower")
    assert_same_tower(TimmModel.from_pretrained(tmp_path / "tower"), model.visual)


def test_models_without_a_timm_tower_or_changed_by_hand_are_errors(tmp_path: Path) -> None:
    native = open_clip.CLIP(16, {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, TEXT)
    with pytest.raises(ConfigError, match="its vision tower is a VisionTransformer, not a timm tower"):
        TimmModel.from_open_clip(native)
    model = shake(open_clip.CLIP(16, TINY["vision_cfg"], TEXT))
    with pytest.raises(ArgumentError, match="does not say how images are prepared"):
        TimmModel.from_open_clip(model)
    assert_same_tower(TimmModel.from_open_clip(model, preprocess_cfg={}), model.visual)
    for block in model.visual.trunk.blocks:
        block.mlp.act = torch.nn.Tanh()
    with pytest.raises(ConfigError, match="gives other outputs"):
        TimmModel.from_open_clip(model, preprocess_cfg={})


# towers -> open_clip


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"model_name": "test_vit", "pool": "token", "proj": "linear"}, 160),
        ({"model_name": "test_vit", "pool": "map", "proj": "none", "embed_dim": None}, 160),
        ({"model_name": "test_vit", "pool": "token", "proj": None}, 160),
        ({"model_name": "test_convnext", "pool": "default", "proj": "mlp", "proj_bias": True, "image_size": 96}, 96),
    ],
)
def test_a_tower_goes_into_open_clip_strictly(arguments: dict[str, Any], size: int, tmp_path: Path) -> None:
    tower = shake(TimmModel(**{"embed_dim": 16, "drop_path": 0.1, **arguments})).eval()
    tower.config.preprocess = {**tower.config.preprocess, **preprocess_entries(SIGLIP, "test")}
    config = to_open_clip_config(tower, TEXT, custom_text=True)
    model = open_clip.CustomTextCLIP(tower.config.embed_dim, config["model_cfg"]["vision_cfg"], TEXT)
    state = {**model.state_dict(), **to_open_clip_state_dict(tower)}
    model.load_state_dict(state, strict=True)
    assert_same_tower(tower, model.visual)
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    assert torch.equal(outputs(theirs.visual, (size, size)), outputs(tower, (size, size)))
    assert all(torch.equal(tower.transform()(image), transform(image)) for image in PHOTOS)
    back = TimmModel.from_open_clip(folder)
    assert back.config.to_dict() == tower.config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"custom_head": torch.nn.Linear(64, 16), "pool": "token"}, "a custom head"),
        ({"pool": "token_avg", "proj": "none", "embed_dim": None}, "pool='token_avg'"),
        ({"pool": "token", "image_size": 192}, r"weights for \[192, 192\] pixels"),
        ({"pool": "token", "model_kwargs": {"in_chans": 1}}, "in_chans=1"),
        ({"pool": "token", "model_kwargs": {"depth": 1}}, "model_kwargs depth"),
    ],
)
def test_what_open_clip_has_no_words_for_does_not_go_there(arguments: dict[str, Any], message: str) -> None:
    tower = TimmModel(**{"model_name": "test_vit", "embed_dim": 16, **arguments})
    with pytest.raises(ConfigError, match=message):
        to_open_clip_state_dict(tower)


def test_a_tower_changed_by_hand_does_not_go_there() -> None:
    tower = TimmModel("test_vit", 16, pool="token")
    tower.trunk.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(ConfigError, match="the layers of the trunk differ"):
        to_open_clip_state_dict(tower)


def test_pixels_that_open_clip_cannot_prepare_do_not_go_there() -> None:
    tower = TimmModel("test_resnet", 16)
    assert tower.config.preprocess["crop_pct"] != 1
    with pytest.raises(ConfigError, match="cannot prepare the same pixels"):
        to_open_clip_config(tower, TEXT)


# standing in for open_clip's own class


@pytest.fixture
def ours_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.model, "TimmModel", hf_timm_tower.TimmModel)


def assert_lives_inside_open_clip(name: str, theirs: torch.nn.Module, folder: Path, tokenizer: Any) -> None:
    """open_clip creates, saves, loads and trains a model whose vision tower is ours, from weights of its own."""
    model, _, transform = open_clip.create_model_and_transforms(name)
    assert isinstance(model.visual, TimmModel)
    model.load_state_dict(theirs.state_dict(), strict=True)
    size = model.visual.config.image_size
    assert torch.equal(outputs(model.visual, size), outputs(theirs.visual, size))
    assert transform(PHOTOS[0]).shape == (3, *size)
    save_for_hf(model, tokenizer, open_clip.get_model_config(name), folder, safe_serialization=True)
    again = open_clip.create_model(f"local-dir:{folder}")
    assert isinstance(again.visual, TimmModel)
    assert torch.equal(outputs(again.visual, size), outputs(theirs.visual, size))
    again.train()
    before = copy.deepcopy(again.visual.state_dict())
    text = torch.randint(1, 30, (2, again.context_length), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    loss = open_clip.ClipLoss()(*again(images, text)[:3])
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [key for key, value in again.visual.named_parameters() if not torch.equal(value, before[key])]
    assert any(key.startswith("trunk.") for key in moved)
    assert all(parameter.grad is not None for parameter in again.visual.parameters())


def test_ours_stands_in_for_open_clip_s_own_class(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = register(tmp_path / "configs", "tiny-inside", TINY)
    theirs = shake(open_clip.create_model(name))
    monkeypatch.setattr(open_clip.model, "TimmModel", hf_timm_tower.TimmModel)
    assert_lives_inside_open_clip(name, theirs, tmp_path / "published", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen_part(SMALLEST))
def test_ours_stands_in_for_open_clip_s_own_class_in_its_configs(
    name: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = open_clip.create_model(name)
    shake(theirs.visual)
    monkeypatch.setattr(open_clip.model, "TimmModel", hf_timm_tower.TimmModel)
    assert_lives_inside_open_clip(name, theirs, tmp_path / "published", tokenizer)


def test_a_trained_stand_in_becomes_a_tower_with_open_clip_s_preprocessing(ours_inside: None, tmp_path: Path) -> None:
    name = register(tmp_path / "configs", "tiny-taken-out", TINY)
    model, _, transform = open_clip.create_model_and_transforms(
        name, image_mean=SIGLIP["mean"], image_std=SIGLIP["std"], image_resize_mode="squash"
    )
    tower = TimmModel.from_open_clip(model)
    assert_same_tower(tower, model.visual)
    for one in (tower, model.visual):
        one.save_pretrained(tmp_path / "tower")
        again = TimmModel.from_pretrained(tmp_path / "tower")
        assert all(torch.equal(again.transform()(image), transform(image)) for image in PHOTOS)


@pytest.mark.parametrize("vision", [TINY["vision_cfg"], {"timm_model_name": "swin_tiny_patch4_window7_224"}])
def test_force_image_size_gives_open_clip_s_own_numbers(
    vision: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**TINY, "vision_cfg": {"image_size": 224, "timm_pool": "", **vision}}
    name = register(tmp_path / "configs", f"forced-{vision['timm_model_name']}", config)
    model = shake(open_clip.create_model(name))
    save_for_hf(model, tokenizer, config, tmp_path / "native", safe_serialization=True)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'native'}", force_image_size=192)
    monkeypatch.setattr(open_clip.model, "TimmModel", hf_timm_tower.TimmModel)
    ours, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'native'}", force_image_size=192)
    assert ours.visual.config.image_size == [192, 192]
    assert_same_tower(ours.visual, theirs.visual)
    assert transform(PHOTOS[0]).shape == (3, 192, 192)
    # Outside of open_clip, weights of another size stay an error.
    with pytest.raises(RuntimeError, match="size mismatch"):
        TimmModel.from_config(ours.visual.config).load_state_dict(model.visual.state_dict())

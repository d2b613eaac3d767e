"""`load_trunk`: a checkpoint in somebody's own key layout, all of it accounted for or nothing loaded."""

import argparse
import ast
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import timm.utils
import torch
from safetensors.torch import save_file

from hf_timm_tower import ArgumentError, FormatError, TimmModel, WeightsError
from hf_timm_tower.interop.checkpoints import load_trunk

IMAGE = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def tower(**kwargs: Any) -> TimmModel:
    torch.manual_seed(1)
    return TimmModel("test_vit", 16, pool="token", **kwargs).eval()


def trunk_weights(name: str = "test_vit", seed: int = 2, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Weights of a plain timm model without a classifier, as somebody else trained them."""
    torch.manual_seed(seed)
    state = timm.create_model(name, num_classes=0, **kwargs).state_dict()
    return {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}


def under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def assert_holds(ours: TimmModel, weights: dict[str, torch.Tensor]) -> None:
    found = ours.trunk.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)


HEAD = {"weight": torch.ones(3, 4)}
LAYOUTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, list[str]]] = {
    "timm": (lambda w: {**w, **under("head.", HEAD)}, "", ["head.*"]),
    "distributed": (lambda w: under("module.", w), "module.", []),
    "dino": (
        lambda w: {"teacher": {**under("backbone.", w), **under("head.", HEAD)}, "epoch": 3},
        "teacher.backbone.",
        ["teacher.head.*"],
    ),
    "lightning": (
        lambda w: {"state_dict": {**under("model.", w), **under("criterion.", HEAD)}, "global_step": 7},
        "state_dict.model.",
        ["state_dict.criterion.*"],
    ),
    "mae": (
        lambda w: {"model": {**w, "mask_token": torch.ones(1), **under("decoder_blocks.0.", HEAD)}},
        "model.",
        ["mask_token", "decoder_*"],
    ),
    "open_clip": (
        lambda w: {**under("visual.trunk.", w), **under("visual.head.proj.", HEAD), "logit_scale": torch.ones(())},
        "visual.trunk.",
        ["visual.head.*", "logit_scale"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_load_with_the_prefix_found(layout: str, tmp_path: Path) -> None:
    make, prefix, ignore = LAYOUTS[layout]
    weights = trunk_weights()
    checkpoint = make(weights)
    ours = tower()
    head = ours.head.state_dict()["proj.weight"].clone()
    if ignore:
        before = {key: value.clone() for key, value in ours.state_dict().items()}
        with pytest.raises(WeightsError, match="nothing was loaded") as error:
            load_trunk(ours, checkpoint)
        assert "have no place in the trunk" in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    torch.save(checkpoint, tmp_path / "last.pth")
    report = load_trunk(ours, tmp_path / "last.pth", ignore=ignore, allow_pickle=True)
    assert_holds(ours, weights)
    assert torch.equal(ours.head.state_dict()["proj.weight"], head)
    assert report.prefix == prefix
    assert report.matched == {key: f"{prefix}{key}" for key in weights}
    assert bool(report.left_over) == bool(ignore)
    assert not report.missing
    assert not report.resampled
    assert report.not_weights == {"dino": ("epoch",), "lightning": ("global_step",)}.get(layout, ())
    assert f"matched     {len(weights):>6}  " in str(report)


def test_a_safetensors_file_gives_the_same_as_the_state_dict(tmp_path: Path) -> None:
    weights = trunk_weights()
    save_file(under("module.backbone.", weights), tmp_path / "w.safetensors")
    ours = tower()
    assert load_trunk(ours, tmp_path / "w.safetensors").prefix == "module.backbone."
    assert_holds(ours, weights)
    expected = timm.create_model("test_vit", num_classes=0).eval()
    expected.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(ours.trunk(IMAGE), expected(IMAGE))


def test_the_parameters_stay_the_ones_that_an_optimizer_holds() -> None:
    ours = tower()
    before = dict(ours.trunk.named_parameters())
    load_trunk(ours, trunk_weights())
    assert all(before[key] is value for key, value in ours.trunk.named_parameters())


def test_open_clip_s_own_model_is_a_checkpoint_too() -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
    state = open_clip.CustomTextCLIP(16, vision, text).state_dict()
    ours = tower()
    load_trunk(ours, state, ignore=["text.*", "logit_scale", "visual.head.*"])
    assert_holds(ours, {k.removeprefix("visual.trunk."): v for k, v in state.items() if k.startswith("visual.trunk.")})


def test_two_backbones_are_ambiguous_until_one_is_named() -> None:
    teacher, student = trunk_weights(seed=2), trunk_weights(seed=3)
    both = {"teacher": under("backbone.", teacher), "student": under("backbone.", student)}
    ours = tower()
    with pytest.raises(WeightsError, match=r"several prefixes.*'student\.backbone\.'.*'teacher\.backbone\.'"):
        load_trunk(ours, both)
    with_heads = {**both["teacher"], **under("head.", HEAD)}
    with pytest.raises(WeightsError, match=r"ignore=\['student\.\*', 'teacher\.head\.\*'\]"):
        load_trunk(ours, {**both, "teacher": with_heads}, prefix="teacher.backbone")
    report = load_trunk(ours, both, prefix="teacher.backbone", ignore=["student.*"])
    assert_holds(ours, teacher)
    assert len(report.left_over) == len(student)
    with pytest.raises(WeightsError, match="no key begins with prefix='teachers"):
        load_trunk(ours, both, prefix="teachers.")


def test_missing_weights_are_an_error_unless_kept() -> None:
    weights = trunk_weights()
    short = {key: value for key, value in weights.items() if not key.startswith("norm.")}
    ours = tower()
    kept = ours.trunk.norm.weight.clone()
    with pytest.raises(WeightsError, match=r"2 of the trunk are not in the checkpoint.*keep=\['norm\.\*'\]"):
        load_trunk(ours, short)
    report = load_trunk(ours, short, keep=["norm.*"])
    assert report.missing == ("norm.weight", "norm.bias")
    assert torch.equal(ours.trunk.norm.weight, kept)
    assert torch.equal(ours.trunk.cls_token, weights["cls_token"])


def old_torch(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint from before BatchNorm counted its batches."""
    return {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}


def half_a_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if key != "layer3.0.bn1.bias"}


@pytest.mark.parametrize("lacks", [old_torch, half_a_norm])
def test_what_the_error_offers_to_keep_fits_that_and_nothing_else(lacks: Callable[..., Any]) -> None:
    weights = trunk_weights("test_resnet")
    torch.manual_seed(1)
    ours = TimmModel("test_resnet", 16)
    with pytest.raises(WeightsError) as error:
        load_trunk(ours, lacks(weights))
    keep = ast.literal_eval(re.search(r"keep=(\[[^\]]*\])", str(error.value))[1])
    load_trunk(ours, lacks(weights), keep=keep)
    for gone in ("layer3.", "layer1.0.conv1", "layer3.0.bn1.weight", "conv1.0.weight"):
        less = {key: value for key, value in lacks(weights).items() if not key.startswith(gone)}
        with pytest.raises(WeightsError, match="not in the checkpoint"):
            load_trunk(ours, less, keep=keep)


def test_layers_that_are_missing_are_not_offered_to_be_kept_random() -> None:
    weights = {key: value for key, value in trunk_weights("test_resnet").items() if not key.startswith("layer3.")}
    ours = TimmModel("test_resnet", 16)
    with pytest.raises(WeightsError, match=r"layer3.0.conv1.*stay random.*remap") as error:
        load_trunk(ours, weights)
    assert "keep=" not in str(error.value)
    load_trunk(ours, weights, keep=["layer3.*"])  # by name it is the caller's word


def test_remap_renames_keys_and_beginnings_of_keys() -> None:
    weights = trunk_weights()
    theirs = {
        key.replace("blocks.", "layers.").replace("cls_token", "class_token"): value for key, value in weights.items()
    }
    ours = tower()
    load_trunk(ours, theirs, remap={"layers.": "blocks.", "class_token": "cls_token"})
    assert_holds(ours, weights)
    with pytest.raises(ArgumentError, match=r"no key of the state dict is or begins with lay\., layer "):
        load_trunk(ours, theirs, prefix="", remap={"layer": "blocks.", "lay.": "x.", "class_token": "cls_token"})
    with pytest.raises(WeightsError, match="would both be cls_token"):
        load_trunk(ours, {**theirs, "cls_token": theirs["class_token"]}, prefix="", remap={"class_token": "cls_token"})


def test_positions_for_another_size_are_resampled_only_when_asked() -> None:
    weights = trunk_weights(img_size=224)
    ours = tower()
    with pytest.raises(WeightsError, match=r"pos_embed \[1, 197, .*resample=True"):
        load_trunk(ours, weights)
    report = load_trunk(ours, weights, resample=True)
    assert report.resampled == {"pos_embed": (tuple(weights["pos_embed"].shape), tuple(ours.trunk.pos_embed.shape))}
    expected = timm.create_model("test_vit", num_classes=0, img_size=224)
    expected.load_state_dict(weights)
    expected.set_input_size(160)  # timm's own resampling
    assert torch.equal(ours.trunk.pos_embed, expected.pos_embed)


def test_a_grid_that_is_not_square_is_resampled_as_what_it_is_or_asked_for() -> None:
    for size in ((96, 160), (64, 256)):  # 6 x 10 = 60 places, and 4 x 16 = 64, which is a square too
        grid = (size[0] // 16, size[1] // 16)
        weights = trunk_weights(img_size=size)
        expected = timm.create_model("test_vit", num_classes=0, img_size=size)
        expected.load_state_dict(weights)
        expected.set_input_size(160)  # timm knows the grid that it has
        ours = tower()
        load_trunk(ours, weights, resample=grid)
        assert torch.equal(ours.trunk.pos_embed, expected.pos_embed)
        with pytest.raises(ArgumentError, match="120 places, pos_embed of the checkpoint has 6"):
            load_trunk(ours, weights, resample=(10, 12))
        # into a tower of that size: the same number of places, but are they the same places?
        wide = tower(image_size=size)
        load_trunk(wide, weights)
        assert torch.equal(wide.trunk.pos_embed, weights["pos_embed"])
        load_trunk(wide, weights, resample=grid)
        assert torch.equal(wide.trunk.pos_embed, weights["pos_embed"])
    with pytest.raises(WeightsError, match=r"60 places.*the trunk's is 10 x 10.*resample=\(rows, columns\)"):
        load_trunk(tower(), trunk_weights(img_size=(96, 160)), resample=True)
    square = trunk_weights(img_size=128)  # 8 x 8: as many places as 4 x 16
    with pytest.raises(WeightsError, match=r"64 places.*the trunk's is 4 x 16"):
        load_trunk(tower(image_size=(64, 256)), square, resample=True)
    ours = tower(image_size=(64, 256))
    load_trunk(ours, square, resample=(8, 8))
    assert not torch.equal(ours.trunk.pos_embed, square["pos_embed"])
    for wrong in ((8, 0), (8,), "64", (8.0, 8.0)):
        with pytest.raises(ArgumentError, match="rows and columns"):
            load_trunk(ours, square, resample=wrong)


def test_a_wrong_shape_is_never_resampled_away() -> None:
    ours = tower()
    wrong = {**trunk_weights(), "cls_token": torch.zeros(1, 1, 7), "pos_embed": torch.zeros(1, 12, 64)}
    with pytest.raises(WeightsError, match=r"2 have another shape: .*cls_token \[1, 1, 7\]"):
        load_trunk(ours, wrong, resample=True)


def test_timm_s_filter_reads_the_authors_layout_and_hides_nothing() -> None:
    # ConvNeXt as its authors published it: timm's filter renames every key.
    weights = trunk_weights("test_convnext")
    reference = timm.create_model("test_convnext", num_classes=0)
    theirs = {}
    for key, value in weights.items():
        for new, old in (("stem.", "downsample_layers.0."), ("head.norm.", "norm.")):
            key = key.replace(new, old)
        parts = key.split(".")
        if parts[0] == "stages":
            key = f"stages.{parts[1]}." + ".".join(parts[3:]) if parts[2] == "blocks" else key
            if parts[2] == "downsample":
                key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        for new, old in ((".conv_dw.", ".dwconv."), (".mlp.fc", ".pwconv")):
            key = key.replace(new, old)
        theirs[key] = value
    torch.manual_seed(1)
    ours = TimmModel("test_convnext", 16)
    with pytest.raises(WeightsError, match="timm_filter=True"):
        load_trunk(ours, theirs)
    report = load_trunk(ours, theirs, timm_filter=True)
    assert_holds(ours, weights)
    assert len(report.matched) == len(reference.state_dict())
    # DINOv2's layout has a mask token, which timm's filter drops: that is said, not hidden.
    with pytest.raises(WeightsError, match="1 of the checkpoint have no place in the trunk: mask_token"):
        load_trunk(tower(), {**trunk_weights(), "mask_token": torch.ones(1, 1, 64)}, timm_filter=True)
    with pytest.raises(WeightsError, match="say that you want it, resample=True"):
        load_trunk(tower(), trunk_weights(img_size=224), timm_filter=True)


def test_pickles_are_refused_unless_asked_for_and_never_run_code(tmp_path: Path) -> None:
    torch.save(trunk_weights(), tmp_path / "w.pth")
    with pytest.raises(FormatError, match="allow_pickle=True"):
        load_trunk(tower(), tmp_path / "w.pth")

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()",)

    torch.save({**trunk_weights(), "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(FormatError, match="holds more than tensors"):
        load_trunk(tower(), tmp_path / "evil.pth", allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    with pytest.raises(FormatError, match="torch cannot read it"):
        load_trunk(tower(), tmp_path / "cut.pth", allow_pickle=True)
    save_file(trunk_weights(), tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-8])
    with pytest.raises(FormatError, match="cut off"):
        load_trunk(tower(), tmp_path / "cut.safetensors")


NAMESPACE = argparse.Namespace(model="test_vit", lr=0.1, betas=(0.9, 0.95), output_dir=Path("runs"))


def by_timm(trained: torch.nn.Module, average: torch.nn.Module, folder: Path) -> Path:
    ema = timm.utils.ModelEmaV3(trained)
    ema.module.load_state_dict(average.state_dict())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    trained(IMAGE).sum().backward()
    optimizer.step()
    saver = timm.utils.CheckpointSaver(
        trained, optimizer, args=NAMESPACE, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    return folder / "last.pth.tar"


def by_deit(trained: torch.nn.Module, average: torch.nn.Module, folder: Path) -> Path:
    """As DeiT's main.py writes it; MAE's leaves the average out."""
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(IMAGE).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": trained.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict(),
        "epoch": 3,
        "model_ema": average.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": NAMESPACE,
    }
    torch.save(checkpoint, folder / "checkpoint.pth", _use_new_zipfile_serialization=False)
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("write", [by_timm, by_deit])
def test_training_checkpoints_give_the_weights_that_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained, average = (timm.create_model("test_vit", num_classes=3) for _ in range(2))
    path = write(trained, average, tmp_path)
    for name, model in (("model", trained), ("ema", average)):
        ours = tower()
        report = load_trunk(ours, path, weights=name, ignore=["head.*"], allow_pickle=True)
        assert_holds(ours, {key: value for key, value in model.state_dict().items() if not key.startswith("head.")})
        assert report.left_over == ("head.weight", "head.bias")
        assert not report.prefix
    with pytest.raises(WeightsError, match="weights='model' or weights='ema'"):
        load_trunk(tower(), path, ignore=["*"], allow_pickle=True)
    with pytest.raises(WeightsError, match=r"weights='teacher': no entry is called so; .*optimizer"):
        load_trunk(tower(), path, weights="teacher", allow_pickle=True)
    # by its own name, and from memory
    ours = tower()
    state = {"teacher": trained.state_dict(), "student": average.state_dict(), "args": NAMESPACE}
    load_trunk(ours, state, weights="teacher", ignore=["head.*"])
    assert torch.equal(ours.trunk.cls_token, trained.cls_token)


def test_a_namespace_lets_nothing_else_in(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()",)

    torch.save({"model": trunk_weights(), "args": argparse.Namespace(a=Evil())}, tmp_path / "e.pth")
    with pytest.raises(FormatError, match=r"holds more than tensors \('(builtins\.)?eval'\)"):
        load_trunk(tower(), tmp_path / "e.pth", weights="model", allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save({"model": trunk_weights(), "best": Fraction(1, 2)}, tmp_path / "f.pth")
    with pytest.raises(FormatError, match=r"holds more than tensors \('fractions.Fraction'\)"):
        load_trunk(tower(), tmp_path / "f.pth", weights="model", allow_pickle=True)


def test_keys_of_a_checkpoint_are_shown_printable_and_short() -> None:
    state = {**trunk_weights(), "\x1b[2J\nrm -rf": torch.ones(1), "x" * 10_000: torch.ones(1)}
    with pytest.raises(WeightsError) as error:
        load_trunk(tower(), state)
    text = str(error.value)
    assert "\x1b" not in text
    assert "\nrm" not in text
    assert len(text) < 1500


def test_half_precision_is_cast_to_the_trunk_s_and_reported() -> None:
    weights = {key: value.half() for key, value in trunk_weights().items()}
    ours = tower()
    report = load_trunk(ours, weights)
    assert set(report.cast.values()) == {torch.float16}
    assert_holds(ours, {key: value.float() for key, value in weights.items()})
    counts = {**trunk_weights(), "cls_token": torch.zeros(1, 1, 64, dtype=torch.int64)}
    with pytest.raises(WeightsError, match="another kind of number"):
        load_trunk(ours, counts)


def test_a_loaded_trunk_is_saved_as_what_it_now_is(tmp_path: Path) -> None:
    ours = tower()
    ours.save_pretrained(tmp_path / "t")
    again = TimmModel.from_pretrained(tmp_path / "t")
    load_trunk(again, trunk_weights())
    again.save_pretrained(tmp_path / "t")
    last = TimmModel.from_pretrained(tmp_path / "t", verify=True)
    assert_holds(last, trunk_weights())


def test_dictionaries_that_a_pickle_stores_once_and_names_often_are_counted(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(14):
        nested = {str(number): nested for number in range(10)}
    torch.save(nested, tmp_path / "nested.pth")
    with pytest.raises(FormatError, match="entries"):
        load_trunk(tower(), tmp_path / "nested.pth", allow_pickle=True)

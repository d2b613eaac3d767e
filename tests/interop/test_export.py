"""Towers as ONNX and as programs of torch.export: the same numbers, for any batch, without this package."""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hf_timm_tower import ConfigError, ExportError, FolderError, TimmModel
from hf_timm_tower.interop.eval_tower import EvalTower
from hf_timm_tower.interop.onnx import export_onnx
from hf_timm_tower.interop.torch_export import export_torch
from hf_timm_tower.modeling import TimmTowerForImageClassification

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "export.py"


class TwoNumbers(nn.Module):
    """A head that gives a dict."""

    def __init__(self, width: int, _: int | None) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": self.mean(x), "scale": self.scale(x).exp()}


class Undecided(nn.Module):
    """A head that no exporter can write down: what it does depends on the numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.sum() > 0) else -x


def run_onnx(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def run_torch(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    found = torch.export.load(path).module()(images)
    return list(found.values()) if isinstance(found, dict) else [found]


FORMATS: dict[str, tuple[Callable[..., Any], str, Callable[..., list[torch.Tensor]]]] = {
    "onnx": (export_onnx, "tower.onnx", run_onnx),
    "torch": (export_torch, "tower.pt2", run_torch),
}


def compare(tower: TimmModel, how: str, path: Path) -> None:
    """The file's numbers beside the tower's, for batches that the exporter did not see."""
    tower.eval()
    for batch in (1, 5):
        images = torch.randn(batch, tower.config.in_chans, *tower.config.image_size)
        with torch.no_grad():
            expected = tower(images)
        expected = list(expected.values()) if isinstance(expected, dict) else [expected]
        for ours, theirs in zip(FORMATS[how][2](path, images), expected, strict=True):
            near = 1e-4 * theirs.abs().max().item()
            if (ours - theirs).abs().max() > near:  # a tower of these values may lose more in float32 by itself
                with torch.no_grad():
                    exact = copy.deepcopy(tower).double()(images.double())
                near = 10 * (theirs - exact).abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=near)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"embed_dim": 8, "image_size": 64}),
        ("test_vit", {"embed_dim": 8, "pool": "token_avg", "proj": "mlp"}),
        ("test_convnext", {"custom_head": TwoNumbers, "image_size": 64}),
    ],
)
def test_an_exported_tower_gives_the_towers_numbers(
    how: str, name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    tower = TimmModel(name, **arguments)
    tower.train()
    tower.trunk.eval()
    modes = [part.training for part in tower.modules()]
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    export, file, _ = FORMATS[how]
    written = export(tower, tmp_path / file)
    assert written.difference <= 1e-4
    assert [part.training for part in tower.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
    compare(tower, how, tmp_path / file)


@pytest.mark.parametrize("how", FORMATS)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(how: str, tmp_path: Path) -> None:
    export, name, _ = FORMATS[how]
    tower = TimmModel("test_resnet", custom_head=Undecided()).eval()
    with pytest.raises(ExportError, match=r"cannot export test_resnet .*Undecided"):
        export(tower, tmp_path / name)
    with pytest.raises(ConfigError, match="ends in"):
        export(tower, tmp_path / "tower.bin")
    with pytest.raises(FolderError):
        export(TimmModel("test_resnet", proj="none", image_size=64), tmp_path / "no" / "folder" / name)
    assert list(tmp_path.iterdir()) == []


def test_a_program_runs_without_this_package_and_timm(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    tower = TimmModel("test_resnet", embed_dim=8, image_size=64).eval()
    export_torch(tower, tmp_path / "tower.pt2")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.save((images, tower(images)), tmp_path / "example.pt")
    code = """
        import json, sys, torch
        extra = {"preprocess.json": ""}
        program = torch.export.load(sys.argv[1] + "/tower.pt2", extra_files=extra)
        images, expected = torch.load(sys.argv[1] + "/example.pt", weights_only=True)
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
        assert not {"timm", "hf_timm_tower", "transformers"} & set(sys.modules)
        print(json.loads(extra["preprocess.json"])["mean"], json.loads(extra["preprocess.json"])["image_size"])
    """
    told = fresh_process(code, tmp_path)
    assert told.strip() == f"{tower.config.preprocess['mean']} [64, 64]"


def test_an_onnx_file_says_what_its_images_went_through(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", embed_dim=8, image_size=64).eval()
    export_onnx(tower, tmp_path / "tower.onnx")
    model = onnx.load(tmp_path / "tower.onnx")
    assert {entry.key for entry in model.metadata_props} >= {"preprocess.json"}
    assert [entry.name for entry in (*model.graph.input, *model.graph.output)] == ["images", "embedding"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch is free"
    assert [path.name for path in tmp_path.iterdir()] == ["tower.onnx"]


def test_the_script_writes_all_three_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    tower = str(tmp_path / "tower")
    TimmModel("test_resnet", embed_dim=8, image_size=64).eval().save_pretrained(tower)
    for how, name in {"torch": "a.pt2", "timm": "a", "onnx": "a.onnx"}.items():
        assert main([tower, "--format", how, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).exists()
        assert name in capsys.readouterr().out
    assert main([tower, "--format", "onnx", "--out", str(tmp_path / "b.pb")]) == 1
    assert "ends in" in capsys.readouterr().err


def test_the_scripts_help_does_not_pay_for_torch(fresh_process: Callable[..., str]) -> None:
    code = f"""
        import runpy, sys
        sys.argv = [{str(SCRIPT)!r}, "--help"]
        try:
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        except SystemExit as done:
            assert done.code == 0
        assert "torch" not in sys.modules
    """
    assert "--format" in fresh_process(code)


def test_a_classifier_that_is_not_exported_is_said() -> None:
    tower = TimmModel("test_resnet", 16, image_size=64)
    with pytest.warns(UserWarning, match="classifier of a TimmTowerForImageClassification is not exported"):
        EvalTower(TimmTowerForImageClassification.from_tower(tower, num_labels=3))

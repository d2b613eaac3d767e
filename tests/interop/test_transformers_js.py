"""A tower in the form that transformers.js loads: its keys here, its numbers in Node (slow)."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from hf_timm_tower import ConfigError, ExportError, TimmModel
from hf_timm_tower.interop.onnx import export_onnx
from hf_timm_tower.interop.transformers_js import browser_preprocessing

from .test_export import TwoNumbers

VERSION = "4.3.2"
SCRIPT = """
import { AutoImageProcessor, AutoModel, RawImage, env, pipeline } from '@huggingface/transformers';
const [folder, picture] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const processor = await AutoImageProcessor.from_pretrained('tower');
const model = await AutoModel.from_pretrained('tower', { dtype: 'fp32' });
const { pixel_values } = await processor(await RawImage.read(picture));
const { pooler_output, last_hidden_state } = await model({ pixel_values });
const extract = await pipeline('image-feature-extraction', 'tower', { dtype: 'fp32' });
const piped = await extract(picture, { pool: true });
const told = { dims: last_hidden_state.dims };
for (const [name, tensor] of Object.entries({ pixel_values, pooler_output, last_hidden_state, piped })) {
    told[name] = Array.from(tensor.data);
}
console.log('RESULT' + JSON.stringify(told));
"""


def tower(name: str = "test_vit", **arguments: Any) -> TimmModel:
    return TimmModel(name, 16, image_size=64, **arguments).eval()


def preprocessed(ours: TimmModel, **changes: Any) -> TimmModel:
    ours.config.preprocess = {**(ours.config.preprocess or {}), **changes}
    return ours


def test_the_folder_has_the_names_that_transformers_js_reads(tmp_path: Path) -> None:
    ours = tower(pool="token")
    written = export_onnx(ours, tmp_path / "tower", layout="transformers.js")
    assert written.path == tmp_path / "tower" / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64)
    embedding, tokens = session.run(["pooler_output", "last_hidden_state"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(embedding), ours(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(tokens), ours.forward_features(images), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("timm_tower", 16)
    assert (tmp_path / "tower" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "squash", "crop_pct": 1.0},
        {"crop_mode": "squash", "crop_pct": 0.8},
        {"crop_mode": "center", "crop_pct": 1.0},
        {"crop_pct": 1.0, "value_range": [-1.0, 3.0], "channel_order": "BGR", "mean": [0.1, 0.2, 0.3]},
    ],
    ids=str,
)
def test_the_keys_mean_what_the_tower_does(changes: dict[str, Any]) -> None:
    ours = preprocessed(tower(), **changes)
    keys = browser_preprocessing(ours.config)
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    resized = tuple(keys["size"].get(side, keys["size"].get("shortest_edge")) for side in ("width", "height"))
    sized = picture.resize(resized, Image.Resampling(keys["resample"])) if resized != picture.size else picture
    edge = (sized.width - keys["crop_size"]["width"]) // 2
    pixels = torch.from_numpy(np.array(sized)).double()
    pixels = pixels[edge : edge + 64, edge : edge + 64] * keys["rescale_factor"]
    pixels = (pixels - torch.tensor(keys["image_mean"])) / torch.tensor(keys["image_std"])
    pixels = pixels.flip(-1) if keys["do_flip_channel_order"] else pixels
    torch.testing.assert_close(pixels.permute(2, 0, 1).float(), ours.transform()(picture), rtol=1e-4, atol=1e-4)


def test_what_the_keys_cannot_say_is_refused(tmp_path: Path) -> None:
    odd: list[tuple[TimmModel, str]] = [
        (preprocessed(tower(), padding={"mode": "square", "color": [0, 0, 0]}), "padding"),
        (preprocessed(tower(), interpolation="hamming"), "hamming"),
        (preprocessed(tower(), crop_mode="border"), "border"),
        (preprocessed(tower(), crop_pct=1.2), "crop_pct=1.2"),
        (TimmModel("test_vit", 16, image_size=(64, 96)), "no square"),
        (tower(model_kwargs={"in_chans": 1}), "1 channels"),
    ]
    for ours, named in odd:
        with pytest.raises(ConfigError, match=named):
            export_onnx(ours, tmp_path / "tower", layout="transformers.js")
    with pytest.raises(ExportError, match="gives several"):
        export_onnx(tower_of_two(), tmp_path / "tower", layout="transformers.js")
    with pytest.raises(ConfigError, match=r"tower\.float"):
        export_onnx(tower().half(), tmp_path / "tower", layout="transformers.js")
    with pytest.raises(ConfigError, match=r"'transformers\.js' or None"):
        export_onnx(tower(), tmp_path / "tower", layout="optimum")  # type: ignore[arg-type]
    assert not (tmp_path / "tower").exists()


def tower_of_two() -> TimmModel:
    return TimmModel("test_vit", image_size=64, custom_head=TwoNumbers).eval()


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js installed and the script; without its packages' own install scripts."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "run.mjs").write_text(SCRIPT)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", f"@huggingface/transformers@{VERSION}"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install transformers.js: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_vit", {"crop_mode": "squash", "crop_pct": 1.0}),
        ("test_resnet", {"crop_pct": 1.0, "channel_order": "BGR"}),
    ],
)
def test_node_gives_the_tower_s_numbers(name: str, changes: dict[str, Any], node_modules: Path, tmp_path: Path) -> None:
    ours = preprocessed(tower(name), **changes)
    export_onnx(ours, tmp_path / "tower", layout="transformers.js")
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    picture.save(tmp_path / "picture.png")
    command = ["node", "run.mjs", str(tmp_path), str(tmp_path / "picture.png")]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    pixels = ours.transform()(picture)[None]
    torch.testing.assert_close(torch.tensor(found["pixel_values"]), pixels.flatten(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        embedding, features = ours(pixels), ours.forward_features(pixels)
    assert found["dims"] == list(features.shape)
    expected = {"pooler_output": embedding, "piped": embedding, "last_hidden_state": features}
    for key, value in expected.items():
        cosine = torch.nn.functional.cosine_similarity(torch.tensor(found[key]), value.flatten(), dim=0)
        assert cosine >= 0.9999, key

"""A tower -> ONNX, by torch's own exporter, checked with onnxruntime. Needs the extra `onnx`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

from ..files.disk import folder_error
from ..files.json import write_json
from ..files.names import CONFIG_NAME, PREPROCESSOR_NAME
from ..reader.errors import ConfigError, ExportError
from ..reader.trunk import float_dtype
from .eval_tower import EvalTower
from .onnxruntime import Session
from .torch_export import (
    PREPROCESS_NAME,
    Exported,
    check_output,
    finished_file,
    preprocess_text,
    reasons,
    required_suffix,
    trace,
)
from .transformers_js import INPUT, BrowserTower, browser_config, browser_preprocessing

INPUT_NAME, OUTPUT_NAME = "images", "embedding"


def export_onnx(
    tower: nn.Module,
    path: str | os.PathLike[str],
    *,
    check: bool = True,
    layout: Literal["transformers.js"] | None = None,
) -> Exported:
    """Write a tower as ONNX: input `images` `[batch, in_chans, H, W]`, output `embedding`, the batch size free.

    What the images must have gone through is in the model's metadata, as JSON under `preprocess.json`. Weights of more
    than about 2 GB are stored beside the file, in `<name>.onnx.data`.

    Args:
        tower: A tower in float32 or float16; it is not changed.
        path: The file, ending in `.onnx`; it appears complete or not at all. With a layout, the folder.
        check: Run the file in onnxruntime and compare its output with the tower's.
        layout: `transformers.js`: a folder that it loads, in Node and in a browser: `onnx/model.onnx` with
            `pixel_values` -> `pooler_output` and `last_hidden_state`, `config.json` and `preprocessor_config.json`.

    Returns:
        The file and how far its output is from the tower's.

    Raises:
        ExportError: torch is too old, or cannot export this tower; or its output differs by more than 1e-4.
        ConfigError: another ending, or a dtype that onnxruntime does not run; or the layout cannot say how images are
            prepared.
        FolderError: the file cannot be written.
    """
    if layout is None:
        path, model = required_suffix(path, ".onnx"), EvalTower(tower)
        return _written(model, path, INPUT_NAME, _output_names(model), check)
    if layout != "transformers.js":
        raise ConfigError(f"layout={layout!r}: expected 'transformers.js' or None")
    browser = BrowserTower(tower)
    if float_dtype(browser.trunk) != torch.float32:
        raise ConfigError("layout='transformers.js' is written in float32, which it loads by default: tower.float()")
    described = {PREPROCESSOR_NAME: browser_preprocessing(browser.config), CONFIG_NAME: browser_config(browser.config)}
    folder = Path(path)
    try:
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_error(f"{folder}: cannot be written", error) from error
    done = _written(browser, folder / "onnx" / "model.onnx", INPUT, browser.output_names, check)
    if done.path.with_name(f"{done.path.name}.data").exists():
        raise ExportError(f"{done.path}: more than 2 GB of weights, which transformers.js cannot load from one file")
    for name, content in described.items():
        write_json(folder / name, content)
    return done


def _written(model: EvalTower, path: Path, takes: str, gives: list[str] | None, check: bool) -> Exported:
    dtype = float_dtype(model.trunk)
    if dtype not in (torch.float32, torch.float16):
        raise ConfigError(f"the tower is in {dtype}, which onnxruntime does not run on the CPU: tower.float() first")
    with _plain_attention(model):
        program = trace(model)
    try:
        with reasons("torch.onnx", model):
            converted = torch.onnx.export(program, input_names=[takes], output_names=gives, dynamo=True, verbose=False)
    except ImportError as error:  # onnx and onnxscript, which torch imports when it is called
        raise ExportError(f'torch.onnx: {error}: pip install "hf_timm_tower[onnx]"') from error
    assert converted is not None
    converted.model.metadata_props[PREPROCESS_NAME] = preprocess_text(model)
    for part in (converted.model.graph, *converted.model.functions.values()):
        for node in part:
            node.metadata_props.clear()  # paths and source lines of this machine
            node.doc_string = None
    difference = None
    with finished_file(path) as partial:
        converted.save(partial)
        if check:
            difference = check_output(model, Session(partial), f"{path.name} (onnxruntime)")
        _move_weights(partial, path)
    return Exported(path, difference)


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """timm's attention layers in their written-out form for a while.

    torch's exporter takes the fused operator apart into others that lay out their result differently in memory, and
    then fails on the reshape that follows it (test_vit_relpos).
    """
    fused = [part for part in model.modules() if getattr(part, "fused_attn", None) is True]
    for part in fused:
        vars(part)["fused_attn"] = False
    try:
        yield
    finally:
        for part in fused:
            vars(part)["fused_attn"] = True


def _move_weights(partial: Path, path: Path) -> None:
    """The weights beside the model, if there are any: never a model beside another one's weights."""
    data, old = partial.with_name(f"{partial.name}.data"), path.with_name(f"{path.name}.data")
    if data.exists() or old.exists():
        path.unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    if data.exists():
        os.replace(data, old)


def _output_names(model: EvalTower) -> list[str] | None:
    """One tensor is the embedding; the parts of a tuple or a dict keep the exporter's names."""
    return [OUTPUT_NAME] if model.config.embed_dim is not None else None

"""`manifest.json` of a folder of embeddings: what made them, and whether a run may go on with them.

A folder belongs to one tower, one preprocessing and one set of options: those that gave the outputs of the probe image,
bit for bit. What is only said about it (where the tower came from, versions) does not decide.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..files.fingerprint import probe_image, surroundings, weight_digests
from ..files.open_folder import read_json
from ..heads.batch_formula import flat_bytes
from ..reader.errors import FolderError, FormatError, TowerError, shown
from ..reader.image_processing import completed_preprocess
from ..reader.trunk import native_size
from .embedder import Block, Embedder, Outputs
from .folders import printable

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_DTYPES = {str(each): each for each in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_DECIDES = ("weights", "outputs", "preprocessing", "options", "columns")


def describe(tower: Any, outputs: Outputs, rows_per_shard: int, source: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that is begun now.

    Args:
        tower: A TimmModel, on the device where it runs.
        outputs: What is computed.
        rows_per_shard: Images of a shard.
        source: What the images are, for the reader of the manifest.
    """
    config = tower.config
    block, size = completed_preprocess(config)
    origin = dict(getattr(tower, "_origin", None) or {"loaded_from": None, "commit": None})
    if origin["loaded_from"] and os.path.isdir(origin["loaded_from"]):
        origin["loaded_from"] = printable(
            os.path.abspath(origin["loaded_from"])
        )  # it is loaded again from other folders
    values = probe_values(tower, outputs)
    if odd := [name for name, value in tower.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise TowerError(
            f"{odd[0]} is no tensor, as in layers that torch.ao.quantization makes: such a tower cannot be told from "
            "others; use embed, or quantize with quantization_config="
        )
    return {
        "manifest_version": MANIFEST_VERSION,
        "made_by": "hf_timm_tower",
        "tower": {
            "architecture": config.architecture,
            "embed_dim": config.embed_dim,
            "fingerprint": _digest_of_json(tower._fingerprint),
            **origin,
        },
        "weights": weight_digests(tower),
        "outputs": {path: _digest(tensor) for path, tensor in values.items()},
        "columns": columns_of(values),
        "preprocessing": {**block, "image_size": size, "exif": "turned upright"},
        "options": {**dataclasses.asdict(outputs), "dtype": str(outputs.dtype), "layers": list(outputs.layers)},
        "rows_per_shard": rows_per_shard,
        "source": source,
        "versions": surroundings(tower),
        "complete": False,
    }


def columns_of(values: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Name of each column of a table -> shape and dtype of its rows.

    Args:
        values: Path in the tower's output -> `[N, ...]`.

    Raises:
        TowerError: a table cannot have such a column.
    """
    columns = {
        path or "embedding": {"shape": list(tensor.shape[1:]), "dtype": stored_dtype(tensor.dtype)}
        for path, tensor in values.items()
    }
    if not values or len(columns) < len(values) or "id" in columns:
        raise TowerError(
            f"the head gives outputs of the names {shown(list(values))}, expected at least one, and none called "
            "'id', which is the column of the images' ids; rename it in the head, or use embed"
        )
    for name, tensor in values.items():
        if tensor.is_complex() or 0 in tensor.shape[1:]:
            raise TowerError(
                f"the head gives {list(tensor.shape[1:])} of {tensor.dtype} at {name or 'its output'} for each image; "
                "a table takes real numbers, at least one; use embed"
            )
    return columns


def outputs_of(manifest: dict[str, Any]) -> Outputs:
    """What was computed for the embeddings of a folder.

    Raises:
        FormatError: the manifest does not say it.
    """
    try:
        facts = dict(manifest["options"])
        return Outputs(**{**facts, "dtype": _DTYPES[facts["dtype"]], "layers": tuple(facts["layers"])})
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{MANIFEST_NAME}: options are not what this package writes: {shown(str(error))}") from error


def stored_dtype(dtype: torch.dtype) -> str:
    """Name of the dtype in which values are stored: Arrow has no bfloat16, float32 holds it exactly."""
    return str(torch.float32 if dtype == torch.bfloat16 else dtype).removeprefix("torch.")


def probe_values(tower: Any, outputs: Outputs) -> dict[str, torch.Tensor]:
    """What is computed for the fingerprint's probe image: path -> `[1, ...]`."""
    embedder, size = Embedder(tower, outputs), native_size(tower.config)
    probe = probe_image(tower.config.in_chans, size)
    pixels = probe.new_zeros((outputs.batch_size, *probe.shape[1:]))
    pixels[0] = probe[0]
    return embedder.run((pixels, Block(0, ["probe"], [0], {}, None, []))).values


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none.

    Raises:
        FormatError: it is damaged or of a later version.
        FolderError: it cannot be read.
    """
    place = folder / MANIFEST_NAME
    if not os.path.lexists(place):
        return None
    found = read_json(place)
    if found.get("manifest_version") != MANIFEST_VERSION:
        raise FormatError(
            f"{place}: version {shown(found.get('manifest_version'))}, this package reads {MANIFEST_VERSION}"
        )
    parts = ("tower", "columns", "options", "source", "versions")
    if odd := [name for name in parts if not isinstance(found.get(name), dict)]:
        raise FormatError(f"{place}: {odd[0]} is {shown(found.get(odd[0]))}, expected an object")
    texts = [found["source"].get(name) for name in ("kind", "place")]
    texts += [found["tower"].get(name) for name in ("loaded_from", "commit")]
    if odd := [text for text in texts if not isinstance(text, str | None)]:
        raise FormatError(f"{place}: {shown(odd[0])} in source or tower, expected a text")
    if not found["columns"] or not all(map(_is_column, found["columns"].values())):
        raise FormatError(f"{place}: columns are {shown(found['columns'])}, expected shape and dtype of each")
    if type(rows := found.get("rows_per_shard")) is not int or rows < 1:
        raise FormatError(f"{place}: rows_per_shard is {shown(rows)}, expected a whole number from 1 on")
    return found


def _is_column(facts: Any) -> bool:
    if not isinstance(facts, dict) or not isinstance(facts.get("shape"), list):
        return False
    sizes = all(type(size) is int and size > 0 for size in facts["shape"])
    return sizes and isinstance(getattr(torch, str(facts.get("dtype")), None), torch.dtype)


def check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with embeddings of something else.

    Raises:
        FolderError: names what differs, and versions that changed.
    """
    now = json.loads(json.dumps(now))
    changed = [key for key in _DECIDES if then.get(key) != now[key]]
    if not changed:
        return
    if {"options", "outputs"} <= set(changed):
        changed.remove("outputs")  # they follow
    was_done, is_done = then.get("options") or {}, now["options"]
    odd = [key for key, value in is_done.items() if was_done.get(key) != value]
    words = {
        "weights": "the tower has other weights",
        "outputs": "the tower gives other outputs for the same image",
        "preprocessing": "the preprocessing is another",
        "columns": f"the columns were {shown(then.get('columns'), 200)} and would be {shown(now['columns'], 200)}",
        "options": f"the options were {shown({key: was_done.get(key) for key in odd}, 200)} and "
        f"are {shown({key: is_done[key] for key in odd}, 200)}",
    }
    was, origin = then.get("versions") or {}, then.get("tower") or {}
    versions = [f"{key} {was.get(key)} then, {new} now" for key, new in now["versions"].items() if was.get(key) != new]
    raise FolderError(
        f"{folder} holds embeddings of something else ({shown(origin.get('loaded_from') or origin.get('architecture'))}"
        f"): {'; '.join(words[key] for key in changed)}{' (' + ', '.join(versions) + ')' if versions else ''}. Give "
        "the same ones, or another folder, or delete this one."
    )


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(flat_bytes(tensor).numpy().tobytes()).hexdigest()


def _digest_of_json(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""What sentence-transformers needs beside a tower: `modules.json` and `sentence_bert_config.json`.

They name its own module for transformers models (there since 5.4; older versions raise when they load the folder) and
say that an image's embedding is `pooler_output`. So `SentenceTransformer(...).encode(images)` runs no code but what
transformers runs. Without these files it would take the mean over the trunk's tokens for the embedding, without a
word: therefore every tower has them, also those whose output it cannot use.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..reader.errors import FormatError
from .disk import folder_error
from .json import parse_json
from .open_folder import OpenFolder

MODULES_NAME = "modules.json"
SENTENCE_NAME = "sentence_bert_config.json"

_MODULE = "sentence_transformers.base.modules.transformer.Transformer"
_VECTOR, _TOKENS = "sentence_embedding", "token_embeddings"


def sentence_files(outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """File name -> its JSON.

    Args:
        outputs: What the tower gives for its probe image, as `run_probe` returns it. A vector `[B, embed_dim]` is the
            embedding. Tokens `[B, N, C]` and maps are left as tokens, without a pool: `encode` raises KeyError for
            want of one. A tuple or dict fails in `encode` too.
    """
    single = outputs.get("") if len(outputs) == 1 else None
    return _files(_VECTOR if single is None or single.ndim == 2 else _TOKENS)


def _files(output_name: str) -> dict[str, Any]:
    image = {"method": "forward", "method_output_name": "pooler_output"}
    return {
        MODULES_NAME: [{"idx": 0, "name": "0", "path": "", "type": _MODULE}],
        SENTENCE_NAME: {
            "modality_config": {"image": image},
            "module_output_name": output_name,
            "transformer_task": "feature-extraction",
        },
    }


def are_edited(present: Mapping[str, bytes]) -> bool:
    """Whether somebody made these files what they are (a further module, say), so that a save leaves them alone.

    Args:
        present: Name -> content, of those of the files that are there.
    """
    for name, content in present.items():
        try:
            found = parse_json(content, name)
        except FormatError:
            return True
        if all(found != _files(output_name)[name] for output_name in (_VECTOR, _TOKENS)):
            return True
    return False


def write_sentence_files(staging: Path, folder: Path, outputs: Mapping[str, torch.Tensor]) -> None:
    """Write the files into a save, unless the folder has edited ones: those are kept, as all that is not ours.

    Args:
        staging: Where the save is written.
        folder: The folder that it will replace.
        outputs: As in `sentence_files`.

    Raises:
        FolderError: a file cannot be read or written.
        FormatError: a file is something else than a small regular file.
    """
    files = sentence_files(outputs)
    if folder.is_dir():
        with OpenFolder(folder) as before:
            if are_edited({name: before.read_bytes(name) for name in files if before.has(name)}):
                return
    try:
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (staging / name).write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise folder_error(f"{folder}: the files for sentence-transformers cannot be written", error) from error

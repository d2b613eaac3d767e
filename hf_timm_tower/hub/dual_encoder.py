"""A tower and a text model as one: how transformers' `VisionTextDualEncoderModel` loads where this package is absent.

transformers finds the code of a model by `auto_map` at the top of a config and never in the config of a part. A folder
of two models as transformers saves it therefore does not load without this package, whatever travels with the tower.
`make_self_contained` mends such a folder.
"""

import re
from pathlib import Path
from typing import Any

from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from ..files.json import write_json
from ..files.names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from ..files.open_folder import OpenFolder, read_json
from ..files.safetensors_layout import write_aligned
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, shown
from .reader_file import READER_NAME, write_reader

_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MODULE = READER_NAME.removesuffix(".py")
PAIR_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.TowerTextConfig",
    "AutoImageProcessor": f"{_MODULE}.TimmTowerImageProcessor",
    "AutoModel": f"{_MODULE}.TowerTextModel",
}
# None for AutoModelForZeroShotImageClassification, in whose list transformers does not have this model: its pipeline
# then takes the class that the config names, and asks nobody to trust code where this package is imported.


def make_self_contained(folder: Any) -> None:
    """Let a folder of a `VisionTextDualEncoderModel` with a tower inside load where this package is absent.

    `modeling_timm_tower.py` is written into it and named by its config, so that `AutoModel` and
    `pipeline("zero-shot-image-classification", ..., trust_remote_code=True)` work with transformers and timm alone;
    where this package is imported, nothing changes. The model's weights are written anew in the layout in which mapped
    tensors are aligned: kernels may give other last bits for weights at odd addresses. No other file is touched.

    Args:
        folder: What `VisionTextDualEncoderModel.save_pretrained` wrote.

    Raises:
        ConfigError: it holds no such model, or none with a tower.
        FolderError: it cannot be read or written.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    vision = config.get("vision_config")
    if not isinstance(vision, dict) or vision.get("model_type") != TimmTowerConfig.model_type:
        raise ConfigError(
            f"{folder / CONFIG_NAME}: expected a {VisionTextDualEncoderConfig.model_type} with a tower as its vision "
            f"model, found model_type {shown(config.get('model_type'))}; a tower by itself carries its code already"
        )
    write_reader(folder, for_pair=True)
    align_weights(folder)
    for part in ("vision_config", "text_config"):  # transformers stores where each was loaded from, a folder too
        inner = config.get(part)
        if isinstance(inner, dict) and not _REPOSITORY.fullmatch(str(inner.get("_name_or_path"))):
            inner.pop("_name_or_path", None)
    names = {"architectures": [VisionTextDualEncoderModel.__name__], "auto_map": PAIR_AUTO_MAP}
    write_json(folder / CONFIG_NAME, {**config, **names})


def align_weights(folder: Any) -> None:
    """Write the weights of a model as transformers saves it anew, in the layout in which mapped tensors are aligned.

    transformers maps a file and uses its tensors where they lie, and kernels may give other last bits at odd addresses:
    a UperNet or a language model with a tower inside then comes back with the tower's bits, and almost with its own.
    After this it comes back bit for bit. The tensors and the names stay as they are.

    Args:
        folder: What `save_pretrained` of any model wrote, as safetensors.

    Raises:
        FolderError: it cannot be read or written, or holds no safetensors.
        FormatError: a file is damaged.
    """
    folder = Path(folder)
    with OpenFolder(folder) as opened:
        index = opened.read_json(INDEX_NAME).get("weight_map") if opened.has(INDEX_NAME) else {"": SINGLE_NAME}
        for name in sorted(set(index.values()) if isinstance(index, dict) else ()):
            write_aligned(folder / name, opened.read_tensors(name))

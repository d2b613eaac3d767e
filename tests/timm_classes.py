"""The smallest architecture of every model class in this timm, found by building all of them on the meta device."""

import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import timm
import torch


@lru_cache(maxsize=1)
def smallest_of_each_class() -> dict[str, str]:
    """Class name (`module.Class`) -> architecture with the fewest parameters.

    It takes minutes, so it is kept beside other temporary files, by timm's version.
    """
    cache = Path(tempfile.gettempdir()) / f"timm-{timm.__version__}-smallest-of-each-class.json"
    if cache.exists():
        return dict(json.loads(cache.read_text()))
    found: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        key = f"{type(model).__module__.removeprefix('timm.models.')}.{type(model).__name__}"
        found[key] = min(found.get(key, (size, name)), (size, name))
    result = {key: name for key, (_, name) in sorted(found.items(), key=lambda item: item[1])}
    part = cache.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(cache)
    return result

"""The smallest architecture of every model class of timm.

Finding it means building all 1,371 architectures on the meta device, minutes of work, so the list for one version of
timm is kept beside this file. `python -m tests.timm_classes` writes it anew.
"""

import json
from functools import lru_cache
from pathlib import Path

import timm
import torch

LIST = Path(__file__).with_name("timm_classes.json")


def find_smallest() -> dict[str, str]:
    """Class (`module.Class`) -> architecture with the fewest parameters, smallest first."""
    found: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        key = f"{type(model).__module__.removeprefix('timm.models.')}.{type(model).__name__}"
        found[key] = min(found.get(key, (size, name)), (size, name))
    return {key: name for key, (_, name) in sorted(found.items(), key=lambda item: item[1])}


@lru_cache(maxsize=1)
def smallest_of_each_class() -> dict[str, str]:
    """The list for this timm: the kept one where the version is the same, else found now."""
    kept = json.loads(LIST.read_text())
    return dict(kept["smallest"]) if kept["timm"] == timm.__version__ else find_smallest()


if __name__ == "__main__":
    LIST.write_text(json.dumps({"timm": timm.__version__, "smallest": find_smallest()}, indent=1) + "\n")

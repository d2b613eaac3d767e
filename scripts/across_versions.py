#!/usr/bin/env python
"""Whether towers saved under one set of versions come back under another.

    python scripts/across_versions.py .venv/bin/python .venv-lowest/bin/python

Each Python saves a few towers and loads those of each other one: with `TimmModel`, whose `verify()` compares with what
the tower gave when it was saved, and with transformers' `AutoModel` and `AutoImageProcessor`, which must agree with
`TimmModel` bit for bit. Exit status 1 where one does not load, is `different`, or the two disagree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SAVE = """
import sys, warnings
from pathlib import Path
import torch, torch.nn as nn
from hf_timm_tower import TimmModel, TimmTowerForImageClassification

class Gated(nn.Module):
    "A head that only a graph can store."
    def __init__(self, in_features, embed_dim):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(in_features), nn.Linear(in_features, 2 * embed_dim)
    def forward(self, x):
        value, gate = self.proj(self.norm(x.mean(1))).chunk(2, dim=-1)
        return value * gate.sigmoid()

torch.manual_seed(0)
root = Path(sys.argv[1])
TimmModel("test_resnet", 16).save_pretrained(root / "resnet")
TimmModel("test_convnext", 16, proj="mlp").save_pretrained(root / "convnext-mlp")
TimmModel("test_efficientnet", 16, pool="rot_attn").save_pretrained(root / "efficientnet-rot_attn")
TimmModel("test_vit", 16, pool="none", custom_head=Gated).save_pretrained(root / "vit-graph")
TimmModel("vit_tiny_patch16_224", 16, pool="token", image_size=64).save_pretrained(root / "vit-64")
TimmModel("swin_tiny_patch4_window7_224", 16, model_kwargs={"depths": (1, 1, 1, 1)}).save_pretrained(root / "swin")
locked = TimmModel("test_resnet", 16)
locked.lock(1, freeze_bn_stats=True)
locked.save_pretrained(root / "locked")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the classifier is fresh, as it should be
    labelled = TimmTowerForImageClassification.from_pretrained(root / "resnet", id2label={0: "cat", 1: "dog"})
labelled.save_pretrained(root / "classifier")
"""

CHECK = """
import json, sys, warnings
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from hf_timm_tower import TimmModel, TowerError

image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (190, 240, 3), dtype=np.uint8))
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TimmModel has no place for a classifier, and says so
            tower = TimmModel.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder)
        verified = tower.verify()
        pixels = tower.transform()(image)[None]
        same = torch.equal(AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values, pixels)
        with torch.no_grad():
            same = same and torch.equal(model(pixels).pooler_output, tower(pixels))
    except TowerError as error:
        found[folder.name] = ["does not load", str(error), False]
        continue
    found[folder.name] = [verified.status, f"{verified.relative_difference:.2g}", same]
print(json.dumps(found))
"""

VERSIONS = """
from importlib.metadata import version
names = ("torch", "timm", "transformers", "huggingface_hub", "safetensors")
print(", ".join(name + " " + version(name) for name in names))
"""


def run(python: str, code: str, *arguments: object) -> str:
    """What a Python prints that has this checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters, each of another environment")
    pythons = parser.parse_args().pythons
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for number, python in enumerate(pythons):
            print(f"{number}: {run(python, VERSIONS).strip()}")
            run(python, SAVE, Path(scratch, str(number)))
        print("\nsaved  loaded  tower                   verify()       relative  AutoModel, AutoImageProcessor")
        for saved in range(len(pythons)):
            for loaded, python in enumerate(pythons):
                table = json.loads(run(python, CHECK, Path(scratch, str(saved))).splitlines()[-1])
                for name, (status, relative, same) in table.items():
                    agree = "equal" if same else "NOT equal"
                    print(f"{saved:5}  {loaded:6}  {name:<22}  {status:<13}  {relative:<8}  {agree}")
                    failed |= status not in ("equal", "close") or not same
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

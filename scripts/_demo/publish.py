"""One step of the demo on a Hub, in a process of its own whose huggingface_hub talks to that Hub.

    python publish.py push REPO_ID RESULT.json TOWER_FOLDER
    python publish.py tune REPO_ID RESULT.json EMBEDDINGS.safetensors

`tune` loads the tower by its id, compares what it gives with the embeddings of the one that was pushed, fine-tunes the
head on digits with the trunk frozen, and pushes again.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
from embed import load_digit_images, prepare
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file
from training import Split, fine_tune, measure

from hf_timm_tower import TimmModel

EPOCHS = 1


def large_files(repo_id: str) -> dict[str, int]:
    """SHA-256 -> bytes of every large file of the repository; nothing where there is none yet."""
    try:
        siblings = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    except RepositoryNotFoundError:
        return {}
    return {file.lfs.sha256: file.lfs.size for file in siblings if file.lfs is not None}


def push(tower: TimmModel, repo_id: str) -> dict[str, object]:
    """Push, and say where to, and how many bytes of large files the Hub did not have before."""
    before = large_files(repo_id)
    url = tower.push_to_hub(repo_id, tags=["demo"], model_card_kwargs={"datasets": ["scikit-learn/digits"]})
    after = large_files(repo_id)
    return {"url": url, "new": sum(size for digest, size in after.items() if digest not in before), "files": len(after)}


def tune(repo_id: str, embeddings: Path) -> dict[str, object]:
    """Load by id, compare, fine-tune the head alone, push again."""
    tower = TimmModel.from_pretrained(repo_id)
    digits = load_digit_images()
    data = Split(
        prepare(tower, digits.train_images),
        digits.train_labels,
        prepare(tower, digits.test_images),
        digits.test_labels,
    )
    here = tower.embed(digits.test_images, progress=False)
    equal = torch.equal(here, load_file(embeddings)["digits.test"])
    tower.lock(freeze_bn_stats=True)
    classifier = nn.Linear(tower.config.embed_dim, 10)
    fine_tune(tower, classifier, data, EPOCHS)
    accuracy = measure(tower, classifier, data)
    return {"equal": equal, "accuracy": accuracy.classifier, **push(tower, repo_id)}


def main(step: str, repo_id: str, result: Path, given: Path) -> None:
    """Do a step and write what came of it."""
    torch.manual_seed(0)
    found = push(TimmModel.from_pretrained(given), repo_id) if step == "push" else tune(repo_id, given)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("push", "tune"):
        sys.exit(f"usage:{__doc__.partition('huggingface_hub talks to that Hub.')[2].rpartition('`tune`')[0]}")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))

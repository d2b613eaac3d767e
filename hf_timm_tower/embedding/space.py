"""The app of an embedded folder as a Space: the embeddings, the images of the set, and a program of a few lines."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi

from ..hub.download import hub_errors
from ..reader.errors import ArgumentError, shown
from .folders import is_image_name

if TYPE_CHECKING:
    from .shown_set import ShownSet

_PROGRAM = """from hf_timm_tower import TimmModel
from hf_timm_tower.embedding.gradio import make_app
from hf_timm_tower.embedding.shown_set import ShownSet
from hf_timm_tower.embedding.stored import StoredEmbeddings

tower = TimmModel.from_pretrained({tower}, revision={revision})
make_app(ShownSet(tower, StoredEmbeddings("embeddings"), "images")).launch()
"""
_CARD = """---
title: {title}
sdk: gradio
app_file: app.py
models:
- {tower}
---
"""


def push_space(shown_set: "ShownSet", repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Push the app with its embeddings and images, in one commit.

    Args:
        shown_set: What to show; its tower must be in a repository, for the Space loads it from there, and it must have
            been told the folder of its images: embeddings say where images lie, and may be somebody else's.
        repo_id: Of the Space; it is made.
        private: Of a new Space.
        token: None is the stored one.

    Returns:
        The commit's address.

    Raises:
        ArgumentError: the tower was not loaded from a repository, nobody named the images, or one is not there.
        HubError: the Hub refuses.
    """
    origin = shown_set.stored.manifest["tower"]
    tower, commit = origin.get("loaded_from"), origin.get("commit")
    if not tower or not commit:
        raise ArgumentError(
            f"the tower of {shown_set.stored.path} was not loaded from a repository: push it, and embed with what "
            "from_pretrained gives"
        )
    if not shown_set.images_are_named:
        raise ArgumentError(
            f"{shown_set.stored.path} says that its images are in {shown(shown_set.stored.manifest['source'])}; all of "
            "them become public, so name their folder: ShownSet(..., images=...) or --images"
        )
    adds = [CommitOperationAdd(f"embeddings/{each.path.name}", each.path) for each in shown_set.stored.shards]
    for row, name in enumerate(shown_set.index.ids):
        path = shown_set.path_of(row)
        if path is None or Path(name).is_absolute() or not is_image_name(Path(name).name):
            raise ArgumentError(f"image {shown(name)} is no image below the folder; a Space needs all of them")
        adds.append(CommitOperationAdd(f"images/{name}", path))
    manifest = {**shown_set.stored.manifest, "source": {"kind": "folder", "place": "images"}}
    texts = {
        "embeddings/manifest.json": json.dumps(manifest, indent=2, sort_keys=True) + "\n",
        "app.py": _PROGRAM.format(tower=json.dumps(tower), revision=json.dumps(commit)),
        "requirements.txt": "hf_timm_tower[app]\n",
        "README.md": _CARD.format(title=json.dumps(repo_id.rpartition("/")[2]), tower=json.dumps(tower)),
    }
    adds += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    api = HfApi(token=token)
    with hub_errors("cannot be pushed", repo_id):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        done = api.create_commit(repo_id, adds, commit_message="The app, embeddings and images", repo_type="space")
    return str(done.commit_url)

"""What a result becomes outside: a model card, one commit."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData


class NotTheSame(Exception):
    """What was loaded does not give the outputs of what was trained."""


def write_card(folder: Path, title: str, text: str, tags: list[str], pipeline_tag: str) -> None:
    """Write README.md: metadata, a title and a text."""
    data = ModelCardData(library_name="transformers", pipeline_tag=pipeline_tag, tags=["hf_timm_tower", "timm", *tags])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text.strip()}\n").save(folder / "README.md")


def push(folder: Path, repo_id: str, private: bool | None) -> str:
    """Push a folder as one commit; weights that an earlier commit had and this one has not go. Returns its address."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Add two towers trained by train_clip.py",
        delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.bin"],
    )
    return commit.commit_url

"""What client processes of the loopback Hub do with transformers' models of a tower (`hub_worker`)."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageClassification

from hf_timm_tower import ArgumentError, TimmModel, TimmTowerForImageClassification, TimmTowerModel

from .hub_calls import make

LABELS = ["cat", "dog", "owl"]
Face = TimmTowerModel | TimmTowerForImageClassification


def face(seed: int, labels: list[str] | None = None, **kwargs: Any) -> Face:
    """The tower of `hub_calls.make` as a transformers model, with a classifier where there are labels."""
    with tempfile.TemporaryDirectory() as folder:
        make(seed).save_pretrained(folder, include_code=False)
        if labels is None:
            return TimmTowerModel.from_pretrained(folder, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = TimmTowerForImageClassification.from_pretrained(folder, id2label=dict(enumerate(labels)), **kwargs)
    nn.init.normal_(model.classifier.weight)
    return model


def push_face(
    repo_id: str, seed: int, labels: list[str] | None = None, added: str | None = None, **kwargs: Any
) -> tuple[str, torch.Tensor]:
    """Push a transformers model; the address that it gave, and what the model gives for an image."""
    model = face(seed, labels)
    if added is not None:
        model.add_model_tags(added)
    return model.push_to_hub(repo_id, **kwargs), output(model)


def push_as_timm_model(repo_id: str, seed: int, **kwargs: Any) -> torch.Tensor:
    """Push the same tower as a TimmModel; its embedding."""
    tower = make(seed)
    tower.push_to_hub(repo_id, **kwargs)
    return output(tower)


def in_turn(*steps: tuple[Callable[..., Any], dict[str, Any]]) -> list[Any]:
    """Several calls in one process, which pays for transformers' imports once."""
    return [function(**arguments) for function, arguments in steps]


def output(model: nn.Module) -> torch.Tensor:
    """What a model gives for one image, the first tensor that counts."""
    with torch.no_grad():
        found = model(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if "logits" in found else found.pooler_output


def load(repo_id: str, by: str, revision: str | None = None) -> torch.Tensor:
    """What a repository gives by one of the classes that read it."""
    classes = {"TimmModel": TimmModel, "AutoModel": AutoModel, "classifier": AutoModelForImageClassification}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the classifier that is left out
        return output(classes[by].from_pretrained(repo_id, revision=revision))


def change_and_push(repo_id: str, part: str, **kwargs: Any) -> None:
    """Load, change one part as training does, and push again."""
    cls: Any = TimmTowerForImageClassification if part == "classifier" else TimmTowerModel
    model = cls.from_pretrained(repo_id)
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.add_(torch.randn_like(parameter))
    model.push_to_hub(repo_id, **kwargs)


def save_and_push(folder: str, seed: int, **kwargs: Any) -> None:
    """`save_pretrained` with `push_to_hub=True`; the weights are gathered ones, not the model's own."""
    model, gathered = face(seed), face(seed + 1).state_dict()
    model.save_pretrained(folder, state_dict=gathered, push_to_hub=True, **kwargs)


def push_adapter(repo_id: str, **kwargs: Any) -> None:
    """Push a model with a LoRA adapter."""
    from peft import LoraConfig

    with tempfile.TemporaryDirectory() as folder:
        TimmModel("test_vit", 8).save_pretrained(folder, include_code=False)
        model = TimmTowerModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ArgumentError, match=r"adapter.*license"):
        model.push_to_hub(repo_id, license="mit")
    model.push_to_hub(repo_id, **kwargs)


def save_head_only(repo_id: str, folder: str) -> torch.Tensor:
    """Load a tower whose trunk lies in another repository, change that, and save it whole; what it gives."""
    model = TimmTowerModel.from_pretrained(repo_id)
    with torch.no_grad():
        next(model.trunk.parameters()).add_(1)
    model.save_pretrained(folder, trunk=False)
    return output(model)


def upload_over_a_single_file(repo_id: str) -> torch.Tensor:
    """A repository with `model.safetensors` of an older tower, and a newer one uploaded over it; what the newer gives.

    So `Trainer` pushes: it takes nothing away.
    """
    old, new = make(1), make(2)
    with tempfile.TemporaryDirectory() as folder:
        new.save_pretrained(folder)
        save_file(old.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        HfApi().create_repo(repo_id)
        HfApi().upload_folder(folder_path=folder, repo_id=repo_id)
    return output(new)


def refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The name of the error that a call raises, and its message."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(repo_id: str, folder: str) -> list[str]:
    """What wrong arguments are told."""
    model = face(1)
    return [
        refused(model.push_to_hub, repo_id, licence="mit"),
        refused(model.push_to_hub, repo_id, metrics={"accuracy": "high"}),
        refused(model.push_to_hub, repo_id, metrics={"a": 1.0}, model_card_kwargs={"metrics": {"a": 2.0}}),
        refused(model.save_pretrained, folder, push_to_hub=True, licence="mit"),
        refused(model.save_pretrained, folder, commit_message="without a push"),
    ]

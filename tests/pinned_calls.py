"""What client processes of the loopback Hub do with a tower whose trunk is stored in another repository."""

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import HfApi, hf_hub_download
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, VisionTextDualEncoderModel, pipeline

from hf_timm_tower import (
    TimmModel,
    TimmTowerBackbone,
    TimmTowerEncoder,
    TimmTowerForImageClassification,
    TimmTowerModel,
    WeightsError,
)

from .hub_calls import make

SIZE = 64


def push_base_and_head(base: str, head_only: str) -> None:
    """A tower, and a head of its own on that tower's trunk, which is frozen as a whole."""
    make(1).push_to_hub(base)
    tower = TimmModel.from_pretrained(base)
    _change(tower.head)
    tower.lock(freeze_bn_stats=True)
    tower.push_to_hub(head_only, trunk=base)


def trunk_in(repo_id: str, base: str) -> list[str]:
    """The files of a repository, at any of its commits, that hold bytes of a weight of the base's trunk."""
    api = HfApi()
    parameters = TimmModel.from_pretrained(base).trunk.parameters()  # without those of norms, zeros and ones
    weights = [each.detach().numpy().tobytes() for each in parameters if each.ndim > 1]
    found = set()
    for commit in api.list_repo_commits(repo_id) if api.repo_exists(repo_id) else ():
        for name in api.list_repo_files(repo_id, revision=commit.commit_id):
            data = Path(hf_hub_download(repo_id, name, revision=commit.commit_id)).read_bytes()
            if any(weight in data for weight in weights):
                found.add(name)
    return sorted(found)


def publish(ways: dict[str, Callable[[str, str], None]], base: str, head_only: str) -> dict[str, tuple[str, list[str]]]:
    """Push a head in several ways, each into a repository of its name.

    Returns:
        Way -> the refusal (nothing where there was none), and the files of the repository that hold the trunk.
    """
    found = {}
    for name, way in ways.items():
        refusal = ""
        try:
            way(head_only, f"ann/{name}")
        except WeightsError as error:
            refusal = str(error)
        found[name] = refusal, trunk_in(f"ann/{name}", base)
    return found


class Pictures(Dataset[dict[str, torch.Tensor]]):
    """Four pictures with labels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = torch.full((3, SIZE, SIZE), index / 4)
        return {"pixel_values": picture, "labels": torch.tensor(index % 2)}


def _labelled(source: str, **options: Any) -> TimmTowerForImageClassification:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fresh classifier
        return TimmTowerForImageClassification.from_pretrained(source, num_labels=2, **options)


def _trainer(model: nn.Module, repo_id: str, folder: str, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        folder, hub_model_id=repo_id, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Pictures())


def by_trainer(source: str, repo_id: str, frozen: bool = True) -> None:
    """`Trainer(push_to_hub=True)`, which pushes every checkpoint too. One is gone on with, by another trainer."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_steps": 1, "hub_strategy": "all_checkpoints", "hub_always_push": True, "push_to_hub": True}
        trainer = _trainer(_labelled(source, frozen=frozen), repo_id, folder, **options)
        trainer.train()
        trainer.push_to_hub()


def by_trainer_at_the_end(source: str, repo_id: str) -> None:
    """`trainer.push_to_hub()` alone, of a classifier."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(_labelled(source), repo_id, folder, save_strategy="no")
        trainer.train()
        trainer.push_to_hub()


def by_pipeline(source: str, repo_id: str) -> None:
    """`pipeline.push_to_hub`."""
    pipeline("image-classification", model=_labelled(source), image_processor=source).push_to_hub(repo_id)


def by_a_merged_adapter(source: str, repo_id: str) -> None:
    """LoRA on the head, the adapter pushed by peft, and the merged tower."""
    from peft import LoraConfig, get_peft_model

    from hf_timm_tower.interop.peft import merge_lora

    adapted = get_peft_model(TimmTowerModel.from_pretrained(source), LoraConfig(target_modules=["head.out"]))
    adapted.push_to_hub(repo_id)
    merge_lora(adapted).push_to_hub(repo_id)


def by_another_face(source: str, repo_id: str) -> None:
    """On the same trunk and head as a model of another class."""
    TimmTowerModel.from_tower(TimmModel.from_pretrained(source)).push_to_hub(repo_id)
    TimmModel.from_tower(TimmTowerModel.from_pretrained(source)).push_to_hub(repo_id)


def save_a_trained_trunk(source: str, repo_id: str, cls: type[Any] = TimmTowerModel, **options: Any) -> None:
    """`save_pretrained` of a trunk that moved, and `upload_folder` as `Trainer` does it."""
    model = cls.from_pretrained(source)
    with torch.no_grad():
        next(model.trunk.parameters()).add_(1)
    HfApi().create_repo(repo_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def train_all_by_trainer(source: str, repo_id: str) -> None:
    """`Trainer` where nothing is frozen."""
    by_trainer(source, repo_id, frozen=False)


def _text() -> BertModel:
    return BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))


def by_a_pair(source: str, repo_id: str) -> None:
    """`VisionTextDualEncoderModel.push_to_hub`."""
    pair = VisionTextDualEncoderModel(vision_model=TimmTowerModel.from_pretrained(source), text_model=_text())
    pair.push_to_hub(repo_id)


def by_a_saved_pair(source: str, repo_id: str) -> None:
    """`save_pretrained(push_to_hub=True)` of a pair that is loaded by its parts' names."""
    with tempfile.TemporaryDirectory() as folder:
        _text().save_pretrained(f"{folder}/text")
        pair = VisionTextDualEncoderModel.from_vision_text_pretrained(source, f"{folder}/text")
        pair.save_pretrained(f"{folder}/pair", push_to_hub=True, repo_id=repo_id)


def by_an_encoder(source: str, repo_id: str) -> None:
    """The trunk's tokens."""
    TimmTowerEncoder.from_pretrained(source).push_to_hub(repo_id)


def by_a_backbone(source: str, repo_id: str) -> None:
    """The trunk's feature maps, inside of a model of segmentation."""
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    backbone = TimmTowerBackbone.from_pretrained(source, out_indices=[1, 2, 3, 4])
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone.config, hidden_size=16, use_auxiliary_head=False)
    )
    model.backbone = backbone
    model.push_to_hub(repo_id)


def by_a_named_pair(source: str, repo_id: str) -> None:
    """A pair whose trunk the user gives away, in both ways that the refusal names."""
    tower = TimmTowerModel.from_pretrained(source)
    tower.config.trunk_source = None
    VisionTextDualEncoderModel(vision_model=tower, text_model=_text()).push_to_hub(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        TimmModel.from_pretrained(source).save_pretrained(folder, trunk=False)
        TimmTowerEncoder.from_pretrained(folder)
        TimmTowerBackbone.from_pretrained(folder)


def trained_and_named(source: str, repo_id: str) -> None:
    """`Trainer` on a whole tower whose trunk the user gives away."""
    model = _labelled(source, frozen=False)
    model.config.trunk_source = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
    with tempfile.TemporaryDirectory() as folder:
        _trainer(model, repo_id, folder, save_strategy="no").push_to_hub()


STAYS: dict[str, Callable[[str, str], None]] = {
    "trainer": by_trainer,
    "trainer-at-the-end": by_trainer_at_the_end,
    "pipeline": by_pipeline,
    "merged-adapter": by_a_merged_adapter,
    "other-face": by_another_face,
}
REFUSED: dict[str, Callable[[str, str], None]] = {
    "trained": save_a_trained_trunk,
    "trained-timm": partial(save_a_trained_trunk, cls=TimmModel),
    "trained-trainer": train_all_by_trainer,
    "pair": by_a_pair,
    "saved-pair": by_a_saved_pair,
    "encoder": by_an_encoder,
    "backbone": by_a_backbone,
}
NAMED: dict[str, Callable[[str, str], None]] = {
    "named": partial(save_a_trained_trunk, trunk=False),
    "named-trainer": trained_and_named,
    "named-pair": by_a_named_pair,
}


def publish_all(base: str, head_only: str) -> dict[str, tuple[str, list[str]]]:
    """`publish` in all ways."""
    push_base_and_head(base, head_only)
    return publish({"base": lambda *_: None, "head": lambda *_: None, **STAYS, **REFUSED, **NAMED}, base, head_only)


def said_before_training(source: str) -> list[str]:
    """What each face says when a trunk begins to train that is stored elsewhere: frozen as it came, and not."""
    said = []
    for cls in (TimmModel, TimmTowerModel):
        for frozen in (True, False):
            model = cls.from_pretrained(source, frozen=frozen)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.train()
            said.append("; ".join(str(each.message) for each in caught))
    return said


def _change(module: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))

"""Repositories of other libraries, other ways into a repository, and exports."""

import json
from pathlib import Path

import timm
import torch
from transformers import AutoModel, TimmWrapperForImageClassification, pipeline

from hf_timm_tower import TimmModel, TimmTowerForImageClassification, TimmTowerModel

from .models import DiffersError, images, picture, same


def timm_into_face(d: Path) -> str:
    TimmTowerModel.from_pretrained(d / "timm")
    return ""


def timm_into_face_peer(d: Path) -> str:
    AutoModel.from_pretrained(d / "timm_hub")
    return ""


def timm_classifier(d: Path) -> str:
    model = TimmTowerForImageClassification.from_timm(d / "timm")
    same(model(images(160)).logits, _timm(d)(images(160)), "the logits")
    return "timm's logits"


def timm_classifier_peer(d: Path) -> str:
    model = TimmWrapperForImageClassification.from_pretrained(d / "timm_hub")
    same(model(images(160)).logits, _timm(d)(images(160)), "the logits")
    return "timm's logits"


def _timm(d: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{d / 'timm'}", pretrained=True).eval()


def timm_labels(d: Path) -> str:
    model = TimmTowerForImageClassification.from_timm(d / "timm", num_labels=3)
    return f"logits {list(model(images(160)).logits.shape)}"


def timm_labels_peer(d: Path) -> str:
    model = timm.create_model(f"local-dir:{d / 'timm'}", pretrained=True, num_classes=3)
    return f"logits {list(model(images(160)).shape)}"


def into_timm(d: Path) -> str:
    TimmModel.from_pretrained(d / "vit_bare").export_timm("exported")
    model = timm.create_model("local-dir:exported", pretrained=True, num_classes=0).eval()
    same(model(images()), TimmModel.from_pretrained(d / "vit_bare")(images()), "the embedding")
    return "after export_timm"


def into_timm_peer(d: Path) -> str:
    timm.create_model(f"local-dir:{d / 'wrapper'}", pretrained=True)
    return ""


def timm_on_tower(d: Path) -> str:
    try:
        timm.create_model(f"local-dir:{d / 'vit'}", pretrained=True)
    except TypeError as error:
        raise ValueError(str(error).partition("argument ")[2]) from error  # timm's own, that names our key
    return ""


def card(d: Path) -> str:
    found = TimmModel.from_pretrained(d / "vit").generate_model_card(license="mit")
    if "TimmModel.from_pretrained" not in str(found) or found.data.license != "mit":
        raise DiffersError("a card that says nothing of the model")
    return "the card that saving writes"


def card_peer(d: Path) -> str:
    from huggingface_hub import PyTorchModelHubMixin

    class Plain(torch.nn.Module, PyTorchModelHubMixin):
        pass

    if "More Information Needed" in str(Plain().generate_model_card()):
        raise DiffersError("a template with nothing filled in")
    return ""


def no_task(d: Path) -> str:
    return _pipeline_labels(d / "vit")


def _pipeline_labels(folder: Path) -> str:
    found = pipeline("image-feature-extraction", model=str(folder), pool=True)(picture())
    return f"{len(found[0])} numbers"


def no_task_peer(d: Path) -> str:
    return _pipeline_labels(d / "dinov2")


def sentence(d: Path) -> str:
    from sentence_transformers import SentenceTransformer

    tower = TimmModel.from_pretrained(d / "vit")
    found = torch.tensor(SentenceTransformer(str(d / "vit"), device="cpu").encode([picture()]))
    same(found, tower(tower.transform()(picture())[None]), "the embedding", 1e-5)
    return "the tower's embedding"


def sentence_peer(d: Path) -> str:
    from sentence_transformers import SentenceTransformer

    found = torch.tensor(SentenceTransformer(str(d / "wrapper"), device="cpu").encode([picture()]))
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    pixels = timm.data.create_transform(**config)(picture())[None]
    same(found, AutoModel.from_pretrained(d / "wrapper")(pixels).pooler_output, "mean of all tokens", 1e-4)
    return ""


def browser(d: Path) -> str:
    from hf_timm_tower.interop import onnx

    onnx.export_onnx(TimmModel.from_pretrained(d / "vit"), "web", layout="transformers.js")
    said = json.loads(Path("web/preprocessor_config.json").read_text())
    return f"onnx/model.onnx, do_normalize={said['do_normalize']}"


def browser_peer(d: Path) -> str:
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise ValueError("needs optimum, which is not installed here") from error
    main_export(str(d / "dinov2"), "web", task="feature-extraction")
    return "optimum's export"


ROWS = [
    ("timm", "TimmTowerModel.from_pretrained(a timm repository)", timm_into_face, "AutoModel, TimmWrapperModel",
     timm_into_face_peer),
    ("timm", "TimmTowerForImageClassification.from_timm(repo)", timm_classifier, "TimmWrapperForImageClassification",
     timm_classifier_peer),
    ("timm", "TimmTowerForImageClassification.from_timm(repo, num_labels=3)", timm_labels, "timm.create_model",
     timm_labels_peer),
    ("timm", "into timm.create_model", into_timm, "TimmWrapperModel.save_pretrained", into_timm_peer),
    ("timm", "timm.create_model('local-dir:' + the folder as it is)", timm_on_tower, "TimmWrapperModel.save_pretrained",
     into_timm_peer),
    ("other ways in", "generate_model_card()", card, "PyTorchModelHubMixin", card_peer),
    ("other ways in", "pipeline('image-feature-extraction', pool=True)", no_task, "Dinov2Model", no_task_peer),
    ("other ways in", "SentenceTransformer(repo).encode(images)", sentence, "TimmWrapperModel", sentence_peer),
    ("other ways in", "for transformers.js in a browser", browser, "optimum on Dinov2Model", browser_peer),
]  # fmt: skip

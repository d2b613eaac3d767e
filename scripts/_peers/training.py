"""Training, adapters, quantised loading, and what open_clip asks of a tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from hf_timm_tower import TimmModel, TimmTowerForImageClassification
from hf_timm_tower.interop.peft import add_lora, load_lora

from .models import SIZE, DiffersError, cosine, images, same, there


def own_head(d: Path) -> str:
    class Gate(nn.Module):
        def __init__(self, in_features: int, embed_dim: int) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(in_features, embed_dim), nn.Linear(in_features, embed_dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value(x) * self.gate(x).sigmoid()

    tower = TimmModel("test_vit", 16, image_size=SIZE, pool="token", custom_head=Gate).eval()
    tower.save_pretrained("tower")
    same(AutoModel.from_pretrained("tower")(images()).pooler_output, tower(images()), "the embedding")
    return "comes back with no code"


def own_head_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "wrapper")
    model.head = nn.Linear(64, 16)
    model.save_pretrained("model")
    there(AutoModel.from_pretrained("model"), "head")
    return ""


def labels_on_bare(d: Path) -> str:
    model = AutoModelForImageClassification.from_pretrained(d / "vit_bare", num_labels=3)
    return f"logits {list(model(images()).logits.shape)}, a fresh classifier with a warning"


def labels_on_bare_peer(d: Path) -> str:
    model = AutoModelForImageClassification.from_pretrained(d / "wrapper", num_labels=3)
    shape = list(model(images(160)).logits.shape)
    if shape[1] != 3:
        raise DiffersError(f"logits {shape}")
    return f"logits {shape}"


class _Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, size: int) -> None:
        self.pixels = images(size, 4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": index % 3}


def _trainer(folder: Path, size: int) -> str:
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    options = TrainingArguments(
        "out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, save_steps=2, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, options, train_dataset=_Pictures(size)).train()
    again = AutoModelForImageClassification.from_pretrained("out/checkpoint-2")
    same(again(images(size)).logits, model.eval()(images(size)).logits, "the checkpoint")
    return "two steps with gradient checkpointing, the checkpoint has the same bits"


def trainer(d: Path) -> str:
    return _trainer(d / "vit", SIZE)


def trainer_peer(d: Path) -> str:
    return _trainer(d / "wrapper", 160)


def _reentrant(folder: Path, size: int) -> str:
    model = AutoModel.from_pretrained(folder)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(images(size).requires_grad_()).pooler_output.sum().backward()
    return ""


def reentrant(d: Path) -> str:
    return _reentrant(d / "vit", SIZE)


def reentrant_peer(d: Path) -> str:
    return _reentrant(d / "dinov2", SIZE)


def rates(d: Path) -> str:
    tower = TimmModel.from_pretrained(d / "vit", drop=0.1, drop_path=0.2, patch_drop=0.3)
    same(tower(images()), TimmModel.from_pretrained(d / "vit")(images()), "the embedding")
    return "the weights and the outputs in eval mode stay"


def rates_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "dinov2", drop_path_rate=0.2, hidden_dropout_prob=0.1)
    same(model(images()).pooler_output, AutoModel.from_pretrained(d / "dinov2")(images()).pooler_output, "the output")
    return "by its config's names"


def lora(d: Path) -> str:
    model = add_lora(TimmModel.from_pretrained(d / "vit"))
    model.save_pretrained("adapter")
    load_lora(TimmModel.from_pretrained(d / "vit"), "adapter")
    return "head trained and saved with it"


def lora_peer(d: Path) -> str:
    model = get_peft_model(AutoModel.from_pretrained(d / "dinov2"), LoraConfig(target_modules="all-linear"))
    model.save_pretrained("adapter")
    PeftModel.from_pretrained(AutoModel.from_pretrained(d / "dinov2"), "adapter")
    return ""


def other_base(d: Path) -> str:
    add_lora(TimmModel.from_pretrained(d / "vit")).save_pretrained("adapter")
    load_lora(TimmModel("test_vit", 16, image_size=SIZE, pool="token"), "adapter")
    raise DiffersError("loaded onto other weights")


def other_base_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "dinov2")
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained("adapter")
    PeftModel.from_pretrained(type(model)(model.config), "adapter")
    raise DiffersError("loaded onto other weights")


def _quantised(folder: Path, config: Any, size: int) -> str:
    full = AutoModel.from_pretrained(folder)(images(size)).pooler_output
    model = AutoModel.from_pretrained(folder, quantization_config=config)
    found = cosine(model(images(size)).pooler_output, full)
    if found < 0.95:
        raise DiffersError(f"cosine {found:.3f} to float")
    return f"cosine {found:.4f} to float"


def eight_bits(d: Path) -> str:
    return _quantised(d / "vit", BitsAndBytesConfig(load_in_8bit=True), SIZE)


def eight_bits_peer(d: Path) -> str:
    return _quantised(d / "wrapper", BitsAndBytesConfig(load_in_8bit=True), 160)


def four_bits(d: Path) -> str:
    return _quantised(d / "vit", BitsAndBytesConfig(load_in_4bit=True), SIZE)


def four_bits_peer(d: Path) -> str:
    return _quantised(d / "wrapper", BitsAndBytesConfig(load_in_4bit=True), 160)


def quanto(d: Path) -> str:
    return _quantised(d / "vit", QuantoConfig(weights="int8"), SIZE)


def quanto_peer(d: Path) -> str:
    return _quantised(d / "wrapper", QuantoConfig(weights="int8"), 160)


def torchao(d: Path) -> str:
    return _quantised(d / "vit", _int8(), SIZE)


def torchao_peer(d: Path) -> str:
    return _quantised(d / "wrapper", _int8(), 160)


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _qlora(folder: Path, size: int, add: Callable[[Any], Any], load: Callable[[Any, str], Any]) -> str:
    def four_bit() -> Any:
        return AutoModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))

    model = add(four_bit()).train()
    model(images(size)).pooler_output.square().mean().backward()
    trained = [each for each in model.parameters() if each.grad is not None]
    torch.optim.SGD(trained, 0.1).step()
    model.eval().save_pretrained("adapter")
    again = load(four_bit(), "adapter").eval()
    with torch.no_grad():  # with gradients bitsandbytes takes another kernel
        same(again(images(size)).pooler_output, model(images(size)).pooler_output, "the output after saving")
    return "a step, saved, the same outputs"


def qlora(d: Path) -> str:
    return _qlora(d / "vit", SIZE, add_lora, load_lora)


def qlora_peer(d: Path) -> str:
    config = LoraConfig(target_modules="all-linear")
    return _qlora(d / "wrapper", 160, lambda model: get_peft_model(model, config), PeftModel.from_pretrained)


def save_quantised(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "vit", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained("again")
    return ""


def save_quantised_peer(d: Path) -> str:
    model = AutoModel.from_pretrained(d / "wrapper", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained("again")
    same(AutoModel.from_pretrained("again")(images(160)).pooler_output, model(images(160)).pooler_output, "the output")
    return "the same after saving"


def checkpointing_impl(d: Path) -> str:
    tower = TimmModel.from_pretrained(d / "vit")
    tower.set_grad_checkpointing(True, impl="inline")
    return ""


def _theirs() -> Any:
    import open_clip

    return open_clip.timm_model.TimmModel("test_vit", 16, pool="token")


def checkpointing_impl_peer(d: Path) -> str:
    _theirs().set_grad_checkpointing(True, impl="inline")
    return ""


def groups(d: Path) -> str:
    pairs = TimmModel.from_pretrained(d / "vit").layer_groups(True)
    tower = TimmModel.from_pretrained(d / "vit")
    named = [name for name, _ in tower.layer_groups(True)]
    members = [part for _, group in tower.layer_groups(True) for part in group]
    count = sum(1 if isinstance(part, nn.Parameter) else len(list(part.parameters())) for part in members)
    if count != len(list(tower.parameters())) or len(set(named)) != len(pairs):
        raise DiffersError("not a partition of the parameters")
    return f"{len(pairs)} (name, members) pairs"


def groups_peer(d: Path) -> str:
    return f"{len(there(_theirs(), 'layer_groups')(True))} (name, members) pairs"


def script(d: Path) -> str:
    torch.jit.script(AutoModel.from_pretrained(d / "vit"))
    return ""


def script_peer(d: Path) -> str:
    torch.jit.script(AutoModel.from_pretrained(d / "dinov2"))
    return ""


def attributes(d: Path) -> str:
    tower = TimmModel.from_pretrained(d / "vit")
    return f"{there(tower, 'device')}, {there(tower, 'dtype')}, {there(tower, 'num_features')}"


def attributes_peer(d: Path) -> str:
    tower = _theirs()
    return f"{there(tower, 'device')}, {there(tower, 'dtype')}, {there(tower, 'num_features')}"


def from_tower(d: Path) -> str:
    tower = TimmModel.from_pretrained(d / "vit")
    model = TimmTowerForImageClassification.from_tower(tower, num_labels=3)
    same(TimmModel.from_tower(model)(images()), tower(images()), "the embedding")
    return "on the same modules"


def from_tower_peer(d: Path) -> str:
    from transformers import TimmWrapperModel

    there(TimmWrapperModel, "from_timm_model")
    return ""


ROWS = [
    ("heads", "a head of one's own, saved and loaded", own_head, "TimmWrapperModel", own_head_peer),
    ("heads", "AutoModelForImageClassification.from_pretrained(a headless repo, num_labels=3)", labels_on_bare,
     "TimmWrapperModel", labels_on_bare_peer),
    ("heads", "a model in memory as a transformers model, and back", from_tower, "TimmWrapperModel", from_tower_peer),
    ("training", "Trainer", trainer, "TimmWrapperModel", trainer_peer),
    ("training", "gradient_checkpointing_enable({'use_reentrant': True})", reentrant, "Dinov2Model", reentrant_peer),
    ("training", "from_pretrained(repo, drop=, drop_path=, patch_drop=)", rates, "Dinov2Model", rates_peer),
    ("training", "LoRA, saved and loaded", lora, "peft on Dinov2Model", lora_peer),
    ("training", "an adapter onto another model of the same shapes", other_base, "peft on Dinov2Model",
     other_base_peer),
    ("quantised", "BitsAndBytesConfig(load_in_8bit=True)", eight_bits, "TimmWrapperModel", eight_bits_peer),
    ("quantised", "BitsAndBytesConfig(load_in_4bit=True)", four_bits, "TimmWrapperModel", four_bits_peer),
    ("quantised", "QuantoConfig(weights='int8')", quanto, "TimmWrapperModel", quanto_peer),
    ("quantised", "TorchAoConfig(Int8WeightOnlyConfig())", torchao, "TimmWrapperModel", torchao_peer),
    ("quantised", "QLoRA: adapters on 4 bits, saved and loaded", qlora, "peft on TimmWrapperModel", qlora_peer),
    ("quantised", "save_pretrained of an 8-bit model", save_quantised, "TimmWrapperModel", save_quantised_peer),
    ("open_clip", "set_grad_checkpointing(True, impl='inline'), of open_clip 4", checkpointing_impl,
     "open_clip's TimmModel", checkpointing_impl_peer),
    ("open_clip", "layer_groups(pooler_in_head), of open_clip 4", groups, "open_clip's TimmModel", groups_peer),
    ("torch", "torch.jit.script(model)", script, "Dinov2Model", script_peer),
    ("torch", "tower.device, tower.dtype, tower.num_features", attributes, "open_clip's TimmModel", attributes_peer),
]  # fmt: skip

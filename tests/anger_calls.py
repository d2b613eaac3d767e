"""Train a tower for two steps as people's scripts do, and save it; see promises/test_used_in_anger."""

import copy
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from hf_timm_tower import TimmModel, TimmTowerForImageClassification, register_head

RESNET: dict[str, Any] = {"channels": (8, 8, 16, 16), "stem_width": 8}
VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIZE, OTHER_SIZE = 64, 96

KINDS = ("built-in", "graph head", "registered head", "classifier")


class Two(nn.Module):
    """A head of one's own, stored as a graph."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(in_features), nn.Linear(in_features, 16)
        self.out = nn.Linear(16, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.norm(x))))


@register_head("tests.anger.by_value")
class ByValue(nn.Module):
    """Which way it goes depends on the values: stored by its name."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum() > 1e6 else -2 * y


def build(kind: str, scratch: Path, vit: bool = False) -> nn.Module:
    """A small tower, or a classifier on one.

    Args:
        kind: One of KINDS.
        scratch: Where a classifier's tower may be saved.
        vit: With tokens and position embeddings instead of maps and BatchNorm.
    """
    torch.manual_seed(0)
    name, small = ("test_vit", VIT) if vit else ("test_resnet", RESNET)
    head = {"graph head": Two, "registered head": ByValue}.get(kind)
    tower = TimmModel(name, 8, SIZE, custom_head=head, model_kwargs=small)
    if kind != "classifier":
        return tower.train()
    if vit:
        tower.set_input_size(OTHER_SIZE)  # which only the tower can
    tower.save_pretrained(scratch / "trunk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is fresh, as it should be
        model = TimmTowerForImageClassification.from_pretrained(scratch / "trunk", id2label={0: "cat", 1: "dog"})
    return model.train()


def outputs(given: Any) -> torch.Tensor:
    """The logits of a classifier, the embedding of a tower."""
    found: torch.Tensor = given if isinstance(given, torch.Tensor) else given.logits
    return found


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """Pictures for the model, the same ones every time."""
    size = model.config.image_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def train(model: nn.Module, call: Callable[[torch.Tensor], Any], steps: int = 2, after: Any = None) -> None:
    """Steps of SGD on the model's parameters, with `call` as its forward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs(call(images(model))).float().square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


# --- ways to train: model, folder -> the model that was saved there


def plain(model: nn.Module, folder: Path) -> nn.Module:
    train(model, model)
    model.save_pretrained(folder)
    return model


def accelerate_bf16(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(outputs(prepared(images(model))).float().square().mean())
        optimizer.step()
    unwrapped = accelerator.unwrap_model(prepared)
    unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    return unwrapped


def autocast_by_hand(model: nn.Module, folder: Path) -> nn.Module:
    with torch.autocast("cpu", torch.bfloat16):
        train(model, model)
        model.save_pretrained(folder)
    return model


def fp16_autocast(model: nn.Module, folder: Path) -> nn.Module:
    """As accelerate's fp16 does it, which itself asks for a GPU."""
    with torch.autocast("cpu", torch.float16):
        train(model, model)
        model.save_pretrained(folder)
    return model


def compiled_forward(model: nn.Module, folder: Path) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    train(model, model)
    model.save_pretrained(folder)
    return model


def ema_copy(model: nn.Module, folder: Path) -> nn.Module:
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(model, decay=0.5)
    train(model, model, after=lambda: ema.update(model))
    ema.module.save_pretrained(folder)
    assert not torch.equal(next(ema.module.parameters()), next(model.parameters()))
    return ema.module


def gradient_checkpointing(model: nn.Module, folder: Path) -> nn.Module:
    if isinstance(model, TimmModel):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    return plain(model, folder)


def other_size(model: nn.Module, folder: Path) -> nn.Module:
    if isinstance(model, TimmModel):
        model.set_input_size(OTHER_SIZE)
    assert list(model.config.image_size) == [OTHER_SIZE] * 2
    return plain(model, folder)


def half_weights(model: nn.Module, folder: Path) -> nn.Module:
    train(model, model)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def sync_batchnorm(model: nn.Module, folder: Path) -> nn.Module:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    return plain(converted, folder)


def ddp_wrapped(model: nn.Module, folder: Path) -> nn.Module:
    store = f"file://{folder.parent / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(model, wrapped)
        wrapped.module.save_pretrained(folder)
    finally:
        torch.distributed.destroy_process_group()
    return model


def resumed(model: nn.Module, folder: Path) -> nn.Module:
    train(model, model, steps=1)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).train()
    train(again, again, steps=1)
    again.save_pretrained(folder)
    return again


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "plain": plain,
    "accelerate bf16": accelerate_bf16,
    "autocast by hand": autocast_by_hand,
    "fp16 autocast": fp16_autocast,
    "compiled forward": compiled_forward,
    "EMA copy": ema_copy,
    "gradient checkpointing": gradient_checkpointing,
    "other size": other_size,
    "half weights": half_weights,
    "SyncBatchNorm": sync_batchnorm,
    "DDP-wrapped": ddp_wrapped,
    "resumed": resumed,
}


CELLS = list(product(WAYS, KINDS))


def bare(model: nn.Module) -> torch.Tensor:
    """What the class's own forward gives in eval mode, whatever was put on the instance."""
    model = copy.copy(model).eval()
    anchor = next(model.parameters())
    with torch.no_grad():
        return outputs(type(model).forward(model, images(model).to(anchor.dtype))).clone()


def train_and_save(way: str, kind: str, folder: Path) -> torch.Tensor:
    """Train and save one tower; what it then gives."""
    folder.mkdir(parents=True)
    model = build(kind, folder, vit=way == "other size")
    fresh = [parameter.detach().clone() for parameter in model.parameters()]
    saved = WAYS[way](model, folder / "tower")
    moved = [not torch.equal(a, b) for a, b in zip(fresh, saved.parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2, "training moved it"
    return bare(saved)


def load(kind: str, folder: Path) -> tuple[torch.Tensor, str | None]:
    """What a saved tower gives, and what `verify()` says of it."""
    cls = TimmTowerForImageClassification if kind == "classifier" else TimmModel
    model = cls.from_pretrained(folder)
    assert not model.training
    return bare(model), model.verify().status if isinstance(model, TimmModel) else None


def main(act: str, root: Path) -> None:
    """Train, or load, all cells in this process; `root` gets what each gave, or its error, as `<act>.pt`."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for number, (way, kind) in enumerate(CELLS):
        folder = root / str(number)
        try:
            found[f"{way}, {kind}"] = (
                train_and_save(way, kind, folder) if act == "train" else load(kind, folder / "tower")
            )
        except Exception as error:
            found[f"{way}, {kind}"] = f"{type(error).__name__}: {error}"
    torch.save(found, root / f"{act}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""The training loop, on one process or several."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from open_clip.loss import ClipLoss, SigLipLoss
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from hf_timm_tower.training.param_groups import param_groups

from .data import Draws
from .options import Options
from .towers import LARGEST_SCALE, ImageAndText, TwoImages


def make_loss(name: str, rank: int, processes: int) -> nn.Module:
    """open_clip's loss of this process's rows, with the negatives of all processes.

    Gradients, *averaged* over the processes as DistributedDataParallel does, are those of one process with the whole
    batch; so is the mean of the losses.

    Args:
        name: `clip` or `siglip`.
        rank: Number of this process.
        processes: How many share a batch.

    Returns:
        `(image_embeds [B, D], other_embeds [B, D], scale, bias or None)` -> a scalar, in nats.
    """
    if name == "siglip":
        return SigLipLoss(rank=rank, world_size=processes)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=processes)


def train(
    accelerator: Accelerator,
    module: ImageAndText | TwoImages,
    draws: Draws,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    options: Options,
) -> list[float]:
    """Train the module in place; it ends in eval mode.

    Args:
        accelerator: Made with `split_batches` and `use_seedable_sampler`: then a step's pairs, and the order, are the
            same for any number of processes.
        module: Two towers.
        draws: What to learn from.
        collate: Pairs -> the module's arguments.
        options: Epochs, batch size, rates.

    Returns:
        The mean loss of each epoch, in nats.

    Raises:
        SystemExit: a batch cannot be shared by the processes, or there are fewer pairs than one batch.
    """
    size, processes = options.batch_size, accelerator.num_processes
    if size % processes:
        raise SystemExit(f"train_clip: --batch-size {size} cannot be shared evenly by {processes} processes")
    if len(draws) < size:
        raise SystemExit(f"train_clip: {len(draws)} training images are less than one batch of {size}")
    # A smaller last batch is left out: it would have fewer negatives, and unequal parts cannot be gathered.
    loader = DataLoader(draws, size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=options.workers)
    optimizer = torch.optim.AdamW(_groups(module, options))
    steps = options.epochs * (len(draws) // size)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(options.warmup * steps), steps)
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    criterion = make_loss(options.loss, accelerator.process_index, processes)
    means = []
    for epoch in range(options.epochs):
        draws.set_epoch(epoch)
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for batch in loader:
            image, other, scale, bias = model(**batch)
            loss = criterion(image, other, scale, bias)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                module.log_scale.clamp_(0, LARGEST_SCALE)
            total += loss.detach()
        means.append(accelerator.reduce(total, "mean").item() / len(loader))
        accelerator.print(f"epoch {epoch + 1}/{options.epochs}  loss {means[-1]:.4f}")
    module.eval()
    return means


def _groups(module: ImageAndText | TwoImages, options: Options) -> list[dict[str, Any]]:
    """Parameter groups: those of image towers as their trunks ask for, others by their dimensions."""
    groups: list[dict[str, Any]] = []
    for tower in module.image_towers.values():
        if any(weight.requires_grad for weight in tower.parameters()):
            groups += param_groups(tower, options.lr, options.weight_decay)
    inside = tuple(f"{name}." for name in module.image_towers)
    outside = {name: weight for name, weight in module.named_parameters() if not name.startswith(inside)}
    rest = [weight for weight in outside.values() if weight.requires_grad]
    groups.append({"params": [weight for weight in rest if weight.ndim >= 2], "weight_decay": options.weight_decay})
    groups.append({"params": [weight for weight in rest if weight.ndim < 2], "weight_decay": 0.0})
    return [{"lr": options.lr, **group} for group in groups if group["params"]]


def batches_of(items: Any, size: int) -> list[list[Any]]:
    """Items in lists of at most `size`."""
    return [[items[i] for i in range(start, min(start + size, len(items)))] for start in range(0, len(items), size)]


def on_device_of(module: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Tensors on the device of the module's parameters."""
    device = next(module.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}

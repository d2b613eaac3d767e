"""Contrastive losses of two towers, on one process and on several.

`clip_loss` is the loss of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3) and `siglip_loss` that
of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1); both give what open_clip's `ClipLoss` and
`SigLipLoss` give on one process.

With several processes each holds a part of the batch, and the negatives of all count. `gathered_clip_loss` and
`gathered_siglip_loss` give, on every process, the loss of the whole batch, and gradients which, *averaged* over the
processes as DistributedDataParallel does, are those of one process with the whole batch. Why no factor is needed: a
process's loss is that of its own rows, and the whole loss is the mean of these. An embedding that was gathered gets the
sum of what all processes' losses say about it, the world's size times the whole loss's gradient; the average divides it
out again. Parameters that every process uses alike, such as the scale, are averaged just so.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..reader.errors import ArgumentError

__all__ = ["clip_loss", "gather_with_gradient", "gathered_clip_loss", "gathered_siglip_loss", "siglip_loss"]

Group = dist.ProcessGroup | None


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """CLIP's loss: which text belongs to an image, and which image to a text, among those of the batch.

    Args:
        image_embeds: `[B, D]`, of length 1 each.
        text_embeds: `[B, D]`, of length 1 each; row i belongs to image i.
        logit_scale: What cosines are multiplied with, so 1 / temperature and not its logarithm.

    Returns:
        The mean of the two cross entropies in nats: a scalar.

    Raises:
        ArgumentError: the shapes are not `[B, D]`, twice the same.
    """
    _check_shapes(image_embeds, text_embeds)
    return _clip_rows(image_embeds, text_embeds, image_embeds, text_embeds, logit_scale, first=0)


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """SigLIP's loss: does this text belong to this image, asked for each pair of the batch by itself.

    Args:
        image_embeds: `[B, D]`, of length 1 each.
        text_embeds: `[B, D]`, of length 1 each; row i belongs to image i.
        logit_scale: What cosines are multiplied with. SigLIP starts at 10.
        logit_bias: What is added then. SigLIP starts at -10: most pairs do not belong together.

    Returns:
        The sum over all pairs, in nats, divided by B: a scalar.

    Raises:
        ArgumentError: the shapes are not `[B, D]`, twice the same.
    """
    _check_shapes(image_embeds, text_embeds)
    return _siglip_rows(image_embeds, [text_embeds], logit_scale, logit_bias, own=0)


def gathered_clip_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, *, group: Group = None
) -> Tensor:
    """`clip_loss` of the whole batch, of which each process of the group holds a part of the same size.

    A process computes its own rows of the two matrices of logits, `[B, world * B]` each, never the whole square.
    Outside a process group, and in a group of one, this is `clip_loss`.

    Args:
        image_embeds: `[B, D]`, this process's images.
        text_embeds: `[B, D]`, their texts.
        logit_scale: As in `clip_loss`, the same on each process.
        group: Which processes; None for all.

    Returns:
        A scalar, the same on each process. Gradients are right once they are averaged (not summed) over the processes.

    Raises:
        ArgumentError: the shapes are not `[B, D]`, or differ between processes.
    """
    _check_shapes(image_embeds, text_embeds)
    if _world_size(group) == 1:
        return clip_loss(image_embeds, text_embeds, logit_scale)
    _check_same_everywhere(image_embeds, group)
    all_images = torch.cat(gather_with_gradient(image_embeds, group=group))
    all_texts = torch.cat(gather_with_gradient(text_embeds, group=group))
    first = dist.get_rank(group) * len(image_embeds)
    return _as_mean(_clip_rows(image_embeds, text_embeds, all_images, all_texts, logit_scale, first), group)


def gathered_siglip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Group = None,
) -> Tensor:
    """`siglip_loss` of the whole batch, of which each process of the group holds a part of the same size.

    Only texts are gathered, and a process compares its images with one process's texts after the other: no matrix is
    larger than `[B, B]`. Outside a process group, and in a group of one, this is `siglip_loss`.

    Args:
        image_embeds: `[B, D]`, this process's images.
        text_embeds: `[B, D]`, their texts.
        logit_scale: As in `siglip_loss`, the same on each process.
        logit_bias: Likewise.
        group: Which processes; None for all.

    Returns:
        A scalar, the same on each process. Gradients are right once they are averaged (not summed) over the processes.

    Raises:
        ArgumentError: the shapes are not `[B, D]`, or differ between processes.
    """
    _check_shapes(image_embeds, text_embeds)
    if _world_size(group) == 1:
        return siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    _check_same_everywhere(text_embeds, group)
    texts = gather_with_gradient(text_embeds, group=group)
    return _as_mean(_siglip_rows(image_embeds, texts, logit_scale, logit_bias, own=dist.get_rank(group)), group)


def gather_with_gradient(tensor: Tensor, *, group: Group = None) -> tuple[Tensor, ...]:
    """The tensors of all processes of a group, in the order of their ranks.

    The gradient of a process's tensor is the sum of what all processes send back to it.

    Args:
        tensor: Of one shape and dtype on all processes; that is not checked here.
        group: Which processes; None for all.
    """
    gathered: tuple[Tensor, ...] = _Gather.apply(tensor, group)
    return gathered


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather did this; it is deprecated since torch 2.14 without a public successor.

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(_world_size(group))]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # One reduction of all: gloo has no reduce_scatter in every version of torch that we take.
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def _clip_rows(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor | float, first: int
) -> Tensor:
    """The loss of these rows: image and text i belong to number `first + i` of all."""
    answers = torch.arange(first, first + len(images), device=images.device)
    to_text = F.cross_entropy(scale * images @ all_texts.T, answers)
    to_image = F.cross_entropy(scale * texts @ all_images.T, answers)
    return (to_text + to_image) / 2


def _siglip_rows(
    images: Tensor, texts: Sequence[Tensor], scale: Tensor | float, bias: Tensor | float, own: int
) -> Tensor:
    """The loss of these images with all texts, of which part number `own` belongs to them."""
    total = images.new_zeros(())
    for number, part in enumerate(texts):
        signs = -torch.ones(len(images), len(part), dtype=images.dtype, device=images.device)
        if number == own:
            signs.fill_diagonal_(1)
        total = total - F.logsigmoid(signs * (scale * images @ part.T + bias)).sum()
    return total / len(images)


def _as_mean(loss: Tensor, group: Group) -> Tensor:
    """This process's loss, with the mean of all as its value: its gradient stays its own."""
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    return loss + (mean / _world_size(group) - loss.detach())


def _world_size(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _check_shapes(images: Tensor, texts: Tensor) -> None:
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise ArgumentError(
            f"image_embeds {list(images.shape)} and text_embeds {list(texts.shape)}: expected [B, D] of both, B >= 1"
        )


def _check_same_everywhere(tensor: Tensor, group: Group) -> None:
    # Unequal parts hang or corrupt the gathering, and would each weigh the same in the mean.
    own = torch.tensor(tensor.shape, device=tensor.device)
    shapes = [torch.empty_like(own) for _ in range(_world_size(group))]
    dist.all_gather(shapes, own, group=group)
    if any(not torch.equal(shape, own) for shape in shapes):
        found = ", ".join(f"{shape.tolist()}" for shape in shapes)
        raise ArgumentError(
            f"embeddings of shapes {found} on the processes: all must be of one shape. Leave out a last batch that "
            "does not fill all processes (drop_last)"
        )

"""timm's transform on tensors: whole batches, on any device, close to the exact one and not equal to it.

timm's steps say what happens; only the resizing is done by torch instead of PIL. How far the two are apart before mean
and std, in steps of an 8-bit pixel (of 255), from a fifth to three times the size, is measured by
`scripts/bench_image_processor.py`. With the aspect kept, on an x86-64 CPU with torch 2.14.1, torchvision 0.29.1 and
Pillow 13.0:

    interpolation        uint8: max, mean      uint8 without a kernel of its own      float: max, mean
    nearest              0, 0                  0, 0                                   0, 0
    bilinear             2, 0.024              2, 0.25                                1.0, 0.35
    bicubic, lanczos     2, 0.010              2, 0.027                               1.2, 0.32

The means are the largest of all sizes. torch has uint8 kernels on CPUs with AVX2 or NEON, not on GPUs. Floats are not
rounded to whole steps, which is what their mean comes from. Where an image loses much height and little width (say a
portrait that is squashed to a square), this Pillow resizes the columns before the rows, and we do not: then the maximum
is 11 and the mean of uint8 0.30.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio, center_crop_or_pad
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as F

from .errors import ArgumentError
from .image_processing import PadToSquare, transform_of


def transform_tensor(images: torch.Tensor, block: dict[str, Any], size: Sequence[int]) -> torch.Tensor:
    """Preprocess a batch of tensors.

    Args:
        images: `[B, C, H, W]`, uint8, or floating point in [0, 1]; one channel counts as grey where three are needed.
        block: A checked preprocess block.
        size: Height and width of the result in pixels.

    Returns:
        `[B, C, height, width]`, float32, on the device of `images`; differentiable where `images` are floats.

    Raises:
        ArgumentError: channels, dtype or values are not those of images, or torch has no such interpolation.
    """
    images = _checked(images, len(block["mean"]))
    for step in transform_of(block, size).transforms:
        if isinstance(step, PadToSquare):
            images = _pad_to_square(images, step)
        elif isinstance(step, Resize):
            images = _resize(images, _target(images, step.size), step.interpolation)
        elif isinstance(step, ResizeKeepRatio):
            target = step.get_params(images, step.size, step.longest)  # type: ignore[no-untyped-call]
            images = _resize(images, target, step.interpolation)
        elif isinstance(step, CenterCropOrPad):
            images = _crop_or_pad(images, step)
        elif isinstance(step, MaybeToTensor):
            images = images if images.is_floating_point() else images.float().div(255)
        else:
            images = step(images)  # cropping, normalising and our own steps take both kinds
    return images


def _checked(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.ndim != 4 or 0 in images.shape:
        raise ArgumentError(f"a tensor of shape {list(images.shape)}: expected [C, H, W] or [B, C, H, W], not empty")
    if images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1) if channels == 3 else images
    if images.shape[1] != channels:
        raise ArgumentError(
            f"a tensor of shape {list(images.shape)}: expected {channels} channels first, [B, {channels}, H, W]; with "
            "channels last pass input_data_format='channels_last'"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ArgumentError(f"a tensor of {images.dtype}: expected uint8, or floating point in [0, 1]")
    images = images.float()
    least, most = (bound.item() for bound in images.detach().aminmax())
    if not (least >= 0 and most <= 1):
        raise ArgumentError(
            f"a floating point tensor with values from {least:.4g} to {most:.4g}: expected [0, 1], before mean and "
            "std. Divide by 255 what goes to 255; what is normalised already goes to the model as it is."
        )
    return images


def _target(images: torch.Tensor, size: int | Sequence[int]) -> list[int]:
    """Height and width that torchvision's `Resize` gives: a single number is the shorter side."""
    if not isinstance(size, int):
        return list(size)
    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    return [size, longer] if height <= width else [longer, size]


def _resize(images: torch.Tensor, size: Sequence[int], mode: InterpolationMode) -> torch.Tensor:
    height, width = size
    if mode == InterpolationMode.NEAREST:
        rows, columns = _nearest(images.shape[-2], height), _nearest(images.shape[-1], width)
        return images[..., rows, :][..., columns]
    try:
        # As PIL does: rows first, then columns, and what bicubic and lanczos overshoot is cut after each of them. uint8
        # is also rounded in between, as PIL's is, where torch has no kernel of its own for it.
        for target in ([images.shape[-2], width], [height, width]):
            images = F.resize(images, target, interpolation=mode, antialias=True)
            images = images.clamp(0, 1) if images.is_floating_point() else images
    except (NotImplementedError, ValueError) as error:
        raise ArgumentError(
            f"this torch and torchvision cannot resize tensors with interpolation {mode.value!r}; pass PIL images or "
            "uint8 numpy arrays"
        ) from error
    return images


def _nearest(before: int, after: int) -> list[int]:
    """The pixels that PIL takes: it adds up the step in double precision, where torch's modes multiply in single."""
    step = before / after
    position, taken = step * 0.5, []
    for _ in range(after):
        taken.append(min(int(position), before - 1))
        position += step
    return taken


def _fill(images: torch.Tensor, color: Sequence[int]) -> torch.Tensor:
    fill = torch.tensor(color, device=images.device)
    return (fill / 255 if images.is_floating_point() else fill).to(images.dtype)


def _pad_to_square(images: torch.Tensor, step: PadToSquare) -> torch.Tensor:
    batch, channels, height, width = images.shape
    side = max(height, width)
    left, top = step.corner(width, height)
    canvas = _fill(images, step.color).view(1, channels, 1, 1).repeat(batch, 1, side, side)
    canvas[..., top : top + height, left : left + width] = images
    return canvas


def _crop_or_pad(images: torch.Tensor, step: CenterCropOrPad) -> torch.Tensor:
    """timm's own, channel by channel: torchvision pads tensors with one number only."""
    color: Any = step.fill
    fill = _fill(images, color).tolist()
    parts = [center_crop_or_pad(images[:, i : i + 1], step.size, fill=value) for i, value in enumerate(fill)]
    return torch.cat(parts, 1)

"""Position embeddings of a checkpoint for the grid of patches that a trunk has, resampled by timm."""

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn as nn
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from ..reader.errors import ArgumentError

_KEY = "pos_embed"


def resample_positions(
    trunk: nn.Module, tensors: dict[str, Tensor], grid: Sequence[int] | None
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Resample `pos_embed` `[1, prefix + rows * columns, C]` to the trunk's grid of patches, in place of `tensors`.

    A checkpoint does not say of what grid its positions are, only how many there are. A square is taken where they are
    as many as one has and the trunk's grid is not of as many; all else is for the caller to say.

    Args:
        trunk: With a `patch_embed` that has a `grid_size`; of others nothing is resampled.
        tensors: Weights under the trunk's keys.
        grid: Rows and columns of the checkpoint's grid; None where it is a square.

    Returns:
        The key and its shape before, where it was resampled; and what is wrong, where the grid cannot be told.

    Raises:
        ArgumentError: `grid` is not two whole numbers, or has not as many places as the checkpoint.
    """
    if grid is not None and (len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid)):
        raise ArgumentError(f"resample={grid!r}: expected True, or rows and columns of the checkpoint's grid")
    found, own = tensors.get(_KEY), getattr(trunk, _KEY, None)
    target = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if found is None or target is None or not isinstance(own, Tensor) or found.ndim != 3 or own.ndim != 3:
        return {}, []
    prefix = 0 if getattr(trunk, "no_embed_class", False) else int(getattr(trunk, "num_prefix_tokens", 1))
    places, target = found.shape[1] - prefix, tuple(target)
    if places <= 0 or found.shape[2] != own.shape[2]:
        return {}, []
    source = (isqrt(places), isqrt(places)) if grid is None else tuple(grid)
    if grid is None and source != target and (source[0] ** 2 != places or found.shape == own.shape):
        return {}, [
            f"{_KEY} has {places} places, and of what grid of patches cannot be told (the trunk's is {target[0]} x "
            f"{target[1]}): pass resample=(rows, columns) of the checkpoint's"
        ]
    if source[0] * source[1] != places:
        raise ArgumentError(f"resample={source}: {source[0] * source[1]} places, {_KEY} of the checkpoint has {places}")
    if source == target:
        return {}, []
    with torch.no_grad():
        tensors[_KEY] = resample_abs_pos_embed(
            found, new_size=list(target), old_size=list(source), num_prefix_tokens=prefix
        )
    return {_KEY: tuple(found.shape)}, []

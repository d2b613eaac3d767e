"""What there is to see in embeddings: where a tower looks in an image, and how a set of images lies.

Numbers and pictures only; `gradio.py` shows them in a browser.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import Normalize

from ..reader.errors import ArgumentError
from ..reader.image_processing import NormalizeRange, in_channels, run_steps
from ..reader.trunk import eval_mode, float_dtype
from .neighbours import BLOCK, nearest_rows

_VIEW = 448
_DOT, _MARGIN = 44, 8
Method = Literal["pca", "umap"]


class PatchView:
    """One image as a tower sees it: the cut-out that reaches the trunk, and the trunk's last map of features.

    Args:
        tower: A TimmModel.
        image: A PIL image, upright.

    Attributes:
        view: The cut-out, its longer side 448 pixels.
        features: `[C, H, W]`, float32, on the CPU: what the trunk's last layer gives at H x W places.

    Raises:
        ConfigError: timm has no inner maps of this trunk.
    """

    def __init__(self, tower: Any, image: Image.Image) -> None:
        steps = tower.transform().transforms
        seen = run_steps(
            [step for step in steps if not isinstance(step, (Normalize, NormalizeRange))],
            in_channels(image, tower.config.in_chans),
        )
        anchor = next(tower.parameters())
        pixels = tower.transform()(in_channels(image, tower.config.in_chans))[None]
        with torch.no_grad(), eval_mode(tower):
            found = tower.forward_intermediates(
                pixels.to(anchor.device, float_dtype(tower.trunk)),
                [-1],
                normalize_intermediates=True,
                intermediates_only=True,
            )
        self.features: torch.Tensor = found["image_intermediates"][0][0].float().cpu()
        shown = seen if seen.shape[0] == 3 else seen[:1].expand(3, -1, -1)
        plain = Image.fromarray((shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
        scale = _VIEW / max(plain.size)
        self.view = plain.resize((round(plain.width * scale), round(plain.height * scale)), Image.Resampling.BICUBIC)

    def components(self) -> Image.Image:
        """The three main directions of the features as red, green and blue; equal colours are alike for the tower."""
        channels, height, width = self.features.shape
        rows = self.features.reshape(channels, -1).T
        axes = principal_axes(rows, min(3, channels))
        values = (rows - rows.mean(0)) @ axes
        low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
        values = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        colours = F.pad(values, (0, 3 - values.shape[1])).reshape(height, width, 3)
        return Image.fromarray((colours * 255).byte().numpy()).resize(self.view.size, Image.Resampling.NEAREST)

    def similarity(self, x: int, y: int) -> torch.Tensor:
        """Cosine of every place with the one under a pixel of the view: `[H, W]`.

        Raises:
            ArgumentError: the pixel lies outside.
        """
        if not (0 <= x < self.view.width and 0 <= y < self.view.height):
            raise ArgumentError(f"({x}, {y}) lies outside the picture of {self.view.width} x {self.view.height} pixels")
        _, height, width = self.features.shape
        unit = F.normalize(self.features, dim=0)
        here = unit[:, y * height // self.view.height, x * width // self.view.width]
        return torch.einsum("c,chw->hw", here, unit)

    def similarity_picture(self, x: int, y: int) -> Image.Image:
        """`similarity` over the view: dark where the image is unlike the place, bright where it is like it."""
        cosines = self.similarity(x, y)
        low = cosines.min()
        scaled = ((cosines - low) / (1 - low).clamp_min(1e-12)).clamp(0, 1)
        heat = Image.fromarray((scaled * 255).byte().numpy()).resize(self.view.size, Image.Resampling.BICUBIC)
        colours = ImageOps.colorize(heat, black="#1a1040", mid="#d6456d", white="#fff3a0")
        return Image.blend(ImageOps.grayscale(self.view).convert("RGB"), colours, 0.65)


def principal_axes(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`[D, count]`: the directions of the largest variance of rows `[N, D]`; the largest number of each is positive."""
    centred = (rows - rows.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return torch.as_tensor(axes * signs, dtype=rows.dtype)


def plane(rows: torch.Tensor, method: Method = "pca") -> torch.Tensor:
    """Rows `[N, D]` -> points `[N, 2]` in [0, 1].

    Args:
        rows: From `unit_rows`.
        method: `"pca"`, or `"umap"`, where umap-learn is installed.

    Raises:
        ArgumentError: another method.
        ImportError: umap-learn is not installed.
    """
    if method == "pca":
        points = (rows - rows.mean(0)) @ principal_axes(rows, min(2, rows.shape[1]))
        points = F.pad(points, (0, 2 - points.shape[1]))
    elif method == "umap":
        from .umap import umap_plane

        points = umap_plane(rows)
    else:
        raise ArgumentError(f"method={method!r}: expected 'pca' or 'umap'")
    low, high = points.amin(0), points.amax(0)
    return (points - low) / (high - low).clamp_min(1e-12)


def plane_picture(points: torch.Tensor, tiles: dict[int, Image.Image], size: int = 900) -> Image.Image:
    """A picture of points `[N, 2]`: a grey dot for each, and a small image over those that have one.

    Args:
        points: From `plane`.
        tiles: Row -> its image.
        size: Side of the picture in pixels.
    """
    canvas = np.full((size, size, 3), 255, np.uint8)
    for x, y in pixels_of(points, size).tolist():
        canvas[y - 1 : y + 2, x - 1 : x + 2] = 150
    picture = Image.fromarray(canvas)
    for row, tile in tiles.items():
        x, y = pixels_of(points[row], size).tolist()
        picture.paste(ImageOps.contain(tile, (_DOT, _DOT)), (x - _DOT // 2, y - _DOT // 2))
    return picture


def pixels_of(points: torch.Tensor, size: int) -> torch.Tensor:
    """Points in [0, 1] -> pixels (x, y) of `plane_picture`."""
    edge = _DOT // 2 + _MARGIN
    return (edge + points * (size - 1 - 2 * edge)).round().long()


def near_duplicates(rows: torch.Tensor, least: float = 0.95, most: int = 50) -> list[tuple[int, int, float]]:
    """The pairs of rows with the largest cosine: (row, later row, cosine), largest first.

    Args:
        rows: `[N, D]`, from `unit_rows`.
        least: Smaller cosines are left out.
        most: No more pairs than this.
    """
    step = max(1, BLOCK // max(len(rows), 1))
    found: list[tuple[int, int, float]] = []
    for first in range(0, len(rows), step):
        cosines = rows[first : first + step] @ rows[first:].T
        cosines = cosines.masked_fill(torch.ones_like(cosines, dtype=torch.bool).tril(), -torch.inf)
        top = cosines.flatten().topk(min(most, cosines.numel()))
        for cosine, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if cosine >= least:
                found.append((first + place // cosines.shape[1], first + place % cosines.shape[1], cosine))
        found = sorted(found, key=lambda pair: (-pair[2], pair[:2]))[:most]
    return found


def outliers(rows: torch.Tensor, k: int = 10, most: int = 24) -> list[tuple[int, float]]:
    """The rows that are least like their k nearest neighbours: (row, mean cosine with them), least first."""
    if len(rows) < 3:
        return []
    near, _ = nearest_rows(rows, rows, min(k, len(rows) - 1), leave_out=torch.arange(len(rows)))
    means = near.mean(1)
    order = means.argsort(stable=True)[:most].tolist()
    return [(row, float(means[row])) for row in order]

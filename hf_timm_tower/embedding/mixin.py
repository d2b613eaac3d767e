"""What `TimmModel` can do with many images: signatures and docstrings."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn as nn

from .embed import embed
from .engine import Workers, make_plan
from .sources import open_source


class EmbeddingMixin(nn.Module):
    """Embeddings of many images. `TimmModel` is the only class to inherit from it."""

    def embed(
        self,
        images: Any,
        *,
        batch_size: int | None = None,
        num_workers: Workers = "auto",
        normalize: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        errors: Literal["raise", "collect"] = "raise",
        return_tokens: bool = False,
        layers: Sequence[int] = (),
        column: str | None = None,
    ) -> Any:
        """Images of any kind and number -> their embeddings, in their order, on the CPU.

        Pixels are those of `tower.transform()` for the upright image (as its EXIF orientation says). An image's
        embedding has the same bits whatever stands beside it and in however many processes; another `batch_size` or
        device may give other last bits. Mode, gradients and random generators of the tower stay as they are.

        Args:
            images: A folder (its image files and tar shards, sorted), a file, a list of paths; PIL images, bytes of
                image files, arrays, tensors (uint8 or floats in [0, 1], not yet transformed); a `datasets` table; a
                WebDataset shard or pipeline; any iterable of these, also as tuples (image, ...) or mappings.
            batch_size: Images that run at once; None: 4 on a CPU (there in each process), 32 elsewhere.
            num_workers: Processes: on a CPU, of one thread each, that decode and run the tower; elsewhere, that decode
                in front of it. `"auto"`: one for each core that this process may use, fewer for few images; 0: none.
            normalize: Scale every embedding to length 1.
            dtype: Of the result; None: what the tower gives.
            device: Where to run, on a copy of the tower; None: where it is.
            progress: Show a bar.
            errors: `"raise"` at the first image that cannot be used, or `"collect"` them.
            return_tokens: Give a dict with `embedding` and `tokens`, the output of `forward_features`.
            layers: Give a dict with `embedding` and `layers`, maps `[N, C, H, W]` of these layers, counted as in
                `forward_intermediates`.
            column: The image's key in tables and mappings; None: the usual names.

        Returns:
            `[N, embed_dim]`, or what the head gives (tuple, dict) of such tensors. With `errors="collect"` an
            `Embedded`: `embeddings` of the M images that could be used, their `ids` and `rows`, and `failures`.

        Raises:
            ArgumentError: an argument or an image that cannot be used.
            FolderError: there is no such folder.
        """
        plan = make_plan(
            self,  # type: ignore[arg-type]
            batch_size=batch_size,
            num_workers=num_workers,
            normalize=normalize,
            dtype=dtype,
            device=device,
            return_tokens=return_tokens,
            layers=layers,
        )
        return embed(plan, open_source(images, column), errors=errors, progress=progress)

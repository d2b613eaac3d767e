"""What `TimmModel` can do with many images: signatures and docstrings."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn

from .embed import embed
from .engine import BATCH_ON_CPU, Workers, make_plan
from .optimize import Optimized, Step, optimize
from .sources import open_source

if TYPE_CHECKING:
    from .stored import StoredEmbeddings


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
            batch_size: Images that run at once; None: 8 on a CPU (there in each process), 32 elsewhere.
            num_workers: Processes: on a CPU, of one thread each, that decode and run the tower; elsewhere, that decode
                in front of it. `"auto"`: one for each core that this process may use, fewer for few images; 0: none.
            normalize: Scale every embedding to length 1; in tokens and maps, the vector of each place.
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
            self,
            batch_size=batch_size,
            num_workers=num_workers,
            normalize=normalize,
            dtype=dtype,
            device=device,
            return_tokens=return_tokens,
            layers=layers,
        )
        return embed(plan, open_source(images, column), errors=errors, progress=progress)

    def embed_to(
        self,
        images: Any,
        folder: str | os.PathLike[str],
        *,
        batch_size: int | None = None,
        num_workers: Workers = "auto",
        normalize: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        errors: Literal["raise", "collect"] = "collect",
        return_tokens: bool = False,
        layers: Sequence[int] = (),
        column: str | None = None,
        rows_per_shard: int | None = None,
    ) -> "StoredEmbeddings":
        """As `embed`, into a folder of Parquet shards; memory does not grow with the number of images.

        A run that was killed goes on with the same call: every image stands once, in order, with the bits of an
        undisturbed run. A folder of another tower, of other options or of other images is refused.

        Args:
            images: As in `embed`; in the same order when a run goes on.
            folder: It is made.
            batch_size: As in `embed`.
            num_workers: As in `embed`.
            normalize: As in `embed`.
            dtype: As in `embed`; bfloat16 is stored as float32.
            device: As in `embed`.
            progress: As in `embed`.
            errors: As in `embed`; images that cannot be used are listed in `failures.jsonl`.
            return_tokens: As in `embed`.
            layers: As in `embed`.
            column: As in `embed`.
            rows_per_shard: Images of a shard, which is what a kill loses at most; None: 4096, fewer for large rows.

        Returns:
            The folder: `load()` gives ids and embeddings.

        Raises:
            ArgumentError: an argument, or with `errors="raise"` an image, that cannot be used.
            FolderError: the folder holds something else or cannot be written.
            ImportError: pyarrow is missing.
        """
        from .to_folder import embed_to_folder  # needs pyarrow

        plan = make_plan(
            self,
            batch_size=batch_size,
            num_workers=num_workers,
            normalize=normalize,
            dtype=dtype,
            device=device,
            return_tokens=return_tokens,
            layers=layers,
        )
        source = open_source(images, column)
        return embed_to_folder(plan, source, folder, rows_per_shard=rows_per_shard, errors=errors, progress=progress)

    def optimize(self, *steps: Step, batch_size: int = BATCH_ON_CPU) -> Optimized:
        """A copy that runs faster, with what each step gained and how far from the exact output it is, measured here.

        No other part of this package does any of this by itself. The tower stays as it is.

        Args:
            steps: In this order: `"reparameterize"` (BatchNorm and branches folded into convolutions, where timm has it
                for the trunk), `"channels_last"`, `"bfloat16"`, `"float16"`, `"compile"` (`torch.compile`, which needs
                a C++ compiler on a CPU).
            batch_size: Images of a batch, when it is measured; on a CPU one thread runs, as in `embed`.

        Returns:
            `tower` and, for each step, `measured`.

        Raises:
            ArgumentError: another step.
        """
        return optimize(self, steps, batch_size)

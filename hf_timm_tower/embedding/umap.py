"""UMAP's plane, and the only file here that imports umap-learn."""

import torch
import umap

from ..reader.errors import ArgumentError

_LEAST = 4  # with fewer it fails, each time in another library


def umap_plane(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[N, D]` -> points `[N, 2]`, the same in every run.

    Raises:
        ArgumentError: they are too few.
    """
    if len(rows) < _LEAST:
        raise ArgumentError(f"umap needs {_LEAST} images or more, there are {len(rows)}; take pca")
    near = min(15, max(2, len(rows) - 1))
    plane = umap.UMAP(n_components=2, metric="cosine", n_neighbors=near, random_state=0, n_jobs=1)
    threads = torch.get_num_threads()
    try:
        made = plane.fit_transform(rows.numpy())
    finally:
        torch.set_num_threads(threads)  # numba, when it starts its own, sets OpenMP's for the whole process
    return torch.from_numpy(made).float()

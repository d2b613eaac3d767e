"""faiss' flat index, and the only file here that imports faiss."""

from typing import Any

import faiss
import torch


def flat_index(rows: torch.Tensor) -> Any:
    """`faiss.IndexFlatIP` over rows `[N, D]`, float32: exact inner products, cosines where rows have length 1."""
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.contiguous().numpy())
    return index

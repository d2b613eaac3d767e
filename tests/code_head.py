"""A head that is stored as code, in a file that imports nothing else: as such heads have to be."""

import torch
import torch.nn as nn


class Looping(nn.Module):
    """A head whose forward branches on values: it cannot be stored as data."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        while bool(x.abs().max() > 1):
            x = x / 2
        return x

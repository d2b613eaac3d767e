"""A tower as `torch.jit.script` takes it: open_clip scripts its models (`jit=True`), and so their image tower.

torch deprecates TorchScript; `interop.torch_export` and `interop.onnx` are what to use.
"""

import torch
import torch.nn as nn

from ..reader.errors import ExportError
from ..reader.graph_head import GraphHead
from ..reader.tower import HeadInput


class ScriptableTower(nn.Module):
    """Trunk and head with a forward that TorchScript can read; on the same parameters.

    Args:
        trunk: The trunk.
        head: A built-in head, or one whose class can be scripted.
        head_input: How the trunk's features become the head's input.

    Raises:
        ExportError: the head was rebuilt from a graph, which TorchScript cannot read.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, head_input: HeadInput) -> None:
        super().__init__()
        if isinstance(head, GraphHead):
            raise ExportError(
                "a head that was rebuilt from its graph cannot be scripted (torch.jit.script); use torch.jit.trace, "
                "interop.torch_export or interop.onnx"
            )
        self.trunk, self.head = trunk, head
        self.prefix = -1 if head_input.prefix is None else head_input.prefix
        self.to_nchw, self.per_position = head_input.to_nchw, head_input.per_position

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, in_chans, H, W]` -> the embedding `[B, embed_dim]`."""
        features = self.trunk(x)
        if self.prefix >= 0:
            features = torch.cat([features[:, 0], features[:, self.prefix :].mean(dim=1)], dim=1)
        if self.to_nchw:
            features = features.permute(0, 3, 1, 2).contiguous()
        if self.per_position:
            return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        return self.head(features)  # type: ignore[no-any-return]

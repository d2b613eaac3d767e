"""A file of ONNX, run on the CPU. Needs the extra `onnx`."""

from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)

from ..reader.errors import ExportError

# What onnxruntime raises for a model that it cannot run; they have no base class of their own.
_ERRORS = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException)


class Session:
    """A model with one input in onnxruntime, called as a tower is.

    Args:
        path: The `.onnx` file.

    Raises:
        ExportError: onnxruntime cannot run it; gives its reason.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _ERRORS as error:
            raise ExportError(f"{path.name}: onnxruntime cannot run it: {error}") from error
        (self._input,) = (entry.name for entry in self._session.get_inputs())

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images `[B, in_chans, H, W]` -> the outputs, in the file's order."""
        try:
            found = self._session.run(None, {self._input: images.cpu().numpy()})
        except _ERRORS as error:
            raise ExportError(
                f"onnxruntime cannot run the exported model on images {list(images.shape)}: {error}"
            ) from error
        return [torch.from_numpy(array) for array in found]

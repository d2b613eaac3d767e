"""A tower -> a file or folder of another library; the command and `scripts/export.py`."""

from typing import Any, Literal

Format = Literal["onnx", "torch", "timm"]


def export(
    tower: Any, out: str, format: Format, *, check: bool = True, head: Any = "fold", preprocess: Any = "exact"
) -> str:
    """Write it, and say what was written.

    Args:
        tower: A TimmModel.
        out: File (.onnx, .pt2) or folder (timm).
        format: `onnx`, `torch` (a program of torch.export) or `timm`.
        check: Compare the output with the tower's (not for timm).
        head: For timm: `fold` it into a classifier or `drop` it.
        preprocess: For timm: `exact`, or `nearest` where timm cannot say it.

    Raises:
        TowerError: it cannot be written.
        ImportError: an optional dependency is missing; says what to install.
    """
    if format == "timm":
        from ..interop.timm_export import export_timm

        done = export_timm(tower, out, head=head, preprocess=preprocess)
        lost = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
        return f"{done.folder}: {done.architecture}, {done.num_classes or 'no'} classifier outputs{lost}"
    if format == "onnx":
        try:
            from ..interop.onnx import export_onnx as write
        except ImportError as error:
            raise ImportError(f'{error}: pip install "hf_timm_tower[onnx]"') from error
    else:
        from ..interop.torch_export import export_torch as write
    written = write(tower, out, check=check)
    if written.difference is None:
        return f"{written.path}: not checked"
    return f"{written.path}: differs from the tower by at most {written.difference:.1e} of the largest value"

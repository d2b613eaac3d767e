"""A tower -> one `.pt2` file of `torch.export`, which runs without this package and without timm.

The program is traced in eval mode with a free batch size; image size and dtype are those of the tower.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from ..files.disk import folder_error, scratch_folder
from ..reader.errors import ConfigError, ExportError, TowerError
from ..reader.trunk import BUILD_ERRORS, eval_mode
from .eval_tower import EvalTower, relative_difference

TOLERANCE = 1e-4
"""Largest difference of an exported program's output to the tower's that is accepted, over the largest output."""

PREPROCESS_NAME = "preprocess.json"
"""Text stored in the file: what the images must have gone through (`config.preprocess` and the image size)."""

# Where in whose files each operation was called: paths and source lines of this machine, which nothing needs.
_TRACES = ("stack_trace", "source_fn_stack", "from_node")
_TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        difference: Largest difference of its output to the tower's, over the largest output, for batches of 1 and 3;
            None where it was not checked.
    """

    path: Path
    difference: float | None


def export_torch(tower: nn.Module, path: str | os.PathLike[str], *, check: bool = True) -> Exported:
    """Write a tower as a `.pt2` file; `torch.export.load(path).module()(images)` runs it.

    Args:
        tower: A tower; it is not changed.
        path: The file, ending in `.pt2`; it appears complete or not at all.
        check: Load the file again and compare its output with the tower's.

    Returns:
        The file and how far its output is from the tower's.

    Raises:
        ExportError: torch cannot export this tower; or its output differs by more than 1e-4.
        ConfigError: another ending.
        FolderError: the file cannot be written.
    """
    path = required_suffix(path, ".pt2")
    model = EvalTower(tower)
    program = trace(model)
    difference = None
    with finished_file(path) as partial:
        with reasons("torch.export.save", model):
            torch.export.save(program, partial, extra_files={PREPROCESS_NAME: preprocess_text(model)})
        if check:
            difference = check_output(model, torch.export.load(partial).module(), f"{path.name} (torch.export)")
    return Exported(path, difference)


def trace(model: EvalTower) -> ExportedProgram:
    """The program of a tower, its batch size free.

    Raises:
        ExportError: with the exporter's reason.
    """
    images = model.images(_TRACED_BATCH)
    with torch.no_grad(), eval_mode(model), reasons("torch.export", model):
        batch = Dim("batch", max=2**31 - 1)  # torch 2.7 asks for a bound
        program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}}, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for name in _TRACES:
                node.meta.pop(name, None)
    return program


def preprocess_text(model: EvalTower) -> str:
    """The text of `PREPROCESS_NAME`."""
    facts = {**(model.config.preprocess or {}), "image_size": model.config.image_size}
    return json.dumps(facts, indent=2, sort_keys=True)


@contextmanager
def reasons(what: str, model: EvalTower) -> Iterator[None]:
    """Turn what an exporter raises into our error."""
    try:
        yield
    except TowerError:
        raise
    except BUILD_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(
            f"{what} cannot export {model.config.architecture} with pool={model.config.pool!r} and head "
            f"{type(model.head).__name__}: {type(error).__name__}: {text[:600]}"
        ) from error


def check_output(model: EvalTower, run: Callable[[torch.Tensor], Any], what: str) -> float:
    """Compare an exported program with the tower, for batches of 1 and 3.

    Returns:
        The largest difference, over the largest output.

    Raises:
        ExportError: it fails on one of these batches, or differs by more than `TOLERANCE`.
    """
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = model.images(batch)
        with torch.no_grad(), eval_mode(model):
            expected = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor)]
            with reasons(f"{what}: a batch of {batch} fails:", model):
                found = [leaf for leaf in tree_leaves(run(images)) if isinstance(leaf, torch.Tensor)]
        difference = relative_difference(found, expected)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{what}: for a batch of {batch} the output of {model.config.architecture} differs from torch's by "
                f"{difference:.1e} of the largest value, more than {TOLERANCE:.0e}: nothing was written"
            )
        worst = max(worst, difference)
    return worst


def required_suffix(path: str | os.PathLike[str], suffix: str) -> Path:
    """A path with its ending checked.

    Raises:
        ConfigError: another ending.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"{path}: expected a file name that ends in {suffix}")
    return path


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A file of that name in a folder beside, to write to; it is moved into place when the block ends well, or removed.

    Raises:
        FolderError: it cannot be written.
    """
    try:
        # a folder of its own: torch writes the file's name into the file
        with scratch_folder(f".{path.stem}.", path.parent) as staging:
            partial = staging / path.name
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        if isinstance(error, TowerError):
            raise
        raise folder_error(f"{path}: cannot be written", error) from error

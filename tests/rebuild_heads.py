"""Run as a script by `test_corpus`: rebuild stored heads in a process that cannot import their classes.

``python rebuild_heads.py FOLDER`` reads, for every head, ``<name>.json`` (graph, shape of the input) and
``<name>.safetensors`` (weights), and writes ``<name>.found.safetensors`` with everything `observe` sees.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_timm_tower.reader.graph_head import construct


def observe(head: nn.Module, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What a user of the head can see: outputs in evaluation, and two steps of training with everything they leave."""
    seen: dict[str, torch.Tensor] = {}
    head.eval()
    for batch in (1, 4):
        values = _start(batch, shape)
        with torch.no_grad():
            _collect(head(values), f"eval.{batch}", seen)
    head.train()
    optimizer = torch.optim.SGD(
        [p for p in head.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))], lr=0.1
    )
    for step in (1, 2):
        values = _start(4 + step, shape).requires_grad_()
        outputs: dict[str, torch.Tensor] = {}
        _collect(head(values * 1.0), f"train.{step}", outputs)
        optimizer.zero_grad()
        loss = sum(tensor.double().pow(2).mean() for tensor in outputs.values() if tensor.requires_grad)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        seen.update(outputs)
        if values.grad is not None:
            seen[f"train.{step}.input_grad"] = values.grad
        for name, tensor in head.state_dict().items():
            seen[f"train.{step}.state.{name}"] = tensor.detach().clone()
    return {name: _savable(tensor) for name, tensor in seen.items()}


def _start(batch: int, shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(batch)
    random.seed(batch)
    return torch.randn(batch, *shape)


def _collect(value: Any, where: str, seen: dict[str, torch.Tensor]) -> None:
    """Flatten an output; the Python types on the way are part of the names."""
    if isinstance(value, torch.Tensor):
        seen[where] = value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _collect(item, f"{where}.{type(value).__name__}{index}", seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{where}.dict[{key!r}]", seen)
    elif value is not None:
        raise TypeError(f"a head returned a {type(value)}")


def _savable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).contiguous().clone()


def main(folder: Path) -> None:
    """Rebuild every head of the folder and write what is seen."""
    torch.set_num_threads(1)
    assert importlib.util.find_spec("heads_in_the_wild") is None, "this process must not know the heads"
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        head = construct(stored["graph"])
        head.load_state_dict(load_file(path.with_suffix(".safetensors")), strict=True)
        save_file(observe(head, tuple(stored["shape"])), path.with_suffix(".found.safetensors"))
    assert "einops" not in sys.modules, "a stored head needs nothing but torch and timm"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

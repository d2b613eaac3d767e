"""Heads as people write them (`heads_in_the_wild`): which come back as data, in a process that never saw their code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rebuild_heads import observe
from safetensors.torch import load_file, save_file
from torch import nn

from heads_in_the_wild import HEADS, Head
from hf_timm_tower.heads.to_graph import to_graph
from hf_timm_tower.heads.verify import verify_head
from hf_timm_tower.reader.errors import HeadError
from hf_timm_tower.reader.graph_head import construct

SHAPES = {"vector": (96,), "map": (96, 5, 5), "tokens": (101, 64)}
ROOT = Path(__file__).parents[2]

HARD_NOT_DATA: dict[str, str] = {}
"""The hard heads that do not come back as data, each with the reason. At most one in five may stand here."""

STORED = [head for head in HEADS if head.kind == "plain" or (head.kind == "hard" and head.name not in HARD_NOT_DATA)]
REFUSED = [head for head in HEADS if head.kind == "code" or head.name in HARD_NOT_DATA]


def make(head: Head) -> nn.Module:
    torch.manual_seed(0)
    return head.make(*SHAPES[head.form])


def store(head: nn.Module, shape: tuple[int, ...]) -> dict[str, object]:
    example = torch.zeros(2, *shape)
    graph = to_graph(head, example)
    verify_head(head, construct(graph), example)
    return graph


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every stored head, and with what a fresh process saw of each after rebuilding it."""
    folder = tmp_path_factory.mktemp("heads")
    empty = tmp_path_factory.mktemp("empty")
    for entry in STORED:
        head, shape = make(entry), SHAPES[entry.form]
        stored = {"graph": store(head, shape), "shape": shape}
        # Keys sorted, as transformers writes config.json: the graph must not rely on their order.
        (folder / f"{entry.name}.json").write_text(json.dumps(stored, sort_keys=True))
        weights = {key: value.clone().contiguous() for key, value in head.state_dict().items()}
        save_file(weights, folder / f"{entry.name}.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    script = shutil.copy(ROOT / "tests" / "rebuild_heads.py", folder)  # its own folder may come onto the path
    run = subprocess.run(
        [sys.executable, script, str(folder)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("entry", STORED, ids=lambda entry: entry.name)
def test_head_comes_back_in_a_process_that_never_saw_it(entry: Head, rebuilt: Path) -> None:
    torch.set_num_threads(1)
    found = load_file(rebuilt / f"{entry.name}.found.safetensors")
    expected = observe(make(entry), SHAPES[entry.form])
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not different


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_head_that_is_code_is_refused_with_a_reason(entry: Head) -> None:
    with pytest.raises(HeadError) as refusal:
        store(make(entry), SHAPES[entry.form])
    assert len(str(refusal.value)) > 30


def test_four_in_five_hard_heads_are_data() -> None:
    hard = {head.name for head in HEADS if head.kind == "hard"}
    assert HARD_NOT_DATA.keys() <= hard
    assert len(HARD_NOT_DATA) * 5 <= len(hard)


@pytest.mark.parametrize("entry", STORED, ids=lambda entry: entry.name)
def test_describing_a_rebuilt_head_gives_the_same_graph(entry: Head) -> None:
    head, example = make(entry), torch.zeros(2, *SHAPES[entry.form])
    graph = to_graph(head, example)
    again = construct(graph)
    again.load_state_dict(head.state_dict())
    assert json.dumps(to_graph(again, example)) == json.dumps(graph)

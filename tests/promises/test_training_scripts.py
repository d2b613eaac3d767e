"""The lines by which everybody's training scripts save, with the real accelerate and torch's FSDP2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_timm_tower import TimmModel, TimmTowerForImageClassification, TimmTowerModel, TowerError

FACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "TimmModel": (TimmModel, {}),
    "TimmTowerModel": (TimmTowerModel, {}),
    "TimmTowerForImageClassification": (TimmTowerForImageClassification, {"num_labels": 3}),
}
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "tower"
    torch.manual_seed(0)
    TimmModel("test_vit", 16, pool="token").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the life of a process."""
    yield
    AcceleratorState._reset_state(True)


def value_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.pooler_output


def train(model: Any, optimizer: torch.optim.Optimizer, backward: Any) -> None:
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        backward(value_of(model(torch.rand(2, 3, 160, 160))).float().square().mean())
        optimizer.step()


def assert_holds(face: Any, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = face.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", FACES)
def test_accelerate_s_documented_save(
    name: str, with_state: bool, mixed_precision: str, saved: Path, tmp_path: Path
) -> None:
    face, more = FACES[name]
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = face.from_pretrained(saved, **more)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, accelerator.backward)
    unwrapped = accelerator.unwrap_model(model)
    state = {"state_dict": accelerator.get_state_dict(model)} if with_state else {}
    unwrapped.save_pretrained(tmp_path / "b", is_main_process=False, save_function=accelerator.save, **state)
    assert not (tmp_path / "b").exists()
    unwrapped.save_pretrained(
        tmp_path / "b", is_main_process=accelerator.is_main_process, save_function=accelerator.save, **state
    )
    assert_holds(face, tmp_path / "b", {key: value.clone() for key, value in unwrapped.state_dict().items()})


@pytest.mark.parametrize("name", FACES)
def test_a_given_state_dict_is_what_is_saved(name: str, saved: Path, tmp_path: Path) -> None:
    face, more = FACES[name]
    model = face.from_pretrained(saved, **more)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=state)
    assert_holds(face, tmp_path / "b", state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    less = dict(list(state.items())[1:])
    with pytest.raises(TowerError, match=next(iter(state))):
        model.save_pretrained(tmp_path / "c", state_dict=less)
    assert not (tmp_path / "c").exists()


def fsdp2(rank: int, world: int, name: str, saved: Path, scratch: Path) -> None:
    """One process: shard, train, be refused, gather, save in the first process."""
    torch.set_num_threads(1)
    face, more = FACES[name]
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model = face.from_pretrained(saved, **more)
        for block in model.trunk.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (world,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda loss: loss.backward())
        with pytest.raises(TowerError, match=r"state_dict=state\) with"):
            model.save_pretrained(scratch / "refused")
        assert not (scratch / "refused").exists()
        state = get_model_state_dict(model, options=GATHER)
        model.save_pretrained(scratch / "b", is_main_process=rank == 0, state_dict=state if rank == 0 else None)
        if rank == 0:
            assert_holds(face, scratch / "b", state)
            # fully_shard renames the model's class in place
            assert "FSDP" not in (scratch / "b" / "config.json").read_text()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", FACES)
def test_fsdp2_in_one_process(name: str, saved: Path, tmp_path: Path) -> None:
    fsdp2(0, 1, name, saved, tmp_path)


def fsdp2_of_every_face(rank: int, world: int, saved: Path, scratch: Path) -> None:
    for name in FACES:
        (scratch / name).mkdir(exist_ok=True)
        fsdp2(rank, world, name, saved, scratch / name)


@pytest.mark.slow
@pytest.mark.turn(1)
def test_fsdp2_in_two_processes(saved: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fsdp2_of_every_face, args=(2, saved, tmp_path), nprocs=2)

"""Weights that are spread over processes are found, whatever spread them, and gathered ones are let through."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_timm_tower import TimmModel, TimmTowerEncoder, TimmTowerEncoderConfig, WeightsError
from hf_timm_tower.training.sharding import refuse_sharded


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_fully_sharded_weights_are_refused_and_gathered_ones_are_not(mesh: dist.DeviceMesh) -> None:
    tower = TimmModel("test_vit", 16, pool="token")
    expected = {key: value.clone() for key, value in tower.state_dict().items()}
    refuse_sharded(tower.state_dict(keep_vars=True))
    fully_shard(tower, mesh=mesh)
    for state in (tower.state_dict(), tower.state_dict(keep_vars=True), dict(tower.named_parameters())):
        with pytest.raises(WeightsError, match=r"DTensor.*accelerator\.get_state_dict.*get_model_state_dict"):
            refuse_sharded(state)
    gathered = get_model_state_dict(tower, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    refuse_sharded(gathered)
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[key], expected[key]) for key in expected)


def test_an_encoder_says_how_to_gather_too(mesh: dist.DeviceMesh, tmp_path: Path) -> None:
    encoder = TimmTowerEncoder(TimmTowerEncoderConfig(tower_config=TimmModel("test_vit", 16).config))
    expected = {key: value.clone() for key, value in encoder.state_dict().items()}
    fully_shard(encoder, mesh=mesh)
    with pytest.raises(WeightsError, match=r"DTensor.*get_model_state_dict"):
        encoder.save_pretrained(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    gathered = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    encoder.save_pretrained(tmp_path / "encoder", state_dict=gathered)
    again = TimmTowerEncoder.from_pretrained(tmp_path / "encoder").state_dict()
    assert all(torch.equal(again[key], expected[key]) for key in expected)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_one_dtensor_among_plain_ones_is_found(mesh: dist.DeviceMesh, placement: Shard | Replicate) -> None:
    spread = distribute_tensor(torch.ones(4, 4), mesh, [placement])
    with pytest.raises(WeightsError, match=r"'last\\n'"):
        refuse_sharded({"first": torch.ones(2), "last\n": spread})


def test_deepspeed_s_empty_parameters_are_found() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id = 3
    with pytest.raises(WeightsError, match="DeepSpeed"):
        refuse_sharded({"w": parameter})

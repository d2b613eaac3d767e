"""Weights that are spread over processes: found before anything is saved, and refused with the way to gather them."""

import sys
from collections.abc import Mapping

import torch

from ..reader.errors import WeightsError, shown

# Where torch keeps its kinds of tensors that hold a part of the values; looked up only where something imported them.
_PARTIAL = (
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed._shard.sharded_tensor", "ShardedTensor"),
    ("torch.distributed.fsdp._flat_param", "FlatParameter"),
)


def refuse_sharded(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of which this process may hold only a part (FSDP, tensor parallelism, DeepSpeed ZeRO-3).

    Args:
        state: Names -> parameters and buffers, as `state_dict(keep_vars=True)` of a model gives them, or gathered.

    Raises:
        WeightsError: names the first of them and the calls that gather them.
    """
    kinds = tuple(
        kind for module, name in _PARTIAL if (kind := getattr(sys.modules.get(module), name, None)) is not None
    )
    for key, tensor in state.items():
        is_zero3 = hasattr(tensor, "ds_id")  # DeepSpeed leaves an empty parameter and this attribute
        if is_zero3 or isinstance(tensor, kinds):
            kind = "DeepSpeed parameter" if is_zero3 else type(tensor).__name__
            raise WeightsError(
                f"{shown(key)} is a {kind}: its values are spread over the processes. Gather the weights, in all "
                "processes, and save them in one: save_pretrained(folder, is_main_process=..., state_dict=state) with "
                "state = accelerator.get_state_dict(model), or without accelerate "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
            )

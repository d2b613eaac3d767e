"""What client processes of the loopback Hub do with open_clip's repositories (see `hub_worker`)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from hf_timm_tower import TimmModel

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "text_cfg": TEXT,
    "custom_text": True,
}
# A vision tower of 198 MB and a text tower of half that: either in memory beside the other would show.
LARGE = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "convnext_small", "timm_pool": "", "timm_proj": "linear", "image_size": 224},
    "text_cfg": {**TEXT, "vocab_size": 50_000, "width": 512, "heads": 8},
    "custom_text": True,
}
SIGLIP = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def outputs(module: nn.Module) -> torch.Tensor:
    """What a vision tower makes of one image."""
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module.eval()(image)


def push(
    repo_id: str, scratch: str, seed: int = 0, config: dict[str, Any] = TINY, safe: bool = True
) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    """A random model in a folder written by open_clip, uploaded; (commit, the vision tower's weights, its output).

    Not by its `push_to_hf_hub`, which in 3.3 needs a function that huggingface_hub 2 no longer has.

    Args:
        repo_id: Where to.
        scratch: An empty folder to write to.
        seed: Of the weights.
        config: open_clip's `model_cfg`.
        safe: safetensors, or a pickle.
    """
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(scratch)
    Path(scratch, "pushed-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path(scratch, "pushed-tower.json"))
    torch.manual_seed(seed)
    model = open_clip.create_model("pushed-tower", force_preprocess_cfg=SIGLIP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.02)  # nothing stays at zero or one
    tokenizer = open_clip.tokenizer.HFTokenizer(scratch, context_length=8)
    save_for_hf(model, tokenizer, config, Path(scratch, "repo"), safe_serialization=safe)
    Path(scratch, "repo", "README.md").write_text("# A model\n")
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=Path(scratch, "repo")).oid
    # copies: what goes back to the test is pickled with its whole storage
    return commit, {key: value.clone() for key, value in model.visual.state_dict().items()}, outputs(model.visual)


def load(source: str, **kwargs: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """A tower from a repository, where open_clip is not installed; (weights, output, preprocessing)."""
    sys.modules["open_clip"] = None  # type: ignore[assignment]
    tower = TimmModel.from_open_clip(source, **kwargs)
    assert not tower.training
    return {key: value.clone() for key, value in tower.state_dict().items()}, outputs(tower), tower.config.preprocess


def memory_of_load(small: str, source: str, cache_dir: str) -> tuple[int, int]:
    """(bytes that loading took at its peak, download included; bytes of the tower's weights)."""
    load(small, cache_dir=cache_dir)  # what loads late is loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    tower = TimmModel.from_open_clip(source, cache_dir=cache_dir)
    peak = _status("VmHWM") - before
    return peak, sum(tensor.nbytes for tensor in tower.state_dict().values())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

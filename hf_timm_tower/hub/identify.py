"""What a folder or repository that holds no tower seems to be, and the call that loads it."""

from collections.abc import Collection, Mapping
from typing import Any

from ..reader.errors import shown


def identify(names: Collection[str], config: Mapping[str, Any] | None, place: str) -> str:
    """Say what else it is.

    Args:
        names: Files of the folder or repository, as far as they are known.
        config: Its `config.json`, None where there is none.
        place: The folder or repository's id, for the call.

    Returns:
        A sentence, empty where nothing is recognised.
    """
    config = config or {}
    kind = config.get("model_type")
    if "open_clip_config.json" in names:
        return (
            f"It seems to be an open_clip model: TimmModel.from_open_clip('{place}') takes its image tower if that is "
            f"timm's, open_clip.create_model_and_transforms('hf-hub:{place}') loads the whole of it."
        )
    if "adapter_config.json" in names:
        return f"It seems to be a peft adapter: peft.PeftModel.from_pretrained(base_model, '{place}') loads it."
    if "modules.json" in names and "config_sentence_transformers.json" in names:
        return f"It seems to be a sentence-transformers model: SentenceTransformer('{place}') loads it."
    if kind == "timm_wrapper" or ("architecture" in config and ("pretrained_cfg" in config or "num_classes" in config)):
        return (
            f"It seems to be a timm model: TimmModel.from_timm('{place}') makes a tower of it, and so do the "
            "transformers models' from_timm."
        )
    if isinstance(kind, str):
        return (
            f"It seems to be a transformers checkpoint of model_type {shown(kind)}: "
            f"transformers.AutoModel.from_pretrained('{place}') loads it."
        )
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickles:
        return f"It holds pickled weights ({shown(', '.join(pickles[:3]))}), which are never read here."
    if "model.safetensors" in names:
        return (
            "It holds model.safetensors but no config of ours; a model saved by a plain PyTorchModelHubMixin class is "
            "loaded by that class."
        )
    return ""

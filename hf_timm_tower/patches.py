"""Images of any aspect through the transformers models of a tower on NaFlexVit: `model(**model.naflex()(pictures))`."""

from contextlib import nullcontext
from typing import Any

import torch

from .reader.errors import ArgumentError
from .reader.forward import weights_in_place
from .reader.hidden_states import HiddenStates, attention_maps, forward_hidden
from .reader.pretrained import TimmTowerPreTrainedModel
from .reader.tower import run_head
from .training.naflex import PATCH_KEYS, NaFlexProcessor, check_takes_patches


class TakesPatches(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """Models whose forward takes timm's `patches`, `patch_coord` and `patch_valid` in place of `pixel_values`."""

    def naflex(self, max_seq_len: int | None = None, is_training: bool = False, **kwargs: Any) -> NaFlexProcessor:
        """Images of any aspect -> batches of patches with masks, of a tower on NaFlexVit. See `training/naflex.py`."""
        return NaFlexProcessor(self.config, self.trunk, max_seq_len, is_training, **kwargs)

    def _run(
        self,
        images: torch.Tensor | None,
        hidden: HiddenStates,
        attentions: bool | None,
        other_size: bool | None,
        pools: bool | None = True,
        patches: tuple[Any, ...] = (None, None, None),
    ) -> tuple[Any, Any, Any, Any]:
        """As `reader.forward.run_tower`, for patches too: timm's `trunk(patches)` in its two steps."""
        batch = {key: each for key, each in zip(PATCH_KEYS, patches, strict=True) if each is not None}
        if not batch and isinstance(images, torch.Tensor):
            return super()._run(images, hidden, attentions, other_size, pools)
        if images is not None or len(batch) < len(PATCH_KEYS):
            given = [*([] if images is None else [f"pixel_values ({type(images).__name__})"]), *batch]
            found = ", ".join(given) or "none"
            raise ArgumentError(f"forward: expected pixel_values, a tensor, or {', '.join(PATCH_KEYS)}; found {found}")
        check_takes_patches(self.config, self.trunk)
        self.follow_attn_implementation()
        trunk: Any = self.trunk
        batch["patches"] = batch["patches"].to(self.dtype)
        hidden = self.config.output_hidden_states if hidden is None else hidden
        attentions = self.config.output_attentions if attentions is None else attentions
        states = None
        with weights_in_place(trunk):
            with attention_maps(trunk) if attentions else nullcontext() as maps:
                if hidden:
                    tokens, states = forward_hidden(trunk, batch, hidden)
                    features = {"patches": tokens, "patch_valid": batch["patch_valid"]}
                else:
                    features = trunk.forward_features(**batch)
            pooled = trunk.forward_head(**features) if pools or pools is None else None
        embedding = None if pooled is None else run_head(self.head, self._head_input, pooled)
        return features["patches"], embedding, states, None if maps is None else tuple(maps)

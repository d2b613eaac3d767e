"""What the transformers models of a tower share: building on the meta device and loading strictly.

`from_pretrained` is transformers' own, with all it takes (revisions, device maps, quantization, adapters). Two steps
of it are ours: how a model is built under it, and how tensors get in.

*Building.* transformers builds on the meta device and fills what the checkpoint holds. Buffers outside the state dict
(relative position indices, rotary tables, attention biases) are in no checkpoint and would come back as uninitialised
memory. So trunk and head are always built for real, with initialisation left out, their computed buffers set aside,
and then moved to meta. `_initialize_weights` puts the buffers back: transformers calls it on every model inside a
model, so that it works nested in another model's `from_pretrained` too.

*Tensors.* They come through `read_tower`: checked against the index, 64-byte aligned, mapped where the file allows it.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..files.assign import assign_weights
from ..files.folder import read_tower
from .build import (
    CLASSIFIER,
    Steps,
    as_dtype,
    budget_of,
    has_classifier,
    init_classifier,
    steps_of,
)
from .config import TimmTowerConfig
from .errors import ArgumentError, ConfigError
from .freezing import note_fixed, restore_frozen
from .head import CODE
from .model_building import (
    align,
    build_for_transformers,
    can_checkpoint,
    move_to_meta,
    put_buffers,
    take_computed_buffers,
)
from .model_loading import (
    DOWNLOAD,
    LOADING,
    Loading,
    check_registered_head,
    loading_report,
    refuse_changed,
    refuse_misfits,
    warn_of_changes,
)
from .modeling_saving import TAGS, SavesAsTower
from .trunk import buffers_as_timm, float_dtype, native_size

__all__ = ["TimmTowerPreTrainedModel"]


class TimmTowerPreTrainedModel(SavesAsTower):
    """A tower as a transformers model; see `modeling.py` for those to use.

    Args:
        config: Completed (from a folder) or not; the model's own `config` is the completed one.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    accepts_loss_kwargs = False
    _supports_sdpa = True

    steps: Steps
    supports_gradient_checkpointing: bool

    def __init__(self, config: TimmTowerConfig) -> None:
        on_meta = torch.empty(0).is_meta
        loading = LOADING.get()
        budget, make_head = None, None
        if loading is not None:
            # A trunk that lies in another repository is not among the files that the budget was made of.
            budget = loading.budget if config.trunk_source is None else None
            if config.head is not None and config.head.get("form") == CODE:
                make_head = partial(loading.make_head, config.head)
        tower = build_for_transformers(
            config, with_classifier=self._has_classifier, budget=budget, make_head=make_head
        )
        super().__init__(tower.config)
        self.model_tags = list(TAGS)  # its own: `add_model_tags` appends to it
        self._arrangement = tower.arrangement
        for name, part in tower.named_children():
            self.add_module(name, part)
        note_fixed(self)
        # Buffers that no checkpoint holds, until they are back in their places; None where they never left.
        self._computed: dict[str, torch.Tensor] | None = None
        self._buffers_to: torch.dtype | None = None
        if on_meta:
            self._computed = take_computed_buffers(self)
            self._buffers_to = torch.get_default_dtype()
            move_to_meta(self)
        self.steps = steps_of(self.trunk)
        self._no_split_modules = [type(self.trunk).__name__]
        self._checkpoints = False
        self.supports_gradient_checkpointing = can_checkpoint(self.trunk)
        if self.config._attn_implementation == "eager":
            for module in self.trunk.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]

    # --- what transformers asks of a model

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """One black image `[1, in_chans, H, W]`."""
        size = (1, self.config.in_chans, *native_size(self.config))
        return {"pixel_values": torch.zeros(size, dtype=self.dtype, device=self.device)}

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None: images have no table of embeddings."""
        return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused, see `get_input_embeddings`."""
        raise ArgumentError(f"{type(self).__name__} takes images and has no input embeddings to set")

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the trunk recomputes activations in the backward pass. Setting it passes it on to timm."""
        return self._checkpoints

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        if enable and not self.supports_gradient_checkpointing:
            raise ConfigError(f"{type(self.trunk).__name__} does not support gradient checkpointing in timm")
        if self.supports_gradient_checkpointing:
            self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]
        self._checkpoints = enable

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        how = getattr(gradient_checkpointing_func, "keywords", {})
        plain = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is checkpoint
        if enable and (every_n_layers != 1 or not plain or how.get("use_reentrant")):
            raise ArgumentError(
                "gradient checkpointing: timm checkpoints every block of the trunk, not reentrant and without "
                f"offloading; every_n_layers={every_n_layers} and {how or 'another function'} cannot be honoured"
            )
        self.gradient_checkpointing = enable

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: timm and the head have initialised what was built; see `_initialize_weights`."""

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Called for every module inside and last for the model itself, also when it is nested in another model.
        if module is not self or self._computed is None:
            return
        if any(self.get_buffer(name).is_meta for name in self._computed):
            return  # nothing is loaded yet
        put_buffers(self, self._computed)
        self._computed = None
        if self._buffers_to is not None:
            buffers_as_timm(self, self._buffers_to)
        else:
            buffers_as_timm(self.trunk, float_dtype(self.trunk))
        # What is on meta now lies on the disk: transformers loads it when it runs.
        state = {key: tensor for key, tensor in self.state_dict(keep_vars=True).items() if not tensor.is_meta}
        if fresh := [key for key, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]:
            self._fill(fresh)
        align(self)

    @torch.no_grad()
    def _fill(self, keys: list[str]) -> None:
        """Give fresh values to what a checkpoint did not hold, those that a new model has."""
        if all(key.startswith(f"{CLASSIFIER}.") for key in keys):
            init_classifier(self.get_submodule(CLASSIFIER))  # type: ignore[arg-type]
            return
        twin = build_for_transformers(self.config, with_classifier=self._has_classifier).state_dict()
        state = self.state_dict(keep_vars=True)
        for key in keys:
            state[key].copy_(twin[key])

    # --- loading

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        frozen: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Load a tower from a folder or a repository, in eval mode; reads what `TimmModel.from_pretrained` reads.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's id.
            config: A config that was loaded already, or where to load it from.
            dtype: Cast floating-point weights; None and `"auto"` keep every tensor's own, which transformers
                otherwise makes one for all.
            torch_dtype: The old name of `dtype`.
            ignore_mismatched_sizes: Weights that are missing, unexpected or of another shape are no error: they get
                fresh values or are left out, and a warning lists them.
            output_loading_info: Return `(model, info)`, info with the lists of such keys.
            frozen: Freeze what was frozen when the tower was saved; False or None: everything trains. `AutoModel`
                takes None alone, since it reads this into the config first.
            kwargs: As `PreTrainedModel.from_pretrained`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `subfolder`, `device_map`, `attn_implementation`, `quantization_config`, ...

        Raises:
            WeightsError: weights are missing, unexpected or of another shape.
            ConfigError: the config that was given is not that of the folder.
            TowerError: by what is wrong with the folder.
        """
        wanted = torch_dtype if dtype is None else dtype
        name = str(pretrained_model_name_or_path)
        folder = os.path.join(name, kwargs.get("subfolder") or "")
        loading = Loading(
            place=name,
            download={key: kwargs[key] for key in DOWNLOAD if kwargs.get(key) is not None},
            trusts=bool(kwargs.get("trust_remote_code")),
            budget=budget_of(folder) if os.path.isdir(folder) else None,
            keeps_dtypes=wanted in (None, "auto"),
        )
        token = LOADING.set(loading)
        try:
            found: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                config=config,
                dtype=wanted,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=True,
                **kwargs,
            )
        finally:
            LOADING.reset(token)
        model, info = found
        if not ignore_mismatched_sizes:
            refuse_misfits(name, info, allowed=loading.fresh)
        warn_of_changes(name, info, loading)
        if loading.fingerprint is not None and (model.config.head or {}).get("form") == "registered":
            check_registered_head(model._bare(model), loading.fingerprint)
        bare = model._bare(model)
        if frozen:
            restore_frozen(bare, model.config.frozen)
        else:
            model.config.frozen = None
        model._held_statistics = getattr(bare, "_held_statistics", ())
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A step of `PreTrainedModel.from_pretrained`: the files are found, the model is on meta."""
        stock = PreTrainedModel._load_pretrained_model
        loading = LOADING.get()
        if loading is not None and state_dict is None and checkpoint_files:
            loading.refuse_stale(checkpoint_files)
        devices = {str(place) for place in (load_config.device_map or {"": "cpu"}).values()}
        if state_dict is not None or not checkpoint_files or "disk" in devices or loading is None:
            return stock(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        folder = Path(checkpoint_files[0]).parent
        files = read_tower(folder, loading.access())
        refuse_changed(files.config, model.config, folder)
        loading.fingerprint = files.fingerprint
        weights = dict(files.weights)
        saved_with_one = type(model).__name__ in (files.config.architectures or ())
        if model._has_classifier and not has_classifier(weights) and not saved_with_one:
            loading.fresh += [f"{CLASSIFIER}.{name}" for name in model.classifier.state_dict()]
        if not model._has_classifier:
            loading.left_out += [key for key in weights if key.startswith(f"{CLASSIFIER}.")]
            weights = {key: tensor for key, tensor in weights.items() if key not in loading.left_out}
        keeps = loading.keeps_dtypes and files.config.dtype is None
        if load_config.hf_quantizer is not None or load_config.ignore_mismatched_sizes or len(devices) > 1:
            return stock(model, weights, None, load_config, *args, **kwargs)
        dtype = None if keeps else as_dtype(load_config.dtype)
        model._buffers_to = dtype
        assign_weights(
            model, weights, source=str(folder), dtype=dtype, device=devices.pop(), allow_missing=loading.fresh
        )
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor._is_hf_initialized = key in weights
        return loading_report(missing_keys=set(loading.fresh)), None

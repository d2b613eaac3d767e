"""The transformers model that every face of a tower is: how transformers builds, fills and saves it.

`from_pretrained` is transformers' own, with all it takes (revisions, device maps, quantization, adapters). Two steps of
it are ours. *Building*: transformers builds on the meta device and fills what the checkpoint holds. Buffers outside the
state dict (relative positions, rotary tables, attention biases) are in no checkpoint and would come back as
uninitialised memory. So trunk and head are always built for real, with initialisation left out, their computed buffers
set aside, and then moved to meta; `_initialize_weights` puts the buffers back. transformers calls it on every model
inside a model, so that it works nested in another model's `from_pretrained` too. *Tensors*: they are checked against
the index and the folder's config, and put in strictly.
"""

import copy
import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from typing_extensions import Self

from .computed_buffers import align, computed_buffers, move_to_meta, put_buffers
from .config import OUR_FIELDS, TimmTowerConfig
from .errors import ArgumentError, ConfigError, FolderError, HeadError, did_you_mean, shown
from .forward import can_checkpoint, run_tower, steps_of
from .freezing import apply_frozen, keep_statistics
from .head import CODE, make_code_head
from .loading import TowerLoading, loading_report, refuse_changed, refuse_misfits, warn_of_changes
from .skip_init import Budget, skip_init, within_budget
from .tower import CLASSIFIER, Tower, build_tower, has_classifier, init_classifier, plain_defaults
from .trunk import buffers_as_timm, float_dtype, native_size
from .weights import (
    INDEX_FILE,
    StoredTower,
    assign_weights,
    fetch_pinned_trunk,
    floating_dtype,
    parse_trunk_source,
    read_weight_files,
)

MODEL_TAGS = ("timm",)
"""Tags of every tower, as transformers' `model_tags`."""

# Keywords of `from_pretrained` that say how files are found.
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")


class TimmTowerPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the transformers models of a tower share. They take a completed config, and have a copy of it."""

    config: TimmTowerConfig
    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    model_tags = list(MODEL_TAGS)  # noqa: RUF012
    accepts_loss_kwargs = False
    supports_gradient_checkpointing: bool
    _supports_sdpa = True
    _has_classifier = False
    _leaves_out: tuple[str, ...] = (f"{CLASSIFIER}.",)

    trunk: nn.Module
    head: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None, **unknown: Any) -> None:
        for name in unknown:  # what neither transformers' `from_pretrained` nor the config knew
            raise ArgumentError(
                f"{type(self).__name__}: unknown argument {shown(name)}{did_you_mean(name, OUR_FIELDS)}; of "
                "hf_timm_tower TimmModel.from_pretrained takes drop_path and patch_drop"
            )
        on_meta, wanted = torch.empty(0).is_meta, torch.get_default_dtype()
        make_head = None
        if _loading is not None and config.head is not None and config.head.get("form") == CODE:
            make_head = partial(_loading.make_head, config.head)
        budget = Budget.default() if _loading is None or config.trunk_source is not None else _loading.budget()
        # Everything is computed in float32 and then cast, as for a tower that is loaded and cast.
        with plain_defaults(), skip_init(budget) if on_meta else within_budget(budget):
            tower = self._build(config, self._has_classifier, make_head)
        if not on_meta and wanted != torch.float32:
            tower.to(wanted)
        super().__init__(tower.config)
        self.model_tags = list(MODEL_TAGS)  # its own: `add_model_tags` appends to it
        self._loading = _loading
        self._head_input = tower.head_input
        for name, part in tower.named_children():
            self.add_module(name, part)
        # Buffers that no checkpoint holds, until they are back in their places; None where they never left.
        self._computed: dict[str, torch.Tensor] | None = None
        self._buffers_to: torch.dtype | None = wanted if on_meta else None
        self._keys = set(self.state_dict())  # quantized layers have others
        if on_meta:
            self._computed = computed_buffers(self)
            move_to_meta(self, wanted)
        self.steps = steps_of(self.trunk)
        self._no_split_modules = [type(self.trunk).__name__]
        self._checkpoints = False
        self.supports_gradient_checkpointing = can_checkpoint(self.trunk)
        self._runs_fused = True
        self._fused = [module for module in self.trunk.modules() if getattr(module, "fused_attn", False)]
        self.follow_attn_implementation()
        self.post_init()  # type: ignore[no-untyped-call]

    # --- steps that hf_timm_tower's own classes replace

    _make_code_head = staticmethod(make_code_head)
    _run = run_tower

    @staticmethod
    def _build(config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:
        return build_tower(config, with_classifier=with_classifier, make_head=make_head)

    @staticmethod
    def _read(files: Sequence[str], loading: TowerLoading) -> StoredTower:
        described = json.loads(Path(files[0]).with_name("config.json").read_bytes())
        described.pop("auto_map", None)  # of the files, not of the tower
        config = TimmTowerConfig(**described)
        weights = read_weight_files([Path(file) for file in files])
        if config.trunk_source is not None:
            weights = {**weights, **fetch_pinned_trunk(parse_trunk_source(config.trunk_source), **loading.access())}
        return StoredTower(config, weights)

    # --- what transformers asks of a model

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """One black image `[1, in_chans, H, W]`."""
        size = (1, self.config.in_chans, *native_size(self.config))
        return {"pixel_values": torch.zeros(size, dtype=self.dtype, device=self.device)}

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None: images have no table of embeddings."""
        return None

    def set_input_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, see `get_input_embeddings`."""
        raise ArgumentError(f"{type(self).__name__} takes images and has no input embeddings to set")

    resize_token_embeddings = set_input_embeddings

    def follow_attn_implementation(self) -> None:
        """Let timm's layers run fused or not as `config._attn_implementation` says, which others set too."""
        fused = self.config._attn_implementation != "eager"
        for module in self._fused if fused != self._runs_fused else ():
            module.fused_attn = fused
        self._runs_fused = fused

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`: "sdpa", where timm runs attention fused, or "eager"."""
        super().set_attn_implementation(*args, **kwargs)
        self.follow_attn_implementation()

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
        if enable and (every_n_layers != 1 or not plain):
            raise ArgumentError(
                "gradient checkpointing: timm checkpoints every block of the trunk, without offloading; "
                f"every_n_layers={every_n_layers} and {how or 'another function'} cannot be honoured"
            )
        if enable and how.get("use_reentrant"):
            warnings.warn(
                "gradient checkpointing: use_reentrant=True: timm checkpoints without it; the gradients are the same",
                stacklevel=2,
            )
        self.gradient_checkpointing = enable

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that modules with frozen statistics stay in eval mode."""
        super().train(mode)
        keep_statistics(self)
        return self

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
        layer = self.get_submodule(CLASSIFIER) if self._has_classifier else None
        bias = getattr(layer, "bias", None)
        fresh_bias = bias is not None and not (bias.is_meta or getattr(bias, "_is_hf_initialized", False))
        # Before the state dict, which a quantized layer without its weights cannot give (transformers 5.4).
        if fresh_bias and type(layer) is not nn.Linear:
            raise ConfigError(
                f"a fresh classifier cannot be a quantized {type(layer).__name__}: leave it out of quantization, "
                f"by modules_to_not_convert=[{CLASSIFIER!r}] (llm_int8_skip_modules for bitsandbytes)"
            )
        # What is on meta is on the disk: transformers loads it when it runs.
        state = self.state_dict(keep_vars=True)
        state = {key: tensor for key, tensor in state.items() if key in self._keys and not tensor.is_meta}
        if fresh := [key for key, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]:
            self._fill(fresh)
        align(self)
        if self._loading is None:
            apply_frozen(self, self.config.frozen)  # nested: nobody else does

    @torch.no_grad()
    def _fill(self, keys: list[str]) -> None:
        """Give fresh values to what a checkpoint did not hold, those that a new model has."""
        if all(key.startswith(f"{CLASSIFIER}.") for key in keys):
            init_classifier(self.get_submodule(CLASSIFIER))  # type: ignore[arg-type]
            return
        with plain_defaults():
            twin = self._build(self.config, self._has_classifier, None).state_dict()
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
        image_size: int | Sequence[int] | None = None,
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
            image_size: Change the input size after loading, an int or (height, width) in pixels: positions are
                resampled. By hf_timm_tower only.
            dtype: Cast floating-point weights; None and `"auto"` keep every tensor's own, whatever `dtype` of the
                config says.
            torch_dtype: The old name of `dtype`.
            ignore_mismatched_sizes: Weights that are missing, unexpected or of another shape are no error: they get
                fresh values or are left out, and a warning lists them.
            output_loading_info: Return `(model, info)`, info with the lists of such keys.
            frozen: Freeze what was frozen when the tower was saved; False or None: everything trains. `AutoModel`
                takes None alone, since it reads this into the config first.
            kwargs: As `PreTrainedModel.from_pretrained`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `subfolder`, `device_map`, `attn_implementation`, ...

        Raises:
            WeightsError: weights are missing, unexpected or of another shape.
            ConfigError: the config that was given is not that of the folder.
            TowerError: by what is wrong with the folder.
        """
        if image_size is not None and isinstance(config, TimmTowerConfig):
            config = copy.deepcopy(config)
            config.image_size = image_size  # which must be the stored one
        elif image_size is not None:
            kwargs["image_size"] = image_size  # of the config, as `AutoModel` has it
        wanted = torch_dtype if dtype is None else dtype
        wanted = getattr(config, "_dtype_asked", None) if wanted is None else wanted
        loading = TowerLoading(
            place=str(pretrained_model_name_or_path),
            download={key: kwargs[key] for key in DOWNLOAD if kwargs.get(key) is not None},
            trusts=bool(kwargs.get("trust_remote_code")),
            keeps_dtypes=wanted in (None, "auto"),
            run_code=cls._make_code_head,
        )
        if pretrained_model_name_or_path is not None:
            # transformers reads it unchecked, and what it names: a pickle too
            loading.refuse_damaged_index(getattr(config, "_commit_hash", None))
        found: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            config=config,
            dtype=wanted,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
            _loading=loading,
            **kwargs,
        )
        model, info = found
        model._loading = None
        vars(model.config).pop("_dtype_asked", None)  # it was for this load
        if not ignore_mismatched_sizes:
            refuse_misfits(loading.place, info, allowed=loading.fresh, left_out=model._leaves_out)
        warn_of_changes(loading, info)
        if frozen:
            apply_frozen(model, model.config.frozen)
        else:
            model.config.frozen = None
        model._after_loading(loading)
        return (model, info) if output_loading_info else model

    def _after_loading(self, loading: TowerLoading) -> None:
        """What is left to check once everything is in place."""

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A step of `PreTrainedModel.from_pretrained`: the files are found, the model is on meta."""
        stock = PreTrainedModel._load_pretrained_model
        loading = model._loading
        if loading is not None and state_dict is None and checkpoint_files:
            loading.refuse_stale(checkpoint_files)
        devices = {str(place) for place in (load_config.device_map or {"": "cpu"}).values()}
        if state_dict is not None or not checkpoint_files or "disk" in devices or loading is None:
            return stock(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        stored = loading.stored = model._read(checkpoint_files, loading)
        folder = Path(checkpoint_files[0]).parent
        refuse_changed(stored.config, model.config, folder)
        saved_with_one = type(model).__name__.removeprefix("FSDP") in (stored.config.architectures or ())
        if model._has_classifier and not has_classifier(stored.weights) and not saved_with_one:
            loading.fresh += [f"{CLASSIFIER}.{name}" for name in model.classifier.state_dict()]
        loading.left_out += [key for key in stored.weights if key.startswith(model._leaves_out)]
        weights = {key: tensor for key, tensor in stored.weights.items() if key not in loading.left_out}
        if load_config.hf_quantizer is not None or load_config.ignore_mismatched_sizes or len(devices) > 1:
            return stock(model, weights, None, load_config, *args, **kwargs)
        model._buffers_to = None if loading.keeps_dtypes else floating_dtype(load_config.dtype)
        assign_weights(
            model,
            weights,
            source=str(folder),
            dtype=model._buffers_to,
            device=devices.pop(),
            allow_missing=loading.fresh,
        )
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor._is_hf_initialized = key in weights
        return loading_report(missing_keys=set(loading.fresh)), None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does: this class has no card, no fingerprint and no proof (hf_timm_tower has).

        Raises:
            HeadError: the head is not the one that was loaded.
            FolderError: the folder holds a tower's own files, which would stay beside the new ones.
        """
        config, here = self.config, Path(save_directory)
        is_code = config.head is not None and config.head.get("form") == CODE
        with plain_defaults(), skip_init(Budget.default()):
            built = self.head if is_code else self._build(config, False, None).head
        if repr(built) != repr(self.head) or type(built) is not type(self.head) or config.trunk_source is not None:
            raise HeadError(
                "the head was replaced, or its trunk is stored in another repository: only hf_timm_tower can save this "
                "tower so that it comes back; install it (pip install hf_timm_tower)"
            )
        if any((here / name).exists() for name in (INDEX_FILE, "trunk.safetensors", "fingerprint.json")):
            raise FolderError(f"{here}: holds a tower saved by hf_timm_tower; save into another folder, or install it")
        super().save_pretrained(save_directory, *args, **kwargs)

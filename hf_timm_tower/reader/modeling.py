"""Towers as transformers models: `TimmTowerModel`, and `TimmTowerForImageClassification` with a classifier on top.

`from_pretrained` is transformers' own, with all it takes (revisions, device maps, quantization, adapters). Two steps of
it are ours. *Building*: transformers builds on the meta device and fills what the checkpoint holds. Buffers outside the
state dict (relative positions, rotary tables, attention biases) are in no checkpoint and would come back as
uninitialised memory. So trunk and head are always built for real, with initialisation left out, their computed buffers
set aside, and then moved to meta; `_initialize_weights` puts the buffers back. transformers calls it on every model
inside a model, so that it works nested in another model's `from_pretrained` too. *Tensors*: they are checked against
the index and the folder's config, and put in strictly.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from .config import OUR_FIELDS, TimmTowerConfig
from .errors import ArgumentError, ConfigError, FolderError, FormatError, HeadError, WeightsError, shown
from .freezing import apply_frozen, keep_statistics
from .head import CODE, make_code_head, refuse_code
from .skip_init import Budget, skip_init, within_budget
from .tower import CLASSIFIER, Tower, build_tower, has_classifier, init_classifier, plain_defaults, run_head
from .trunk import buffers_as_timm, float_dtype, native_size
from .weights import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTower,
    assign_weights,
    fetch_pinned_trunk,
    floating_dtype,
    parse_trunk_source,
    read_index,
    read_weight_files,
)

HiddenStates = bool | int | Sequence[int] | None

MODEL_TAGS = ("timm",)
"""Tags of every tower, as transformers' `model_tags`."""

# Keywords of `from_pretrained` that say how files are found.
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")


@dataclass
class TimmTowerModelOutput(ModelOutput):
    """What `TimmTowerModel` gives.

    Args:
        last_hidden_state: The trunk's unpooled features, as timm's `forward_features` gives them: tokens
            `[B, N, C]` or a map in the trunk's own order; a list for CoaT, CrossViT and EfficientViM.
        pooler_output: The embedding `[B, embed_dim]`; the whole tuple or dict where a custom head gives one.
        hidden_states: Features of inner layers, as timm's `forward_intermediates` gives them: `[B, C, H, W]` each.
    """

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class TowerLoading:
    """What a `from_pretrained` that is under way tells the steps inside it, and what they tell it.

    Attributes:
        place: Folder or repository.
        download: How its files are found: `revision`, `token`, `cache_dir`, `subfolder`, ...
        trusts: Code of the place may run.
        keeps_dtypes: No dtype was asked for: every tensor keeps its own.
        run_code: Makes a head that is stored as code.
        fresh: Keys that are not in the files, and need not be.
        left_out: Keys in the files that this model has no place for, and need not have.
        stored: What was read.
    """

    place: str
    download: Mapping[str, Any]
    trusts: bool
    keeps_dtypes: bool
    run_code: Callable[..., nn.Module] = make_code_head
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stored: Any = None

    def budget(self) -> Budget:
        """What building may cost, by the size of the weight files where these are known."""
        folder = os.path.join(self.place, self.download.get("subfolder") or "")
        if not os.path.isdir(folder):
            return Budget.default()
        return Budget.for_weights(sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors")))

    def access(self) -> dict[str, Any]:
        """How to reach another repository, where the trunk is stored in one."""
        names = ("token", "cache_dir", "force_download", "local_files_only")
        return {name: self.download[name] for name in names if name in self.download}

    def make_head(self, spec: dict[str, Any]) -> nn.Module:
        """A head that is stored as code, where that is trusted.

        Raises:
            HeadError: it is not, or the code fails.
        """
        if not self.trusts:
            raise refuse_code(spec, repo=self.place, revision=self.download.get("revision"))
        return self.run_code(spec, self.place, **self.download)

    def refuse_damaged_index(self) -> None:
        """Refuse an index that does not map keys to file names.

        Raises:
            FormatError: it does not.
        """
        path = cached_file(self.place, INDEX_FILE, _raise_exceptions_for_missing_entries=False, **self.download)
        if path is not None:
            read_index(Path(path))

    def refuse_stale(self, files: Sequence[str]) -> None:
        """Refuse a `model.safetensors` that an index of other files is beside, as a folder with both is refused.

        transformers takes the former and does not fetch the latter. `Trainer` makes such repositories: it uploads a
        tower over an older model and takes nothing away.

        Raises:
            FormatError: there are both.
        """
        if Path(files[0]).name != SINGLE_FILE:
            return
        if cached_file(self.place, INDEX_FILE, _raise_exceptions_for_missing_entries=False, **self.download):
            raise FormatError(
                f"{self.place}: holds both {SINGLE_FILE} and {INDEX_FILE} of other files; transformers would load the "
                f"first. Remove the stale one; push_to_hub of a tower removes an old {SINGLE_FILE} by itself."
            )


class TimmTowerPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the transformers models of a tower share.

    Args:
        config: Completed, as every folder has it; the model's own `config` is a copy.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    config: TimmTowerConfig
    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    model_tags = list(MODEL_TAGS)  # noqa: RUF012
    accepts_loss_kwargs = False
    supports_gradient_checkpointing: bool
    _supports_sdpa = True
    _has_classifier = False

    trunk: nn.Module
    head: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None) -> None:
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
        if on_meta:
            self._computed = _computed_buffers(self)
            _move_to_meta(self, wanted)
        self.steps = _steps_of(self.trunk)
        self._no_split_modules = [type(self.trunk).__name__]
        self._checkpoints = False
        self.supports_gradient_checkpointing = _can_checkpoint(self.trunk)
        if self.config._attn_implementation == "eager":
            for module in self.trunk.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]

    # --- steps that hf_timm_tower's own classes replace

    _make_code_head = staticmethod(make_code_head)

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
        _put_buffers(self, self._computed)
        self._computed = None
        if self._buffers_to is not None:
            buffers_as_timm(self, self._buffers_to)
        else:
            buffers_as_timm(self.trunk, float_dtype(self.trunk))
        # What is on meta is on the disk: transformers loads it when it runs.
        state = {key: tensor for key, tensor in self.state_dict(keep_vars=True).items() if not tensor.is_meta}
        if fresh := [key for key, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]:
            self._fill(fresh)
        _align(self)
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
        wanted = torch_dtype if dtype is None else dtype
        loading = TowerLoading(
            place=str(pretrained_model_name_or_path),
            download={key: kwargs[key] for key in _DOWNLOAD if kwargs.get(key) is not None},
            trusts=bool(kwargs.get("trust_remote_code")),
            keeps_dtypes=wanted in (None, "auto"),
            run_code=cls._make_code_head,
        )
        try:
            found: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                config=config,
                dtype=wanted,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=True,
                _loading=loading,
                **kwargs,
            )
        except (AttributeError, IndexError, KeyError, OSError, TypeError):
            loading.refuse_damaged_index()  # transformers reads it unchecked
            raise
        model, info = found
        model._loading = None
        if not ignore_mismatched_sizes:
            _refuse_misfits(loading.place, info, allowed=loading.fresh)
        _warn_of_changes(loading, info)
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
        _refuse_changed(stored.config, model.config, folder)
        weights = dict(stored.weights)
        saved_with_one = type(model).__name__.removeprefix("FSDP") in (stored.config.architectures or ())
        if model._has_classifier and not has_classifier(weights) and not saved_with_one:
            loading.fresh += [f"{CLASSIFIER}.{name}" for name in model.classifier.state_dict()]
        if not model._has_classifier:
            loading.left_out += [key for key in weights if key.startswith(f"{CLASSIFIER}.")]
            weights = {key: tensor for key, tensor in weights.items() if key not in loading.left_out}
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
        return _loading_report(missing_keys=set(loading.fresh)), None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does: this class has no card, no fingerprint and no proof (hf_timm_tower has).

        Raises:
            HeadError: the head is not the one that was loaded.
            FolderError: the folder holds a tower's own files, which would stay beside the new ones.
        """
        wanted, (trunk_source, here) = self.config.head, (self.config.trunk_source, Path(save_directory))
        with plain_defaults(), skip_init(Budget.default()):
            same = wanted is not None and wanted.get("form") == CODE
            built = self.head if same else self._build(self.config, False, None).head
        if repr(built) != repr(self.head) or type(built) is not type(self.head) or trunk_source is not None:
            raise HeadError(
                "the head was replaced, or its trunk is stored in another repository: only hf_timm_tower can save this "
                "tower so that it comes back; install it (pip install hf_timm_tower)"
            )
        if any((here / name).exists() for name in (INDEX_FILE, "trunk.safetensors", "fingerprint.json")):
            raise FolderError(f"{here}: holds a tower saved by hf_timm_tower; save into another folder, or install it")
        super().save_pretrained(save_directory, *args, **kwargs)


class TimmTowerModel(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower as a transformers model: images in, features and embedding out.

    Its `pooler_output` has the bits of `TimmModel.forward`. Both read and write the same folders.

    Args:
        config: The model's own `config` is a completed copy.

    Raises:
        ConfigError, HeadError: the config describes no tower that can be built in this process.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TimmTowerModelOutput | tuple[Any, ...]:
        """Run the tower.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: True for all inner layers, a list of indices for those, an int for the last n.
            return_dict: False gives a tuple of the fields that are there.
            output_attentions: Refused: timm gives none.

        Raises:
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        features, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        output = TimmTowerModelOutput(features, embedding, inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


class TimmTowerForImageClassification(TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower with a linear classifier on its embedding.

    Starts from a plain tower (`num_labels=...` or `id2label=...` give a fresh classifier, and a warning says so) and
    saves with its labels; `classifier.safetensors` is stored beside the tower's files.

    Args:
        config: With `id2label` or `num_labels`, and `problem_type` (single label, multi label, regression; None
            follows from the labels' dtype, as everywhere in transformers).

    Raises:
        ConfigError: the tower's embedding is not one vector of a known width.
    """

    _has_classifier = True

    classifier: nn.Module

    def __init__(self, config: TimmTowerConfig, _loading: TowerLoading | None = None) -> None:
        super().__init__(config, _loading)
        self.num_labels = self.config.num_labels
        names = self.config.id2label or {}
        if set(names.values()) != set(self.config.label2id or ()):
            # given alone, id2label leaves transformers' default labels in the other table
            self.config.label2id = {str(label): int(index) for index, label in names.items()}

    @property
    def base_model(self) -> nn.Module:
        """Trunk and head without the classifier, as one module on the same parameters."""
        return Tower(self.config, self.trunk, self.head)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Run tower and classifier.

        Args:
            pixel_values: `[B, in_chans, H, W]`, floating; cast to the model's dtype.
            labels: `[B]` integers for one label each, `[B, num_labels]` floats for several, floats for regression;
                the loss follows `config.problem_type`.
            output_hidden_states: As `TimmTowerModel.forward`.
            return_dict: As `TimmTowerModel.forward`.
            output_attentions: Refused: timm gives none.

        Raises:
            HeadError: the embedding is not `[B, embed_dim]`.
            ConfigError: inner layers or attentions were asked for and timm does not give them.
        """
        _, embedding, inner = _run(self, pixel_values, output_hidden_states, output_attentions)
        if not isinstance(embedding, torch.Tensor) or embedding.ndim != 2:
            found = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
            raise HeadError(f"a classifier needs an embedding [B, embed_dim], this tower gives {found}; choose a pool")
        logits = self.classifier(embedding)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=inner)
        return output if _wants_dict(self, return_dict) else output.to_tuple()


def _run(
    model: Any, images: torch.Tensor, wanted: HiddenStates, attentions: bool | None
) -> tuple[Any, Any, tuple[torch.Tensor, ...] | None]:
    """The trunk's features, the embedding, and features of inner layers where asked for."""
    trunk = model.trunk
    if model.config.output_attentions if attentions is None else attentions:
        raise ConfigError("output_attentions: timm's models do not give their attentions")
    if not images.is_floating_point():
        raise ArgumentError(
            f"pixel_values are {images.dtype}: expected floats as the image processor gives them, scaled and normalised"
        )
    images = images.to(model.dtype)
    wanted = model.config.output_hidden_states if wanted is None else wanted
    inner = None
    # An empty list or 0 asks for none; True, and no number, for all.
    if wanted:
        if not hasattr(trunk, "forward_intermediates"):
            raise ConfigError(f"{type(trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
        indices = None if wanted is True else wanted if isinstance(wanted, int) else list(wanted)
        features, found = trunk.forward_intermediates(images, indices=indices)
        inner = tuple(found)
    else:
        features = trunk.forward_features(images)
    if model.steps == "features":
        pooled = features
    else:
        # Where the trunk's forward is more than these two steps, it runs whole: the embedding is what it gives.
        pooled = trunk.forward_head(features) if model.steps == "features, head" else trunk(images)
    return features, run_head(model.head, model._head_input, pooled), inner


def _wants_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


# --- how the trunk runs


def _steps_of(trunk: nn.Module) -> str:
    """What the trunk's forward is made of, for a tensor x: `forward_head(forward_features(x))` and nothing else
    (`features, head`), `forward_features(x)` alone (`features`), or something that is not known (`whole`).

    Told from the names that the code of its class uses: one that this does not know is not taken for steps.
    """
    code = getattr(type(trunk).forward, "__code__", None)
    names = set(code.co_names) if code is not None else set()
    if names == {"forward_features"}:
        return "features"
    more = tuple(sorted(names - {"forward_features", "forward_head"}))
    known = not more or (type(trunk).__name__, *more) in _STEPS_WITH_SWITCHES
    return "features, head" if known and {"forward_features", "forward_head"} <= names else "whole"


# Classes of timm whose forward has switches that a tower never turns: features of inner layers (CoaT, FastViT), a
# second classifier for training (Inception), packed patches of several sizes (NaFlexVit).
_STEPS_WITH_SWITCHES = {
    ("CoaT", "is_scripting", "jit", "return_interm_layers", "torch"),
    ("FastVit", "fork_feat"),
    ("InceptionV3", "aux_logits"),
    ("NaFlexVit", "_assert", "dict", "get", "isinstance"),
}


def _can_checkpoint(trunk: nn.Module) -> bool:
    try:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        trunk.set_grad_checkpointing(False)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True


# --- building as transformers builds


def _computed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that are not in the state dict."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None:
                found[f"{prefix}.{name}"] = buffer
    return found


def _put_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put buffers into the places of uninitialised ones, on the device of those."""
    moved: dict[int, torch.Tensor] = {}
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        device = owner._buffers[leaf].device  # type: ignore[union-attr]
        # One buffer that several modules hold stays one.
        owner._buffers[leaf] = moved.setdefault(id(buffer), buffer.to(device=device))


def _align(module: nn.Module) -> None:
    """Copy what begins at odd places in memory to places that are multiples of 64 bytes.

    Another model's checkpoint is mapped by transformers as it is; kernels may give other last bits for such tensors.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.detach().clone()


def _move_to_meta(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to("meta", dtype)`, except that tied parameters stay tied."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    twin = tensor.detach().to("meta", dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                setattr(part, name, moved[id(tensor)])


# --- what loading refuses or says


def _refuse_changed(stored: TimmTowerConfig, given: TimmTowerConfig, folder: Path) -> None:
    """Refuse a config that is not the folder's own; only what was frozen may be left out of it.

    Raises:
        ConfigError: names the fields.
    """
    opened = {"frozen"} if given.frozen is None else set()
    odd = [name for name in OUR_FIELDS if getattr(stored, name) != getattr(given, name) and name not in opened]
    if odd:
        changes = ", ".join(
            f"{name}={shown(getattr(given, name))} (stored {shown(getattr(stored, name))})" for name in odd[:4]
        )
        raise ConfigError(
            f"{folder}: a tower is loaded as it was saved; {changes} would make another one of the same weights. Load "
            "it without, change it (TimmModel.from_pretrained takes image_size=...), and save it."
        )


def _refuse_misfits(name: str, info: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse a model whose weights did not all come from the files, and the other way round.

    Raises:
        WeightsError: lists the keys.
    """
    misfits = {
        "missing": sorted(set(info["missing_keys"]) - set(allowed)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    lines = [f"{len(keys)} {what}: {', '.join(map(shown, keys[:5]))}" for what, keys in misfits.items() if keys]
    if lines:
        raise WeightsError(
            f"{name}: the weights do not fit, the model is not returned: {'; '.join(lines)}. Where that is wanted, "
            "pass ignore_mismatched_sizes=True"
        )


def _warn_of_changes(loading: TowerLoading, info: Mapping[str, Any]) -> None:
    """List fresh weights, and those in the files that the model leaves out."""
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    left_out = sorted({*loading.left_out, *info["unexpected_keys"]})
    found = {"fresh random weights, to be trained": fresh, "weights that this model leaves out": left_out}
    for what, keys in found.items():
        if keys:
            warnings.warn(f"{loading.place}: {what}: {', '.join(shown(key)[1:-1] for key in keys)}", stacklevel=4)


def _loading_report(missing_keys: set[str]) -> LoadStateDictInfo:
    """transformers' record of a loading without other events; its fields differ between versions."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = LoadStateDictInfo(**{each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)})
    info.missing_keys = missing_keys
    return info

"""The methods of `TimmModel` by which it comes from open_clip and checkpoints, and lives inside open_clip."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from typing_extensions import Self

from ..build import checked_arguments, head_fields
from ..heads.registry import CustomHead
from ..hub.download import Access
from ..load import check_device
from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError, ConfigError
from ..reader.tower import HeadInput
from ..reader.weights import floating_dtype
from ..subclassing import OVERRIDABLE, overrides, rebuild
from ..training.freezing import note_fixed
from .checkpoints import load_trunk
from .faces import parts_of
from .open_clip import open_source, tower_of_model, tower_of_source
from .open_clip_config import preprocess_entries
from .timm_export import export_timm
from .timm_repo import open_timm_source
from .timm_weights import fill_trunk
from .to_open_clip import fit_inside_open_clip


class InterchangeMixin(nn.Module):
    """What a tower can do with other libraries' models. `TimmModel` is the only class to inherit from it."""

    config: TimmTowerConfig
    trunk: nn.Module

    @classmethod
    def from_open_clip(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
        *,
        model_config: str | Mapping[str, Any] | None = None,
        preprocess_cfg: Mapping[str, Any] | None = None,
        image_size: int | Sequence[int] | None = None,
        allow_pickle: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The vision tower of an open_clip model, in eval mode, with its preprocessing. The text tower is not read.

        Args:
            source: A repository's id (`hf-hub:` before it or not), a folder, a file of weights, a state dict, or a
                model of open_clip in memory, which is copied.
            model_config: For a file or a state dict: open_clip's `model_cfg`, the whole of an `open_clip_config.json`,
                or the name of a config that open_clip brings.
            preprocess_cfg: open_clip's; goes over what the source says. `{}` where the source says nothing and
                open_clip's own defaults are meant.
            image_size: Change the input size after loading, as open_clip's `force_image_size`.
            allow_pickle: Read pickled weights where there are no others, with `weights_only=True`.
            device: Where the weights go.
            dtype: Cast floating-point weights; None keeps what was saved (open_clip itself casts to float32).
            revision: Branch, tag or commit of the repository.
            token: For private and gated repositories.
            cache_dir: Where downloads are kept.
            force_download: Download again.
            local_files_only: Do not go to the network.

        Raises:
            ConfigError: no timm tower inside, or one that cannot be built.
            WeightsError: weights and config do not fit.
            FolderError, HubError, FormatError: the source cannot be read.
            ArgumentError: `model_config` or `preprocess_cfg` is missing or has no meaning here.
        """
        check_device(device)
        if isinstance(source, nn.Module):
            if model_config is not None:
                raise ArgumentError(
                    "model_config is for a state dict or a file; a model in memory says itself what it is"
                )
            tower = tower_of_model(cls, source, preprocess_cfg).to(device=device, dtype=floating_dtype(dtype))
        else:
            access = Access(token, cache_dir, force_download, local_files_only)
            found = open_source(source, model_config, preprocess_cfg, allow_pickle, revision, access)
            tower = tower_of_source(cls, found, device, floating_dtype(dtype))
        if image_size is not None:
            tower.set_input_size(image_size)
        return tower.eval()  # type: ignore[no-any-return]

    @classmethod
    def from_timm(
        cls,
        source: str | os.PathLike[str],
        embed_dim: int | None = None,
        image_size: int | Sequence[int] | None = None,
        pool: str | None = "default",
        proj: str | None = "none",
        proj_bias: bool = False,
        drop: float = 0.0,
        custom_head: CustomHead | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
        allow_pickle: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A tower on a timm repository or folder, or on a folder of transformers' `TimmWrapperModel`, in eval mode.

        Its architecture, arguments, input size and preprocessing come along; timm's own loader puts the weights in,
        and every weight of the trunk must be there. The classifier is left out, unless `proj=None`.

        Args:
            source: `org/name`, `hf-hub:org/name`, `hf-hub:org/name@revision`, a folder, or `local-dir:folder`.
            embed_dim, pool, proj_bias, drop, custom_head: As in the constructor. With `proj=None` the width follows.
            image_size: Where it is not the stored one, timm resamples position embeddings.
            proj: `none` by default, so that nothing random is added: the embedding is what the trunk gives.
            model_kwargs: Go over the stored arguments.
            allow_pickle: Read `pytorch_model.bin` where there is no safetensors file, with `weights_only=True`.
            revision: Branch, tag, commit or `refs/pr/N`.
            token, cache_dir, force_download, local_files_only: As in `from_open_clip`.

        Raises:
            FolderError: no such folder or repository (HubError), or no weights that are read.
            ConfigError: it holds something else, or arguments that a tower does not take.
            WeightsError: a weight of the trunk is missing or does not fit.
        """
        access = Access(token, cache_dir, force_download, local_files_only)
        found = open_timm_source(source, revision=revision, access=access, allow_pickle=allow_pickle)
        fields = head_fields(overrides(cls, "_create_head"), embed_dim, pool, proj, proj_bias, drop, custom_head)
        config = found.config(fields, image_size=image_size, model_args=checked_arguments(model_kwargs))
        tower = rebuild(cls, config, custom_head)
        fill_trunk(tower.trunk, tower.config, found)
        return tower.eval()

    @classmethod
    def from_tower(cls, tower: nn.Module) -> Self:
        """A transformers model of a tower as a `TimmModel`: on the very same trunk and head, without its classifier.

        Args:
            tower: Anything with the config, trunk and head of a tower; `TimmTowerModel.from_tower` is the way back.

        Raises:
            ArgumentError: it is no tower.
            ConfigError: this class or the tower's makes or runs a tower by code of its own.
        """
        if own := [step for step in OVERRIDABLE if overrides(cls, step)]:
            raise ConfigError(f"{cls.__name__} has its own {', '.join(own)}, and is built by these alone")
        parts = parts_of(tower)
        made: Any = cls.__new__(cls)
        nn.Module.__init__(made)
        made.config, made.trunk, made.head = parts.config, parts.trunk, parts.head
        made.config.architectures = None  # of the class that it comes from
        made._head_input = HeadInput.of(made.config, made.trunk)
        made._fingerprint = getattr(tower, "_fingerprint", None)
        made.training = tower.training
        note_fixed(made)
        return made  # type: ignore[no-any-return]

    # each of these functions is a method as it is
    export_timm = export_timm
    load_trunk = load_trunk

    # --- inside open_clip, which reads and sets these

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels; open_clip makes its transforms for it."""
        height, width = self.config.image_size  # type: ignore[misc]
        return height, width

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's preprocessing of the model in which this tower stands; empty outside of open_clip."""
        return self.__dict__.get("_preprocess_cfg") or {}

    @preprocess_cfg.setter
    def preprocess_cfg(self, preprocess_cfg: dict[str, Any]) -> None:
        entries = preprocess_entries(preprocess_cfg, "open_clip")
        self.config.preprocess = {**(self.config.preprocess or {}), **entries}
        self.__dict__["_preprocess_cfg"] = preprocess_cfg

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        fit_inside_open_clip(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # It acts on a part of another model only: at the root, a tower leaves its state dict to nn.Module.

"""The methods of `TimmModel` by which it comes from open_clip and checkpoints, and lives inside open_clip."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn as nn
from torch import Tensor
from typing_extensions import Self

from ..hub.download import Access
from ..load import check_device
from ..reader.config import TimmTowerConfig
from ..reader.head import CustomHead
from ..reader.trunk import float_dtype
from ..reader.weights import floating_dtype
from .checkpoints import TrunkReport, load_trunk
from .faces import tower_of_parts
from .open_clip import tower_from_open_clip
from .open_clip_config import preprocess_entries
from .timm_export import TimmExport, export_timm
from .timm_weights import tower_from_timm
from .to_open_clip import fit_inside_open_clip

if TYPE_CHECKING:
    from ..timm_model import TimmModel


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
        tower = tower_from_open_clip(
            cast("type[TimmModel]", cls),
            source,
            model_config=model_config,
            preprocess_cfg=preprocess_cfg,
            image_size=image_size,
            allow_pickle=allow_pickle,
            device=device,
            dtype=floating_dtype(dtype),
            revision=revision,
            access=Access(token, cache_dir, force_download, local_files_only),
        )
        return cast("Self", tower)

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

        See `interop.timm_weights.tower_from_timm` for arguments and errors.
        """
        tower = tower_from_timm(
            cast("type[TimmModel]", cls),
            source,
            embed_dim,
            image_size,
            pool,
            proj,
            proj_bias,
            drop,
            custom_head,
            model_kwargs=model_kwargs,
            allow_pickle=allow_pickle,
            revision=revision,
            access=Access(token, cache_dir, force_download, local_files_only),
        )
        return cast("Self", tower)

    @classmethod
    def from_tower(cls, tower: nn.Module) -> Self:
        """A transformers model of a tower as a `TimmModel`: on the very same trunk and head, without its classifier.

        See `interop.faces.tower_of_parts` for errors; `TimmTowerModel.from_tower` is the way back.
        """
        return tower_of_parts(cls, tower)

    def export_timm(
        self,
        folder: str | os.PathLike[str],
        *,
        head: Literal["fold", "drop"] = "fold",
        preprocess: Literal["exact", "nearest"] = "exact",
    ) -> TimmExport:
        """Write a folder that stock timm loads, and stock transformers as `TimmWrapperModel`.

        See `interop.timm_export.export_timm` for arguments and errors.
        """
        return export_timm(self, folder, head=head, preprocess=preprocess)

    def load_trunk(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        weights: str | None = None,
        prefix: str | None = None,
        remap: Mapping[str, str] | None = None,
        ignore: Collection[str] = (),
        keep: Collection[str] = (),
        resample: bool | Sequence[int] = False,
        timm_filter: bool = False,
        allow_pickle: bool = False,
    ) -> TrunkReport:
        """Put the weights of a checkpoint into the trunk, in place, whatever its keys are called, or change nothing.

        See `interop.checkpoints.load_trunk` for arguments and errors.
        """
        return load_trunk(
            cast("TimmModel", self),
            source,
            weights=weights,
            prefix=prefix,
            remap=remap,
            ignore=ignore,
            keep=keep,
            resample=resample,
            timm_filter=timm_filter,
            allow_pickle=allow_pickle,
        )

    # --- as transformers' models and sentence-transformers name them

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return next(self.trunk.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the trunk's floating parameters."""
        return float_dtype(self.trunk)

    @property
    def num_features(self) -> int:
        """Width of what the trunk hands to the head, as timm names it; the embedding's is `config.embed_dim`."""
        return self.config.num_features  # type: ignore[return-value]

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
        fit_inside_open_clip(cast("TimmModel", self), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # It acts on a part of another model only: at the root, a tower leaves its state dict to nn.Module.

"""`TimmModel`: any timm trunk plus any head, with open_clip's signature and weight keys."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn as nn
from typing_extensions import Self

from .build import add_rates, build_parts, checked_arguments, head_fields
from .embedding.mixin import EmbeddingMixin
from .heads.registry import CustomHead, make_custom_head, rebuild_stored
from .hub.trunk_source import warn_of_training
from .hub_mixin import TowerHubMixin
from .input_size import set_input_size
from .interop.mixin import InterchangeMixin
from .interop.open_clip_4 import check_checkpointing, counted, group_pairs
from .interop.timm_face import TimmFace
from .interop.timm_repo import is_timm_source, open_timm_source
from .interop.timm_weights import fill_trunk
from .interop.torchscript import ScriptableTower
from .reader.config import TimmTowerConfig
from .reader.errors import ConfigError, HeadError
from .reader.freezing import keep_statistics
from .reader.head import LIVE, SUBCLASS, builtin_head
from .reader.skip_init import Budget, within_budget
from .reader.tower import run_head
from .reader.trunk import create_trunk, float_dtype, remove_classifier
from .subclassing import REBUILDING, overrides, rebuild
from .training.feature_cache import cache_features, forward_from_cache
from .training.freezing import frozen_context, note_fixed
from .training.layer_groups import layer_groups
from .training.lock import Patterns, lock, unlock
from .training.naflex import NaFlexProcessor
from .training.param_groups import param_groups, summary_table
from .training.transform import make_transform
from .trunk_facts import check_rebuilt, trunk_arguments


class TimmModel(EmbeddingMixin, InterchangeMixin, TimmFace, TowerHubMixin):
    """A timm trunk and a head as one model: image `[B, in_chans, H, W]` in, embedding `[B, embed_dim]` out.

    Args:
        model_name: A name of timm's registry, with or without a pretrained tag; or `hf-hub:org/name[@revision]` or
            `local-dir:path`, as timm spells a repository and a folder: their architecture, arguments, input size and
            preprocessing then hold where nothing else is given (the config stores these, not the spelling).
        embed_dim: Width of the embedding; None where it follows (`proj="none"`, a custom head).
        image_size: Height and width in pixels, an int for a square, None for the trunk's native size. The trunk is
            built for it where it has a fixed size (position embeddings are resampled from pretrained weights).
        pool: What the trunk offers (`avg`, `max`, `token`, `map`, ...), `abs_attn`, `rot_attn`, `token_avg` (class
            token and mean of patch tokens side by side), `default` (the trunk's own) or `none` (features as they
            are). None is `none`; `""` is `default` with a built-in projection and `none` with a custom head.
        proj: `linear`, `mlp`, `none`, or None/`""`: the trunk's own classifier is the projection.
        proj_bias: Whether the projection's last layer has a bias.
        drop: Dropout probability of the projection.
        drop_path: Stochastic depth rate of the trunk.
        patch_drop: Patch dropout rate of the trunk.
        pretrained: Fetch timm's pretrained weights for the trunk, or load those of the repository or folder.
        custom_head: A module, or a class, callable or registered name that is called with `(in_features,
            embed_dim)`. It gets what the pool leaves: `[B, C]`, `[B, N, C]` or `[B, C, H, W]`, and may return a
            tensor, a tuple or a dict.
        model_kwargs: Further arguments of `timm.create_model` (`in_chans`, layers by class, ...).

    Raises:
        ConfigError: an argument has a value that cannot be used.
        ArgumentError: arguments that contradict each other, or that timm does not take.
        HeadError: the custom head does not fit what the pool leaves, or gives another width than `embed_dim`.
    """

    _is_tower_base = True  # where `subclassing` stops looking for what a subclass overrides

    def __init__(
        self,
        model_name: str,
        embed_dim: int | None = None,
        image_size: int | Sequence[int] | None = None,
        pool: str | None = "avg",
        proj: str | None = "linear",
        proj_bias: bool = False,
        drop: float = 0.0,
        drop_path: float | None = None,
        patch_drop: float | None = None,
        pretrained: bool = False,
        custom_head: CustomHead | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        stored = REBUILDING.get()
        if stored is not None:
            REBUILDING.set(None)  # a tower that a subclass builds inside its own constructor is another one
            self._assemble(stored.config, stored.custom_head)
            return
        model_args = checked_arguments(model_kwargs)
        add_rates(model_args, drop_path, patch_drop)
        own_head = overrides(type(self), "_create_head")
        fields = head_fields(own_head, embed_dim, pool, proj, proj_bias, drop, custom_head)
        if is_timm_source(model_name):
            source = open_timm_source(model_name, with_weights=pretrained)
            self._assemble(source.config(fields, image_size=image_size, model_args=model_args), custom_head)
            if pretrained:
                fill_trunk(self.trunk, self.config, source)
            return
        in_chans = model_args.pop("in_chans", 3)
        config = TimmTowerConfig(
            architecture=model_name,
            model_args=model_args,
            image_size=list(image_size) if isinstance(image_size, Sequence) else image_size,
            in_chans=in_chans,
            **fields,
        )
        self._assemble(config, custom_head, pretrained=pretrained)

    def _assemble(
        self,
        config: TimmTowerConfig,
        custom_head: CustomHead | None,
        *,
        pretrained: bool = False,
        trunk: nn.Module | None = None,
    ) -> None:
        fresh, given = config.num_features is None, trunk

        def make_trunk(settled: TimmTowerConfig) -> nn.Module:
            self.config = settled
            if given is None:
                return self._create_trunk(pretrained=pretrained)
            remove_classifier(given, config)
            return given

        def make_head(done: TimmTowerConfig) -> nn.Module:
            self.config = done
            self._custom_head = custom_head  # for `_create_head`, whose signature is its users'
            head = self._create_head(done.num_features, done.embed_dim)  # type: ignore[arg-type]
            del self._custom_head
            return head

        self.config, trunk, head, self._head_input = build_parts(config, make_trunk, make_head)
        self.trunk, self.head = trunk, head
        if fresh and not isinstance(custom_head, nn.Module):
            anchor = next(trunk.parameters())
            head.to(device=anchor.device, dtype=float_dtype(trunk))
        note_fixed(self)
        self._fingerprint: dict[str, Any] | None = None

    def _create_trunk(self, pretrained: bool = False) -> nn.Module:
        """Make the trunk that `self.config` describes. Override to change it; the subclass is then needed to load.

        Args:
            pretrained: Fetch timm's weights; False when a stored tower is rebuilt.
        """
        return create_trunk(self.config, pretrained=pretrained)

    def _create_head(self, in_features: int, embed_dim: int | None) -> nn.Module:
        """Make the head. Override to give a class of towers its own.

        Args:
            in_features: Channels of what the pool leaves.
            embed_dim: As in the config.
        """
        if self._custom_head is not None:
            return make_custom_head(self._custom_head, in_features, embed_dim)
        form = None if self.config.head is None else self.config.head.get("form")
        if form == LIVE or (form == SUBCLASS and not overrides(type(self), "_create_head")):
            raise HeadError("the config says that there is a custom head, but not which: pass custom_head=...")
        if self.config.head is not None and form != SUBCLASS:
            return rebuild_stored(self.config.head)
        return builtin_head(self.config)

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return next(self.trunk.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the images that the tower takes: that of the trunk's first floating-point parameter."""
        return float_dtype(self.trunk)

    @property
    def num_features(self) -> int:
        """Width of what the pool leaves for the head, in channels."""
        return self.config.num_features  # type: ignore[return-value]

    @classmethod
    def from_config(cls, config: TimmTowerConfig, custom_head: CustomHead | None = None) -> Self:
        """A tower with fresh random weights.

        Args:
            config: Completed or not; it is copied.
            custom_head: Takes the place of the head that the config stores.

        Raises:
            TowerError: as the constructor.
        """
        config = copy.deepcopy(config)
        if custom_head is not None and config.head is None:
            config.head, config.proj, config.num_features = {"form": LIVE}, "none", None
        with within_budget(Budget.default()):
            return rebuild(cls, config, custom_head).train()

    @classmethod
    def from_trunk(
        cls,
        trunk: nn.Module,
        embed_dim: int | None = None,
        pool: str | None = "default",
        proj: str | None = "linear",
        proj_bias: bool = False,
        drop: float = 0.0,
        custom_head: CustomHead | None = None,
    ) -> Self:
        """Wrap a timm model that exists already, with its weights. Its classifier is removed in place.

        Args:
            trunk: From `timm.create_model`; its arguments, input size and changes since are read back from it.
            embed_dim, pool, proj, proj_bias, drop, custom_head: As in the constructor. With `proj=None` the model's own
                classifier is kept as the projection.

        Raises:
            ConfigError: timm cannot tell how the model was made, or building it again gives other weights.
        """
        described = trunk_arguments(trunk)
        fields = head_fields(overrides(cls, "_create_head"), embed_dim, pool, proj, proj_bias, drop, custom_head)
        config = TimmTowerConfig(**described, **fields, classifier="reset")
        check_rebuilt(trunk, config, with_classifier=True)
        tower = cls.__new__(cls)
        nn.Module.__init__(tower)
        tower._assemble(config, custom_head, trunk=trunk)
        return tower

    # --- running

    def forward(self, x: torch.Tensor) -> Any:
        """Images `[B, in_chans, H, W]`, or `naflex` patches -> the embedding `[B, embed_dim]`, or what a head gives."""
        with frozen_context(self.trunk, x):
            features = self.trunk(x)
        return run_head(self.head, self._head_input, features)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` scripts in the tower's place."""
        return ScriptableTower(self.trunk, self.head, self._head_input)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, in_chans, H, W]` -> the trunk's unpooled features, in the trunk's own layout."""
        with frozen_context(self.trunk, x):
            return self.trunk.forward_features(x)  # type: ignore[operator,no-any-return]

    def forward_head(self, features: torch.Tensor) -> Any:
        """Features of `forward_features` -> what `forward` gives."""
        with frozen_context(self.trunk, features):
            pooled = self.trunk.forward_head(features)  # type: ignore[operator]
        return run_head(self.head, self._head_input, pooled)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Features of inner layers, with open_clip's arguments and keys.

        Args:
            x: Images `[B, in_chans, H, W]`.
            indices: The last n if an int, all if None, those listed otherwise.
            stop_early: Do not run layers past the last one wanted (only with `intermediates_only`).
            normalize_intermediates: Run the trunk's final norm over each.
            intermediates_only: Leave out the embedding.
            output_fmt: Layout of the intermediates.
            output_extra_tokens: Give the prefix tokens too.

        Returns:
            `image_intermediates` (list), `image_intermediates_prefix` (list, where asked for), and `image_features`
            (the embedding) unless `intermediates_only`.

        Raises:
            ConfigError: this trunk has no intermediates in timm.
        """
        if not hasattr(self.trunk, "forward_intermediates"):
            raise ConfigError(f"{type(self.trunk).__name__} has no forward_intermediates in timm {timm.__version__}")
        extra = {"return_prefix_tokens": True} if output_extra_tokens else {}
        with frozen_context(self.trunk, x):
            output = self.trunk.forward_intermediates(  # type: ignore[operator]
                x,
                indices=indices,
                intermediates_only=intermediates_only,
                norm=normalize_intermediates,
                stop_early=stop_early,
                output_fmt=output_fmt,
                **extra,
            )
        found: dict[str, Any] = {}
        intermediates = output if intermediates_only else output[1]
        if output_extra_tokens and intermediates and isinstance(intermediates[0], tuple):
            found["image_intermediates_prefix"] = [prefix for _, prefix in intermediates]
            intermediates = [spatial for spatial, _ in intermediates]
        found["image_intermediates"] = intermediates
        if not intermediates_only:
            found["image_features"] = self.forward_head(output[0])
        return found

    def transform(self, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
        """timm's own transform for this tower: PIL image -> `[in_chans, H, W]`. See `training/transform.py`."""
        return make_transform(self.config, is_training, **kwargs)

    def naflex(self, max_seq_len: int | None = None, is_training: bool = False, **kwargs: Any) -> NaFlexProcessor:
        """Images of any aspect -> batches of patches with masks, of a tower on NaFlexVit. See `training/naflex.py`."""
        return NaFlexProcessor(self.config, self.trunk, max_seq_len, is_training, **kwargs)

    # --- training: each of these functions is a method as it is

    unlock = unlock
    param_groups = param_groups
    cache_features = cache_features
    forward_from_cache = forward_from_cache

    # --- changing
    def set_input_size(self, image_size: int | Sequence[int]) -> None:
        """Change the input size; position embeddings are resampled by timm, the transform follows.

        Args:
            image_size: Pixels, an int or (height, width).

        Raises:
            ConfigError: the trunk does not run at this size, or timm cannot build it so. The tower is as before.
        """
        set_input_size(self, image_size, own_trunk=overrides(type(self), "_create_trunk"))

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Args:
            enable: False: keep them again.
            impl: Of open_clip 4: `inline`; for `composable` a warning says that it is inline too.

        Raises:
            ConfigError: the trunk does not support it.
        """
        check_checkpointing(impl)
        try:
            self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"{type(self.trunk).__name__} does not support gradient checkpointing: {error}"
            ) from error

    def layer_groups(self, pooler_in_head: bool | None = None) -> list[Any]:
        """The `LayerGroup`s from input to output, each parameter in one of them. See `training/layer_groups.py`.

        With `pooler_in_head`, which open_clip 4 passes to every tower, `(name, parameters)` pairs as it takes them.
        """
        groups = layer_groups(self)
        return groups if pooler_in_head is None else group_pairs(self, groups)

    def lock(
        self,
        unlocked_groups: int = 0,
        freeze_bn_stats: bool = False,
        *,
        head: bool | None = None,
        until: str | None = None,
        only: Patterns | None = None,
        except_: Patterns | None = None,
    ) -> None:
        """Freeze the trunk, or what the selectors name; all else trains. See `training/lock.py`.

        Args:
            unlocked_groups, freeze_bn_stats, until, only, except_: As there.
            head: Freeze the head as well. None is False, except inside of open_clip 4, where the head is the last of
                the groups that are counted (`interop/open_clip_4.py`).

        Raises:
            ArgumentError: a selector matches nothing, or there are fewer groups.
        """
        if until is None and only is None:
            unlocked_groups, head = counted(self, unlocked_groups, head)
        lock(self, unlocked_groups, freeze_bn_stats, head=bool(head), until=until, only=only, except_=except_)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that modules with frozen statistics stay in eval mode."""
        super().train(mode)
        keep_statistics(self)
        if self.config.trunk_source is not None:
            warn_of_training(self.config.trunk_source, self.trunk)
        return self

    def summary(self) -> str:
        """A table of the parts with their parameters; print it."""
        head = type(self.head).__name__ if self.config.head is None else self.config.head.get("class", "custom")
        size = self.config.image_size
        return (
            f"{type(self).__name__}: {self.config.architecture}, pool={self.config.pool}, head={head}, "
            f"image {self.config.in_chans} x {size[0]} x {size[1]} -> {self.config.embed_dim}\n" + summary_table(self)  # type: ignore[index]
        )

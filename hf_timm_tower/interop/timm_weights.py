"""A timm model's weights -> a tower's trunk: put in by timm's own loader, then proved complete."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from ..build import checked_arguments, head_fields
from ..files.private_draws import private_draws
from ..heads.registry import CustomHead
from ..hub.download import Access
from ..reader.config import TimmTowerConfig
from ..reader.errors import WeightsError
from ..reader.trunk import native_cfg, remove_classifier
from ..reader.weights import assign_weights
from ..subclassing import overrides
from .timm_repo import TimmSource, create_model, open_timm_source

if TYPE_CHECKING:
    from ..timm_model import TimmModel

T = TypeVar("T", bound="TimmModel")


def tower_from_timm(
    cls: type[T],
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
    access: Access | None = None,
) -> T:
    """A tower on a timm repository or folder, or on a folder of transformers' `TimmWrapperModel`, in eval mode.

    Its architecture, arguments, input size and preprocessing come along; timm's own loader puts the weights in, and
    every weight of the trunk must be there. The classifier is left out, unless `proj=None`.

    Args:
        cls: TimmModel or a subclass.
        source: `org/name`, `hf-hub:org/name`, `hf-hub:org/name@revision`, a folder, or `local-dir:folder`.
        embed_dim: As in the constructor, like all arguments up to `model_kwargs`. With `proj=None` it follows.
        image_size: Where it is not the stored one, timm resamples position embeddings.
        pool: As in the constructor.
        proj: `none` by default, so that nothing random is added: the embedding is what the trunk gives.
        proj_bias: As in the constructor.
        drop: As in the constructor.
        custom_head: As in the constructor.
        model_kwargs: Go over the stored arguments.
        allow_pickle: Read `pytorch_model.bin` where there is no safetensors file, with `weights_only=True`.
        revision: Branch, tag, commit or `refs/pr/N`.
        access: Token, cache and so on.

    Raises:
        FolderError: no such folder or repository (HubError), or no weights that are read.
        ConfigError: it holds something else, or arguments that a tower does not take.
        WeightsError: a weight of the trunk is missing or does not fit.
    """
    found = open_timm_source(source, revision=revision, access=access, allow_pickle=allow_pickle)
    fields = head_fields(overrides(cls, "_create_head"), embed_dim, pool, proj, proj_bias, drop, custom_head)
    config = found.config(fields, image_size=image_size, model_args=checked_arguments(model_kwargs))
    tower = cls.from_config(config, custom_head=custom_head)
    fill_trunk(tower.trunk, tower.config, found)
    return tower.eval()


def fill_trunk(trunk: nn.Module, config: TimmTowerConfig, source: TimmSource) -> list[str]:
    """Put a timm model's weights into a trunk that was built for them, strictly; the trunk's own are replaced.

    Args:
        trunk: From `create_trunk(config)`.
        config: From `source.config(...)`.
        source: Opened with its weights.

    Returns:
        Keys that were left out: those of the classifier, where the tower has none.

    Raises:
        WeightsError: the file lacks a weight of the trunk, or has weights that are neither the trunk's nor the
            classifier's.
    """
    assert source.weights is not None
    args = dict(config.model_args or {})
    keeps_classifier = args.get("num_classes") == source.num_classes
    args["num_classes"] = source.num_classes
    assert isinstance(config.image_size, (list, tuple))
    noted = _LoadOnly()
    with private_draws(0), noted:
        full = create_model(source, list(config.image_size), config.in_chans, args, source.has_size, with_weights=True)
    lacking = [key for key, tensor in full.state_dict(keep_vars=True).items() if id(tensor) not in noted.filled]
    if lacking:
        raise WeightsError(
            f"{source.place}: {len(lacking)} weights of {config.architecture} are not in the file, or timm could not "
            f"fit them, and would stay random: {', '.join(lacking[:5])}"
        )
    before = set(full.state_dict())
    remove_classifier(full, config)
    weights = full.state_dict()
    left_out = sorted(before - set(weights))
    fresh: list[str] = []
    if config.proj is None and not keeps_classifier:
        # another number of outputs: timm's classifier of that size starts at random, as in timm itself
        shapes = {key: value.shape for key, value in trunk.state_dict().items()}
        fresh = sorted(key for key, value in weights.items() if shapes.get(key) != value.shape)
        _require_classifier(fresh, full, source)
        weights = {key: value for key, value in weights.items() if key not in fresh}
    assign_weights(trunk, weights, source=source.place, allow_missing=fresh)
    return sorted({*left_out, *fresh})


def _require_classifier(keys: list[str], model: nn.Module, source: TimmSource) -> None:
    named = source.pretrained_cfg.get("classifier") or native_cfg(source.architecture).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    if odd := [key for key in keys if not key.startswith(prefixes)]:
        raise WeightsError(f"{source.place}: {', '.join(odd[:5])} do not fit {type(model).__name__}")


class _LoadOnly(TorchFunctionMode):
    """Leaves out random initialisation and notes which parameters and buffers something was copied into.

    timm loads some models without strictness, and leaves what it cannot fit at random with no more than a line in its
    log: a parameter that nothing was copied into is one of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filled: dict[int, torch.Tensor] = {}  # the tensor too, so that its id is not given to another

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if name == "copy_" and isinstance(target, torch.Tensor):
            self.filled[id(target)] = target
        elif isinstance(target, nn.Parameter) and name.endswith("_") and not name.endswith("__"):
            if name != "requires_grad_":
                return target
        return func(*args, **kwargs)

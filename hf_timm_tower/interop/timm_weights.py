"""A timm model's weights -> a tower's trunk: put in by timm's own loader, then proved complete."""

from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from ..files.private_draws import private_draws
from ..reader.config import TimmTowerConfig
from ..reader.errors import WeightsError
from ..reader.trunk import native_cfg, native_size, remove_classifier
from ..reader.weights import assign_weights
from ..trunk_facts import shapes_of
from .timm_repo import TimmSource, create_model


def fill_trunk(trunk: nn.Module, config: TimmTowerConfig, source: TimmSource) -> None:
    """Put a timm model's weights into a trunk that was built for them, strictly; the trunk's own are replaced.

    The classifier's are left out where the tower has none.

    Args:
        trunk: From `create_trunk(config)`.
        config: From `source.config(...)`.
        source: Opened with its weights.

    Raises:
        WeightsError: the file lacks a weight of the trunk, or has weights that are neither the trunk's nor the
            classifier's.
    """
    assert source.weights is not None
    args = dict(config.model_args or {})
    keeps_classifier = args.get("num_classes") == source.num_classes
    args["num_classes"] = source.num_classes
    noted = _LoadOnly()
    with private_draws(0), noted:
        full = create_model(source, native_size(config), config.in_chans, args, with_weights=True)
    lacking = [key for key, tensor in full.state_dict(keep_vars=True).items() if id(tensor) not in noted.filled]
    if lacking:
        raise WeightsError(
            f"{source.place}: {len(lacking)} weights of {config.architecture} are not in the file, or timm could not "
            f"fit them, and would stay random: {', '.join(lacking[:5])}"
        )
    remove_classifier(full, config)
    weights = full.state_dict()
    fresh: list[str] = []
    if config.proj is None and not keeps_classifier:
        # another number of outputs: timm's classifier of that size starts at random, as in timm itself
        shapes = shapes_of(trunk.state_dict())
        fresh = sorted(key for key, value in weights.items() if shapes.get(key) != value.shape)
        _require_classifier(fresh, full, source)
        weights = {key: value for key, value in weights.items() if key not in fresh}
    assign_weights(trunk, weights, source=source.place, allow_missing=fresh)


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

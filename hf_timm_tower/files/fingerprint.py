"""`fingerprint.json`: are the outputs the same here, on this timm, this torch, this device?

A fixed probe image goes through the tower; the outputs are kept as a digest, some of their values, and the versions
that made them. The probe is a closed formula of whole numbers, so that every machine makes the same bits.
"""

import contextlib
import dataclasses
import functools
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import huggingface_hub
import safetensors
import timm
import torch
import torch.nn as nn
import transformers

from ..reader.errors import FormatError, TowerError, shown
from ..reader.trunk import eval_mode, native_size
from .private_draws import private_draws
from .safetensors_layout import bytes_of

FINGERPRINT_VERSION = 1
MAX_VALUES = 1024

# Largest difference, relative to the largest value of the output, that other kernels may make: about a thousand
# roundings of the dtype. Above it, the numbers are not the same numbers.
TOLERANCES = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 8e-2, "torch.float64": 1e-10}


def probe_image(in_chans: int, image_size: list[int]) -> torch.Tensor:
    """The probe: `[1, in_chans, height, width]`, float32, values from -1 to 1.

    Pixel (c, y, x) is `((31 y + 17 x + 13 y x + 101 c) mod 257) / 128 - 1`, exact in float32.
    """
    height, width = image_size
    y = torch.arange(height, dtype=torch.int64, device="cpu").view(1, height, 1)
    x = torch.arange(width, dtype=torch.int64, device="cpu").view(1, 1, width)
    c = torch.arange(in_chans, dtype=torch.int64, device="cpu").view(in_chans, 1, 1)
    whole = (31 * y + 17 * x + 13 * y * x + 101 * c) % 257
    return (whole.to(torch.float32) / 128 - 1).unsqueeze(0)


@dataclass(frozen=True)
class Verification:
    """What `tower.verify()` found.

    Attributes:
        status: `equal` (the same bits), `close` (within tolerance) or `different`.
        largest_difference: Largest absolute difference of the kept values.
        relative_difference: The same, relative to the largest kept value.
        tolerance: What `close` allows for the relative difference.
        changed: What is not as it was at saving: name -> (then, now).
    """

    status: Literal["equal", "close", "different"]
    largest_difference: float
    relative_difference: float
    tolerance: float
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.status}: largest difference {self.largest_difference:.3g}, relative {self.relative_difference:.3g} "
            f"(tolerance {self.tolerance:.3g})"
        ]
        lines += [f"  {name}: saved with {then}, now {now}" for name, (then, now) in self.changed.items()]
        return "\n".join(lines)


def run_probe(tower: nn.Module, in_chans: int, image_size: list[int]) -> dict[str, torch.Tensor]:
    """The tower's outputs on the probe, in eval mode: path -> tensor on the CPU (`""` for a single tensor).

    Autocast is off, and a `forward` that was put on the object (a compiled one, accelerate's) is left out: the outputs
    are those of the class.

    Raises:
        TowerError: the tower does not run on its own input size, or gives something that is not made of tensors.
    """
    anchor = next(tower.parameters())
    image = probe_image(in_chans, image_size).to(anchor.device, anchor.dtype)
    forward = functools.partial(type(tower).forward, tower) if "forward" in vars(tower) else tower
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", anchor.device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(tower))
        stack.enter_context(private_draws(0))
        try:
            output = forward(image)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if isinstance(error, TowerError):
                raise
            raise TowerError(
                f"the tower does not run on the image that its config describes, {in_chans} x {image_size[0]} x "
                f"{image_size[1]} (C, H, W): {error}"
            ) from error
    flat: dict[str, torch.Tensor] = {}
    _flatten(output, "", flat)
    return flat


def _flatten(value: Any, path: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        into[path] = value.detach().to("cpu").contiguous()
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}" if path else str(key), into)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _flatten(item, f"{path}.{index}" if path else str(index), into)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _flatten(getattr(value, field.name), f"{path}.{field.name}" if path else field.name, into)
    elif value is not None:
        raise TowerError(f"the tower gives a {type(value).__name__} at {path or 'the top'}, expected tensors")


def make_fingerprint(
    outputs: dict[str, torch.Tensor],
    tower: nn.Module,
    in_chans: int,
    image_size: list[int],
    weights: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Outputs of `run_probe` -> the JSON of `fingerprint.json`; `weights` are the `weight_digests`, where known."""
    return {
        "fingerprint_version": FINGERPRINT_VERSION,
        "probe": [1, in_chans, *image_size],
        "outputs": {path: _describe(tensor) for path, tensor in outputs.items()},
        "weights": weight_digests(tower) if weights is None else weights,
        "made_with": surroundings(tower),
    }


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "sha256": hashlib.sha256(bytes_of(tensor)).hexdigest(),
        "values": [_plain(value) for value in _sample(tensor).tolist()],
    }


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    flat = flat.to(torch.float64)
    step = max(1, -(-flat.numel() // MAX_VALUES))
    return flat[::step]


def _plain(value: float) -> float | str:
    # JSON has no NaN and no infinity
    return value if value == value and abs(value) != float("inf") else repr(value)


def weight_digests(tower: nn.Module) -> dict[str, str]:
    """SHA-256 over names, shapes and bytes of the trunk's and the head's tensors."""
    digests = {"trunk": hashlib.sha256(), "head": hashlib.sha256()}
    for key, tensor in sorted(tower.state_dict().items()):
        if not key.startswith(tuple(f"{part}." for part in digests)):
            continue  # a classifier on top
        digest = digests["head" if key.startswith("head.") else "trunk"]
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return {part: digest.hexdigest() for part, digest in digests.items()}


def surroundings(tower: nn.Module) -> dict[str, str]:
    """Everything around the weights that can change the last bits."""
    device = next(tower.parameters()).device
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def compare(saved: Mapping[str, Any], tower: Any) -> Verification:
    """A saved fingerprint against what a tower gives now.

    Args:
        saved: The JSON of `fingerprint.json`.
        tower: With its `config`.

    Raises:
        TowerError: as from `run_probe`.
        FormatError: the fingerprint is malformed or of an unknown version.
    """
    in_chans, image_size = tower.config.in_chans, native_size(tower.config)
    outputs = run_probe(tower, in_chans, image_size)
    try:
        version, then = saved["fingerprint_version"], saved["outputs"]
        changed = _changes(saved, tower)
        probe = [1, in_chans, *image_size]
        if saved["probe"] != probe:
            changed["probe"] = (saved["probe"], probe)
        if version != FINGERPRINT_VERSION:
            raise FormatError(f"fingerprint.json: version {shown(version)}, this package reads {FINGERPRINT_VERSION}")
        shapes = {path: (entry["shape"], entry["dtype"]) for path, entry in then.items()}
        now = {path: (list(tensor.shape), str(tensor.dtype)) for path, tensor in outputs.items()}
        if shapes != now:
            return Verification("different", float("inf"), float("inf"), 0.0, {**changed, "outputs": (shapes, now)})
        if all(entry["sha256"] == hashlib.sha256(bytes_of(outputs[path])).hexdigest() for path, entry in then.items()):
            return Verification("equal", 0.0, 0.0, 0.0, changed)
        return _distance(then, outputs, changed)
    except FormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise FormatError(f"fingerprint.json is malformed: {type(error).__name__}: {shown(str(error))}") from error


def _distance(
    then: Mapping[str, Any], outputs: dict[str, torch.Tensor], changed: Mapping[str, tuple[Any, Any]]
) -> Verification:
    largest = relative = tolerance = 0.0
    close = True
    for path, entry in then.items():
        old = torch.tensor([float(value) for value in entry["values"]], dtype=torch.float64, device="cpu")
        new = _sample(outputs[path])
        if old.shape != new.shape:
            raise ValueError(f"{old.numel()} values at {path or 'the embedding'}, expected {new.numel()}")
        difference = torch.where(old.eq(new) | (old.isnan() & new.isnan()), 0.0, (old - new).abs())
        difference = difference.nan_to_num(nan=float("inf"))
        here = difference.max().item() if difference.numel() else 0.0
        scale = old.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if old.numel() else 0.0
        allowed = TOLERANCES.get(entry["dtype"], 0.0)
        share = here / scale if scale else (float("inf") if here else 0.0)
        close = close and share <= allowed
        largest, relative, tolerance = max(largest, here), max(relative, share), max(tolerance, allowed)
    return Verification("close" if close else "different", largest, relative, tolerance, changed)


def _changes(saved: Mapping[str, Any], tower: nn.Module) -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    for label, then, now in (
        ("weights of", saved["weights"], weight_digests(tower)),
        ("", saved["made_with"], surroundings(tower)),
    ):
        for key in sorted(set(then) | set(now)):
            if then.get(key) != now.get(key):
                old, new = then.get(key), now.get(key)
                if label:
                    old, new = f"sha256 {str(old)[:12]}", f"{str(new)[:12]}"
                changed[f"{label} {key}".strip()] = (old, new)
    return changed

"""`preprocessor_config.json`: what it holds, made from a tower's config, and held against it.

It repeats the preprocess block and the size for transformers, under transformers' names. Here and not beside the
processor's class, so that saving and loading a tower need not import transformers' image processing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .config import TimmTowerConfig, check_size
from .errors import ConfigError
from .image_processing import check_preprocess, completed_preprocess

PROCESSOR_TYPE = "TimmTowerImageProcessor"
# Where transformers finds the class in a tower's folder, under trust_remote_code. A list: of a plain name transformers
# makes a video processor's, and asks every pipeline's user to trust its code.
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": [f"modeling_timm_tower.{PROCESSOR_TYPE}", None]}
# Keys that transformers itself writes into a processor's file.
PROCESSOR_FOREIGN_KEYS = frozenset({"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"})

# Entry of the preprocess block -> its name in the file.
_NAMES = {
    "interpolation": "interpolation",
    "crop_pct": "crop_pct",
    "crop_mode": "crop_mode",
    "mean": "image_mean",
    "std": "image_std",
    "padding": "padding",
    "channel_order": "channel_order",
    "value_range": "value_range",
}
PROCESSOR_FACTS = ("size", *_NAMES.values())


def facts_of(block: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The preprocess block and `[height, width]` under their names in `preprocessor_config.json`."""
    height, width = size
    named = {name: block[key] for key, name in _NAMES.items()}
    return {"size": {"height": height, "width": width}, **_plain(named)}


def block_of(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The checked preprocess block and `[height, width]` from the facts of `preprocessor_config.json`.

    Raises:
        ConfigError: a fact is missing or wrong; names it.
    """
    if missing := [name for name in PROCESSOR_FACTS if name not in facts]:
        raise ConfigError(f"{PROCESSOR_TYPE}: {', '.join(missing)} missing")
    block = _plain({key: facts[name] for key, name in _NAMES.items()})
    size = facts["size"]
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise ConfigError(f"size={dict(size)!r}: expected {{'height': ..., 'width': ...}} in pixels")
        size = [size["height"], size["width"]]
    if not isinstance(block["mean"], list) or not block["mean"]:
        raise ConfigError(f"image_mean={block['mean']!r}: expected a list with a number for each channel")
    check_preprocess(block, len(block["mean"]))
    return block, check_size("size", size)


def _plain(value: Any) -> Any:
    """What JSON gives back: lists for tuples, and nothing shared with the config."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def processor_dict(config: TimmTowerConfig) -> dict[str, Any]:
    """What `preprocessor_config.json` of a tower holds, from its config alone.

    Written with `json.dumps(..., indent=2, sort_keys=True)` and a newline it is, byte for byte, what
    `TimmTowerImageProcessor.save_pretrained` writes.

    Raises:
        ConfigError: the config is not completed, or its preprocess block cannot be used.
    """
    block, size = completed_preprocess(config)
    check_preprocess(block, config.in_chans)
    return {
        **facts_of(block, size),
        "image_processor_type": PROCESSOR_TYPE,
        "auto_map": dict(PROCESSOR_AUTO_MAP),
    }


def facts_in_tower(processor: dict[str, Any]) -> dict[str, Any]:
    """What `preprocessor_config.json` holds beside a tower's `config.json`, which names the class.

    Here the class's name and `auto_map` would make transformers look for a video processor too, and ask every user of a
    pipeline whether to trust the code, although the class is registered.
    """
    return {name: value for name, value in processor.items() if name not in ("image_processor_type", "auto_map")}


def check_processor(found: Mapping[str, Any], config: TimmTowerConfig) -> None:
    """Refuse a `preprocessor_config.json` that would prepare other pixels than the tower's config says.

    Args:
        found: The parsed file.
        config: The completed config of the same folder, before any override.

    Raises:
        ConfigError: names every fact that differs, with both values.
    """
    expected = processor_dict(config)
    kind = found.get("image_processor_type")  # not beside a tower, but whoever saved the processor alone wrote it
    if kind not in (None, PROCESSOR_TYPE):
        raise ConfigError(
            f"preprocessor_config.json: image_processor_type is {kind!r}, not {PROCESSOR_TYPE!r}: it would prepare "
            "other pixels than this tower was made for. Save the tower again to write its own."
        )
    differ = [
        f"{name} is {found.get(name, 'missing')!r} there and {expected[name]!r} in config.json"
        for name in PROCESSOR_FACTS
        if name not in found or found[name] != expected[name]
    ]
    differ += [f"{name} is unknown" for name in sorted(set(found) - set(expected) - PROCESSOR_FOREIGN_KEYS)]
    if differ:
        raise ConfigError(
            f"preprocessor_config.json and config.json disagree: {'; '.join(differ)}. One of them was edited; save the "
            "tower again to write both."
        )

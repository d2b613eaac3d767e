"""timm's own transform for a tower, for evaluation or training: what `TimmModel.transform` gives."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose, Normalize

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError
from ..reader.image_processing import (
    PIL_MODES,
    completed_preprocess,
    load_pixels,
    run_steps,
    timm_arguments,
    with_tower_steps,
)


class TowerTransform(Compose):  # type: ignore[misc]  # torchvision carries no types
    """timm's steps, before which a PIL image that they cannot take, or only at great cost, is refused in words.

    Args:
        steps: PIL image -> float tensor `[channels, height, width]`.
        channels: The tower's `in_chans`.
    """

    def __init__(self, steps: list[Any], channels: int) -> None:
        super().__init__(steps)
        self.channels = channels

    def __call__(self, image: Any) -> Any:
        """One image through all steps.

        Raises:
            ArgumentError: the image is of another mode, empty, damaged, or too large once it is padded or resized.
        """
        if not isinstance(image, Image.Image):
            return super().__call__(image)
        load_pixels(image)
        mode = PIL_MODES.get(self.channels, image.mode)
        if image.mode != mode or len(image.getbands()) != self.channels:
            deep = " (after scaling it to 8 bits)" if image.mode.startswith(("I", "F")) else ""
            raise ArgumentError(
                f"transform: an image of mode {image.mode}, but the tower takes {self.channels} channels: "
                f"image.convert({mode!r}) first{deep}"
            )
        return run_steps(self.transforms, image)

    def __repr__(self) -> str:
        return repr(Compose(self.transforms))  # timm's


def make_transform(config: TimmTowerConfig, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
    """timm's own transform for a tower, from the config alone.

    It pads first, and scales to `value_range` and reverses the channels around the normalisation, where the preprocess
    block says so; otherwise its steps are those of `timm.data.create_transform`.

    Args:
        config: A completed config.
        is_training: The random transform for training instead of the one for evaluation.
        kwargs: Further arguments of `timm.data.create_transform` (augmentation).

    Returns:
        PIL image -> float32 tensor `[in_chans, height, width]`, normalised.

    Raises:
        ConfigError: the config is not completed, or asks for images of too many pixels.
        ArgumentError: an argument that the config decides, or that timm does not know, or with which the transform
            does not normalise although the tower needs what is done there.
    """
    block, size = completed_preprocess(config)
    decided = timm_arguments(block, size)
    if twice := sorted(set(decided) & set(kwargs)):
        raise ArgumentError(f"transform: {', '.join(twice)} come from the tower's config; change them there")
    try:
        transform: Callable[[Any], Any] = create_transform(is_training=is_training, **decided, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"transform: timm.data.create_transform refuses: {error}") from error
    steps = list(transform.transforms) if isinstance(transform, Compose) else []
    plain = (block["padding"], block["channel_order"], block["value_range"]) == (None, "RGB", [0, 1])
    if not plain and sum(isinstance(step, Normalize) for step in steps) != 1:
        raise ArgumentError(
            f"transform: with {kwargs} timm does not normalise within one transform, and this tower's padding, "
            "value_range or channel_order would get lost; leave such arguments out"
        )
    return TowerTransform(with_tower_steps(steps, block), len(block["mean"])) if steps else transform

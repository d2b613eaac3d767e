"""How far the image processor's tensor path is from its exact one, and what each costs.

    python scripts/bench_image_processor.py [--device cuda] [--threads 1]

The exact path (PIL images, uint8 arrays) is checked to be timm's, bit for bit, before anything is measured. Differences
are in units of an 8-bit pixel (0 to 255) before mean and std, over three photographs of scikit-image in landscape,
portrait and square, made larger or smaller by the factors below: with their aspect kept (`center`), and squashed to 1:2
(`squash`). The numbers are the largest, and the largest mean, of the three. Needs the `demo` extra.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform

from hf_timm_tower import TimmTowerConfig
from hf_timm_tower.reader.image_processor import TimmTowerImageProcessor
from hf_timm_tower.trunk_facts import preprocess_from_timm

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
# Side of the result / shorter side of the photograph.
SCALES = {"down 5x": 0.2, "down 2x": 0.45, "down 1.1x": 0.9, "up 1.5x": 1.5, "up 3x": 3.0}
ROUNDS = 5


def photographs() -> list[Image.Image]:
    astronaut, coffee, cat = (Image.fromarray(picture()) for picture in (data.astronaut, data.coffee, data.chelsea))
    return [coffee, astronaut.crop((100, 0, 311, 400)), cat.crop((60, 0, 360, 300))]


def processor(size: tuple[int, int], steps: dict[str, Any]) -> TimmTowerImageProcessor:
    block = {**preprocess_from_timm(steps, 3), "mean": [0.0] * 3, "std": [1.0] * 3}
    config = TimmTowerConfig(architecture="test_resnet", image_size=size, preprocess=block)
    return TimmTowerImageProcessor.from_tower_config(config)


def milliseconds(call: Callable[[], object], device: str) -> float:
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[1:])


def compare(
    interpolation: str, scale: float, crop_mode: str, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Kind of input -> its largest and mean difference, and kind -> milliseconds for each photograph."""
    apart: dict[str, list[float]] = {"uint8": [0.0, 0.0], "float": [0.0, 0.0]}
    cost: dict[str, list[float]] = {"exact": [], "uint8": [], "float": []}
    for picture in photographs():
        side = round(min(picture.size) * scale)
        size = (side, side) if crop_mode == "center" else (side // 2, side)
        steps = {"interpolation": interpolation, "crop_mode": crop_mode, "crop_pct": 1.0}
        ours, timms = processor(size, steps), create_transform(size, **steps, mean=(0,) * 3, std=(1,) * 3)
        exact = ours(picture, return_tensors="pt").pixel_values
        if not torch.equal(exact[0], timms(picture)):
            raise AssertionError("the exact path is not timm's")
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(device)
        for kind, image in {"exact": picture, "uint8": tensor, "float": tensor / 255}.items():
            cost[kind].append(milliseconds(partial(ours, image, return_tensors="pt"), device))
            if kind != "exact":
                off = (ours(image, return_tensors="pt").pixel_values.cpu() - exact).abs() * 255
                apart[kind] = [max(apart[kind][0], off.max().item()), max(apart[kind][1], off.mean().item())]
    return apart, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the tensor path runs (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s)")
    print(f"{'':23}|tensor - exact|, max and mean: uint8, float     ms per image: exact, uint8, float")
    for crop_mode in ("center", "squash"):
        print(crop_mode)
        for interpolation, (name, scale) in itertools.product(INTERPOLATIONS, SCALES.items()):
            apart, cost = compare(interpolation, scale, crop_mode, options.device)
            figures = "   ".join(f"{most:6.2f} {mean:7.4f}" for most, mean in apart.values())
            times = "  ".join(f"{statistics.mean(values):5.1f}" for values in cost.values())
            print(f"{interpolation:9} {name:12} {figures}       {times}")


if __name__ == "__main__":
    main()

"""The feature cache: a frozen trunk sees each image once, the head trains on what it gave.

    tower.lock(freeze_bn_stats=True)
    cached = cache_features(tower, dataset, "features")
    for epoch in range(20):
        for features, labels in cached.batches(64, shuffle=True):
            loss = criterion(forward_from_cache(tower, features), labels)

What is stored is what the head takes: the trunk's output after pooling and arrangement, a vector `[C]`, tokens `[N, C]`
or a map `[C, H, W]` for each image. It is that of the trunk in eval mode: where the trunk would drop paths or tokens in
train mode, it does not here.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset, Subset

from ..files.disk import locked_folder
from ..files.fingerprint import TOLERANCES, weight_digests
from ..files.private_draws import private_draws
from ..heads.batch_formula import same_bytes
from ..reader.errors import ArgumentError, ConfigError, FolderError, FormatError
from ..reader.freezing import has_frozen_statistics, keeps_statistics
from ..reader.skip_init import tensors_in
from ..reader.tower import HeadInput, run_head
from ..reader.trunk import eval_mode, float_dtype
from .feature_rows import ImageRows, Sample, take_sample
from .feature_store import DTYPES, Column, Plan, RowWriter, prepare_folder, read_plan, read_table, rows_written

_STORED = (None, torch.float32, torch.float16, torch.bfloat16)


class CachedFeatures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A complete feature cache: row -> (features, label). With several versions of each image, row
    `v * images + i` is version v of image i.

    This opens a folder as it is. `cache_features` also makes sure that it fits the tower and the dataset.

    Args:
        path: The folder.

    Attributes:
        images: Number of images.
        repeats: Versions of each.
        dtype: Of the features that come out, the trunk's own; on disk they may be smaller.

    Raises:
        FolderError: there is no cache, or it is not complete.
        FormatError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        plan = read_plan(self.path)
        if plan is None:
            raise FolderError(f"{self.path}: there is no feature cache; cache_features(tower, dataset, path) makes one")
        done = rows_written(self.path) or 0
        if done > plan.rows:
            raise FormatError(f"{self.path}: {done} rows written, of {plan.rows}; delete the folder to cache anew")
        if done < plan.rows:
            raise FolderError(
                f"{self.path}: the feature cache has {done} of {plan.rows} rows; cache_features with the same "
                "arguments resumes it"
            )
        self.repeats: int = plan.made_of["repeats"]
        self.images = plan.rows // self.repeats
        self.dtype = DTYPES[plan.made_of["features dtype"]]
        self._column = plan.features
        self._features, self._labels = (read_table(self.path, name, plan) for name in ("features", "labels"))

    def __reduce__(self) -> tuple[type["CachedFeatures"], tuple[Path]]:
        return type(self), (self.path,)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[C]`, `[N, C]` or `[C, H, W]`, and the label; copies."""
        features, labels = self.take(torch.tensor([range(len(self))[row]]))
        return features[0], labels[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Several at once, for a `DataLoader`."""
        features, labels = self.take(torch.tensor(rows))
        return list(zip(features.unbind(), labels.unbind(), strict=True))

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: row numbers, int64 `[B]` -> features `[B, ...]` and labels `[B, ...]`; copies."""
        # copies: the map may be written to in memory, and a change in place must not come back in the next epoch
        features = self._column.from_disk(self._features.index_select(0, rows))
        return features.to(self.dtype), self._labels.index_select(0, rows)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        version: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch in whole batches: a `DataLoader` would put them together row by row.

        Args:
            batch_size: Rows of a batch.
            shuffle: In random order.
            drop_last: Leave out a last batch that is smaller.
            version: Only this version of each image, from 0; None: all of them.
            generator: For the order; None: torch's own.

        Raises:
            ArgumentError: a number is out of range.
        """
        _check_whole("batch_size", batch_size, 1)
        if version is not None and not 0 <= version < self.repeats:
            raise ArgumentError(f"version={version}: the cache has {self.repeats}, counted from 0")
        rows = len(self) if version is None else self.images
        order = torch.randperm(rows, generator=generator) if shuffle else torch.arange(rows)
        batches = torch.split(order + (version or 0) * self.images, batch_size)
        return (self.take(batch) for batch in batches if len(batch) == batch_size or not drop_last)


def forward_from_cache(tower: Any, features: torch.Tensor) -> Any:
    """Stored features `[B, ...]`, on the head's device -> what `tower(images)` gives, by the head alone.

    The trunk is not looked at: it must be as it was when the features were made.
    """
    return run_head(tower.head, HeadInput(per_position=tower._head_input.per_position), features)


def cache_features(
    tower: Any,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    repeats: int = 1,
    num_workers: int = 0,
    transform: Callable[[Any], Any] | None = None,
    dtype: torch.dtype | None = None,
    columns: tuple[str, str] = ("image", "label"),
    progress: bool = True,
) -> CachedFeatures:
    """Run every image once through the frozen trunk and keep what the head takes, in a folder.

    A folder that is complete is opened, a run that was interrupted is resumed. The folder is tied to the trunk's
    weights, the transform and the dataset; where one of these has changed, it is refused. Head and projection may
    change as they like.

    The trunk runs in eval mode and without gradients, on the device where it is. In batches of another size it may
    give other last bits: those of `batch_size` are what is kept.

    Args:
        tower: Its trunk must be frozen: `tower.lock(freeze_bn_stats=True)`.
        dataset: With a length and items by number: `(image, label)`, or mappings as in a `datasets` table. Images are
            PIL images (converted to RGB, or L for one channel), what the transform takes, or, without a transform of
            your own, tensors `[in_chans, H, W]` that are transformed already. Labels are numbers or tensors of one
            shape.
        path: The folder; it is made.
        batch_size: Images of a batch.
        repeats: 1: augmentation is left out, each image is seen once, through a transform that is not random. k: k
            random versions of each image, and no more than these will ever be seen.
        num_workers: Processes that read the dataset.
        transform: Image -> `[in_chans, H, W]`; None: `tower.transform()`. `tower.transform(is_training=True)` for
            several versions.
        dtype: What is stored (float32, float16, bfloat16); None: the trunk's own, and only then are outputs the same
            bits as through the trunk.
        columns: Keys of image and label where items are mappings.
        progress: Show a bar.

    Raises:
        ArgumentError: an argument, the dataset, or the transform with this number of repeats cannot be used.
        ConfigError: something in the trunk trains, or the tower is more than trunk and head.
        FolderError: the folder holds a cache that was made of something else, or other files; too little space.
        FormatError: the folder is damaged.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1), ("repeats", repeats, 1), ("num_workers", num_workers, 0)
    ):  # fmt: skip
        _check_whole(name, value, least)
    if dtype not in _STORED:
        raise ArgumentError(f"dtype={dtype}: expected {', '.join(map(str, _STORED))}")
    _check_trunk_frozen(tower)
    rows = ImageRows(dataset, tower.config, transform, repeats, columns)
    sample = take_sample(rows)
    features = _proven_features(tower, sample.inputs)
    plan = Plan(
        len(rows),
        Column.like(features, dtype),
        Column.like(sample.labels),
        _made_of(tower, rows, sample, features.dtype),
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):  # of several processes one writes, the others then find it complete
        prepare_folder(folder, plan)
        _check_stored(folder, plan, sample, features)
        _fill(tower, rows, folder, plan, batch_size, num_workers, progress)
    return CachedFeatures(folder)


def _fill(
    tower: Any, rows: ImageRows, folder: Path, plan: Plan, batch_size: int, num_workers: int, progress: bool
) -> None:
    writer = RowWriter(folder, plan)
    if writer.rows == plan.rows:
        return
    # a generator of its own: torch's stays where it is
    left = Subset(rows, range(writer.rows, plan.rows))
    loader = DataLoader(left, batch_size, num_workers=num_workers, generator=torch.Generator())
    bar = tqdm(total=plan.rows, initial=writer.rows, desc="features", unit="img", disable=not progress)  # type: ignore[no-untyped-call]
    try:
        with eval_mode(tower.trunk), bar:
            for images, labels in loader:
                writer.append(_features_of(tower, images).to("cpu", plan.features.dtype), labels)
                bar.update(len(images))
    finally:
        writer.sync()  # what was written stays, however the run ends


def _features_of(tower: Any, images: torch.Tensor) -> torch.Tensor:
    """Images on the CPU -> the head's input, on the trunk's device."""
    with torch.no_grad():
        return tower._head_input(tower.trunk(_on_trunk(tower, images)))  # type: ignore[no-any-return]


def _on_trunk(tower: Any, images: torch.Tensor) -> torch.Tensor:
    return images.to(next(tower.trunk.parameters()).device, float_dtype(tower.trunk))


def _check_trunk_frozen(tower: Any) -> None:
    trains = [name for name, parameter in tower.trunk.named_parameters() if parameter.requires_grad]
    if trains:
        raise ConfigError(
            f"the trunk is not frozen, {len(trains)} of its parameters train ({', '.join(trains[:3])}, ...), and "
            "cached features would not follow them: tower.lock(freeze_bn_stats=True) first"
        )
    moving = [
        name
        for name, module in tower.trunk.named_modules()
        if module.training and keeps_statistics(module) and not has_frozen_statistics(module)
    ]
    if moving:
        raise ConfigError(
            f"the trunk is in train mode, and the running statistics of {len(moving)} modules ({', '.join(moving[:3])}"
            ", ...) are not frozen: cached features would not follow them. tower.lock(freeze_bn_stats=True) first"
        )


def _proven_features(tower: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The head's input for some images, if trunk and head are all there is of the tower's forward.

    Raises:
        ConfigError: a hook or a replaced method brings something into the trunk that trains, or the tower's own forward
            gives something else than the head on this input.
    """
    with eval_mode(tower):
        with torch.enable_grad():
            if tower.trunk(_on_trunk(tower, inputs)).requires_grad:
                raise ConfigError(
                    "the trunk's parameters are frozen, but something else in it trains (a hook, a replaced forward): "
                    "cached features would not follow it"
                )
        features = _features_of(tower, inputs)
        with torch.no_grad():
            with private_draws(0):
                whole = tensors_in(tower(_on_trunk(tower, inputs)))
            with private_draws(0):
                by_head = tensors_in(forward_from_cache(tower, features))
    if len(whole) != len(by_head) or not all(map(same_bytes, whole, by_head)):
        raise ConfigError(
            f"the forward of {type(tower).__name__} is more than its head on what its trunk gives, so that cached "
            "features cannot replace the trunk"
        )
    return features


def _made_of(tower: Any, rows: ImageRows, sample: Sample, dtype: torch.dtype) -> dict[str, Any]:
    """All that the stored rows depend on, as JSON gives it back."""
    config = tower.config
    device = next(tower.trunk.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    made_of = {
        "trunk weights": weight_digests(tower)["trunk"],
        "architecture": config.architecture,
        "model_args": config.model_args,
        "pool": config.pool,
        "image_size": config.image_size,
        "arrangement": [tower._head_input.prefix, tower._head_input.to_nchw],
        **rows.identity(config),
        **{f"sampled {name}": digest for name, digest in sample.digests.items()},
        "features dtype": str(dtype),
        "autocast": None if autocast is None else str(autocast),
    }
    return json.loads(json.dumps(made_of))  # type: ignore[no-any-return]


def _check_stored(folder: Path, plan: Plan, sample: Sample, features: torch.Tensor) -> None:
    """The trunk still gives what is stored: another timm, or a changed module, may not, with the same weights.

    Raises:
        FolderError: it does not.
    """
    done = rows_written(folder) or 0
    known = [at for at, row in enumerate(sample.rows) if row < done]
    if not known or sample.digests["inputs"] is None:
        return
    stored = read_table(folder, "features", plan)[torch.tensor([sample.rows[at] for at in known])]
    stored = plan.features.from_disk(stored).double()
    now = features[torch.tensor(known, device=features.device)].to("cpu", plan.features.dtype).double()
    scale = now.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    allowed = max(TOLERANCES[str(kind)] for kind in (plan.features.dtype, features.dtype))
    if not torch.allclose(stored, now, rtol=0, atol=allowed * scale, equal_nan=True):
        raise FolderError(
            f"{folder}: this feature cache is stale, the trunk with the same weights now gives other features for the "
            f"same images (by more than {allowed:.0e} of the largest). Give another folder, or delete this one to "
            "cache anew."
        )


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r}: expected a whole number from {least}")

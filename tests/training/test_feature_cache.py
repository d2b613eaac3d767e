"""The feature cache: the same numbers as through the trunk, never stale, and nothing lost when it is killed."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hf_timm_tower import ArgumentError, ConfigError, FolderError, FormatError, TimmModel
from hf_timm_tower.training.feature_cache import CachedFeatures, cache_features, forward_from_cache

ROOT = Path(__file__).resolve().parents[2]


class Pictures(Dataset):
    """Noise of different sizes and modes, as files in the wild; labels 0 to 4."""

    def __init__(self, length: int = 10, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        random = np.random.default_rng([self.seed, index])
        pixels = random.integers(0, 256, (70 + 3 * index, 90, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert("L" if index % 4 == 3 else "RGB"), index % 5


class MapHead(nn.Module):
    """A head on a map, with statistics of its own."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_features, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2))
        self.proj = nn.Linear(8, embed_dim)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.proj(self.body(x).mean(2)), "map": self.body(x)}


class TokenHead(nn.Module):
    """A head on tokens."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(in_features, 1, batch_first=True)
        self.proj = nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attention(x, x, x, need_weights=False)[0].amax(1))


def locked(name: str = "test_vit", **arguments: Any) -> TimmModel:
    torch.manual_seed(0)
    tower = TimmModel(name, 6, **arguments)
    tower.lock(freeze_bn_stats=True)
    return tower


def inputs_of(tower: TimmModel, dataset: Pictures) -> torch.Tensor:
    transform = tower.transform()
    return torch.stack([transform(dataset[index][0].convert("RGB")) for index in range(len(dataset))])


def total(output: Any) -> torch.Tensor:
    values = output.values() if isinstance(output, dict) else [output]
    return sum(value.square().sum() for value in values)


def run(tower: TimmModel, output: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and gradients of the head."""
    tower.zero_grad(set_to_none=True)
    total(output).backward()
    gradients = [parameter.grad for parameter in tower.head.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [value.detach() for value in (output.values() if isinstance(output, dict) else [output])], gradients


# --- the same numbers

FORMS = {
    "vector": ("test_vit", {"pool": "avg"}, 1),
    "class token": ("test_vit", {"pool": "token", "proj": "mlp"}, 1),
    "class token and mean": ("test_vit", {"pool": "token_avg"}, 1),
    "vector of a convolutional trunk": ("test_resnet", {"proj": "mlp"}, 1),
    "tokens": ("test_vit", {"pool": "none", "custom_head": TokenHead}, 2),
    "map": ("test_convnext", {"pool": "none", "custom_head": MapHead}, 3),
    "map, channels last": ("swin_tiny_patch4_window7_224", {"pool": "none", "custom_head": MapHead}, 3),
    "map, attention pool": ("resnet18", {"pool": "rot_attn", "proj": None, "image_size": 64}, 3),
    "map, projected at every position": ("test_resnet", {"pool": "none", "proj": "linear"}, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_the_whole_tower(form: str, tmp_path: Path) -> None:
    name, arguments, rank = FORMS[form]
    if name.startswith("swin"):
        arguments = {**arguments, "model_kwargs": {"depths": (1, 1, 1, 1), "embed_dim": 48}, "image_size": 64}
        arguments["model_kwargs"]["window_size"] = 2
    tower, dataset = locked(name, **arguments), Pictures(6)
    cached = tower.cache_features(dataset, tmp_path / "cache", batch_size=3, progress=False)
    images = inputs_of(tower, dataset)
    tower.trunk.eval()
    assert cached[0][0].ndim == rank
    for at, (features, labels) in enumerate(cached.batches(3)):
        state = {key: value.clone() for key, value in tower.state_dict().items()}
        outputs, gradients = run(tower, tower(images[3 * at : 3 * at + 3]))
        tower.load_state_dict(state)  # a head may have statistics
        cached_outputs, cached_gradients = run(tower, tower.forward_from_cache(features))
        assert all(map(torch.equal, outputs, cached_outputs))
        assert all(map(torch.equal, gradients, cached_gradients))
        assert labels.tolist() == [dataset[3 * at + row][1] for row in range(3)]
    assert at == 1


def test_the_trunk_never_runs_again(tmp_path: Path) -> None:
    tower = locked()
    cached = tower.cache_features(Pictures(), tmp_path / "cache", progress=False)

    def refuse(module: nn.Module, inputs: Any) -> None:
        raise AssertionError("the trunk was run")

    for module in tower.trunk.modules():
        module.register_forward_pre_hook(refuse)
    with pytest.raises(AssertionError, match="the trunk was run"):
        tower(torch.zeros(1, 3, *tower.config.image_size))
    optimizer = torch.optim.SGD(tower.param_groups(0.1))
    before = tower.head.proj.weight.detach().clone()
    for _ in range(2):
        for features, labels in cached.batches(4, shuffle=True):
            nn.functional.cross_entropy(tower.forward_from_cache(features), labels).backward()
            optimizer.step()
    assert not torch.equal(before, tower.head.proj.weight)


def test_caching_leaves_the_tower_and_the_random_state_as_they_were(tmp_path: Path) -> None:
    tower = locked("test_resnet", drop=0.5)
    tower.trunk.layer1.eval()
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    modes, random = [module.training for module in tower.modules()], torch.get_rng_state()
    tower.cache_features(Pictures(), tmp_path / "cache", progress=False)
    assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())
    assert modes == [module.training for module in tower.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_smaller_on_disk_comes_back_in_the_dtype_of_the_trunk(tmp_path: Path) -> None:
    tower, dataset = locked(), Pictures(4)
    whole = cache_features(tower, dataset, tmp_path / "whole", progress=False)
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        small = cache_features(tower, dataset, folder, dtype=dtype, progress=False)
        features, _ = small.take(torch.arange(4))
        assert features.dtype == torch.float32
        assert torch.equal(features, whole.take(torch.arange(4))[0].to(dtype).float())
        assert np.load(folder / "features.npy").itemsize == 2
        forward_from_cache(tower, features)
        cache_features(tower, dataset, folder, dtype=dtype, progress=False)  # and it is not taken for stale


# --- a data set


def test_data_loaders_give_what_batches_give(tmp_path: Path) -> None:
    cached = locked().cache_features(Pictures(), tmp_path / "cache", progress=False)
    for workers in (0, 1):
        loader = DataLoader(cached, 4, num_workers=workers)
        for (features, labels), (same, same_labels) in zip(loader, cached.batches(4), strict=True):
            assert torch.equal(features, same)
            assert torch.equal(labels, same_labels)
    shuffled = torch.cat([labels for _, labels in cached.batches(4, shuffle=True, generator=torch.Generator())])
    assert len(shuffled) == 10
    assert sorted(shuffled.tolist()) == sorted(index % 5 for index in range(10))
    assert [len(labels) for _, labels in cached.batches(4, drop_last=True)] == [4, 4]
    again = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 1000
    assert torch.equal(again[3][0], cached[3][0])


def test_changing_a_batch_in_place_changes_no_later_epoch(tmp_path: Path) -> None:
    cached = cache_features(locked(), Pictures(4), tmp_path / "cache", progress=False)
    before = cached.take(torch.arange(4))[0]
    for features, labels in [cached[0], next(cached.batches(4)), *cached.__getitems__([1, 2])]:
        features.zero_(), labels.zero_()
    assert torch.equal(before, cached.take(torch.arange(4))[0])
    assert before.abs().sum() > 0


def test_tables_of_datasets_and_tensors(tmp_path: Path) -> None:
    tower, pictures = locked(), Pictures(4)
    items = [pictures[index] for index in range(4)]
    table = datasets.Dataset.from_dict(
        {"img": [image for image, _ in items], "fine": [label for _, label in items]},
        features=datasets.Features({"img": datasets.Image(), "fine": datasets.Value("int64")}),
    )
    with pytest.raises(ArgumentError, match=r"no image, label, it has img, fine"):
        tower.cache_features(table, tmp_path / "table")
    of_table = tower.cache_features(table, tmp_path / "table", columns=("img", "fine"), progress=False)
    ready = TensorDataset(inputs_of(tower, pictures), torch.eye(4))
    of_tensors = tower.cache_features(ready, tmp_path / "tensors", progress=False)
    assert torch.equal(of_table.take(torch.arange(4))[0], of_tensors.take(torch.arange(4))[0])
    assert torch.equal(of_tensors.take(torch.arange(4))[1], torch.eye(4))
    other = table.add_column("extra", [0] * 4)  # another table to `datasets`, though its images are the same
    with pytest.raises(FolderError, match="dataset fingerprint"):
        tower.cache_features(other, tmp_path / "table", columns=("img", "fine"))


# --- augmentation


def test_repeats_store_versions_that_come_again_after_a_stop(tmp_path: Path) -> None:
    tower, dataset = locked(), Pictures(5)
    arguments = {"repeats": 3, "transform": tower.transform(is_training=True), "batch_size": 4, "progress": False}
    cached = tower.cache_features(dataset, tmp_path / "cache", **arguments)
    assert (len(cached), cached.images, cached.repeats) == (15, 5, 3)
    versions = [torch.cat([features for features, _ in cached.batches(5, version=v)]) for v in range(3)]
    assert not any(torch.equal(versions[0][i], versions[v][i]) for i in range(5) for v in (1, 2))
    assert [label for _, labels in cached.batches(5, version=2) for label in labels.tolist()] == [0, 1, 2, 3, 4]
    shutil.copytree(tmp_path / "cache", tmp_path / "cut")
    (tmp_path / "cut" / "progress.json").write_text('{"rows": 8}')
    array = np.lib.format.open_memmap(tmp_path / "cut" / "features.npy", mode="r+")
    array[8:] = np.nan
    array.flush()
    torch.manual_seed(1)  # what is drawn hangs on the row, not on what was drawn before
    arguments["num_workers"] = 1
    again = tower.cache_features(dataset, tmp_path / "cut", **arguments)
    assert torch.equal(again.take(torch.arange(15))[0], cached.take(torch.arange(15))[0])


def test_random_transforms_and_repeats_go_together_or_not_at_all(tmp_path: Path) -> None:
    tower = locked()
    with pytest.raises(ArgumentError, match="random: repeats=1 would train on one random version"):
        cache_features(tower, Pictures(), tmp_path / "cache", transform=tower.transform(is_training=True))
    with pytest.raises(ArgumentError, match="repeats=2, but the transform is not random"):
        cache_features(tower, Pictures(), tmp_path / "cache", repeats=2)
    assert not (tmp_path / "cache").exists()


# --- refusals


def test_what_would_make_features_stale_is_refused_by_name(tmp_path: Path) -> None:
    tower, dataset, folder = locked(), Pictures(), tmp_path / "cache"
    cached = tower.cache_features(dataset, folder, progress=False)
    held = cached.take(torch.arange(10))[0]

    def refused(match: str, tower: TimmModel = tower, dataset: Any = dataset, **arguments: Any) -> None:
        with pytest.raises(FolderError, match=match):
            tower.cache_features(dataset, folder, progress=False, **arguments)
        assert torch.equal(held, CachedFeatures(folder).take(torch.arange(10))[0])

    other = locked()
    with torch.no_grad():
        other.trunk.blocks[0].mlp.fc1.bias[0] += 1e-6
    refused("stale(.|\n)*trunk weights: .* then, .* now", other)
    refused("pool: 'avg' then, 'token' now", locked(pool="token"))
    other = locked()
    other.config.preprocess = {**other.config.preprocess, "mean": [0.5, 0.5, 0.4]}
    refused("transform: .* then", other)
    refused("dataset length: 10 then, 11 now", dataset=Pictures(11))
    refused("sampled inputs: ", dataset=Pictures(10, seed=1))
    refused("transform: ", transform=_Halved(tower.transform()))
    refused("features: .*float16", dtype=torch.float16)
    other = locked()
    other.trunk.norm.eps = 0.3  # no weight, no config: only what comes out tells
    refused("the trunk with the same weights now gives other features", other)

    tower.head.proj.weight.data.add_(1)  # the head may change, and be another
    tower.cache_features(dataset, folder, progress=False)
    locked(proj="mlp").cache_features(dataset, folder, progress=False)


class _Halved:
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image) / 2


def test_a_trunk_that_trains_is_refused(tmp_path: Path) -> None:
    tower = TimmModel("test_resnet", 6)
    with pytest.raises(ConfigError, match=r"not frozen, \d+ of its parameters train"):
        cache_features(tower, Pictures(), tmp_path)
    tower.lock(1)
    with pytest.raises(ConfigError, match="not frozen"):
        cache_features(tower, Pictures(), tmp_path)
    tower.lock()
    with pytest.raises(ConfigError, match=r"running statistics of \d+ modules \(conv1\.1, "):
        cache_features(tower, Pictures(), tmp_path)
    prompt = nn.Parameter(torch.zeros(1))
    tower.lock(freeze_bn_stats=True)
    handle = tower.trunk.layer1.register_forward_hook(lambda module, inputs, output: output + prompt)
    with pytest.raises(ConfigError, match="something else in it trains"):
        cache_features(tower, Pictures(), tmp_path)
    handle.remove()
    cache_features(tower, Pictures(4), tmp_path, progress=False)


class Normalised(TimmModel):
    """A forward that is more than trunk and head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(x))


def test_a_forward_that_is_more_than_trunk_and_head_is_refused(tmp_path: Path) -> None:
    tower = Normalised("test_vit", 6)
    tower.lock()
    with pytest.raises(ConfigError, match="the forward of Normalised is more than its head"):
        cache_features(tower, Pictures(), tmp_path)


def test_folders_and_files_that_are_not_a_cache_are_refused(tmp_path: Path) -> None:
    tower, dataset = locked(), Pictures(4)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match=r"not empty either \(thesis.tex"):
        cache_features(tower, dataset, tmp_path)
    with pytest.raises(FolderError, match="there is no feature cache"):
        CachedFeatures(tmp_path)
    folder = tmp_path / "cache"
    cache_features(tower, dataset, folder, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    os.truncate(folder / "features.npy", os.path.getsize(folder / "features.npy") - 1)
    with pytest.raises(FormatError, match=r"features.npy: cannot be mapped"):
        CachedFeatures(folder)
    with pytest.raises(FormatError, match=r"features.npy: cannot be mapped"):
        cache_features(tower, dataset, folder)
    for damage, match in (({"store_version": 99}, "version 99"), ({"rows": "4"}, "not the manifest")):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **damage}))
        with pytest.raises(FormatError, match=match):
            CachedFeatures(folder)
    with pytest.raises(ArgumentError, match=r"dataset\[0\]: expected a number or a tensor as its label, found 'cat'"):
        cache_features(tower, [(dataset[0][0], "cat")], tmp_path / "other")


def forged(made_of: Any = None, **edit: Any) -> Any:
    """manifest -> the same with these entries, and these in what it was made of."""
    return lambda found: {**found, **edit, "made_of": {**found["made_of"], **(made_of or {})}}


FORGED = {
    "no version of an image": forged({"repeats": 0}),
    "versions below 0": forged({"repeats": -1}),
    "versions that do not divide": forged({"repeats": 3}),
    "versions as text": forged({"repeats": "1"}),
    "versions as truth": forged({"repeats": True}),
    "dtype of nothing": forged({"features dtype": "torch.nope"}),
    "dtype is a function": forged({"features dtype": "torch.load"}),
    "dtype of whole numbers": forged({"features dtype": "torch.int8"}),
    "dtype is a list": forged({"features dtype": ["torch.float32"]}),
    "rows huge": forged(rows=10**400),
    "rows true": forged(rows=True),
    "rows none": forged(rows=0),
    "shape of truth": forged(features={"shape": [True], "dtype": "torch.float32", "axes": [0]}),
    "features of whole numbers": forged(features={"shape": [64], "dtype": "torch.int32", "axes": [0]}),
    "column is a list": forged(labels=[1, 2]),
    "a list": lambda found: [found],
    "made of nothing": lambda found: {**found, "made_of": None},
}


def test_forged_manifests_progress_and_tables_are_refused_in_words(tmp_path: Path) -> None:
    folder, dataset = tmp_path / "cache", Pictures(4)
    cache_features(locked(), dataset, folder, progress=False)
    whole = (folder / "manifest.json").read_text()
    for name, forge in FORGED.items():
        (folder / "manifest.json").write_text(json.dumps(forge(json.loads(whole))))
        with pytest.raises(FormatError, match=r"manifest\.json: (not the manifest|holds)|features\.npy: "):
            raise AssertionError(f"{name}: {CachedFeatures(folder)}")
    (folder / "manifest.json").write_text(whole + " " * 2**20)
    with pytest.raises(FormatError, match="at most"):
        CachedFeatures(folder)
    (folder / "manifest.json").write_text(whole)
    for rows in ("9" * 5000, "9" * 4000, "5", "-4", "4.0", '"\\u001b[2J"', "null", "4, }"):
        (folder / "progress.json").write_text(f'{{"rows": {rows}}}')
        with pytest.raises(FormatError, match=r"expected a number|not JSON|5 rows written, of 4") as caught:
            CachedFeatures(folder)
        assert str(caught.value).isprintable()
    (folder / "progress.json").write_text('{"rows": 4}')
    table = (folder / "features.npy").read_bytes()
    for header in (b"(" * 100, b"{'descr': [", b"{'descr': 3, 'shape': (4,), 'fortran_order': 0}", b"{'descr': '|O'}"):
        (folder / "features.npy").write_bytes(table[:10] + header.ljust(118) + table[128:])
        with pytest.raises(FormatError, match=r"features\.npy: "):
            CachedFeatures(folder)
    (folder / "features.npy").unlink()
    os.mkfifo(folder / "features.npy")
    with pytest.raises(FormatError, match="no regular file"):
        CachedFeatures(folder)


def test_deeper_images_are_clipped_with_the_same_warning_as_elsewhere(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((170, 170), 999, np.uint16))
    with pytest.warns(UserWarning, match="clips"):
        cache_features(locked(), [(deep, 0), (deep, 1)], tmp_path / "cache", progress=False)


# --- a kill


def noise() -> TensorDataset:
    return TensorDataset(torch.randn(24, 3, 160, 160, generator=torch.Generator().manual_seed(0)), torch.arange(24))


SLOW = """
    import sys, time, torch
    from hf_timm_tower import TimmModel
    from hf_timm_tower.training import feature_store
    from hf_timm_tower.training.feature_cache import cache_features

    torch.set_num_threads(1)
    feature_store.SECONDS_BETWEEN_SYNCS = 0.0
    images = torch.randn(24, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    tower = TimmModel("test_resnet", 6)
    tower.lock(freeze_bn_stats=True)
    tower.trunk.register_forward_pre_hook(lambda module, inputs: time.sleep(0.3))
    dataset = torch.utils.data.TensorDataset(images, torch.arange(24))
    cache_features(tower, dataset, sys.argv[1], batch_size=4, progress=False)
"""


def _rows(process: Any, progress: Path) -> Iterator[int]:
    while process.poll() is None:
        yield json.loads(progress.read_bytes())["rows"] if progress.exists() else 0
        time.sleep(0.02)


def test_a_killed_run_goes_on_behind_its_last_whole_batch(tmp_path: Path) -> None:
    script, folder = tmp_path / "slow.py", tmp_path / "killed"
    script.write_text(textwrap.dedent(SLOW))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen([sys.executable, str(script), str(folder)], env=environment) as process:
        for rows in _rows(process, folder / "progress.json"):
            if rows >= 8:  # two batches
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
    done = json.loads((folder / "progress.json").read_text())["rows"]
    assert 8 <= done < 24
    assert done % 4 == 0
    with pytest.raises(FolderError, match=f"has {done} of 24 rows"):
        CachedFeatures(folder)
    ran = []
    tower = locked("test_resnet")
    tower.trunk.register_forward_pre_hook(lambda module, inputs: ran.append(len(inputs[0])))
    cached = cache_features(tower, noise(), tmp_path / "whole", batch_size=4, progress=False)
    at_once = sum(ran)
    ran.clear()
    resumed = cache_features(tower, noise(), folder, batch_size=4, progress=False)
    assert sum(ran) == at_once - done
    assert torch.equal(resumed.take(torch.arange(24))[0], cached.take(torch.arange(24))[0])
    assert resumed.take(torch.arange(24))[1].tolist() == list(range(24))


# --- the document


def test_the_python_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/finetuning.md: block {number}", "exec"), names)
    assert len(names["several"]) == 4 * len(names["dataset"])


def test_the_earlier_import_paths() -> None:
    from hf_timm_tower import ConfigError, feature_cache, unfreezing
    from hf_timm_tower.core import errors
    from hf_timm_tower.training.unfreeze_schedule import UnfreezeSchedule

    assert feature_cache.cache_features is cache_features
    assert feature_cache.CachedFeatures is CachedFeatures
    assert unfreezing.UnfreezeSchedule is UnfreezeSchedule
    assert errors.ConfigError is ConfigError

"""`tower.embed`: every way in gives the same bits, in the order given, and the tower stays as it was."""

import copy
import io
import os
import random
import signal
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.nn as nn
import webdataset
from PIL import Image

from hf_timm_tower import ArgumentError, FolderError, TimmModel, TowerError
from hf_timm_tower.embedding.embed import Embedded
from hf_timm_tower.embedding.embedder import Embedder, Outputs
from hf_timm_tower.embedding.engine import BATCH_ON_CPU, make_plan, stream
from hf_timm_tower.embedding.replicas import in_order
from hf_timm_tower.embedding.sources import in_batches, open_source

COUNT = 11


class ManyOutputs(nn.Module):
    """A head that gives a dict with a tuple in it."""

    def __init__(self, in_features: int, _: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 6)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"embedding": self.linear(x), "pair": (x.mean(1), x.argmax(1))}


class Rows:
    """A dataset with a length and items by number, and no iterator of its own."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.items[row], row % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs of noise, of different sizes, with no loss, in two folders."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    noise = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = noise.integers(0, 256, (60 + 5 * number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if number > 7 else ".") / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[str]:
    return [str(folder / ("more" if number > 7 else ".") / f"{number:02}.png") for number in range(COUNT)]


@pytest.fixture(scope="module")
def tower() -> TimmModel:
    torch.manual_seed(0)
    return TimmModel("test_vit", embed_dim=16).eval()


@pytest.fixture(scope="module")
def expected(tower: TimmModel, paths: list[str]) -> torch.Tensor:
    """What the plain loop gives, in batches of four; the last is filled up."""
    transform = tower.transform()
    pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    pixels = torch.cat([pixels, torch.zeros(-COUNT % 4, *pixels.shape[1:])])
    with torch.no_grad():
        return torch.cat([tower(batch) for batch in pixels.split(4)])[:COUNT]


def embed(tower: TimmModel, images: Any, **options: Any) -> Any:
    return tower.embed(images, **{"num_workers": 0, "progress": False, **options})


def shard_of(paths: list[str], into: Path) -> Path:
    place = into / "shard.tar"
    with tarfile.open(place, "w") as archive:
        for number, path in enumerate(paths):
            archive.add(path, f"{number:04}.png")
            label = tarfile.TarInfo(f"{number:04}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"1"))
    return place


def test_every_way_in_gives_the_bits_of_the_plain_loop(
    tower: TimmModel, folder: Path, paths: list[str], expected: torch.Tensor, tmp_path: Path
) -> None:
    pictures = [Image.open(path) for path in paths]
    encoded = [Path(path).read_bytes() for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    table = datasets.Dataset.from_dict({"label": list(range(COUNT)), "picture": paths}).cast_column(
        "picture", datasets.Image()
    )
    shard = shard_of(paths, tmp_path)
    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False)
    ways: dict[str, Any] = {
        "folder": folder,
        "paths": paths,
        "Path objects": [Path(path) for path in paths],
        "PIL": pictures,
        "bytes": encoded,
        "arrays": arrays,
        "datasets": table,
        "datasets, streamed": table.to_iterable_dataset(),
        "tar shard": shard,
        "webdataset, encoded": pipeline,
        "webdataset, decoded": pipeline.decode("pil").to_tuple("png", "cls"),
        "generator": (path for path in paths),
        "Dataset by number": Rows(pictures),
        "mappings": [{"id": f"row {row}", "image": path} for row, path in enumerate(paths)],
    }
    for way, images in ways.items():
        assert torch.equal(embed(tower, images), expected), way
    # torch resizes tensors, so they are those of the tower's image processor
    assert torch.allclose(embed(tower, tensors), expected, atol=0.05)
    same_size = torch.stack([tensor[:, :60] for tensor in tensors])
    assert torch.equal(embed(tower, same_size), embed(tower, [tensor[:, :60] for tensor in tensors]))


def test_one_image_is_a_batch_of_one(tower: TimmModel, paths: list[str], expected: torch.Tensor) -> None:
    first = paths[0]
    for image in (first, Path(first), Image.open(first), Path(first).read_bytes(), np.asarray(Image.open(first))):
        assert torch.equal(embed(tower, image), expected[:1])


def test_bits_do_not_depend_on_order_neighbours_or_processes(
    tower: TimmModel, paths: list[str], expected: torch.Tensor
) -> None:
    assert torch.equal(tower.embed(paths, progress=False), expected)
    for workers in (1, 3):
        assert torch.equal(embed(tower, paths, num_workers=workers), expected)
    order = torch.randperm(COUNT)
    assert torch.equal(embed(tower, [paths[row] for row in order], num_workers=2), expected[order])
    assert torch.equal(torch.cat([embed(tower, path) for path in paths]), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(embed(tower, paths), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_normalize_dtype_and_batch_size(tower: TimmModel, paths: list[str], expected: torch.Tensor) -> None:
    unit = nn.functional.normalize(expected, dim=-1)
    assert torch.equal(embed(tower, paths, normalize=True), unit)
    assert torch.equal(embed(tower, paths, normalize=True, dtype=torch.float16), unit.half())
    assert torch.allclose(embed(tower, paths, batch_size=7), expected, rtol=1e-4, atol=1e-5)
    half = TimmModel("test_vit", embed_dim=16).to(torch.bfloat16)
    assert embed(half, paths[:2]).dtype == torch.bfloat16
    assert embed(half, paths[:2], dtype=torch.float32).dtype == torch.float32


def test_tuples_dicts_tokens_and_layers(tower: TimmModel, paths: list[str], expected: torch.Tensor) -> None:
    many = TimmModel("test_vit", custom_head=ManyOutputs, pool="avg")
    found = embed(many, paths, num_workers=2)
    assert found["embedding"].shape == (COUNT, 6)
    assert isinstance(found["pair"], tuple)
    assert found["pair"][0].shape == (COUNT,)
    assert found["pair"][1].dtype == torch.int64
    dense = embed(tower, paths, return_tokens=True, layers=[0, 1])
    assert torch.equal(dense["embedding"], expected)
    transform = tower.transform()
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(path)) for path in paths[:4]])
        assert torch.equal(dense["tokens"][:4], tower.forward_features(pixels))
        maps = tower.forward_intermediates(pixels, [0, 1], intermediates_only=True)["image_intermediates"]
    assert len(dense["layers"]) == 2
    assert all(torch.equal(ours[:4], theirs) for ours, theirs in zip(dense["layers"], maps, strict=True))


class OneOutput(nn.Module):
    """A head whose output is what `made` makes of `[B, 6]`."""

    def __init__(self, in_features: int, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.made = nn.Linear(in_features, 6), made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(self.linear(x))


def headed(made: Callable[[torch.Tensor], Any]) -> TimmModel:
    torch.manual_seed(0)
    head = lambda width, _: OneOutput(width, made)  # noqa: E731
    return TimmModel("test_vit", embed_dim=None, custom_head=head).eval()


def test_a_number_for_each_image_is_not_made_a_part_of_its_neighbours(paths: list[str]) -> None:
    scores = headed(lambda y: {"vector": y, "score": y.mean(1)})
    plain, found = embed(scores, paths), embed(scores, paths, normalize=True)
    assert torch.equal(found["score"], plain["score"])
    assert torch.allclose(found["vector"].norm(dim=1), torch.ones(COUNT))


def test_two_outputs_of_one_name_are_refused(paths: list[str]) -> None:
    with pytest.raises(TowerError, match=r"two tensors at a\.b"):
        embed(headed(lambda y: {"a.b": y, "a": {"b": 2 * y}}), paths)


def test_an_embedding_that_half_precision_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    pixels = torch.zeros(5, 3, 32, 32)
    pixels[3] = torch.rand(3, 32, 32)
    plain = headed(lambda y: y)
    far = (embed(plain, pixels) - embed(plain, pixels[:1])).abs().amax(1)
    assert far[3] > 0
    zero = embed(plain, pixels[:1])[0]
    shouting = headed(lambda y: (y - zero) * 1e6)
    found = embed(shouting, pixels, dtype=torch.float16, errors="collect", batch_size=2)
    assert found.rows == [0, 1, 2, 4]
    assert [(each.index, "too large for dtype=torch.float16" in each.reason) for each in found.failures] == [(3, True)]
    assert found.embeddings.isfinite().all()
    with pytest.raises(ArgumentError, match=r"images\[3\]: its embedding has a number that is too large"):
        embed(shouting, pixels, dtype=torch.float16)
    assert embed(shouting, pixels).abs().max() > 65504
    stored = shouting.embed_to(pixels, tmp_path / "emb", num_workers=0, dtype=torch.float16, progress=False)
    assert (stored.load()[0], len(stored.failures)) == (["0", "1", "2", "4"], 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_pil_images_that_read_a_broken_file_late_cost_their_rows(
    tower: TimmModel, paths: list[str], tmp_path: Path, workers: int
) -> None:
    Image.open(paths[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    lazy = [Image.open(tmp_path / "cut.jpg") if place == 5 else Image.open(path) for place, path in enumerate(paths)]
    found = embed(tower, lazy, errors="collect", num_workers=workers)
    assert [failure.index for failure in found.failures] == [5]
    assert found.failures[0].reason.startswith("the image cannot be read: 'image file is truncated")
    assert len(found.ids) == COUNT - 1


class TwoArguments(Exception):
    """As many write them: it cannot be made again from what it says."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def refuse(kind: Callable[[], Exception], first: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def made(y: torch.Tensor) -> torch.Tensor:
        if first:
            raise kind()
        return y

    return made


def test_an_error_of_a_head_is_told_whatever_its_class(paths: list[str]) -> None:
    class Local(Exception):
        pass

    for kind in (lambda: TwoArguments("this", "that"), lambda: Local("this and that")):
        armed: list[int] = []
        broken = headed(refuse(kind, armed))
        armed.append(1)
        with pytest.raises(TowerError, match=r"(TwoArguments|Local): this and that"):
            embed(broken, paths, num_workers=2)


def test_paths_in_an_array_or_a_column(tower: TimmModel, paths: list[str], expected: torch.Tensor) -> None:
    assert torch.equal(embed(tower, np.array(paths), batch_size=4), expected)
    table = datasets.Dataset.from_dict({"where": paths})
    assert torch.equal(embed(tower, table, column="where", batch_size=4), expected)
    rows = datasets.IterableDataset.from_generator(lambda: ({"picture": Image.open(path)} for path in paths))
    assert rows.features is None
    assert torch.equal(embed(tower, rows, column="picture", batch_size=4), expected)
    with pytest.raises(ArgumentError, match=r"no column 'image', there are \['picture'\]"):
        embed(tower, rows, column="image")


def test_the_tower_and_all_random_generators_stay_as_they_are(paths: list[str]) -> None:
    tower = TimmModel("test_resnet", embed_dim=8, drop=0.5, proj="mlp").train()
    tower.trunk.layer1.eval()
    tower.lock(unlocked_groups=1)
    modes = [module.training for module in tower.modules()]
    grads = [parameter.requires_grad for parameter in tower.parameters()]
    places = [parameter.data_ptr() for parameter in tower.parameters()]
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for workers in (0, 2):
        assert not embed(tower, paths, num_workers=workers).requires_grad
    assert [module.training for module in tower.modules()] == modes
    assert [parameter.requires_grad for parameter in tower.parameters()] == grads
    assert [parameter.data_ptr() for parameter in tower.parameters()] == places
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert (np.random.get_state()[1] == draws[2]).all()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_costs_one_row(
    tower: TimmModel, paths: list[str], expected: torch.Tensor, workers: int, tmp_path: Path
) -> None:
    images = [*paths[:2], tmp_path / "gone.png", *paths[2:5], b"no image", *paths[5:]]
    found = embed(tower, images, errors="collect", num_workers=workers)
    assert isinstance(found, Embedded)
    assert torch.equal(found.embeddings, expected)
    assert found.rows == [0, 1, 3, 4, 5, *range(7, COUNT + 2)]
    assert found.ids == paths
    assert [(failure.index, failure.reason) for failure in found.failures] == [
        (2, "No such file or directory"),
        (6, "not an image file that Pillow knows"),
    ]
    with pytest.raises(ArgumentError, match=r"images\[2\] \(.*gone.png\): No such file.*errors='collect'"):
        embed(tower, images, num_workers=workers)
    nothing = embed(tower, [b"", b""], errors="collect", num_workers=workers)
    assert nothing.embeddings is None
    assert len(nothing.failures) == 2


def test_images_are_upright_whatever_they_come_as(tower: TimmModel, tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    upright = Image.fromarray(pixels)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    for kind in ("png", "tiff", "webp"):
        place = tmp_path / f"turned.{kind}"
        turned.save(place, exif=exif, **({"lossless": True} if kind == "webp" else {}))
        expected = embed(tower, upright)
        for image in (place, place.read_bytes(), Image.open(place), Image.open(place).convert("RGB")):
            assert torch.equal(embed(tower, image), expected), kind
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "turned.png")]}).cast_column("image", datasets.Image())
    assert torch.equal(embed(tower, [row["image"] for row in table]), expected)


def test_wrong_arguments_say_so(tower: TimmModel, paths: list[str], tmp_path: Path) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (paths, {"batch_size": 0}, "batch_size=0"),
        (paths, {"num_workers": -1}, "num_workers=-1"),
        (paths, {"dtype": torch.int8}, "dtype=torch.int8"),
        (paths, {"errors": "ignore"}, "errors='ignore'"),
        (paths, {"device": "nowhere"}, "device='nowhere'"),
        (paths, {"layers": 3}, "layers=3: expected a list of whole numbers"),
        (paths, {"layers": ["a"]}, "expected a list of whole numbers"),
        (paths, {"layers": [99]}, r"layers=\[99\]: feature index 99 is out of range"),
        ([], {}, "there are none"),
        (3, {}, "a int is neither"),
        ([{"text": "a cat"}], {}, r"images\[0\] has no image, it has \['text'\]"),
        (datasets.DatasetDict({}), {}, "choose a split"),
        (datasets.Dataset.from_dict({"a": [1]}), {}, "0 columns of images"),
    ]
    for images, options, words in wrong:
        with pytest.raises(ArgumentError, match=words):
            embed(tower, images, **options)
    with pytest.raises(FolderError, match="no such file or folder"):
        embed(tower, tmp_path / "nowhere")


class Killer(nn.Module):
    """A head that kills its process: once, until the file is there, or every time."""

    def __init__(self, marker: str | None) -> None:
        super().__init__()
        self.marker, self.parent = marker, os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.parent and not (self.marker and os.path.exists(self.marker)):
            if self.marker:
                Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def test_a_process_that_dies_is_replaced_and_one_that_dies_again_ends_the_run(paths: list[str], tmp_path: Path) -> None:
    others = psutil.Process().children()
    tower = TimmModel("test_resnet", pool="avg", proj="none")
    expected = embed(tower, paths)
    tower.head = Killer(str(tmp_path / "killed"))
    assert torch.equal(embed(tower, paths, num_workers=2), expected)
    assert (tmp_path / "killed").exists()
    tower.head = Killer(None)
    with pytest.raises(TowerError, match=r"ended by signal SIGKILL, twice, .*00\.png"):
        embed(tower, paths, num_workers=1)
    with pytest.raises(TowerError, match=r"while it worked on '0, 1, 2, 3, 4, 5, 6, 7'\. Perhaps one of these"):
        embed(tower, torch.zeros(9, 3, 8, 8), num_workers=1)
    assert set(psutil.Process().children()) <= set(others)


def test_a_result_that_cannot_be_sent_says_so() -> None:
    with pytest.raises(TowerError, match=r"a result cannot be sent between processes: .*/dev/shm"):
        list(in_order(lambda task: lambda: task, iter([1, 2, 3]), 2))


def test_processes_that_only_prepare_give_the_same_bits(
    tower: TimmModel, paths: list[str], expected: torch.Tensor
) -> None:
    # what an accelerator gets, with the CPU in its place
    embedder = Embedder(tower, Outputs(batch_size=4))
    tasks = in_batches(iter([(path, path) for path in paths]), 4)
    blocks = [embedder.run(prepared) for prepared in in_order(embedder.prepare, tasks, 2)]
    assert torch.equal(torch.cat([block.values[""] for block in blocks]), expected)


def test_it_works_after_torch_has_used_many_threads_and_within_a_pools_worker(
    fresh_process: Callable[..., str], paths: list[str], folder: Path
) -> None:
    printed = fresh_process(
        """
        import multiprocessing, sys, torch
        from hf_timm_tower import TimmModel
        torch.set_num_threads(4)
        torch.manual_seed(0)
        tower = TimmModel("test_resnet", embed_dim=8).eval()
        tower(torch.randn(8, 3, 160, 160)).sum().backward()
        (torch.randn(300, 300) @ torch.randn(300, 300)).sum()
        here = tower.embed(sys.argv[1], num_workers=0, progress=False)
        print(torch.equal(tower.embed(sys.argv[1], num_workers=3, progress=False), here))
        def embed(_):
            return tower.embed(sys.argv[1], progress=False).numpy()
        with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (1,)) as pool:
            print((pool.map(embed, [0])[0] == here.detach().numpy()).all())
        """,
        folder,
        env={"OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None, "OPENBLAS_NUM_THREADS": None},
        timeout=200,
    )
    assert printed.split() == ["True", "True"]


@pytest.mark.slow
def test_spawned_processes_give_the_same_bits(fresh_process: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys, torch
            from hf_timm_tower import TimmModel

            if __name__ == "__main__":
                multiprocessing.set_start_method("spawn")
                tower = TimmModel("test_resnet", embed_dim=8)
                here = tower.embed(sys.argv[1], num_workers=0, progress=False)
                print(torch.equal(tower.embed(sys.argv[1], num_workers=2, progress=False), here))
            """
        )
    )
    assert fresh_process(script, folder).split() == ["True"]
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys, torch.nn as nn
            from hf_timm_tower import TimmModel, TowerError

            def main():
                class Local(nn.Linear):
                    pass

                multiprocessing.set_start_method("spawn", force=True)
                for head in (None, Local):
                    tower = TimmModel("test_resnet", embed_dim=8, custom_head=head)
                    try:
                        tower.embed(sys.argv[1], num_workers=2, progress=False)
                    except TowerError as error:
                        print(error)

            if multiprocessing.parent_process() is None or sys.argv[2] == "unguarded":
                main()
            """
        )
    )
    assert "the tower cannot be sent to another process: " in fresh_process(script, folder, "guarded")
    assert 'the script lacks `if __name__ == "__main__":`' in fresh_process(script, folder, "unguarded")


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the head fails")


def test_an_error_of_the_tower_is_raised_and_leaves_no_process(paths: list[str]) -> None:
    others = psutil.Process().children()
    tower = TimmModel("test_resnet", pool="avg", proj="none")
    tower.head = Failing()
    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="the head fails"):
            embed(tower, paths, num_workers=workers)
    assert set(psutil.Process().children()) <= set(others)


def test_no_more_than_a_few_batches_are_taken_ahead(tower: TimmModel, paths: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield paths[taken % COUNT]

    blocks = stream(make_plan(tower, num_workers=2), open_source(endless()))
    for _ in range(5):
        next(blocks)
    blocks.close()
    assert taken <= (5 + 2 * 2 * 4) * BATCH_ON_CPU


class WeightPages(nn.Module):
    """A head that gives how many bytes of the mapped weights its process has in memory, and of these for itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = resident = 0
        for mapping in psutil.Process().memory_maps(grouped=False):
            if mapping.path.endswith("trunk.safetensors"):
                own, resident = own + mapping.private_dirty, resident + mapping.rss
        return torch.tensor([[os.getpid(), resident, own]], dtype=torch.float64).expand(len(x), 3)


def test_replicas_share_the_pages_of_the_weights(tmp_path: Path, paths: list[str]) -> None:
    TimmModel("vit_tiny_patch16_224", embed_dim=16).save_pretrained(tmp_path)
    tower = TimmModel.from_pretrained(tmp_path)
    tower.head = WeightPages()
    found = embed(tower, paths, num_workers=2)
    assert os.getpid() not in found[:, 0]
    assert len(found[:, 0].unique()) == 2
    size = (tmp_path / "trunk.safetensors").stat().st_size
    assert (found[:, 1] > 0.9 * size).all(), "they are in memory"
    assert (found[:, 2] < 0.01 * size).all(), "and no process has a copy"


def test_what_cannot_be_sent_to_a_process_costs_its_row_and_what_can_has_the_same_bits(
    tower: TimmModel, paths: list[str], expected: torch.Tensor
) -> None:
    def turned(path: str, stored: int, now: int | None) -> Image.Image:
        data, exif = io.BytesIO(), Image.Exif()
        exif[274] = stored
        Image.open(path).save(data, "PNG", exif=exif)
        image = Image.open(data)
        if now is None:
            del image.getexif()[274]
        else:
            image.getexif()[274] = now
        return image

    pixels = [torch.from_numpy(np.array(Image.open(path))).float().permute(2, 0, 1) / 255 for path in paths]
    for images in (
        [memoryview(Path(path).read_bytes()) for path in paths],
        [image.requires_grad_() * 1 for image in pixels],
        [turned(path, 6, None) for path in paths],
        [turned(path, 1, 6) for path in paths],
    ):
        here, there = (embed(tower, images, num_workers=number) for number in (0, 2))
        assert torch.equal(here, there)
    assert torch.equal(embed(tower, [turned(path, 6, None) for path in paths], num_workers=2), expected)
    with open(paths[0], "rb") as file:
        found = embed(tower, [*paths, file, lambda: None], num_workers=2, errors="collect")
    assert [failure.reason.partition(":")[0] for failure in found.failures] == ["a BufferedReader", "a function"]
    whole = torch.rand(COUNT, 3, 40, 40)
    embed(tower, list(whole), num_workers=2)
    assert not whole.is_shared()


def test_a_stream_that_inherits_a_length_without_having_one(
    tower: TimmModel, paths: list[str], expected: torch.Tensor
) -> None:
    class Stream(torch.utils.data.IterableDataset[str]):
        def __iter__(self) -> Iterator[str]:
            return iter(paths)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert torch.equal(embed(tower, loader), expected)


def test_threads_that_embed_with_one_tower_in_training_do_not_see_each_other(paths: list[str]) -> None:
    torch.manual_seed(0)
    tower = TimmModel("test_resnet", embed_dim=8).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    images = paths * 3
    expected = embed(tower, images, num_workers=0)
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda number: embed(tower, images, num_workers=number), (0, 0, 2)))
        assert all(torch.equal(each, expected) for each in found)
        assert all(part.training for part in tower.modules())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


@pytest.mark.parametrize(("architecture", "channels"), [("test_resnet", 1), ("test_vit", -1)])
def test_the_vectors_of_a_map_are_those_of_its_places(paths: list[str], architecture: str, channels: int) -> None:
    tower = TimmModel(architecture, embed_dim=8).eval()
    found = embed(tower, paths[:2], normalize=True, return_tokens=True, layers=[0])
    for values, dim in ((found["embedding"], -1), (found["tokens"], channels), (found["layers"][0], 1)):
        lengths = values.norm(dim=dim)
        assert torch.allclose(lengths[lengths > 0], torch.ones(()))


def test_a_tower_without_weights_says_so(tower: TimmModel, paths: list[str]) -> None:
    for model, device in ((tower, "meta"), (copy.deepcopy(tower).to("meta"), None)):
        with pytest.raises(ArgumentError, match="meta device has no weights"):
            embed(model, paths, device=device)


@pytest.mark.parametrize("form", [None, "torch", "numpy", "arrow", "polars"])
def test_a_table_may_have_any_format_and_a_column_is_images(
    tower: TimmModel, paths: list[str], expected: torch.Tensor, form: str | None
) -> None:
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    stream = table.to_iterable_dataset()
    for images in (table.with_format(form), stream.with_format(form), table["image"], stream["image"]):
        assert torch.equal(embed(tower, images, num_workers=0), expected)

"""Files as they lie in folders: each is embedded as timm's transform would have it, or listed with a reason."""

import os
import random
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_timm_tower import TimmModel
from hf_timm_tower.embedding.open_image import Preparer, reason_of


@pytest.fixture(scope="module")
def tower() -> TimmModel:
    torch.manual_seed(0)
    return TimmModel("test_resnet", embed_dim=8).eval()


def picture(mode: str = "RGB") -> Image.Image:
    """Stripes, noise and a gradient, 50 x 70."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    noise[:20] = 200
    noise[:, :10, 1] = np.arange(70)[:, None]
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


GOOD: dict[str, Callable[[], bytes]] = {
    "jpeg.jpg": lambda: encoded(picture(), "JPEG"),
    "upper.JPEG": lambda: encoded(picture(), "JPEG"),
    "progressive.jpg": lambda: encoded(picture(), "JPEG", progressive=True),
    "cmyk.jpg": lambda: encoded(picture("CMYK"), "JPEG"),
    "grey.jpg": lambda: encoded(picture("L"), "JPEG"),
    "palette.png": lambda: encoded(picture("P"), "PNG"),
    "palette_transparent.png": lambda: encoded(picture("P"), "PNG", transparency=3),
    "rgba.png": lambda: encoded(picture("RGBA"), "PNG"),
    "grey_alpha.png": lambda: encoded(picture("LA"), "PNG"),
    "one_bit.png": lambda: encoded(picture("1"), "PNG"),
    "sixteen_bit.png": lambda: encoded(Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(70, 50)), "PNG"),
    "float.tiff": lambda: encoded(Image.fromarray(np.linspace(0, 300, 3500, dtype=np.float32).reshape(70, 50)), "TIFF"),
    "lab.tiff": lambda: encoded(picture("LAB"), "TIFF"),
    "animated.gif": lambda: encoded(
        picture("P"), "GIF", save_all=True, append_images=[picture("P").rotate(90), picture("P").rotate(180)]
    ),
    "animated.webp": lambda: encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]),
    "bitmap.bmp": lambda: encoded(picture(), "BMP"),
    "turned.jpg": lambda: encoded(picture(), "JPEG", exif=orientation(6)),
    "mirrored.png": lambda: encoded(picture(), "PNG", exif=orientation(5)),
    "odd_orientation.jpg": lambda: encoded(picture(), "JPEG", exif=orientation(77)),
    "broken_exif.jpg": lambda: encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"),
    "a png named.jpg": lambda: encoded(picture(), "PNG"),
    "line\nfeed.png": lambda: encoded(picture(), "PNG"),
    "one_pixel.png": lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
}
BAD: dict[str, tuple[bytes, str]] = {
    "zero.jpg": (b"", "an empty file, of 0 bytes"),
    "text.png": (b"a text, not an image", "not an image file"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image file"),
    "cut.jpg": (encoded(picture(), "JPEG")[:1500], "truncated"),
    "cut.png": (encoded(picture(), "PNG")[:400], ""),
    "no_pixels.png": (png_of_size(50, 50), ""),
    "bomb.png": (png_of_size(30_000, 30_000), "decompression bomb"),
    "wide.png": (encoded(Image.new("L", (30_000, 1)), "PNG"), "too unequal"),
}


@pytest.mark.filterwarnings("ignore:an image of mode")
@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_every_kind_of_file_is_embedded_as_timm_would_or_listed(tower: TimmModel, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, make in GOOD.items():
        (folder / name).write_bytes(make())
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in BAD.items()}
    sub = folder / "folder.jpg"  # a folder that is named like an image
    sub.mkdir()
    (sub / "inside.png").write_bytes(GOOD["bitmap.bmp"]())
    (sub / "back").symlink_to(folder, target_is_directory=True)
    (folder / "again").symlink_to(sub, target_is_directory=True)  # comes first; each folder is visited once
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(GOOD["bitmap.bmp"]())
    reasons |= {"loop.png": "symbolic links", "dangling.png": "No such file", "pipe.png": "not a regular file"}
    if os.geteuid():
        (folder / "secret.png").write_bytes(GOOD["bitmap.bmp"]())
        (folder / "secret.png").chmod(0)
        (folder / "locked").mkdir(mode=0)
        reasons |= {"secret.png": "Permission denied", "locked/": "Permission denied"}

    found = tower.embed(folder, num_workers=2, errors="collect", progress=False)

    assert {failure.id for failure in found.failures} == set(reasons)
    for failure in found.failures:
        assert reasons[failure.id] in failure.reason, failure
        assert "\n" not in failure.reason
    assert set(found.ids) == {*GOOD, "again/inside.png", "caf\\xe9.png"}
    assert len(found.ids) == len(set(found.ids))
    transform = tower.transform()
    for name, row in zip(found.ids, found.embeddings, strict=True):
        data = GOOD.get(name, GOOD["bitmap.bmp"])()
        expected = tower.embed(transform_input(data), num_workers=0, progress=False)[0]
        assert torch.equal(row, expected), name
        with torch.no_grad():
            plain = tower(transform(transform_input(data))[None])[0]
        assert torch.allclose(row, plain, atol=1e-5), name


def transform_input(data: bytes) -> Image.Image:
    """What the documentation says goes into `tower.transform()`."""
    return ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_timms_pixels_or_one_line(tower: TimmModel) -> None:
    prepare, transform, draw = Preparer(tower.config), tower.transform(), random.Random(0)
    originals = [make() for name, make in GOOD.items() if name not in ("line\nfeed.png", "upper.JPEG")]
    refused = 0
    for number in range(270):
        data = bytearray(originals[number % len(originals)])
        if number % 3:
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            del data[draw.randrange(len(data)) :]
        try:
            expected = transform(transform_input(bytes(data)))
        except Exception as error:  # whatever Pillow raises
            expected = error
        try:
            found = prepare(bytes(data))
        except Exception as error:
            assert isinstance(expected, Exception), (number, error)
            refused += 1
            assert 0 < len(reason_of(error)) <= 300
            assert "\n" not in reason_of(error)
        else:
            assert not isinstance(expected, Exception), (number, expected)
            assert torch.equal(found, expected), number
    assert 20 < refused < 250


def write_shard(place: Path) -> None:
    with tarfile.open(place, "w") as archive:
        for number in range(3):
            data = encoded(picture(), "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


def test_a_list_of_shards_is_their_images(tower: TimmModel, tmp_path: Path) -> None:
    shards = [tmp_path / name for name in ("b.tar", "a.tar")]
    for shard in shards:
        write_shard(shard)
    found = tower.embed([*shards, tmp_path / "c.tar"], num_workers=0, errors="collect", progress=False)
    assert found.ids == [f"{tmp_path}/{name}.tar/{number}.png" for name in "ba" for number in range(3)]
    assert [failure.id for failure in found.failures] == [f"{tmp_path}/c.tar"]


def test_shards_of_one_name_in_two_folders_give_different_ids(
    tower: TimmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = ["00.tar", "more/00.tar"]
    Path("more").mkdir()
    for shard in shards:
        write_shard(Path(shard))
    ids = tower.embed(shards, num_workers=0, errors="collect", progress=False).ids
    assert ids == [f"{shard}/{number}.png" for shard in shards for number in range(3)]


def test_a_shard_that_breaks_off_is_listed_and_what_comes_before_is_embedded(tower: TimmModel, tmp_path: Path) -> None:
    place = tmp_path / "shard.tar"
    write_shard(place)
    place.write_bytes(place.read_bytes()[: 2 * 512 + len(encoded(picture(), "PNG")) + 2000])
    found = tower.embed(tmp_path, num_workers=0, errors="collect", progress=False)
    assert found.ids[0] == "shard.tar/0.png"
    assert found.failures
    assert found.failures[-1].id.startswith("shard.tar")


@pytest.mark.parametrize("damage", ["cut", "cut within", "other bytes", "zeros"])
def test_a_shard_with_a_damaged_header_is_listed(tower: TimmModel, tmp_path: Path, damage: str) -> None:
    place = tmp_path / "shard.tar"
    write_shard(place)
    with tarfile.open(place) as archive:
        header = archive.getmembers()[1].offset
    content = bytearray(place.read_bytes())
    if damage.startswith("cut"):
        del content[header + (100 if damage == "cut within" else 0) :]
    else:
        content[header : header + 512] = (b"?" if damage == "other bytes" else b"\0") * 512
    place.write_bytes(content)
    found = tower.embed(place, num_workers=0, errors="collect", progress=False)
    assert found.ids == ["shard.tar/0.png"]
    assert [failure.id for failure in found.failures] == ["shard.tar"]
    assert "cannot be read to its end" in found.failures[0].reason


def test_a_file_that_vanishes_is_listed(tower: TimmModel, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(GOOD["bitmap.bmp"]())

    def while_they_vanish() -> object:
        for path in paths:
            yield path
            if path == paths[1]:
                paths[1].unlink()

    found = tower.embed(while_they_vanish(), num_workers=0, errors="collect", progress=False)
    assert [failure.id for failure in found.failures] == [str(paths[1])]


def test_a_deep_image_is_clipped_with_a_warning(tower: TimmModel) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = tower.embed(
            [encoded(Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), "PNG")], num_workers=0, progress=False
        )
    assert found.shape == (1, 8)
    assert any("clips what is not from 0 to 255" in str(each.message) for each in seen)

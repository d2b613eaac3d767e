"""What the app shows: maps inside an image, a plane, near duplicates, outliers, and only files of the set."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA

from hf_timm_tower import ArgumentError, FolderError, TimmModel
from hf_timm_tower.embedding.explore import (
    PatchView,
    near_duplicates,
    outliers,
    pixels_of,
    plane,
    plane_picture,
    principal_axes,
)
from hf_timm_tower.embedding.neighbours import unit_rows
from hf_timm_tower.embedding.search import embed_query, nearest
from hf_timm_tower.embedding.shown_set import ShownSet
from hf_timm_tower.embedding.stored import StoredEmbeddings


def noise(number: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tower() -> TimmModel:
    torch.manual_seed(0)
    return TimmModel("test_vit", embed_dim=8, image_size=64).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images, of which `copy.png` is the same as `0.png`."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        noise(number).save(folder / f"{number}.png")
    noise(0).save(folder / "copy.png")
    Image.new("RGB", (60, 80), "red").save(folder / "more" / "red.png")
    return folder


@pytest.fixture
def shown(tower: TimmModel, photos: Path, tmp_path: Path) -> ShownSet:
    return ShownSet(tower, tower.embed_to(photos, tmp_path / "photos.emb", num_workers=0, progress=False))


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext"])
def test_the_view_is_what_reaches_the_trunk_and_the_map_is_the_trunks(architecture: str) -> None:
    tower = TimmModel(architecture, embed_dim=8, image_size=64).eval()
    image = noise(1, (70, 100))
    patches = PatchView(tower, image)
    config = tower.config.preprocess
    pixels = tower.transform()(image)
    expected = pixels * torch.tensor(config["std"])[:, None, None] + torch.tensor(config["mean"])[:, None, None]
    small = np.asarray(patches.view.resize((64, 64), Image.Resampling.BOX), np.float32) / 255
    assert np.abs(small.transpose(2, 0, 1) - expected.numpy()).mean() < 0.06, "the same picture, enlarged"
    with torch.no_grad():
        features = tower.trunk.forward_intermediates(pixels[None], indices=[-1], norm=True, intermediates_only=True)[0]
    assert torch.equal(patches.features, features[0])
    assert patches.components().size == patches.similarity_picture(5, 5).size == patches.view.size


def test_similarity_is_the_cosine_with_the_place_that_was_clicked(tower: TimmModel) -> None:
    patches = PatchView(tower, noise(1))
    _, height, width = patches.features.shape
    x, y = patches.view.width - 1, patches.view.height // 2
    found = patches.similarity(x, y)
    assert found.shape == (height, width)
    place = patches.features[:, height // 2, width - 1]
    assert torch.allclose(found, F.cosine_similarity(patches.features, place[:, None, None], dim=0), atol=1e-6)
    assert found.argmax() == height // 2 * width + width - 1
    for outside in ((-1, 0), (0, patches.view.height)):
        with pytest.raises(ArgumentError, match="lies outside the picture"):
            patches.similarity(*outside)


def test_the_main_directions_are_those_of_sklearns_pca() -> None:
    rows = torch.randn(200, 6) * torch.tensor([5.0, 1, 3, 1, 0.5, 2])
    peer = PCA(3).fit(rows.double().numpy()).components_
    assert np.allclose(np.abs(np.sum(peer * principal_axes(rows, 3).double().numpy().T, axis=1)), 1, atol=1e-5)
    points = plane(rows)
    assert points.min() == 0
    assert points.max() == 1
    assert torch.equal(points, plane(rows)), "no randomness, signs fixed"
    with pytest.raises(ArgumentError, match="'pca' or 'umap'"):
        plane(rows, "tsne")  # type: ignore[arg-type]


@pytest.mark.slow
def test_umap_lays_classes_apart_and_the_same_way_twice() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed (extra umap)")
    torch.manual_seed(0)
    centres = torch.eye(3, 16).repeat_interleave(30, 0)
    rows = unit_rows("rows", centres + 0.05 * torch.randn(90, 16))
    points = plane(rows, "umap")
    assert points.shape == (90, 2)
    assert points.amin() == 0
    assert points.amax() == 1
    nearest = torch.cdist(points, points).topk(6, largest=False).indices[:, 1:] // 30
    assert (nearest == torch.arange(90)[:, None] // 30).all(), "neighbours are of the same class"
    assert torch.get_num_threads() == 1, "numba leaves the number for torch as it was"
    assert torch.equal(plane(rows, "umap"), points)
    assert plane(rows[::25], "umap").shape == (4, 2)
    with pytest.raises(ArgumentError, match="umap needs 4 images or more, there are 3"):
        plane(rows[:3], "umap")


def test_every_point_is_on_the_map_and_tiles_lie_over_their_own() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.2]])
    picture = plane_picture(points, {1: Image.new("RGB", (30, 30), "red")}, size=300)
    places = pixels_of(points, 300).tolist()
    assert [picture.getpixel(tuple(place)) for place in places] == [(150,) * 3, (255, 0, 0), (150,) * 3]


def test_near_duplicates_are_all_pairs_in_order() -> None:
    rows = unit_rows("rows", torch.randn(40, 3))
    cosines = (rows @ rows.T).numpy()
    expected = sorted(((i, j) for i in range(40) for j in range(i + 1, 40) if cosines[i, j] >= 0.9),
                      key=lambda pair: -cosines[pair])  # fmt: skip
    found = near_duplicates(rows, least=0.9, most=1000)
    assert len(expected) > 10
    assert [(one, other) for one, other, _ in found] == expected
    assert near_duplicates(rows, least=0.9, most=5) == found[:5]
    assert near_duplicates(rows[:1]) == []


def test_the_outlier_is_the_row_far_from_all_others() -> None:
    rows = torch.randn(30, 8) * 0.1 + torch.eye(8)[0]
    rows[17] = -torch.eye(8)[0]
    found = outliers(unit_rows("rows", rows), k=5, most=3)
    assert found[0][0] == 17
    assert found[0][1] < 0 < found[1][1]
    assert len(found) == 3


def test_neighbours_come_with_their_pictures(shown: ShownSet) -> None:
    found = shown.neighbours(noise(0), 3)
    assert {caption for _, caption in found[:2]} == {"1.0000 0.png", "1.0000 copy.png"}
    assert len(found) == 3
    assert found[0][0].getpixel((96, 96)) == found[1][0].getpixel((96, 96))
    row = shown.index.ids.index("more/red.png")
    picture, caption = shown.neighbours_of(row, 99)[0]
    assert caption == "1.0000 more/red.png"
    assert picture.getpixel((96, 96)) == (255, 0, 0)
    pairs = shown.duplicates(0.9999)
    assert [caption for _, caption in pairs[:2]] == ["1.0000 0.png", "1.0000 copy.png"]
    assert len(shown.outliers()) == len(shown) == 8


def test_a_click_on_the_map_finds_the_image_there(shown: ShownSet) -> None:
    picture = shown.map_picture("pca")
    for row, (x, y) in enumerate(pixels_of(plane(shown.index.rows), picture.width).tolist()):
        found = shown.row_at("pca", x, y)
        assert torch.equal(shown.index.rows[found], shown.index.rows[row]), "itself, or its copy"


def test_a_file_that_is_another_now_is_grey(shown: ShownSet, photos: Path) -> None:
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for content in (bomb, b"", b"qoif" + bytes([0, 0, 0, 9, 0, 0, 0, 9, 3, 0, 200])):
        (photos / "0.png").write_bytes(content)
        assert shown.picture(shown.index.ids.index("0.png")).getpixel((96, 96)) == (211, 211, 211)


def test_only_files_of_the_set_are_opened(tower: TimmModel, photos: Path, tmp_path: Path) -> None:
    stored = tower.embed_to(photos, tmp_path / "photos.emb", num_workers=0, progress=False)
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "secret.png")
    shown = ShownSet(tower, stored)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "more/../../secret.png", "missing.png", "more"):
        shown.index.ids[0] = name
        assert shown.path_of(0) is None, name
        assert shown.picture(0).getpixel((96, 96)) == (211, 211, 211)
    for row in (-1, 8):
        with pytest.raises(ArgumentError, match="there are 8 images"):
            shown.path_of(row)


def test_images_that_have_moved_are_found_where_they_are_said_to_be(
    tower: TimmModel, photos: Path, tmp_path: Path
) -> None:
    tower.embed_to(photos, tmp_path / "photos.emb", num_workers=0, progress=False)
    photos.rename(tmp_path / "elsewhere")
    stored = StoredEmbeddings(tmp_path / "photos.emb")
    assert ShownSet(tower, stored).path_of(0) is None
    assert ShownSet(tower, stored, tmp_path / "elsewhere").path_of(0) == str(tmp_path / "elsewhere" / "0.png")


def test_another_towers_embeddings_are_refused(shown: ShownSet) -> None:
    torch.manual_seed(1)
    with pytest.raises(FolderError, match="other weights"):
        ShownSet(TimmModel("test_vit", embed_dim=8, image_size=64).eval(), shown.stored)


def test_what_another_machine_has_embedded_is_searched_and_shown(shown: ShownSet, photos: Path) -> None:
    place = shown.stored.path / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["outputs"] = dict.fromkeys(manifest["outputs"], "0" * 64)  # other last bits of the same tower
    place.write_text(json.dumps(manifest))
    stored = StoredEmbeddings(shown.stored.path)
    assert ShownSet(shown.tower, stored).neighbours(noise(0), 1)[0][1] == "1.0000 0.png"
    assert nearest(stored, embed_query(shown.tower, stored, photos / "3.png"), 1)[0][0] == "3.png"
    with pytest.raises(FolderError, match="other outputs"):
        shown.tower.embed_to(photos, stored.path, num_workers=0, progress=False)

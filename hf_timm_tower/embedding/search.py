"""Exact search in a folder of embeddings, shard by shard, and a picture of what was found."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..reader.errors import ArgumentError, shown
from .engine import Plan, stream
from .manifest import check_same, describe, outputs_of
from .neighbours import unit_rows
from .open_image import read_image
from .sources import open_source
from .stored import StoredEmbeddings

_TILE, _GAP, _CAPTION = 192, 8, 20


def embed_query(tower: Any, stored: StoredEmbeddings, image: Any) -> torch.Tensor:
    """An image -> its embedding `[embed_dim]`, as those of the folder were made.

    Raises:
        FolderError: the folder was made by another tower.
        ArgumentError: the image cannot be used, or it is a folder.
    """
    return query_vector(plan_of(tower, stored), stored, image)


def query_vector(plan: Plan, stored: StoredEmbeddings, image: Any) -> torch.Tensor:
    """As `embed_query`, where the plan is there already."""
    source = open_source(image)
    if source.length != 1:
        raise ArgumentError(f"{shown(str(image))}: a {source.kind}, expected one image")
    block = next(stream(plan, source))
    if block.failures:
        raise ArgumentError(f"{shown(str(image))}: {block.failures[0].reason}")
    return block.values[stored.first_column if stored.first_column in block.values else ""][0]


def plan_of(tower: Any, stored: StoredEmbeddings) -> Plan:
    """How further images become comparable with those of a folder.

    Weights, preprocessing and options must be the folder's. The outputs may differ from it in their last bits: what a
    cluster has embedded is searched on a laptop.

    Raises:
        FolderError: the folder was made by another tower.
    """
    plan = Plan(tower, outputs_of(stored.manifest), 0)
    now = describe(tower, plan.outputs, 0, {})
    check_same(stored.path, stored.manifest, {**now, "outputs": stored.manifest.get("outputs")})
    return plan


def nearest(stored: StoredEmbeddings, query: torch.Tensor, k: int) -> list[tuple[str, float]]:
    """The k ids with the largest cosine to the query `[embed_dim]`, largest first; equal ones in the folder's order.

    Raises:
        ArgumentError: `k` is not positive, or what is stored are no vectors of finite numbers.
    """
    if k < 1:
        raise ArgumentError(f"k={k}: expected a whole number from 1 on")
    best: list[tuple[str, float]] = []
    vector = unit_rows("query", query[None])[0]
    for shard, (ids, values) in zip(stored.shards, stored.batches(), strict=True):
        cosines = unit_rows(str(shard.path), values) @ vector
        top = cosines.topk(min(k, len(ids)))
        here = [(ids[place], cosine) for cosine, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        best = sorted([*best, *here], key=lambda pair: -pair[1])[:k]
    return best


def contact_sheet(
    query: str | os.PathLike[str], neighbours: Sequence[tuple[str | os.PathLike[str], str]], out: str | os.PathLike[str]
) -> None:
    """Write one picture: the query, framed, then its neighbours, in rows of six; what cannot be opened is left grey.

    Args:
        query: Its file.
        neighbours: File and caption of each.
        out: Where to.

    Raises:
        ArgumentError: `out` has no extension of a picture.
    """
    tiles = [(query, "query"), *neighbours]
    columns = min(len(tiles), 6)
    rows = -(-len(tiles) // columns)
    step, high = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (path, caption) in enumerate(tiles):
        left, top = _GAP + place % columns * step, _GAP + place // columns * high
        sheet.paste(tile(path), (left, top))
        while font.getlength(caption) > _TILE:
            caption = f"{caption.removesuffix('…')[:-1]}…"
        draw.text((left, top + _TILE + 2), caption, "black", font)
    draw.rectangle((_GAP // 2, _GAP // 2, _GAP + _TILE + 3, _GAP + _TILE + 3), outline="black", width=2)
    try:
        sheet.save(out)
    except ValueError as error:
        raise ArgumentError(f"{out}: {error}; give a .png or .jpg") from error


def tile(path: str | os.PathLike[str]) -> Image.Image:
    """A small square picture of a file; grey where it cannot be opened."""
    try:
        image = ImageOps.exif_transpose(read_image(path)).convert("RGB")
    except Exception:  # whatever a decoder raises for a file that is another than when it was embedded
        return Image.new("RGB", (_TILE, _TILE), "lightgrey")
    return ImageOps.pad(image, (_TILE, _TILE), color="white")

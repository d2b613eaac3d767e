"""The contact sheet: queries and their nearest neighbours, marked right or wrong."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

RIGHT, WRONG, INK, PAPER, SOFT = "#1a8f3c", "#d1242f", "#1f2328", "#ffffff", "#656d76"
TILE, GAP, FRAME, LABEL, MARGIN = 84, 10, 4, 18, 28


@dataclass(frozen=True)
class Tile:
    """A picture with a line under it; `right` is None for a query, which has no frame."""

    image: Image.Image
    label: str
    right: bool | None = None


@dataclass(frozen=True)
class Block:
    """A title, a line that explains it, and rows of tiles; the first of a row is the query."""

    title: str
    note: str
    rows: list[list[Tile]]


def draw_sheet(columns: list[list[Block]], path: Path) -> None:
    """Write blocks as one PNG: columns side by side, the blocks of a column below each other."""
    sizes = [[_size(block) for block in blocks] for blocks in columns]
    width = sum(max(w for w, _ in column) for column in sizes) + MARGIN * (len(columns) + 1)
    height = max(sum(h + MARGIN for _, h in column) for column in sizes) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    left = MARGIN
    for blocks, column in zip(columns, sizes, strict=True):
        top = MARGIN
        for block, (_, block_height) in zip(blocks, column, strict=True):
            _draw_block(sheet, block, left, top)
            top += block_height + MARGIN
        left += max(w for w, _ in column) + MARGIN
    sheet.save(path, optimize=True)


HEADER = 54
QUERY_GAP = 18


def _size(block: Block) -> tuple[int, int]:
    longest = max((len(row) for row in block.rows), default=0)
    text = max(_font(20).getlength(block.title), _font(13).getlength(block.note))
    return max(longest * (TILE + GAP) + QUERY_GAP, int(text) + 1), HEADER + len(block.rows) * (TILE + LABEL + GAP)


def _draw_block(sheet: Image.Image, block: Block, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((left, top), block.title, INK, _font(20))
    draw.text((left, top + 27), block.note, SOFT, _font(13))
    for line, row in enumerate(block.rows):
        y = top + HEADER + line * (TILE + LABEL + GAP)
        for place, tile in enumerate(row):
            x = left + place * (TILE + GAP) + (QUERY_GAP if place else 0)
            _draw_tile(sheet, tile, x, y)
        middle = left + TILE + (GAP + QUERY_GAP) // 2
        draw.line((middle, y, middle, y + TILE), SOFT, 1)


def _draw_tile(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    colour = INK if tile.right is None else RIGHT if tile.right else WRONG
    # A digit of 8 x 8 pixels stays what it is: no smoothing when made large.
    small = max(tile.image.size) < TILE
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    inner = TILE - 2 * FRAME
    if tile.right is not None:
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), colour)
    sheet.paste(ImageOps.fit(tile.image, (inner, inner), how), (left + FRAME, top + FRAME))
    draw.text((left + TILE // 2, top + TILE + 1), tile.label, colour, _font(13), anchor="ma")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)

"""A table of the `datasets` library as a source: images stay encoded, so that they are decoded where they are used."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from ..reader.errors import ArgumentError, shown


def source_of_table(table: Any, column: str | None) -> tuple[str, int | None, Callable[[], Iterator[dict[str, Any]]]]:
    """A `Dataset` or `IterableDataset` -> (its kind, its length if known, what makes an iterator over its rows).

    Args:
        table: The table.
        column: The column of images; None: the only one of type `Image`.

    Raises:
        ArgumentError: several splits, or no column of images, or more than one.
    """
    if not isinstance(table, (datasets.Dataset, datasets.IterableDataset)):
        raise ArgumentError(f"images: a {type(table).__name__}; choose a split: dataset['train']")
    features = table.features or {}  # a stream may not know them before it runs
    if column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(found) != 1:
            raise ArgumentError(
                f"images: {len(found)} columns of images among {shown(list(features))}; name one: column=..."
            )
        column = found[0]
    elif features and column not in features:
        raise ArgumentError(f"images: no column {column!r}, there are {shown(list(features))}")
    table = table.with_format(None)
    if isinstance(features.get(column), datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    name = column
    length = len(table) if isinstance(table, datasets.Dataset) else None

    def rows() -> Iterator[dict[str, Any]]:
        keys = [name] + [key for key in ("id", "__key__") if key in features and key != name]
        for row in table.select_columns(keys) if features else table:
            if name not in row:
                raise ArgumentError(f"images: no column {name!r}, there are {shown(list(row))}")
            image = row[name]
            if isinstance(image, dict) and set(image) == {"bytes", "path"}:
                image = image["path"] if image["bytes"] is None else image["bytes"]
            if image is None:
                image = ArgumentError("the table has no image in this row")
            yield {"image": image, **{key: row[key] for key in keys[1:]}}

    return type(table).__name__, length, rows

"""Parts that the searches have in common when they print and draw."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.drawing import plural
from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.pictures import read_picture
from siglip_serve_client.commands.search.sheet import Cell, Section, sheet

__all__ = ["cells_of", "metric", "printable", "save_sheet"]


def metric(collection: Collection) -> str:
    """Name the scores of a collection."""
    if collection.kind == "binary":
        return f"share of {collection.width} bits that agree less the share that differs"
    return "cosine"


def printable(name: str) -> str:
    """The id with escapes for letters that the terminal cannot print."""
    encoding = sys.stdout.encoding or "utf-8"
    return name.encode(encoding, "backslashreplace").decode(encoding)


def cells_of(
    collection: Collection,
    rows: Sequence[int],
    scores: Sequence[float] | NDArray[np.float64],
    repeated: Sequence[bool] | NDArray[np.bool_] = (),
) -> list[Cell]:
    """The cells of some rows.

    Args:
        repeated: the file is that of an earlier row.
    """
    names = collection.ids(np.array(rows, np.int64))
    notes = ["same file" if same else "" for same in repeated] or [""] * len(rows)
    return [
        Cell(row, name, f"{score:.4f}", note)
        for row, name, score, note in zip(rows, names, scores, notes, strict=True)
    ]


def save_sheet(
    options: argparse.Namespace, collection: Collection, title: str, sections: Sequence[Section]
) -> None:
    """Draw a sheet into the file of the options, and say so."""
    column = options.column or collection.identity.get("image_column") or "image"
    rows = [cell.row for section in sections for cell in section.cells]
    # In outputs of `embed` the id is all that is known.
    paths = [""] * len(rows)
    if collection.id_column != "path":
        paths = collection.texts("path", np.array(rows, np.int64))
    known = dict(zip(rows, paths, strict=True))

    def read(cell: Cell) -> bytes:
        return read_picture(cell.name, known[cell.row], options.base, column)

    sheet(title, sections, read).save(options.sheet)
    print(f"siglip-serve: {options.sheet}: {plural(len(rows), 'picture')}", file=sys.stderr)

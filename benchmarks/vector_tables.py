"""The tables of `docs/small-vectors.md`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["VECTORS"]

_SMALL = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "int8, float32 query": "int8, float32 query",
    "uint8, less 127": "uint8, less 127",
    "uint8, Euclidean": "uint8, Euclidean distance",
    "uint8, cosine": "uint8, cosine",
    "binary": "binary",
    "binary, rescored": "binary, rescored by the float32 query",
    "binary, rescored with int8": "binary, rescored with int8",
}
_DIRECTIONS = (
    "fit-projection",
    "around 0 instead of the mean",
    "with the mean subtracted",
    "fitted to texts too",
    "random directions",
    "first values",
)


def _recall(kind: str, where: Mapping[str, str] | None = None, heading: str = "") -> Column:
    cell = Cell(f"{{{kind}_recall:.3f}}", where or {})
    return Column(heading or f"{kind} to image", cell)


VECTORS: Mapping[str, Table | Summary] = {
    "small-vectors": Table(
        Source("small_vectors.csv", {"projection": ("", "fit-projection")}),
        (
            Key("dimensions", "dimensions", {"128": "128", "64": "64", "32": "32", "16": "16"}),
            Key("encoding", "encoding", _SMALL),
        ),
        (Column("MB", Cell("{bytes:.0f}", {})), _recall("image"), _recall("text")),
    ),
    "projections": Table(
        Source("small_vectors.csv", {"projection": _DIRECTIONS, "encoding": "float32"}),
        (
            Key(
                "directions",
                "projection",
                {name: f"`{name}`" if "-" in name else name for name in _DIRECTIONS},
            ),
        ),
        tuple(
            _recall(kind, {"dimensions": count}, f"{kind}, {count}")
            for kind in ("image", "text")
            for count in ("64", "32", "16")
        ),
    ),
}

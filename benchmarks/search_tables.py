"""The tables of the search in `docs/bulk.md`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["SEARCH"]

_LISTS = {
    **{f"index, {probes} of 2000 lists": f"{probes} of 2,000" for probes in (16, 32, 64, 128)},
    "Lance IVF-PQ, 50 of 1000 lists, refine 10": "Lance's IVF-PQ, 50 of 1,000, refined 10 times",
    "Lance IVF-PQ, 100 of 1000 lists, refine 50": "Lance's IVF-PQ, 100 of 1,000, refined 50 times",
}
_KINDS = {f"exact, {kind}": kind for kind in ("float32", "float16", "int8", "binary")}


def _column(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}))


SEARCH: Mapping[str, Table | Summary] = {
    "search-exact": Table(
        Source("search.csv", {"search": tuple(_KINDS)}),
        (Key("stored as", "search", _KINDS),),
        (
            _column("MB", "{disk_mb:,.0f}"),
            _column("fastest", "{image_best_ms:.0f}"),
            _column("median", "{image_ms:.0f}"),
            _column("numpy, fastest", "{numpy_best_ms:.0f}"),
            _column("numpy, median", "{numpy_ms:.0f}"),
            _column("first query, s", "{load_s:.1f}"),
            _column("own memory, MB", "{private_mb:.0f}"),
            _column("overlap, images", "{image_overlap:.3f}"),
            _column("overlap, texts", "{text_overlap:.3f}"),
        ),
    ),
    "search-index": Table(
        Source("search.csv", {"search": tuple(_LISTS)}),
        (Key("lists read", "search", _LISTS),),
        (
            _column("fastest", "{image_best_ms:.0f}"),
            _column("median", "{image_ms:.0f}"),
            _column("recall@10, images", "{image_overlap:.3f}"),
            _column("recall@10, texts", "{text_overlap:.3f}"),
            _column("to build, s", "{load_s:.0f}"),
            _column("MB", "{disk_mb:,.0f}"),
        ),
    ),
}

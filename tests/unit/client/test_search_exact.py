"""The exact search: the same rows as a plain comparison of all, in every format and kind of number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_outputs import as_stored, write_bulk
from numpy.typing import NDArray
from siglip_serve_client.commands.search import collection as collections
from siglip_serve_client.commands.search import exact
from siglip_serve_client.commands.search.collection import Collection, open_collection
from siglip_serve_client.commands.search.exact import ExactSearch
from siglip_serve_client.commands.search.kinds import bits_that_differ, kind_of, widened
from siglip_serve_client.commands.search.parts import ArrayPart

NAMES = [f"pictures/{number}.jpg" for number in range(300)]


def vectors(count: int = 300, width: int = 24) -> NDArray[np.float32]:
    generator = np.random.default_rng(3)
    lengths = generator.uniform(0.01, 100, (count, 1))
    return (generator.normal(size=(count, width)) * lengths).astype(np.float32)


def in_memory(rows: NDArray[Any]) -> Collection:
    part = ArrayPart(rows, {"id": NAMES[: len(rows)]})
    return Collection(Path("a"), [part], kind_of(rows.dtype), rows.shape[1], {})


def nearest(rows: NDArray[Any], query: NDArray[np.float32], count: int) -> tuple[list[int], Any]:
    """The rows of the largest cosine in the plain way, in float64."""
    wide = rows.astype(np.float64)
    cosines = wide @ query.astype(np.float64)
    cosines /= np.linalg.norm(wide, axis=1) * np.linalg.norm(query.astype(np.float64))
    order = np.argsort(-cosines, kind="stable")[:count]
    return list(order), cosines[order]


@pytest.mark.parametrize("form", ["parquet", "npy", "lance"])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "binary"])
def test_every_format_and_kind_finds_what_a_plain_comparison_finds(
    tmp_path: Path, form: str, kind: str
) -> None:
    rows = vectors(60, 24)
    found = open_collection(write_bulk(tmp_path / "out", rows, form, kind))
    stored = as_stored(rows, kind)
    wide = stored.astype(np.float64)
    if kind == "int8":
        wide += 0.5
    if kind == "binary":
        wide = np.unpackbits(stored, axis=1) * 2.0 - 1
    for query in vectors(3, 24) + 1:
        compared = np.where(query > 0, 1, -1).astype(np.float32) if kind == "binary" else query
        expected, cosines = nearest(wide, compared, 10)
        hits = ExactSearch(found).search(query, 10)
        assert [hit.index for hit in hits] == expected
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-12)
        ids = found.ids(np.array([hit.index for hit in hits]))
        assert ids == [f"{row}.jpg" for row in expected]


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f8", "<f4"])
def test_floats_of_other_types_are_searched(kind: str) -> None:
    rows = np.asfortranarray(vectors().astype(kind))
    query = vectors()[17]
    hits = ExactSearch(in_memory(rows)).search(query, 5)
    assert [hit.index for hit in hits] == nearest(rows, query, 5)[0]


@pytest.mark.parametrize("block", [24, 24 * 7, 2**22])
@pytest.mark.parametrize("count", [1, 20, 300, 1000])
def test_a_search_finds_the_largest_cosines(monkeypatch: pytest.MonkeyPatch, block: int, count: int) -> None:
    """Blocks of one row, of seven, and of all rows give the same, and so does the second search."""
    monkeypatch.setattr(collections, "_BLOCK", block)
    monkeypatch.setattr(exact, "_MARGIN", 2)
    rows = vectors()
    search = ExactSearch(in_memory(rows))
    for query in vectors(4, 24) + 1:
        expected, cosines = nearest(rows, query, count)
        hits = search.search(query, count)
        assert [hit.index for hit in hits] == expected
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-12)


def test_rows_of_almost_the_same_cosine_are_ordered_exactly() -> None:
    """Their cosines differ by 1e-9, which float32 does not tell apart."""
    angles = 1.0 - np.arange(40) * 1e-9
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    hits = ExactSearch(in_memory(rows)).search(np.array([1, 0], np.float32), 40)
    assert [hit.index for hit in hits] == list(range(39, -1, -1))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_equal_rows_keep_their_order_and_rows_without_a_cosine_are_not_found(kind: Any) -> None:
    rows = np.ones((6, 3), kind)
    rows[1], rows[2, 0], rows[3, 1] = 0, np.inf, np.nan
    hits = ExactSearch(in_memory(rows)).search(np.ones(3, np.float32), 10)
    assert [hit.index for hit in hits] == [0, 4, 5]
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 1])


def test_of_many_rows_with_equal_bits_the_first_are_found() -> None:
    rows = np.full((200, 8), 255, np.uint8)
    rows[150:] = 0
    part = ArrayPart(rows, {"id": NAMES[:200]})
    hits = ExactSearch(Collection(Path("a"), [part], "binary", 64, {})).search(np.ones(64, np.float32), 3)
    assert [(hit.index, hit.score) for hit in hits] == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_very_long_and_very_short_vectors_have_a_cosine() -> None:
    rows = np.array([[1e30, 0], [1e-30, 1e-30], [0, 1e25]], np.float32)
    hits = ExactSearch(in_memory(rows)).search(np.array([1, 0.1], np.float32), 3)
    assert [hit.index for hit in hits] == [0, 1, 2]


def test_float16_is_widened_to_the_same_numbers() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 256)
    finite = np.isfinite(halves)
    wide = widened(halves, "float16", 256)
    np.testing.assert_array_equal(wide[finite], halves.astype(np.float32)[finite])
    assert not (np.abs(wide[~finite]) < 65536).any()


@pytest.mark.parametrize("width", [3, 8, 96, 144])
def test_bits_are_counted(width: int) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, width), np.uint8)
    rows[0], rows[1] = 0, 255
    query = np.zeros(width, np.uint8)
    assert bits_that_differ(rows, query).tolist() == np.unpackbits(rows, axis=1).sum(1).tolist()

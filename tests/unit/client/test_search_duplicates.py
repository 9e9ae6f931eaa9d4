"""Near-duplicates: the groups of a plain comparison of all pairs, whatever the sizes of blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bulk_outputs import as_stored, write_bulk
from numpy.typing import NDArray
from siglip_serve_client.commands.search import collection as collections
from siglip_serve_client.commands.search import duplicates
from siglip_serve_client.commands.search.collection import open_collection
from siglip_serve_client.commands.search.duplicates import near_duplicates, pairs_of
from siglip_serve_client.commands.search.groups import Groups


def close_rows(count: int = 90, width: int = 16) -> NDArray[np.float32]:
    """Rows around 30 centres, so that some of them are near-duplicates."""
    generator = np.random.default_rng(5)
    centres = generator.standard_normal((30, width))
    rows = centres[generator.integers(0, 30, count)] + 0.3 * generator.standard_normal((count, width))
    return (rows * generator.uniform(0.1, 9, (count, 1))).astype(np.float32)


def plain_groups(rows: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """Groups of rows that are connected by pairs, found one row after the other."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near = unit @ unit.T >= threshold - 1e-9
    left, groups = set(range(len(rows))), []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            row = todo.pop()
            if row not in group:
                group.add(row)
                todo += np.flatnonzero(near[row]).tolist()
        left -= group
        groups.append(sorted(group))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("sizes", [(16, 16, (1, 1)), (16 * 7, 16 * 23, (3, 5)), (2**21, 2**25, (1024, 4096))])
def test_groups_are_those_of_a_plain_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, sizes: tuple[int, int, tuple[int, int]]
) -> None:
    monkeypatch.setattr(collections, "_BLOCK", sizes[0])
    monkeypatch.setattr(duplicates, "_HELD", sizes[1])
    monkeypatch.setattr(duplicates, "_TILE", sizes[2])
    rows = close_rows()
    wide = as_stored(rows, kind).astype(np.float64) + 0.5 * (kind == "int8")
    if kind == "binary":
        wide = np.unpackbits(as_stored(rows, kind), axis=1) * 2.0 - 1
    done: list[int] = []
    found = near_duplicates(
        open_collection(write_bulk(tmp_path / "out", rows, "npy", kind)), 0.9, done.append
    )
    assert [group.rows.tolist() for group in found] == plain_groups(wide, 0.9)
    assert len(found) > 2
    assert sum(done) == pairs_of(90)
    for group in found:
        first = wide[group.rows[0]]
        norms = np.linalg.norm(wide[group.rows], axis=1) * np.linalg.norm(first)
        np.testing.assert_allclose(group.scores, wide[group.rows] @ first / norms, atol=1e-6)


@pytest.mark.parametrize("apart", [1, 2, 5])
def test_no_pair_is_lost_at_the_edges_of_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apart: int
) -> None:
    """Each row has one near-duplicate, the same number of rows later, so no other pair joins the two."""
    monkeypatch.setattr(collections, "_BLOCK", 16 * 7)
    monkeypatch.setattr(duplicates, "_HELD", 16 * 23)
    monkeypatch.setattr(duplicates, "_TILE", (3, 5))
    row = np.arange(60)
    first = row[row % (2 * apart) < apart]
    rows = np.random.default_rng(8).standard_normal((60, 16)).astype(np.float32)
    rows[first + apart] = rows[first]
    found = near_duplicates(open_collection(write_bulk(tmp_path / "out", rows, "npy")), 0.999)
    assert [group.rows.tolist() for group in found] == [[one, one + apart] for one in first.tolist()]


def test_the_threshold_is_exact_and_equal_files_are_marked(tmp_path: Path) -> None:
    """Cosines of 1e-7 to both sides of the threshold, which float32 does not tell apart."""
    angles = np.arccos(0.98) + np.array([-1e-6, 1e-6])
    rows = np.zeros((7, 8), np.float32)
    rows[0, 0] = 1
    rows[1:3, 0], rows[1, 1], rows[2, 2] = np.cos(angles), np.sin(angles[0]), np.sin(angles[1])
    rows[3, 4] = rows[4, 4] = 5
    rows[6, 7] = np.nan
    digests = ["a", "b", "c", "d", "d", "e", "e"]
    found = open_collection(write_bulk(tmp_path / "out", rows, digests=digests))
    near, same = (near_duplicates(found, threshold) for threshold in (0.98, 1.0))
    assert [group.rows.tolist() for group in near] == [[0, 1], [3, 4]]
    assert [group.rows.tolist() for group in same] == [[3, 4]]
    assert near[1].repeated.tolist() == [False, True]
    assert near[0].repeated.tolist() == [False, False]


def test_many_equal_rows_are_one_group(tmp_path: Path) -> None:
    rows = np.ones((3000, 8), np.float32)
    found = near_duplicates(open_collection(write_bulk(tmp_path / "out", rows)), 0.999)
    assert [len(group.rows) for group in found] == [3000]


def test_pairs_are_joined_in_any_order() -> None:
    generator = np.random.default_rng(2)
    left, right = generator.integers(0, 400, (2, 200))
    groups = Groups(400)
    for start in range(0, 200, 40):
        groups.join(left[start : start + 40], right[start : start + 40])
    near = np.eye(400)
    near[left, right] = near[right, left] = 1
    reached = np.linalg.matrix_power(near, 64) > 0
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reached}
    assert {tuple(rows.tolist()) for rows in groups.found()} == {rows for rows in expected if len(rows) > 1}

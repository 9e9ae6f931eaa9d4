"""The approximate index: its lists, its recall, and the collection that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bulk_outputs import write_bulk
from numpy.typing import NDArray
from siglip_serve_client.commands.search.build import build_index
from siglip_serve_client.commands.search.collection import CollectionError, open_collection
from siglip_serve_client.commands.search.exact import ExactSearch
from siglip_serve_client.commands.search.lists import index_folder, open_lists


def clustered(count: int = 1500, width: int = 32) -> NDArray[np.float32]:
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((40, width))[generator.integers(0, 40, count)]
    return (rows + 0.7 * generator.standard_normal((count, width))).astype(np.float32)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_all_lists_together_find_what_the_exact_search_finds(tmp_path: Path, kind: str) -> None:
    rows = clustered()
    if kind == "float32":
        rows[3], rows[700] = 0, np.nan
    found = open_collection(write_bulk(tmp_path / "out", rows, kind=kind))
    lists, measured = build_index(found, 1.0)
    opened = open_lists(found)
    assert sorted(opened.rows.tolist()) == [
        row for row in range(1500) if kind == "int8" or row not in (3, 700)
    ]
    exact = ExactSearch(found)
    for row in (5, 50, 500):
        hits, compared = opened.search(rows[row], 10, len(lists.centres))
        expected = exact.search(rows[row], 10)
        assert compared == len(opened.rows)
        assert [hit.index for hit in hits] == [hit.index for hit in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=5e-4)
    assert measured[-1].recall == pytest.approx(1, abs=0.01)


def test_the_measured_recall_is_that_of_an_exact_search(tmp_path: Path) -> None:
    rows = clustered()
    found = open_collection(write_bulk(tmp_path / "out", rows))
    lists, measured = build_index(found, 0.8)
    assert [row.probes for row in measured] == [2**number for number in range(len(measured))]
    assert lists.probes == measured[-1].probes < len(lists.centres)
    assert [row.recall >= 0.8 for row in measured] == [False] * (len(measured) - 1) + [True]
    assert measured[0].compared < measured[-1].compared < 1
    exact = ExactSearch(found)
    for result in measured:
        shares = []
        for row in range(0, 1500, 30):
            near, _ = lists.search(rows[row], 11, result.probes)
            expected = {hit.index for hit in exact.search(rows[row], 11)} - {row}
            shares.append(len(expected & {hit.index for hit in near}) / 10)
        assert np.mean(shares) == pytest.approx(result.recall, abs=0.08)  # other queries than the build's
    assert json.loads((index_folder(found) / "index.json").read_text())["recall_at_10"] >= 0.8


def test_an_index_of_other_rows_is_refused(tmp_path: Path) -> None:
    rows = clustered(1200)
    folder = write_bulk(tmp_path / "out", rows, checkpoint_name="a")
    with pytest.raises(CollectionError, match="there is no index; --build-index builds one"):
        open_lists(open_collection(folder))
    build_index(open_collection(folder), 0.5)
    open_lists(open_collection(folder))
    write_bulk(folder, rows, checkpoint_name="b")
    with pytest.raises(CollectionError, match="has changed since the index was built"):
        open_lists(open_collection(folder))
    write_bulk(folder, rows[:1199], checkpoint_name="a")
    with pytest.raises(CollectionError, match="has changed since the index was built"):
        open_lists(open_collection(folder))
    write_bulk(folder, rows, checkpoint_name="a")
    file = folder / "index" / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CollectionError, match="damaged"):
        open_lists(open_collection(folder))


def test_outputs_that_need_no_index_are_refused(tmp_path: Path) -> None:
    few = open_collection(write_bulk(tmp_path / "few", clustered(999)))
    with pytest.raises(CollectionError, match="999 rows, an index needs at least 1000"):
        build_index(few, 0.9)
    bits = open_collection(write_bulk(tmp_path / "bits", clustered(1200), kind="binary"))
    with pytest.raises(CollectionError, match="has bits, which are searched without an index"):
        build_index(bits, 0.9)
    assert not (tmp_path / "bits" / "index").exists()

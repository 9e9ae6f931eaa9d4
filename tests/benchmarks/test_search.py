"""The vectors and figures of `benchmarks.search`, on small sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from siglip_serve_client.commands.search.collection import open_collection

from benchmarks.search import KINDS, image_queries, make_folder, overlap, text_queries, times, vectors


@pytest.mark.parametrize("kind", KINDS)
def test_folders_hold_the_same_vectors(tmp_path: Path, kind: str) -> None:
    rows = np.concatenate(list(vectors(300, 64)))
    found = open_collection(make_folder(tmp_path / kind, kind, 300, 64))
    stored = found.unit(found.take(np.arange(300)))
    cosines = (stored * rows).sum(1)
    assert (found.kind, found.ids(np.array([299]))) == (kind, ["299.jpg"])
    assert cosines.min() > {"binary": 0.6, "int8": 0.99}.get(kind, 0.9999)


def test_queries_are_near_a_row_or_apart_from_all() -> None:
    rows = np.concatenate(list(vectors(300, 64)))
    pictures, texts = image_queries(rows[:20]), text_queries(rows[:20])
    assert ((pictures @ rows.T).argmax(1) == np.arange(20)).mean() > 0.9
    assert (pictures * rows[:20]).sum(1).mean() > 0.85
    assert np.abs(texts @ rows.T).max() < 0.8


def test_figures_are_those_of_all_queries() -> None:
    assert overlap([[1, 2, 3, 4], [5, 6, 7, 8]], [[4, 3, 9, 9], [8, 7, 6, 5]]) == 0.75
    assert times("text", [3.0, 1.0, 2.04]) == {"text_best_ms": "1.0", "text_ms": "2.0"}

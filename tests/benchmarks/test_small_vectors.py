"""The measurement of small vectors, on vectors whose neighbours are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from siglip_serve_client.compact import unit

from benchmarks import small_vectors
from benchmarks.small_vectors import Vectors, Way, found, recall, ways

WIDTH = 16


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """Images around a mean, in 4 directions that vary much and 12 that vary little. Texts around another."""
    random = np.random.default_rng(5)
    spread = np.array([1.0] * 4 + [0.02] * 12)
    turn = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]

    def drawn(count: int, mean: float) -> NDArray[np.float32]:
        return unit(((random.normal(size=(count, WIDTH)) * spread + mean) @ turn).astype(np.float32))

    return Vectors(drawn(300, 0.3), drawn(300, 0.3), drawn(40, 0.3), drawn(40, -0.2))


def test_recall_is_the_share_of_the_exact_places() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(exact[:, ::-1], exact) == (1.0, 0.0)
    mean, half = recall(np.array([[4, 9, 10, 1], [5, 6, 7, 0]]), exact)
    assert mean == (0.5 + 0.75) / 2
    assert half == pytest.approx(1.96 * 0.125)  # 0.125 is the error of the mean of 0.5 and 0.75


def test_of_equal_distances_the_first_counts() -> None:
    distances = np.array([[3, 1, 1, 0, 1]])
    assert small_vectors.nearest(distances, 3).tolist() == [[3, 1, 2]]


def test_distances_are_those_of_single_vectors(vectors: Vectors) -> None:
    queries, database = vectors.images[:5], vectors.database[:7]
    for row, query in enumerate(queries):
        for column, image in enumerate(database):
            bits = int(((query > 0) != (image > 0)).sum())
            assert small_vectors.by_bits(queries, database)[row, column] == bits
            cosine = float(query.astype(float) @ image.astype(float))
            assert -small_vectors.by_float16(queries, database)[row, column] == pytest.approx(
                cosine, abs=0.002
            )


def test_rescoring_orders_the_candidates_alone(vectors: Vectors) -> None:
    scores = small_vectors.by_bits_rescored(vectors.images, vectors.database)
    candidates = small_vectors.nearest(
        small_vectors.by_bits(vectors.images, vectors.database), small_vectors.CANDIDATES
    )
    for row, chosen in enumerate(candidates):
        assert set(np.flatnonzero(np.isfinite(scores[row]))) == set(chosen)
        place = chosen[3]
        signs = np.where(vectors.database[place] > 0, 1.0, -1.0)
        assert -scores[row, place] == pytest.approx(float(vectors.images[row] @ signs), abs=1e-4)


def test_search_in_blocks_finds_what_one_search_finds(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way("int8", WIDTH, WIDTH, small_vectors.by_int8)
    whole = found(way, vectors.images, vectors.database)
    monkeypatch.setattr(small_vectors, "BLOCK", 7)
    np.testing.assert_array_equal(found(way, vectors.images, vectors.database), whole)


def test_projections_find_the_directions_that_vary(vectors: Vectors) -> None:
    exact = small_vectors.nearest_exact(vectors.images, vectors.database)
    shares = {
        (way.projection, way.dimensions): recall(found(way, vectors.images, vectors.database), exact)[0]
        for way in ways(vectors)
        if way.encoding == "float32"
    }
    assert shares["", WIDTH] == 1.0
    assert shares["fit-projection", 8] > 0.6
    assert shares["fit-projection", 8] > shares["random directions", 8] + 0.1
    assert shares["fit-projection", 8] > shares["fit-projection", 2]


def test_bytes_are_those_of_the_encodings(vectors: Vectors) -> None:
    sizes = {
        (way.encoding, way.dimensions): way.size
        for way in ways(vectors)
        if way.projection in ("", "fit-projection")
    }
    assert sizes["float32", 16] == 64
    assert sizes["float16", 16] == 32
    assert sizes["int8", 8] == 8
    assert sizes["binary", 16] == 2

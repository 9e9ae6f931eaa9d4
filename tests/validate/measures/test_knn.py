from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from siglip_serve.embeddings.zero_shot import top_k
from siglip_serve.errors import InvalidInputError
from validate.measures.knn import knn_scores, text_knn_scores

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_the_nearest_neighbour_decides() -> None:
    gallery, queries = np.array([EAST, NORTH]), np.array([[2.0, 1.0], [1.0, 9.0]])
    scores = knn_scores(gallery, np.array([1, 0]), queries, classes=3, k=1)
    assert scores.tolist() == [[-np.inf, 1.0, -np.inf], [1.0, -np.inf, -np.inf]]


def test_votes_are_weighted_by_inverse_cosine_distance() -> None:
    gallery = np.array([[0.6, 0.8], WEST])  # distances to east: 0.4 and 2
    scores = knn_scores(gallery, np.array([0, 1]), np.array([EAST]), classes=2, k=2)
    assert scores == pytest.approx(np.array([[5 / 6, 1 / 6]]))


def test_one_close_neighbour_beats_two_far_ones() -> None:
    gallery = np.array([[0.9, 0.1], NORTH, NORTH])
    scores = knn_scores(gallery, np.array([0, 1, 1]), np.array([EAST]), classes=2)
    assert scores.argmax() == 0


def test_text_neighbours_rank_as_the_cosines_do() -> None:
    rng = np.random.default_rng(0)
    texts, images = rng.normal(size=(30, 8)), rng.normal(size=(50, 8))
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    cosines = unit @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    assert np.array_equal(top_k(text_knn_scores(texts, images), 5), top_k(cosines, 5))


def test_scores_are_scikit_learns_probabilities() -> None:
    rng = np.random.default_rng(1)
    gallery, labels, queries = rng.normal(size=(60, 4)), rng.integers(0, 5, 60), rng.normal(size=(40, 4))
    queries[0] = gallery[0]
    reference = KNeighborsClassifier(10, metric="cosine", weights="distance").fit(gallery, labels)
    scores = knn_scores(gallery, labels, queries, classes=5)
    assert np.where(np.isneginf(scores), 0, scores) == pytest.approx(reference.predict_proba(queries))


def test_a_neighbour_that_coincides_with_the_query_decides_alone() -> None:
    gallery = np.array([EAST, [1.0, 0.1], [1.0, -0.1]])
    scores = knn_scores(gallery, np.array([0, 1, 1]), np.array([EAST]), classes=2)
    assert scores.tolist() == [[1.0, -np.inf]]


def test_names_wrong_inputs() -> None:
    square, labels = np.eye(2), np.array([0, 1])
    with pytest.raises(InvalidInputError, match="queries: expected shape"):
        knn_scores(square, labels, np.ones((1, 3)), classes=2)
    with pytest.raises(InvalidInputError, match="labels: expected one a gallery row"):
        knn_scores(square, labels[:1], square, classes=2)
    with pytest.raises(InvalidInputError, match="labels: expected 0 to 0, got 0 to 1"):
        knn_scores(square, labels, square, classes=1)
    with pytest.raises(InvalidInputError, match="k: expected at least 1, got 0"):
        knn_scores(square, labels, square, classes=2, k=0)

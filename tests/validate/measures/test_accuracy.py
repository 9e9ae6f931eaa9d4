from __future__ import annotations

import numpy as np
import pytest

from siglip_serve.errors import InvalidInputError
from validate.measures.accuracy import (
    Accuracy,
    Confusion,
    confusion_pairs,
    cosine_statistics,
    top_k_accuracy,
    top_k_hits,
    wilson_interval,
)

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
TARGETS = np.array([0, 1, 2])


def test_top_k_hits_count_targets_among_the_k_best() -> None:
    assert top_k_hits(SCORES, TARGETS, 1).tolist() == [True, False, False]
    assert top_k_hits(SCORES, TARGETS, 2).tolist() == [True, True, True]
    assert top_k_hits(SCORES, TARGETS, 5).tolist() == [True, True, True]


def test_accuracy() -> None:
    accuracy = top_k_accuracy(SCORES, TARGETS, 1)
    assert accuracy == Accuracy(1, 3)
    assert accuracy.value == pytest.approx(1 / 3)
    assert accuracy.interval == wilson_interval(1, 3)


def test_class_without_a_vote_is_no_hit() -> None:
    assert top_k_hits(np.array([[0.5, -np.inf]]), np.array([1]), 2).tolist() == [False]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (760, 1000, 0.7326, 0.7854)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_confusion_pairs_most_frequent_first() -> None:
    predicted, targets = np.array([1, 1, 0, 2, -1, 0]), np.array([0, 0, 0, 1, 1, 2])
    assert confusion_pairs(predicted, targets) == [Confusion(0, 1, 2), Confusion(1, 2, 1), Confusion(2, 0, 1)]
    assert confusion_pairs(predicted, targets, limit=1) == [Confusion(0, 1, 2)]


def test_cosine_statistics() -> None:
    statistics = cosine_statistics(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[3.0, 0.0], [0.6, 0.8]]))
    assert statistics.minimum == pytest.approx(0.6)
    assert statistics.mean == pytest.approx(0.8)
    assert statistics.worst_row == 1


def test_wrong_shapes_name_the_input() -> None:
    with pytest.raises(InvalidInputError, match=r"expected one per row of scores \[3, 3\], got \[2\]"):
        top_k_hits(SCORES, TARGETS[:2], 1)
    with pytest.raises(InvalidInputError, match="targets: expected at least one row"):
        top_k_accuracy(np.empty((0, 3)), np.empty(0, np.int64), 1)
    with pytest.raises(InvalidInputError, match=r"correct: expected 0 to total.*got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(InvalidInputError, match="predicted: expected one a target"):
        confusion_pairs(TARGETS[:2], TARGETS)
    with pytest.raises(InvalidInputError, match="second: expected 2 rows"):
        cosine_statistics(np.eye(2), np.ones((1, 2)))


def test_counts_a_target_at_rank_k_and_not_at_the_next() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]] * 7)
    for k in (1, 4, 5, 6):
        assert top_k_hits(scores, np.arange(7), k).tolist() == [rank < k for rank in range(7)]


def test_takes_the_most_opposite_row_as_the_worst() -> None:
    angles = np.arccos([0.1, -0.9, 0.8])
    second = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    statistics = cosine_statistics(np.tile([[2.0, 0.0]], (3, 1)), second)
    assert statistics.worst_row == 1
    assert statistics.minimum == pytest.approx(-0.9)
    assert statistics.mean == pytest.approx(0.0)

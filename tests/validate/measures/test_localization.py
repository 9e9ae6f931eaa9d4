"""Measures of localisation on maps with a known result."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from siglip_serve.errors import InvalidInputError
from validate.measures import localization

MASK = np.array([[True, True, False], [False, False, False]])
RIGHT = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.0]])


def test_average_precision_by_hand() -> None:
    assert localization.average_precision(RIGHT, MASK) == 1
    # The object's pixels come second and fourth: precisions 1/2 and 2/4.
    scores = np.array([[0.8, 0.6, 0.9], [0.7, 0.1, 0.0]])
    assert localization.average_precision(scores, MASK) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert localization.average_precision(-RIGHT, MASK) == pytest.approx((1 / 5 + 2 / 6) / 2)


def test_equal_scores_do_not_depend_on_their_order() -> None:
    flat = np.zeros((2, 3))
    assert localization.average_precision(flat, MASK) == pytest.approx(1 / 3)
    # The first is right, then two are equal and one of them is right: precision 2/3 at both.
    scores = np.array([[0.9, 0.5, 0.5], [0.0, 0.0, 0.0]])
    expected = (1 + 2 / 3) / 2
    assert localization.average_precision(scores, MASK) == pytest.approx(expected)
    assert localization.average_precision(scores[:, [2, 1, 0]], MASK[:, [2, 1, 0]]) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_the_usual_one(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, mask = rng.integers(0, levels, 400) / levels, rng.random(400) < 0.2
    assert localization.average_precision(scores, mask) == pytest.approx(
        average_precision_score(mask, scores), abs=1e-12
    )


def test_two_classes_in_one_ranking() -> None:
    assert localization.two_class_precision(MASK.astype(float), MASK) == 1
    assert localization.two_class_precision(np.full(MASK.shape, 0.5), MASK) == 0.5
    rng = np.random.default_rng(0)
    scores, mask = rng.random(50), rng.random(50) < 0.3
    both = np.stack([1 - scores, scores])
    assert localization.two_class_precision(scores, mask) == pytest.approx(
        average_precision_score(np.stack([~mask, mask]).ravel(), both.ravel()), abs=1e-12
    )


def test_pointing_game() -> None:
    assert localization.pointing_game(RIGHT, MASK) == 1
    assert localization.pointing_game(-RIGHT, MASK) == 0
    assert localization.pointing_game(np.zeros((2, 3)), MASK) == pytest.approx(1 / 3)


def test_mean_iou_by_hand() -> None:
    # Clipped: 0.8 0.4 0 0 0 0. Scaled: 1 0.5 0 0 0 0, with the mean 1/4.
    scores = np.array([[0.8, 0.4, -1.0], [-2.0, 0.0, 0.0]])
    assert localization.foreground(scores).tolist() == MASK.tolist()
    assert localization.mean_iou(scores, MASK) == 1
    # One pixel too many: object 2/3, background 3/4.
    scores = np.array([[0.8, 0.8, 0.8], [0.0, 0.0, 0.0]])
    assert localization.mean_iou(scores, MASK) == pytest.approx((2 / 3 + 3 / 4) / 2)
    # A map without differences finds nothing: object 0/2, background 4/6.
    assert localization.mean_iou(np.ones((2, 3)), MASK) == pytest.approx((0 + 4 / 6) / 2)
    both, either = localization.intersections_and_unions(scores > 0, MASK)
    assert (both.tolist(), either.tolist()) == ([3, 2], [4, 3])


def test_contrast_counts_pairs_and_ignores_what_is_common() -> None:
    masks = np.array([[True, False, False], [False, True, False]])
    maps = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.5]])
    assert localization.pairwise_contrast(maps, masks) == 1
    assert localization.pairwise_contrast(maps[::-1], masks) == 0
    assert localization.pairwise_contrast(np.stack([maps[0], maps[0]]), masks) == 0.5
    # Map B exceeds map A inside A too, so one pair of two is right.
    assert localization.pairwise_contrast(np.array([[0.4, 0.1, 0], [0.6, 0.3, 0]]), masks) == 0.5
    common = np.array([5.0, -3.0, 1.0])
    assert localization.pairwise_contrast(maps + common, masks) == 1


def test_hides_the_highest_places_first() -> None:
    gone = localization.removal_steps(np.array([[1.0, 4.0], [3.0, 2.0]]), 4)
    assert gone.sum(axis=(1, 2)).tolist() == [0, 1, 2, 3, 4]
    assert gone[1].tolist() == [[False, True], [False, False]]
    assert gone[3].tolist() == [[False, True], [True, True]]
    assert localization.removal_steps(np.arange(10.0), 3).sum(axis=1).tolist() == [0, 3, 7, 10]


def test_area_under_a_curve() -> None:
    assert localization.area_under_curve(np.array([1.0, 0.0])) == 0.5
    assert localization.area_under_curve(np.array([1.0, 0.0, 0.0])) == 0.25
    assert localization.area_under_curve(np.array([2.0, 2.0, 2.0, 2.0])) == 2


def test_the_interval_of_a_mean() -> None:
    assert np.allclose(localization.bootstrap_interval(np.full(9, 0.3)), 0.3)
    values = np.append(np.random.default_rng(0).normal(0, 1, 400), np.nan)
    low, high = localization.bootstrap_interval(values)
    # 1.96 standard errors on either side.
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    assert low < np.nanmean(values) < high
    assert np.isnan(localization.bootstrap_interval(np.array([np.nan]))).all()


def test_refuses_inputs_without_an_answer() -> None:
    with pytest.raises(InvalidInputError, match="mask: is empty"):
        localization.average_precision(RIGHT, np.zeros_like(MASK))
    with pytest.raises(InvalidInputError, match=r"mask: expected shape \[2, 3\], got \[3\]"):
        localization.pointing_game(RIGHT, MASK[0])
    with pytest.raises(InvalidInputError, match="not finite"):
        localization.mean_iou(np.full((2, 3), np.nan), MASK)
    with pytest.raises(InvalidInputError, match="expected at least 2 and as many masks"):
        localization.pairwise_contrast(RIGHT[None], MASK[None])
    with pytest.raises(InvalidInputError, match="steps: got 0"):
        localization.removal_steps(RIGHT, 0)
    with pytest.raises(InvalidInputError, match="at least 2, got 1"):
        localization.area_under_curve(np.ones(1))

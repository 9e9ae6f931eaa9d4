from __future__ import annotations

import math

import numpy as np
import pytest

from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.embeddings.zero_shot import (
    Floats,
    build_class_embeddings,
    cosine,
    logits,
    require_matrix,
    sigmoid,
    softmax,
    top_k,
)
from siglip_serve.errors import InvalidInputError

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def test_normalize_keeps_the_direction_and_survives_zero() -> None:
    assert l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_each_template_counts_the_same_whatever_its_length() -> None:
    diagonal = build_class_embeddings(np.array([[[100.0, 0.0], NORTH]]))
    assert diagonal == pytest.approx(np.array([[0.5**0.5, 0.5**0.5]]))


def test_cosine_ignores_length() -> None:
    images = np.array([[5.0, 0.0], [-2.0, 0.0]])
    assert cosine(images, np.array([EAST, NORTH])).tolist() == [[1, 0], [-1, 0]]


def test_pair_probability_is_the_sigmoid_of_the_scaled_cosine() -> None:
    pairs = sigmoid(logits(np.array([[1.0, 0.9]]), logit_scale=np.log(100.0), logit_bias=-100.0))
    assert pairs == pytest.approx(np.array([[0.5, 1 / (1 + np.exp(10))]]))
    assert sigmoid(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_probabilities_keep_their_value_and_order(dtype: type) -> None:
    values: Floats = np.linspace(-69.5, 10, 1000).astype(dtype)  # down to 1e-30
    expected = np.array([1 / (1 + math.exp(-value)) for value in values.astype(float)])
    pairs = sigmoid(values)
    assert pairs.dtype == dtype
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)
    assert (np.diff(pairs[values < -1]) > 0).all()
    competing = softmax(np.append(values, dtype(10)))
    np.testing.assert_allclose(competing[0] / competing[-1], np.exp(values[0] - 10), rtol=1e-4)


def test_softmax_sums_to_one_without_overflow() -> None:
    assert softmax(np.array([[1e4, 1e4], [0.0, np.log(3.0)]])) == pytest.approx(
        np.array([[0.5, 0.5], [0.25, 0.75]])
    )


def test_top_k_breaks_ties_by_column_and_never_takes_minus_infinity() -> None:
    scores = np.array([[0.1, 0.7, 0.7, 0.2], [-np.inf, 0.5, -np.inf, -np.inf]])
    assert top_k(scores, 3).tolist() == [[1, 2, 3], [1, -1, -1]]


def test_wrong_shapes_name_the_input() -> None:
    square = np.eye(2)
    with pytest.raises(
        InvalidInputError, match=r"class_embeddings: expected shape \[rows, 2\], got \[2, 3\]"
    ):
        cosine(square, np.ones((2, 3)))
    with pytest.raises(InvalidInputError, match=r"image_embeddings: expected shape \[rows, n\], got \[2\]"):
        cosine(np.ones(2), square)
    with pytest.raises(InvalidInputError, match="prompt_embeddings: expected shape"):
        build_class_embeddings(np.ones((2, 0, 3)))
    with pytest.raises(InvalidInputError, match="k: expected 1 to 2"):
        top_k(square, 3)
    with pytest.raises(InvalidInputError, match="scores: expected shape"):
        top_k(np.ones(3), 1)
    with pytest.raises(InvalidInputError, match=r"x\[1\]: holds a value that is not finite"):
        require_matrix("x", np.array([[1.0], [np.nan]]))

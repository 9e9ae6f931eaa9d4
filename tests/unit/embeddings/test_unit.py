"""Unit length, whatever the length before."""

from __future__ import annotations

import re

import numpy as np
import pytest

from siglip_serve.embeddings.unit import LARGEST_VALUE, check_values, l2_normalize
from siglip_serve.errors import InvalidInputError


@pytest.mark.parametrize("length", [1e-15, 1e-6, 1, 1e15])
def test_gives_unit_length_to_vectors_of_any_length(length: float) -> None:
    rows = np.array([[3, 4], [0, 0], [-4, 3]], np.float32) * np.float32(length)
    unit = l2_normalize(rows)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, np.array([[0.6, 0.8], [0, 0], [-0.8, 0.6]]), rtol=1e-6)


def test_normalizes_along_the_last_axis() -> None:
    block = np.arange(1, 25, dtype=np.float64).reshape(2, 3, 4)
    np.testing.assert_allclose(np.linalg.norm(l2_normalize(block), axis=-1), np.ones((2, 3)))


@pytest.mark.parametrize(
    "value", [LARGEST_VALUE * 1.001, -LARGEST_VALUE * 1.001, 3e38, np.inf, -np.inf, np.nan]
)
def test_names_the_row_with_a_value_that_would_overflow(value: float) -> None:
    rows = np.ones((3, 4), np.float32)
    rows[2, 1] = value
    with pytest.raises(
        InvalidInputError, match=re.escape(f"x[2]: holds {np.float32(value):g}, expected values")
    ):
        check_values("x", rows)
    with pytest.raises(InvalidInputError, match=r"x\[0, 2\]: holds "):
        check_values("x", rows[None])


def test_accepts_the_largest_values_without_an_infinite_length() -> None:
    rows = np.full((2, 4096), LARGEST_VALUE, np.float32) * np.array([[1], [-1]], np.float32)
    check_values("x", rows)
    check_values("x", rows[:0])
    np.testing.assert_allclose(np.linalg.norm(l2_normalize(rows), axis=1), 1, rtol=1e-5)


def test_leaves_rows_that_are_not_finite_to_the_caller() -> None:
    rows = np.array([[np.nan, 1], [np.inf, 1], [1, 1]], np.float32)
    check_values("x", rows, finite=False)
    rows[0, 1] = -1e38
    with pytest.raises(InvalidInputError, match=r"x\[0\]: holds -1e\+38"):
        check_values("x", rows, finite=False)

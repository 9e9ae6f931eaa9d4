"""Unit length, whatever the length before."""

from __future__ import annotations

import numpy as np
import pytest

from siglip_serve.embeddings.unit import l2_normalize


@pytest.mark.parametrize("length", [1e-15, 1e-6, 1, 1e15])
def test_gives_unit_length_to_vectors_of_any_length(length: float) -> None:
    rows = np.array([[3, 4], [0, 0], [-4, 3]], np.float32) * np.float32(length)
    unit = l2_normalize(rows)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, np.array([[0.6, 0.8], [0, 0], [-0.8, 0.6]]), rtol=1e-6)


def test_normalizes_along_the_last_axis() -> None:
    block = np.arange(1, 25, dtype=np.float64).reshape(2, 3, 4)
    np.testing.assert_allclose(np.linalg.norm(l2_normalize(block), axis=-1), np.ones((2, 3)))

"""Spreads of made-up residuals, whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from siglip_serve.teams.spread import Spread


def test_distances_are_in_units_of_the_spread() -> None:
    spread = Spread(np.eye(2, 3, dtype=np.float32), np.array([1, 2, 4], np.float32))
    rows = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 4], [1, 2, 4]], np.float32)
    centroids = np.array([[0, 0, 0], [3, 0, 0]], np.float32)
    expected = [[0, 3], [1, 2], [1, 10**0.5], [1, 10**0.5], [3**0.5, 6**0.5]]
    assert spread.distances(rows, centroids) == pytest.approx(np.array(expected), rel=1e-6)
    assert spread.outside(np.array([2], np.float32)).tolist() == [0.5]


def test_finds_the_axes_and_their_deviations() -> None:
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    deviations = np.array([0.02, 0.05, 0.1, 0.3])
    residuals = (rng.normal(size=(5000, 4)) * deviations) @ turned.T
    spread = Spread.of(
        residuals.astype(np.float32), np.full(5000, 0.2, np.float32), np.eye(4, dtype=np.float32)
    )
    assert spread.sizes[:-1] == pytest.approx(deviations, rel=0.05)
    assert np.abs(np.diag(spread.axes @ turned)) == pytest.approx(np.ones(4), abs=0.01)
    # Outside of the axes a typical crop lies as far as along all four.
    assert spread.sizes[-1] == pytest.approx(0.1, rel=1e-5)


def test_counts_what_is_not_along_the_basis_as_outside() -> None:
    rng = np.random.default_rng(0)
    residuals = rng.normal(size=(1000, 3)) * (0.1, 0.1, 0.4)
    basis = np.eye(2, 3, dtype=np.float32)
    spread = Spread.of(residuals.astype(np.float32), np.zeros(1000, np.float32), basis)
    assert spread.sizes[-1] == pytest.approx(np.median(np.abs(residuals[:, 2])) / 2**0.5, rel=1e-3)


def test_few_crops_do_not_give_a_direction_without_spread() -> None:
    residuals = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    sizes = Spread.of(residuals, np.ones(5, np.float32), np.eye(8, dtype=np.float32)).sizes
    assert sizes[:-1].max() < 3 * sizes[:-1].min()


def test_equal_crops_have_the_spread_of_rounding() -> None:
    zeros = np.zeros((6, 3), np.float32)
    assert Spread.of(zeros, zeros[:, 0], np.eye(3, dtype=np.float32)).sizes == pytest.approx(
        np.full(4, 0.001)
    )

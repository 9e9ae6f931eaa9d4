"""Spherical k-means of unit vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["centres_of", "nearest_centres"]

Floats = NDArray[np.float32]

_PASSES = 8
_SCORES = 2**22  # of rows with centres at once: 16 MiB


def centres_of(sample: Floats, count: int, seed: int) -> Floats:
    """Find `count` centres of length 1 among unit vectors [S, D], S at least `count`."""
    generator = np.random.default_rng(seed)
    centres = sample[generator.choice(len(sample), count, replace=False)]
    for _ in range(_PASSES):
        owners = nearest_centres(sample, centres)
        order = np.argsort(owners, kind="stable")
        own, starts = np.unique(owners[order], return_index=True)
        sums = np.add.reduceat(sample[order], starts, axis=0)
        centres = sample[generator.choice(len(sample), count, replace=False)]  # where a centre has no rows
        size = np.linalg.norm(sums, axis=1, keepdims=True)
        centres[own] = np.where(size > 0, sums / np.maximum(size, 1e-30), centres[own])
    return centres


def nearest_centres(rows: Floats, centres: Floats) -> NDArray[np.int64]:
    """The centre [N] of the largest product with each row [N, D]."""
    found = np.empty(len(rows), np.int64)
    step = max(1, _SCORES // len(centres))
    for start in range(0, len(rows), step):
        found[start : start + step] = (rows[start : start + step] @ centres.T).argmax(1)
    return found

"""KMeans that ignores the farthest samples, because samples of no team must not form one.

Goalkeepers and referees differ more from both teams than the teams may from each other, so that KMeans cuts
them off and puts all players into the other cluster. Here only a share of the samples, those nearest to their
centroids, counts and moves the centroids. The others get the nearest centroid's label afterwards.

Source: Cuesta-Albertos, Gordaliza and Matran, "Trimmed k-means" (Annals of Statistics 25, 1997).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Clusters", "trimmed_kmeans"]

Rows = NDArray[np.float32]

# A cluster of fewer of the kept samples than this, times a team's fair share, is no team.
_LEAST_SHARE = 0.6
# Starts come from this many clusters more than wanted: choices among five are ten, among eleven too many.
_FINER, _FINER_OF_MANY, _MANY = 3, 1, 4
_MOST_STEPS = 100
_SEED = 0


@dataclass(frozen=True)
class Clusters:
    """Clusters of n samples.

    Attributes:
        labels: int64 [n], 0 to k - 1.
        kept: bool [n], the samples that decided.
    """

    labels: NDArray[np.int64]
    kept: NDArray[np.bool_]


def trimmed_kmeans(
    rows: Rows, k: int, trimmed: float, start: Rows | None = None, thorough: bool = True
) -> Clusters:
    """Find k clusters among n samples, of which some may belong to none.

    Starts are all choices of k among the centroids of plain KMeans with k, k + 1 .. clusters. Of the results
    the one with the smallest sum of squared distances wins, among those in which every cluster is large
    enough if there are any.

    Args:
        rows: [n, d], n at least k.
        k: number of clusters.
        trimmed: share of the samples that is ignored, 0 to 1. A cluster smaller than that may be
            left out as a whole.
        start: centroids [k, d] to start at instead.
        thorough: look for starts in finer clusters too; else in k alone.
    """
    finer = (_FINER if k < _MANY else _FINER_OF_MANY) if thorough else 0
    starts = [start] if start is not None else _starts(rows, k, finer)
    kept = max(math.ceil(len(rows) * (1 - trimmed)), min(2 * k, len(rows)))
    found = [_descend(rows, centroids, kept) for centroids in starts]
    best = min(found, key=lambda one: (one.least < _LEAST_SHARE * kept / k, one.cost))
    if best.least == 0:  # too few samples to leave any out
        best = _descend(rows, _starts(rows, k, 0)[0], len(rows))
    return best.clusters


def _starts(rows: Rows, k: int, finer: int) -> list[Rows]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    starts = []
    for count in range(k, min(k + finer, len(rows)) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than clusters
            centroids = KMeans(count, n_init=3, random_state=_SEED).fit(rows).cluster_centers_
        starts += [centroids[list(chosen)] for chosen in combinations(range(count), k)]
    return starts


@dataclass(frozen=True)
class _Result:
    clusters: Clusters
    cost: float
    least: int  # kept samples of the smallest cluster


def _descend(rows: Rows, centroids: Rows, count: int) -> _Result:
    """Assign, keep the nearest, move the centroids to their means, until nothing changes."""
    k = len(centroids)
    members = np.full(len(rows), -2)
    squares = (rows**2).sum(axis=1)
    for _ in range(_MOST_STEPS):
        distances = squares[:, None] - 2 * rows @ centroids.T + (centroids**2).sum(axis=1)  # [n, k]
        labels = distances.argmin(axis=1)
        nearest = distances[np.arange(len(rows)), labels]
        kept = np.zeros(len(rows), dtype=np.bool_)
        kept[np.argsort(nearest, kind="stable")[:count]] = True
        before, members = members, np.where(kept, labels, -1)
        if (members == before).all():
            break
        centroids = np.stack(
            [
                rows[members == one].mean(axis=0) if (members == one).any() else centroids[one]
                for one in range(k)
            ]
        )
    sizes = np.bincount(labels[kept], minlength=k)
    return _Result(Clusters(labels, kept), float(nearest[kept].sum()), int(sizes.min()))

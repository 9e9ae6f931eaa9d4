"""The spread within teams, and distances in units of it (Mahalanobis distance).

Crops of one team differ much in some directions, such as light, and hardly in others. A crop that lies off in
a direction in which no team varies is of no team, even if it is near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Spread"]

Rows = NDArray[np.float32]

# Unit vectors of one picture differ by the rounding of 16-bit arithmetic, 2e-3 in all directions together.
_LEAST = 0.001


@dataclass(frozen=True)
class Spread:
    """Standard deviations within all teams together.

    Attributes:
        axes: [q, p], orthonormal.
        sizes: [q + 1], the deviation along each axis, and of all that lies outside of the axes. The last is
            such that a typical crop lies as far outside as along all axes together.
    """

    axes: Rows
    sizes: Rows

    @staticmethod
    def of(residuals: Rows, rest: Rows, basis: Rows) -> Spread:
        """The spread of n crops around their centroids.

        Few crops do not tell a covariance, so it is drawn towards equal spreads.
        Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices"
        (Journal of Multivariate Analysis 88, 2004).

        Args:
            residuals: [n, p].
            rest: [n], what is not in the p coordinates.
            basis: [q, p] orthonormal directions in which axes are looked for.
        """
        from sklearn.covariance import ledoit_wolf

        within = residuals @ basis.T
        outside = rest**2 + (residuals**2).sum(axis=1) - (within**2).sum(axis=1)
        covariance, _ = ledoit_wolf(within, assume_centered=True)
        variances, turned = np.linalg.eigh(covariance)
        sizes = np.sqrt(np.maximum([*variances, np.median(outside) / len(basis)], _LEAST**2))
        return Spread(np.asarray(turned.T @ basis, dtype=np.float32), sizes.astype(np.float32))

    def distances(self, rows: Rows, centroids: Rows) -> Rows:
        """Distance of each row [n, p] from each centroid [k, p]: [n, k]."""
        # In float64, as a hostile state may hold numbers whose squares exceed a float32.
        away = rows[:, None].astype(np.float64) - centroids  # [n, k, p]
        along = away @ self.axes.T  # [n, k, q]
        outside = np.maximum((away**2).sum(axis=2) - (along**2).sum(axis=2), 0)
        squares = ((along / self.sizes[:-1]) ** 2).sum(axis=2) + outside / self.sizes[-1] ** 2
        return np.sqrt(squares).astype(np.float32)

    def outside(self, rest: Rows) -> Rows:
        """Lengths [n] outside of the p coordinates, in units of the spread there."""
        return np.asarray(rest / self.sizes[-1])

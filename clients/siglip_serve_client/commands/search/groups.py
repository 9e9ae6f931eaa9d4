"""Groups of connected rows, joined pair by pair: a union-find in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Groups"]


class Groups:
    """N rows, each at first in a group of its own.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        # A row leads to an earlier row of its group, the first row of a group to itself.
        self._parents = np.arange(count)

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        """Join the groups of each pair of rows [P]."""
        while len(left):
            left, right = self._first(left), self._first(right)
            apart = left != right
            left, right = left[apart], right[apart]
            np.minimum.at(self._parents, np.maximum(left, right), np.minimum(left, right))

    def found(self) -> list[NDArray[np.int64]]:
        """The rows of each group of at least two, in their order, the largest group first."""
        first = self._first(np.arange(len(self._parents)))
        order = np.argsort(first, kind="stable")
        starts = np.flatnonzero(np.diff(first[order], prepend=-1))
        groups = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
        return sorted(groups, key=lambda rows: (-len(rows), int(rows[0])))

    def _first(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first row of the group of each row."""
        found = self._parents[rows]
        while True:
            further = self._parents[found]
            if np.array_equal(further, found):
                self._parents[rows] = found  # so that the next way is short
                return found
            found = further

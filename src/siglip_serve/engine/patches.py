"""Rows of images that have different numbers of patches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["PatchRows"]


@dataclass(frozen=True)
class PatchRows:
    """Patches of N images.

    Attributes:
        patches: uint8 [N, T, 3 P P], row by row of each image's grid, then padding that means nothing.
        grids: int [N, 2], rows and columns of each image. Their product is at most T.
    """

    patches: NDArray[np.uint8]
    grids: NDArray[np.int64]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Patches of each image, [N]."""
        return np.asarray(self.grids[:, 0] * self.grids[:, 1])

    @cached_property
    def real(self) -> NDArray[np.bool_]:
        """True where patches are no padding, [N, T]."""
        return np.asarray(np.arange(self.patches.shape[1]) < self.counts[:, None])

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.patches[rows], self.grids[rows])

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Copy some rows, in this order, without the padding that the longest of them does not need."""
        longest = int(self.counts[rows].max())
        return type(self)(self.patches[rows, :longest], self.grids[rows])

"""Passes over rows of different lengths, in which little is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from siglip_serve.engine.passes import Arrays, Batch

__all__ = ["group_rows", "in_groups"]


def group_rows(counts: NDArray[np.int64], most: int, padding: float = 0.1) -> list[NDArray[np.intp]]:
    """Divide rows into passes by their numbers of tokens.

    Args:
        counts: tokens of each row, [N].
        most: most rows of a pass.
        padding: largest share of the tokens of a pass that may be padding, where the longest row has none.

    Returns:
        The indices of the rows of each pass, the longest first.
    """
    order = np.argsort(-counts, kind="stable")
    groups: list[NDArray[np.intp]] = []
    first = 0
    while first < len(order):
        longest, tokens, end = counts[order[first]], 0, first
        while end < min(first + most, len(order)):
            tokens += counts[order[end]]
            if tokens < (1 - padding) * longest * (end + 1 - first):
                break
            end += 1
        groups.append(order[first:end])
        first = end
    return groups


def in_groups(
    groups: Sequence[NDArray[np.intp]], compute: Callable[[NDArray[np.intp]], Batch], rows: int
) -> Batch:
    """Compute some rows at a time.

    Args:
        groups: indices of the rows of each call, each row once.
        compute: computes the rows of a group, in its order.
        rows: number of all rows.
    """
    joined: Arrays = {}
    failed = np.zeros(rows, dtype=np.bool_)
    for group in groups:
        batch = compute(group)
        failed[group] = batch.failed
        for name, array in batch.outputs.items():
            joined.setdefault(name, np.zeros((rows, *array.shape[1:]), dtype=np.float32))
            joined[name][group] = array
    return Batch(joined, failed)

"""Groups of near-duplicates: all pairs of vectors, in blocks of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.exact import cosines
from siglip_serve_client.commands.search.groups import Groups
from siglip_serve_client.commands.search.kinds import precise

__all__ = ["Group", "estimated_seconds", "near_duplicates", "pairs_of"]

_HELD = 2**25  # numbers in memory that all later rows are compared with: 128 MiB as float32
_TILE = (1024, 4096)  # rows of one product: 16 MiB of scores
_UNSURE = 1e-5  # scores of float32 this near to the threshold are computed once more in float64
_CHECKED = 4096  # pairs at once
_ROUNDING = 1e-9  # of float64, so that equal rows reach a threshold of 1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """Rows of one group, in their order.

    Attributes:
        rows: [n], at least two.
        scores: float64 [n], the cosine of each row with the first one.
        repeated: bool [n], the file is that of an earlier row.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    repeated: NDArray[np.bool_]


def pairs_of(count: int) -> int:
    """Count the comparisons of `count` rows."""
    return count * (count - 1) // 2


def near_duplicates(
    collection: Collection, threshold: float, progress: Callable[[int], object] = lambda _: None
) -> list[Group]:
    """Group rows that are connected by pairs with a cosine of at least the threshold, largest group first.

    Every pair is compared. Memory: 128 MiB of rows, 16 MiB of scores, a block of the file, and the pairs
    found in one product. Rows of a group may be less alike than the threshold, if others lie between them.

    Args:
        threshold: -1 to 1. Of bits, the share that agrees less the share that differs.
        progress: called with the number of pairs that have been compared since the last call.
    """
    groups = Groups(len(collection))
    for start, held in _held_blocks(collection):
        stop = start + len(held)
        part = int(np.searchsorted(collection.starts, start, side="right")) - 1
        for first, block in collection.blocks(part):
            if first + len(block) <= start:
                continue
            rows = collection.unit(block)
            for offset in range(0, len(rows), _TILE[0]):
                _compare(groups, threshold, (rows[offset : offset + _TILE[0]], first + offset), (held, start))
            # Pairs of two held rows come once, those with a later row are all new.
            inside = np.arange(max(first, start), min(first + len(block), stop)) - start
            progress(int(inside.sum()) + max(0, first + len(block) - max(first, stop)) * len(held))
    return [_described(collection, rows) for rows in groups.found()]


def estimated_seconds(collection: Collection) -> float:
    """Estimate the time of all comparisons from one of the products."""
    _, block = next(iter(collection.blocks()))
    rows = collection.unit(block[: _TILE[0]])
    many = np.resize(rows, (_TILE[1], collection.width))
    spent = []
    for _ in range(2):  # the first one starts the threads
        begin = time.perf_counter()
        np.count_nonzero(rows @ many.T >= 2)
        spent.append(time.perf_counter() - begin)
    return min(spent) * pairs_of(len(collection)) / (len(rows) * len(many))


def _held_blocks(collection: Collection) -> Iterator[tuple[int, Floats]]:
    """All rows of length 1 in large blocks, each with its first row."""
    most = max(1, _HELD // collection.width)
    waiting: list[Floats] = []
    begin = 0
    for start, block in collection.blocks():
        if waiting and start + len(block) - begin > most:
            yield begin, np.concatenate(waiting)
            waiting, begin = [], start
        waiting.append(collection.unit(block))
    yield begin, np.concatenate(waiting)


def _compare(groups: Groups, threshold: float, later: tuple[Floats, int], held: tuple[Floats, int]) -> None:
    """Join the rows of pairs with a large score."""
    (rows, first), (others, start) = later, held
    for offset in range(0, len(others), _TILE[1]):
        if start + offset >= first + len(rows):
            return  # these pairs are compared the other way round
        part = others[offset : offset + _TILE[1]]
        with np.errstate(invalid="ignore"):
            scores = rows @ part.T
            left, right = np.nonzero(scores >= threshold - _UNSURE)
        earlier = start + offset + right < first + left
        left, right = left[earlier], right[earlier]
        unsure = np.flatnonzero(scores[left, right] < threshold + _UNSURE)
        keep = np.ones(len(left), np.bool_)
        for begin in range(0, len(unsure), _CHECKED):
            some = unsure[begin : begin + _CHECKED]
            keep[some] = _exact(rows[left[some]], part[right[some]]) >= threshold - _ROUNDING
        groups.join(first + left[keep], start + offset + right[keep])


def _exact(left: Floats, right: Floats) -> NDArray[np.float64]:
    wide = left.astype(np.float64), right.astype(np.float64)
    products = np.einsum("ij,ij->i", *wide)
    return np.asarray(products / (np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)))


def _described(collection: Collection, rows: NDArray[np.int64]) -> Group:
    stored = collection.take(rows)
    first = precise(stored[:1], collection.kind, collection.width)[0]
    scores = cosines(stored, collection.kind, collection.width, first.astype(np.float32))
    digests = collection.texts("sha256", rows)
    seen: set[str] = set()
    repeated = []
    for digest in digests:
        repeated.append(digest in seen)
        seen |= {digest} - {""}
    return Group(rows, scores, np.array(repeated))

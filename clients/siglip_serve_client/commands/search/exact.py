"""The exact search: every vector is scored, block by block.

Vectors of numbers are scored by their cosine, those of bits by the share of bits that agree, from -1 to 1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.kinds import (
    Kind,
    bits_that_differ,
    lengths,
    packed,
    precise,
    products,
    widened,
)

__all__ = ["ExactSearch", "Hit", "Scores", "best_of", "cosines", "rescored"]

# Rows beyond those asked for that are scored once more in float64, because float32 may order rows of almost
# the same score in another way.
_MARGIN = 64
# Bits give many rows the same score. This much less per row makes the first of them the best.
_PER_ROW = 2.0**-41

Scores: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Hit:
    """A row of a collection, and its score."""

    index: int
    score: float


class ExactSearch:
    """Searches in a collection. Safe to call from several threads.

    One search reads all vectors once, and has a few blocks of 8 MiB in memory. Four bytes per row
    stay there for the next one: the lengths of vectors.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._lengths: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def search(self, query: NDArray[np.float32], count: int) -> list[Hit]:
        """The rows of the largest scores, best first. Of equal rows the first comes first.

        Rows that are zero or not finite have no cosine and are never found.

        Args:
            query: float [D], not zero.
            count: of rows at most.
        """
        best, scores = np.empty(0, np.int64), np.empty(0, np.float64)
        for start, found in self._scores(query):
            rows = best_of(found, count + _MARGIN)
            best, scores = np.concatenate([best, start + rows]), np.concatenate([scores, found[rows]])
            kept = best_of(scores, count + _MARGIN)
            best, scores = best[kept], scores[kept]
        best = np.sort(best[scores > -np.inf])
        return rescored(self.collection, best, query, count)

    def _scores(self, query: NDArray[np.float32]) -> Iterator[tuple[int, Scores]]:
        """The scores of each block, with its first row."""
        collection = self.collection
        if collection.kind == "binary":
            bits, later = packed(query), np.empty(0)
            for start, block in collection.blocks():
                if len(later) < len(block):
                    later = np.arange(len(block)) * _PER_ROW
                scores = bits_that_differ(block, bits) * (-2 / collection.width)
                scores -= later[: len(block)]
                scores += 1 - start * _PER_ROW
                yield start, scores
            return
        known = self._lengths
        made = np.empty(len(collection), np.float32) if known is None else known
        unit = _unit(query).astype(np.float32)
        for start, block in collection.blocks():
            if known is None:
                wide = widened(block, collection.kind, collection.width)
                made[start : start + len(block)] = lengths(wide, collection.kind)
            with np.errstate(over="ignore", invalid="ignore"):
                found = products(block, collection.kind, collection.width, unit)
                found /= made[start : start + len(block)]
            found[np.isnan(found)] = -np.inf
            yield start, found
        with self._lock:
            self._lengths = made


def rescored(
    collection: Collection, rows: NDArray[np.int64], query: NDArray[np.float32], count: int
) -> list[Hit]:
    """Order some rows by their scores in float64, the first of equal ones first, and keep the best."""
    exact = cosines(collection.take(rows), collection.kind, collection.width, query)
    order = np.argsort(-exact, kind="stable")[:count]
    return [Hit(int(rows[row]), float(exact[row])) for row in order]


def cosines(rows: NDArray[Any], kind: Kind, width: int, query: NDArray[np.float32]) -> NDArray[np.float64]:
    """The exact scores of few stored rows.

    Args:
        query: float [D], not zero. For rows of bits its signs are taken.
    """
    if kind == "binary":
        return 1 - 2 * bits_that_differ(rows, packed(query)) / width
    wide = precise(rows, kind, width)
    return np.asarray((wide @ _unit(query)) / np.linalg.norm(wide, axis=1))


def best_of(scores: Scores, count: int) -> NDArray[np.int64]:
    """The places of the largest scores, in no order."""
    if len(scores) <= count:
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[-count:]


def _unit(query: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = query.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide))

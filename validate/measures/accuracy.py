"""Measures of predictions: accuracy with its uncertainty, confusions, agreement of two embeddings."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.embeddings.zero_shot import Floats, require_matrix, top_k
from siglip_serve.errors import InvalidInputError

__all__ = [
    "Accuracy",
    "Confusion",
    "CosineStatistics",
    "confusion_pairs",
    "cosine_statistics",
    "top_k_accuracy",
    "top_k_hits",
    "wilson_interval",
]


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total`, with the 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share that is correct, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True)
class Confusion:
    """`count` rows of class `target` were taken for class `predicted`."""

    target: int
    predicted: int
    count: int


@dataclass(frozen=True)
class CosineStatistics:
    """Cosines of corresponding rows of two matrices."""

    minimum: float
    mean: float
    worst_row: int


def top_k_hits(scores: Floats, targets: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Hits, bool [n]: True where a row's target is among its `k` best classes. `k` may exceed the classes.

    Args:
        scores: [n, classes]. Ties go to the lower class, and minus infinity is never chosen.
        targets: int64 [n].
        k: guesses allowed.

    Raises:
        InvalidInputError: the shapes do not fit, or `k` is below 1.
    """
    if scores.ndim != 2 or targets.shape != (len(scores),):
        raise InvalidInputError(
            f"targets: expected one per row of scores {list(scores.shape)}, got {list(targets.shape)}"
        )
    hits: NDArray[np.bool_] = (top_k(scores, min(k, scores.shape[1])) == targets[:, None]).any(axis=1)
    return hits


def top_k_accuracy(scores: Floats, targets: NDArray[np.int64], k: int) -> Accuracy:
    """Accuracy of `k` guesses. It raises the errors of `top_k_hits`, and InvalidInputError without rows."""
    if not len(targets):
        raise InvalidInputError("targets: expected at least one row, got none")
    return Accuracy(int(top_k_hits(scores, targets, k).sum()), len(targets))


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); `z` of 1.96 gives 95 %.

    Raises:
        InvalidInputError: `total` is below 1 or `correct` is not in 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise InvalidInputError(f"correct: expected 0 to total, total at least 1, got {correct} of {total}")
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion_pairs(
    predicted: NDArray[np.int64], targets: NDArray[np.int64], limit: int = 20
) -> list[Confusion]:
    """The most frequent mistakes, most frequent first, ties by class. A prediction of -1 is none.

    Args:
        predicted: int64 [n].
        targets: int64 [n].
        limit: how many pairs at most.

    Raises:
        InvalidInputError: the lengths differ.
    """
    if predicted.shape != targets.shape or predicted.ndim != 1:
        raise InvalidInputError(
            f"predicted: expected one a target, {list(targets.shape)}, got {list(predicted.shape)}"
        )
    wrong = (predicted != targets) & (predicted >= 0)
    counts = Counter(zip(targets[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(target, taken_for, count) for (target, taken_for), count in ordered[:limit]]


def cosine_statistics(first: Floats, second: Floats) -> CosineStatistics:
    """Agreement in direction of corresponding rows of `first` [n, d] and `second` [n, d].

    Raises:
        InvalidInputError: not matrices of the same shape with at least one row, or not finite.
    """
    require_matrix("first", first)
    require_matrix("second", second, first.shape[1])
    if len(first) != len(second) or not len(first):
        raise InvalidInputError(f"second: expected {len(first)} rows and at least one, got {len(second)}")
    cosines = (l2_normalize(first.astype(np.float64)) * l2_normalize(second.astype(np.float64))).sum(axis=1)
    return CosineStatistics(float(cosines.min()), float(cosines.mean()), int(cosines.argmin()))

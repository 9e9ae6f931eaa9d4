"""Measures of how well a map finds an object: pure functions on arrays.

A map is float [...], larger where the object is said to be. A mask is bool of the same shape, True where it
is. Both may have any number of dimensions. Their elements, the pixels, are compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import InvalidInputError

__all__ = [
    "Floats",
    "Mask",
    "area_under_curve",
    "average_precision",
    "bootstrap_interval",
    "foreground",
    "intersections_and_unions",
    "mean_iou",
    "min_max",
    "pairwise_contrast",
    "pointing_game",
    "removal_steps",
    "two_class_precision",
]

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


def average_precision(scores: Floats, mask: Mask) -> float:
    """Area under the precision-recall curve, 0..1: the mean precision at each pixel of the object.

    Pixels of equal score are taken together, so that their order in memory does not count. A map that is the
    same everywhere gets the object's share of the pixels. Same as scikit-learn's.

    Raises:
        InvalidInputError: the shapes differ, a score is not finite, or the mask is empty.
    """
    _check(scores, mask)
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, hits = scores.ravel()[order], np.cumsum(mask.ravel()[order])
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last pixel of each score
    recall = hits[ends] / hits[-1]
    precision = hits[ends] / (ends + 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def two_class_precision(scores: Floats, mask: Mask) -> float:
    """Average precision of both classes in one ranking, as published for ImageNet-Segmentation.

    Every pixel is asked twice: whether it is the object, with its score, and whether it is not, with
    1 - score.

    Args:
        scores: 0..1.
        mask: any; here an empty one has an answer.
    """
    both = np.concatenate([1 - scores.ravel(), scores.ravel()])
    return average_precision(both, np.concatenate([~mask.ravel(), mask.ravel()]))


def pointing_game(scores: Floats, mask: Mask) -> float:
    """1 if the highest pixel is the object's, else 0, without a margin.

    If several are equally high, it is the share of the object's among them. Source: "Top-down Neural
    Attention by Excitation Backprop" (Zhang et al., 2016, arXiv 1608.00507), whose margin of 15 pixels is for
    photographs of several hundred.

    Raises:
        InvalidInputError: as `average_precision`.
    """
    _check(scores, mask)
    return float(mask[scores == scores.max()].mean())


def foreground(scores: Floats) -> Mask:
    """Mask of the object by a map: clipped at 0, scaled to 0..1, and above its own mean.

    Source: "Transformer Interpretability Beyond Attention Visualization" (Chefer, Gur and Wolf, 2021, arXiv
    2012.09838). The clipping is that for relative maps (Gandelsman et al., arXiv 2310.05916).
    """
    scaled = min_max(np.maximum(scores, 0))
    return np.asarray(scaled > scaled.mean())


def min_max(scores: Floats) -> Floats:
    """Scores scaled to 0..1, all 0 where there is no difference."""
    low, high = scores.min(), scores.max()
    scaled: Floats = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    return scaled


def intersections_and_unions(found: Mask, mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels in both and in either, each [2]: of the background, of the object. Sum them over images.

    Raises:
        InvalidInputError: the shapes differ.
    """
    if found.shape != mask.shape:
        raise InvalidInputError(f"mask: expected shape {list(found.shape)}, got {list(mask.shape)}")
    both = np.array([(~found & ~mask).sum(), (found & mask).sum()], dtype=np.int64)
    either = np.array([(~found | ~mask).sum(), (found | mask).sum()], dtype=np.int64)
    return both, either


def mean_iou(scores: Floats, mask: Mask) -> float:
    """Intersection over union of `foreground(scores)` with the object, and of the two backgrounds: the mean.

    Of one image. Over a data set the published number divides sums, see `intersections_and_unions`.

    Raises:
        InvalidInputError: as `average_precision`.
    """
    _check(scores, mask)
    both, either = intersections_and_unions(foreground(scores), mask)
    return float((both / np.maximum(either, 1)).mean())


def pairwise_contrast(maps: Floats, masks: Mask) -> float:
    """Share of cases in which a prompt's map is higher inside its own object than another prompt's map, 0..1.

    Common parts of maps cancel out: it says whether they tell prompts apart. Equal means count a half.

    Args:
        maps: [K, ...], of K prompts of one image.
        masks: [K, ...], their objects.

    Raises:
        InvalidInputError: the shapes differ, K is less than 2, or a mask is empty.
    """
    if maps.shape != masks.shape or len(maps) < 2:
        raise InvalidInputError(
            f"maps: expected at least 2 and as many masks, got {list(maps.shape)} and {list(masks.shape)}"
        )
    if not masks.reshape(len(masks), -1).any(axis=1).all():
        raise InvalidInputError("masks: one is empty")
    inside = np.array([[one[mask].mean() for one in maps] for mask in masks])  # [mask, map]
    others = ~np.eye(len(maps), dtype=bool)
    own = np.broadcast_to(np.diag(inside)[:, None], inside.shape)
    return float((np.sign(own - inside)[others] / 2 + 0.5).mean())


def removal_steps(scores: Floats, steps: int) -> Mask:
    """The places that are gone after each step when the highest go first, [steps + 1, ...].

    Nothing is gone at first, everything at last. The number grows evenly. Its complement is what an insertion
    shows. Of equal places the earlier goes first.

    Raises:
        InvalidInputError: `steps` is not positive.
    """
    if steps < 1:
        raise InvalidInputError(f"steps: got {steps}, expected at least 1")
    rank = np.empty(scores.size, dtype=np.int64)
    rank[np.argsort(-scores, axis=None, kind="stable")] = np.arange(scores.size)
    counts = np.rint(np.linspace(0, scores.size, steps + 1))
    return np.asarray(rank < counts[:, None]).reshape(steps + 1, *scores.shape)


def area_under_curve(values: Floats) -> float:
    """Area under values [..., n] at even distances over 0..1, by trapezoids.

    Of a score, while an image is deleted, it should be low, while one is inserted high. Source: "RISE"
    (Petsiuk, Das and Saenko, 2018, arXiv 1806.07421).

    Raises:
        InvalidInputError: there are fewer than two values.
    """
    if values.shape[-1] < 2:
        raise InvalidInputError(f"values: expected at least 2, got {values.shape[-1]}")
    return float(((values[..., 1:] + values[..., :-1]) / 2).mean())


def bootstrap_interval(
    values: Floats, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of values [n], by drawing n of them again and again. NaNs are left out.

    Returns:
        Lower and upper end; both NaN where there are no values.
    """
    kept = values[np.isfinite(values)]
    if not kept.size:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(0, kept.size, (resamples, kept.size))
    low, high = np.quantile(kept[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(scores: Floats, mask: Mask) -> None:
    if scores.shape != mask.shape:
        raise InvalidInputError(f"mask: expected shape {list(scores.shape)}, got {list(mask.shape)}")
    if not np.isfinite(scores).all():
        raise InvalidInputError("scores: hold a value that is not finite")
    if not mask.any():
        raise InvalidInputError("mask: is empty")

"""Zero-shot classification: templates x classnames -> class_embeddings -> scores. Pure functions on arrays.

The order of operations is open_clip's: every prompt's embedding is normalised, the mean is taken over
the templates, and the mean is normalised again. SigLIP's probability of a pair is
`sigmoid(exp(logit_scale) * cosine + logit_bias)` (Zhai et al. 2023, section 3.2), independent of the
other classes; `softmax` over classes is CLIP's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.errors import InvalidInputError

__all__ = [
    "Floats",
    "build_class_embeddings",
    "cosine",
    "logits",
    "require_matrix",
    "sigmoid",
    "softmax",
    "top_k",
]

Floats = NDArray[np.floating[Any]]


def require_matrix(name: str, values: Floats, columns: int | None = None) -> None:
    """Raise InvalidInputError, naming `name`, unless `values` is `[rows, columns]` and all finite."""
    if values.ndim != 2 or (columns is not None and values.shape[1] != columns):
        expected = "n" if columns is None else columns
        raise InvalidInputError(f"{name}: expected shape [rows, {expected}], got {list(values.shape)}")
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise InvalidInputError(f"{name}[{row}]: holds a value that is not finite")


def build_class_embeddings(prompt_embeddings: Floats) -> Floats:
    """One unit vector per class, from the embeddings of its prompts.

    Args:
        prompt_embeddings: [classes, templates, d], of any length.

    Returns:
        class_embeddings [classes, d], unit length.

    Raises:
        InvalidInputError: not three-dimensional, or no templates.
    """
    if prompt_embeddings.ndim != 3 or prompt_embeddings.shape[1] == 0:
        raise InvalidInputError(
            "prompt_embeddings: expected shape [classes, templates, d] with at least one template, "
            f"got {list(prompt_embeddings.shape)}"
        )
    return l2_normalize(l2_normalize(prompt_embeddings).mean(axis=1))


def cosine(image_embeddings: Floats, class_embeddings: Floats) -> Floats:
    """Cosine of every pair, [n, classes] in -1..1.

    Args:
        image_embeddings: [n, d], of any length.
        class_embeddings: [classes, d], of any length.

    Raises:
        InvalidInputError: not matrices of the same width, or not finite.
    """
    require_matrix("image_embeddings", image_embeddings)
    require_matrix("class_embeddings", class_embeddings, image_embeddings.shape[1])
    similarity: Floats = l2_normalize(image_embeddings) @ l2_normalize(class_embeddings).T
    return similarity


def logits(similarity: Floats, logit_scale: float, logit_bias: float) -> Floats:
    """SigLIP's logits. `logit_scale` is the logarithm that the checkpoint stores."""
    return np.exp(logit_scale) * similarity + logit_bias


def sigmoid(values: Floats) -> Floats:
    """Logistic function, 0..1, without overflow. Small results keep the precision of their dtype."""
    small = np.exp(-np.abs(values))
    probabilities: Floats = np.where(values < 0, small, 1) / (1 + small)
    return probabilities


def softmax(values: Floats) -> Floats:
    """Probabilities along the last axis that sum to one, without overflow."""
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    probabilities: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities


def top_k(scores: Floats, k: int) -> NDArray[np.int64]:
    """The `k` best columns of every row, best first, int64 [n, k].

    Ties go to the lower column. A column whose score is minus infinity is never chosen: -1 stands in
    its place, so that a k-nearest vote which knows only two classes does not get three guesses free.

    Raises:
        InvalidInputError: `scores` is not [n, classes], or `k` is not in 1..classes.
    """
    if scores.ndim != 2:
        raise InvalidInputError(f"scores: expected shape [n, classes], got {list(scores.shape)}")
    if not 1 <= k <= scores.shape[1]:
        raise InvalidInputError(f"k: expected 1 to {scores.shape[1]} for that many classes, got {k}")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
    chosen = np.take_along_axis(scores, best, axis=1)
    return np.where(np.isneginf(chosen), np.int64(-1), best)

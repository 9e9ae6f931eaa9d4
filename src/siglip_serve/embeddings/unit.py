"""Embeddings at unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["l2_normalize"]


def l2_normalize(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """`embeddings` [..., D] at unit length along the last axis. A row of zeros stays zero."""
    length = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit: NDArray[np.floating[Any]] = embeddings / np.where(length == 0, 1, length)
    return unit

"""From tokens to one vector an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["l2_normalize"]


def l2_normalize(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of unit length.

    Args:
        embeddings: [N, D] float32.

    Returns:
        [N, D] float32; a row of zeros stays zero.
    """
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)

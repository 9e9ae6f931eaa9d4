"""Embeddings at unit length, and the values that they may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import InvalidInputError

__all__ = ["LARGEST_VALUE", "check_values", "l2_normalize"]

# Far above every embedding, and the squares of such values still add up to a float32.
LARGEST_VALUE = 1e12


def l2_normalize(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """`embeddings` [..., D] at unit length along the last axis. A row of zeros stays zero."""
    length = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit: NDArray[np.floating[Any]] = embeddings / np.where(length == 0, 1, length)
    return unit


def check_values(name: str, values: NDArray[np.floating[Any]], finite: bool = True) -> None:
    """Refuse values from which a length or a product would come out as infinite or NaN.

    Args:
        name: of the input, for the message.
        values: [..., D], with at least two axes.
        finite: refuse infinities and NaN too.

    Raises:
        InvalidInputError: a value is beyond -1e12 to 1e12. The message names its row.
    """
    # Minimum and maximum need no second array of that size. A NaN compares false.
    if not values.size or (values.min() >= -LARGEST_VALUE and values.max() <= LARGEST_VALUE):
        return
    wrong = ~(np.abs(values) <= LARGEST_VALUE)
    if not finite:
        wrong &= np.isfinite(values)
    places = np.argwhere(wrong)
    if len(places):
        place = tuple(map(int, places[0]))
        row = ", ".join(map(str, place[:-1]))
        limits = f"{-LARGEST_VALUE:g} to {LARGEST_VALUE:g}"
        raise InvalidInputError(f"{name}[{row}]: holds {values[place]:g}, expected values from {limits}")

"""Small vectors: float16, int8, uint8, and one bit per value, as the embedding APIs define them.

The gateway writes its answers with these functions. They also shrink vectors that are stored already, such as
an output of `siglip-serve embed`, so that both compare. They need NumPy alone.

`binary` and `ubinary` are those of Cohere and sentence-transformers: one bit per value, 1 above zero, eight
values per byte, the first value in the highest bit. `ubinary` bytes are 0 to 255, and those of `binary` are
lower by 128.

`int8` and `uint8` are those of sentence-transformers' `quantize_embeddings` with the same range for every
dimension. Vectors are scaled to length 1 first. The range goes from -r to r with r = min(1, 8 / sqrt(D)):
values of a vector of length 1 have the root mean square 1 / sqrt(D), so r is eight times that. It depends on
D alone, so vectors of different requests compare. Values outside are clipped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["COMPACT", "ENDIANNESS", "FLOATS", "as_base64", "compact", "unit", "value_range"]

COMPACT = ("int8", "uint8", "binary", "ubinary")
FLOATS = ("float32", "float16")  # of base64 text
ENDIANNESS = ("native", "big", "little")  # vLLM's words
_SPREAD = 8.0
_CODES = {"float32": "f4", "float16": "f2"}
_ORDERS = {"native": "=", "big": ">", "little": "<"}


def value_range(width: int) -> float:
    """The largest absolute value that `int8` and `uint8` of vectors [width] hold."""
    return min(1.0, _SPREAD / math.sqrt(width))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [N, D] float32 scaled to length 1. Zero vectors stay as they are."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    scaled: NDArray[np.float32] = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled


def compact(vectors: NDArray[np.float32], kind: str) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Vectors [N, D] float32 as one of `COMPACT`.

    Returns:
        int8 and uint8: [N, D]. binary (int8) and ubinary (uint8): [N, ceil(D / 8)].

    Raises:
        ValueError: another kind.
    """
    if kind == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if kind == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if kind not in COMPACT:
        raise ValueError(f"kind: {kind!r}, expected one of {', '.join(COMPACT)}")
    most = value_range(vectors.shape[-1])
    steps = (unit(vectors).astype(np.float64) + most) / (2 * most / 255)
    if kind == "uint8":
        return np.clip(steps, 0, 255).astype(np.uint8)
    return np.clip(steps - 128, -128, 127).astype(np.int8)  # cut towards zero, as sentence-transformers do


def as_base64(
    vectors: NDArray[np.float32], dtype: str = "float32", endianness: str = "little"
) -> Sequence[str]:
    """Each vector of [N, D] float32 as base64 text of its bytes.

    Args:
        dtype: one of `FLOATS`. float16 has 11 significant bits, and the nearest value is taken.
        endianness: one of `ENDIANNESS`, the order of the bytes of a value.

    Raises:
        ValueError: another dtype or endianness.
    """
    for name, value, known in (("dtype", dtype, FLOATS), ("endianness", endianness, ENDIANNESS)):
        if value not in known:
            raise ValueError(f"{name}: {value!r}, expected one of {', '.join(known)}")
    rows = vectors.astype(_ORDERS[endianness] + _CODES[dtype], copy=False)
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]

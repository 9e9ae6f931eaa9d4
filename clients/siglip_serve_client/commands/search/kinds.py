"""Stored numbers of vectors: float64, float32, float16, int8 and bits become numbers that products take.

int8 and bits are those of `siglip_serve_client.compact`. A level of int8 stands for the values around half a
step above it, because `compact` cuts towards zero.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.compact import compact

__all__ = [
    "Kind",
    "bits_that_differ",
    "kind_of",
    "lengths",
    "packed",
    "precise",
    "products",
    "unit_rows",
    "widened",
]

Kind: TypeAlias = Literal["float64", "float32", "float16", "int8", "binary"]

# float16 has the exponent 31 for values that are not finite. `widened` makes them 65536 and more.
_LEAST_INFINITE = np.float32(65536)
# The bits of sign, exponent and fraction of a float16 in the place where float32 has its own.
_HALF_BITS = np.int32(-0x70002000)
_HALF_SCALE = np.float32(2.0**112)  # exponents are 127 - 15 too small there
_HALF = np.float32(0.5)
# Numbers that are widened at a time. Arrays beyond 32 MiB would come fresh from the system each time.
_AT_ONCE = 2**18
_ONES = [np.uint64(int(word * 8, 16)) for word in ("55", "33", "0f")]
_BYTES, _WORDS, _TOP = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001), np.uint64(48)
_TABLE = np.array([value.bit_count() for value in range(256)], np.uint8)


def kind_of(dtype: np.dtype[Any], named: str = "") -> Kind:
    """The kind of vectors that are stored in a dtype.

    Args:
        named: the kind that the files say, or an empty text.

    Raises:
        ValueError: vectors are not stored in this dtype, or in another than the files say.
    """
    found = "binary" if dtype == np.uint8 else dtype.name
    if found not in ("float64", "float32", "float16", "int8", "binary"):
        raise ValueError(f"embeddings of the type {dtype}, expected floats, int8 or bits in uint8")
    if named and named != found:
        raise ValueError(f"embeddings of the type {dtype}, expected {named}")
    return cast(Kind, found)


def widened(rows: NDArray[Any], kind: Kind, width: int) -> NDArray[np.float32]:
    """Stored rows [N, D], or [N, ceil(D / 8)] of bits, as float32 [N, D]. Bits are 1 and -1.

    Values of float16 that are not finite have an absolute value of 65536 or more.
    """
    if kind == "float16" and rows.dtype.isnative:
        return _from_half(np.ascontiguousarray(rows))
    if kind == "binary":
        return np.unpackbits(rows, axis=1, count=width) * np.float32(2) - np.float32(1)
    wide = rows.astype(np.float32, copy=False)
    if kind == "int8":
        wide += _HALF
    return wide


def products(rows: NDArray[Any], kind: Kind, width: int, query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inner products [N] of stored rows, as `widened` has them, with a query [D]."""
    if kind in ("float32", "float64"):
        return np.asarray(widened(rows, kind, width) @ query)
    found = np.empty(len(rows), np.float32)
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        wide = some.astype(np.float32) if kind == "int8" else widened(some, kind, width)
        np.matmul(wide, query, out=found[start : start + step])
    if kind == "int8":  # the half steps add the same to all
        found += _HALF * query.sum()
    return found


def precise(rows: NDArray[Any], kind: Kind, width: int) -> NDArray[np.float64]:
    """Few stored rows as float64 [N, D]."""
    exact = kind in ("float64", "float16")
    return rows.astype(np.float64) if exact else widened(rows, kind, width).astype(np.float64)


def lengths(rows: NDArray[np.float32], kind: Kind) -> NDArray[np.float32]:
    """The length of each row [N, D] of `widened`, and NaN where it is 0 or not finite."""
    most = _LEAST_INFINITE**2 if kind == "float16" else np.float32(1e30)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
        found = np.sqrt(squares)
        # Beyond these, sums of float32 overflow or vanish.
        rare = np.flatnonzero(~((squares > 1e-30) & (squares < most)))
        if len(rare):
            exact = np.linalg.norm(rows[rare].astype(np.float64), axis=1)
            finite = np.isfinite(exact)
            if kind == "float16":
                finite &= np.abs(rows[rare]).max(1) < _LEAST_INFINITE
            found[rare] = np.where((exact > 0) & finite, exact, np.nan)
    return found


def unit_rows(rows: NDArray[Any], kind: Kind, width: int) -> NDArray[np.float32]:
    """Stored rows as float32 [N, D] of length 1. Rows that are zero or not finite are NaN."""
    wide = widened(rows, kind, width)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(wide / lengths(wide, kind)[:, None])


def packed(query: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The signs of a vector [D] as bits, uint8 [ceil(D / 8)]."""
    return cast(NDArray[np.uint8], compact(query[None], "ubinary")[0])


def bits_that_differ(rows: NDArray[np.uint8], query: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The Hamming distance [N] of rows [N, B] from a query [B], both bits in uint8."""
    if rows.shape[1] % 8 or not rows.flags.c_contiguous:
        return np.asarray(_TABLE[rows ^ query].sum(1, dtype=np.int64))
    # The query is repeated, because NumPy is ten times slower where it repeats short rows itself.
    words = rows.view(np.uint64).reshape(-1) ^ np.tile(query.view(np.uint64), len(rows))
    if hasattr(np, "bitwise_count"):
        counts = np.bitwise_count(words).reshape(len(rows), -1)
        return np.asarray(counts.sum(1, dtype=np.int64))
    # NumPy 1 counts no bits: sums of neighbours, until each byte holds its own count of at most 8.
    part = words >> np.uint64(1)
    part &= _ONES[0]
    words -= part
    np.right_shift(words, np.uint64(2), out=part)
    part &= _ONES[1]
    words &= _ONES[1]
    words += part
    np.right_shift(words, np.uint64(4), out=part)
    words += part
    words &= _ONES[2]
    # Sums of bytes could overflow, those of four times 16 bits have room for vectors of 65,535 bits.
    np.right_shift(words, np.uint64(8), out=part)
    part &= _BYTES
    words &= _BYTES
    words += part
    sums = np.einsum("ij->i", words.reshape(len(rows), -1))
    return np.asarray(((sums * _WORDS) >> _TOP).astype(np.int64))


def _from_half(rows: NDArray[Any]) -> NDArray[np.float32]:
    """float16 as float32, five times as fast as by NumPy 1."""
    bits = rows.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)
    wide = bits.view(np.float32)
    wide *= _HALF_SCALE
    return wide

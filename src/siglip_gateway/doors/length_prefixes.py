"""Check that tensors are as large, and the strings of binary BYTES tensors as long, as they say.

Each string is preceded by its length in 4 bytes, little-endian. Where the last length says more than there
is, Triton accepts the request and puts it into a batch. Its Python backend then refuses the whole batch, and
with it the requests of other callers.

Triton 24.10 counts the elements of a shape in 64 bits. Where they overflow, a few bytes pass for a huge
tensor, and the model process that reads it dies.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

__all__ = ["Pieces", "TensorError", "check_prefixes", "check_shape"]

_MOST = 2**16  # strings in one tensor, as many as rows in one request; 20 ms to walk over
_MOST_ELEMENTS = 2**40  # far above what a message may have, and far below what overflows
_SIZE = 4
_unpack = struct.Struct("<I").unpack_from


class TensorError(ValueError):
    """A tensor is too large, or its lengths do not fit its bytes or its shape."""


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Check that the number of a tensor's elements cannot overflow.

    Args:
        name: of the input, for the message.
        shape: as the request says. Sides of 0 count as 1, and negative ones as positive ones.

    Raises:
        TensorError: there are more than 2^40.
    """
    elements = 1
    for side in shape:
        elements *= abs(side) or 1
    if elements > _MOST_ELEMENTS:
        raise TensorError(f"{name}: shape {list(shape)}, expected at most {_MOST_ELEMENTS} elements")


def check_prefixes(name: str, shape: Sequence[int], data: bytes | Pieces, start: int, end: int) -> None:
    """Check the BYTES tensor between two offsets.

    Args:
        name: of the input.
        shape: as the request says. Triton refuses one with a negative number.
        data: what the offsets count in.
        start: offset of the tensor's first byte.
        end: offset behind its last.

    Raises:
        TensorError: a length does not fit, or the number of strings is not that of the shape.
    """
    read: Callable[[Any, int], tuple[Any, ...]] = Pieces.unpack if isinstance(data, Pieces) else _unpack
    at, count = start, 0
    while at < end:
        left = end - at - _SIZE
        if left < 0:
            raise TensorError(
                f"{name}[{count}]: {end - at} bytes are left, expected a length of {_SIZE} bytes"
            )
        (length,) = read(data, at)
        if length > left:
            raise TensorError(f"{name}[{count}]: its length says {length} bytes, but {left} follow")
        at += _SIZE + length
        count += 1
        if count > _MOST:
            raise TensorError(f"{name}: more than {_MOST} strings, at most {_MOST} are allowed in one tensor")
    expected = math.prod(shape)
    if count != expected and min(shape, default=0) >= 0:
        raise TensorError(f"{name}: {count} strings, expected {expected} for the shape {list(shape)}")


class Pieces:
    """Bytes that lie in several pieces, read at growing offsets."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))
        self._current = 0

    def unpack(self, at: int) -> tuple[int]:
        """Read the length at an offset, behind which there are at least three more bytes."""
        while self._ends[self._current] <= at:
            self._current += 1
        found, following = b"", self._current
        while len(found) < _SIZE:
            part = self._parts[following]
            begin = max(at - self._ends[following] + len(part), 0)
            found += part[begin : begin + _SIZE - len(found)]
            following += 1
        return (int.from_bytes(found, "little"),)

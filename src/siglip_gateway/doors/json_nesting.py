"""Refuse JSON that is nested too deeply, before a recursive parser reads it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

from siglip_gateway.doors.refusal import RefusedError

__all__ = ["MOST_LEVELS", "NestingScanner", "pieces_of", "refuse_deep_json"]

# Triton 24.10 dies of 160,000 levels. A request that nests a tensor of eight dimensions has twelve.
MOST_LEVELS = 64

_PIECE = 2**16  # bytes between two turns of the event loop
_BRACKETS = b"[{]}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes


class NestingScanner:
    """Follow the depth of JSON that arrives in pieces. Brackets in strings do not count.

    Attributes:
        depth: levels that are open at the end of the pieces so far.
        deepest: largest depth so far.
    """

    def __init__(self) -> None:
        self.depth = self.deepest = 0
        self._in_string = False
        self._escape = b""  # a backslash at the end of a piece, which concerns the next one

    def feed(self, piece: bytes) -> None:
        """Read the next piece. It may begin and end anywhere, also within a string or an escape."""
        piece = self._escape + piece
        backslashes = len(piece) - len(piece.rstrip(b"\\"))
        self._escape = b"\\" if backslashes % 2 else b""
        # Pairs of backslashes first: what then still precedes a quote escapes it.
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        if len(parts) % 2 == 0:  # an odd number of quotes
            self._in_string = not self._in_string
        depths = list(accumulate(array("b", outside.translate(_STEPS, _OTHERS)), initial=self.depth))
        self.depth, self.deepest = depths[-1], max(self.deepest, *depths)


async def refuse_deep_json(parts: Sequence[bytes]) -> None:
    """Check a text of JSON, of any size, without holding up the event loop.

    Raises:
        RefusedError: 400, it is nested deeper than `MOST_LEVELS`.
    """
    openings = 0
    async for piece in pieces_of(parts):
        openings += piece.count(b"[") + piece.count(b"{")
    if openings <= MOST_LEVELS:  # as in nearly all requests
        return
    scanner = NestingScanner()
    async for piece in pieces_of(parts):
        scanner.feed(piece)
        if scanner.deepest > MOST_LEVELS:
            raise RefusedError(400, f"the JSON is nested deeper than {MOST_LEVELS} levels")


async def pieces_of(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    """Cut bytes into pieces of at most 64 KiB, between which the event loop has a turn."""
    for part in parts:
        for begin in range(0, len(part), _PIECE):
            if begin:
                await asyncio.sleep(0)
            yield part[begin : begin + _PIECE]
        if len(parts) > 1:
            await asyncio.sleep(0)

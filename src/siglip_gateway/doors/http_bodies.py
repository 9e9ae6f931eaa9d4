"""Read the bodies of HTTP requests within limits: bytes of one, bytes of all, time, and inflated size."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from siglip_gateway.doors.refusal import RefusedError

__all__ = ["Body", "Held", "Memory", "patience", "read_body"]

_GRACE = 30.0  # seconds that any transfer may take
_SLOWEST = 16 * 2**10  # bytes per second beyond that: a slow phone sends more
_STEP = 2**18  # bytes that are inflated before the event loop has a turn
_PART_OVERHEAD = 128  # bytes that Python needs per part, so that tiny chunks count as what they cost
_JOINED = 2**20  # bodies up to this size are sent in one piece
_ENCODINGS = {"gzip", "x-gzip", "deflate"}
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32


class Memory:
    """Bytes that all requests of a process hold together.

    Args:
        limit: bytes from which on further ones are refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def hold(self) -> Held:
        """Begin an account that is empty."""
        return Held(self)


class Held:
    """Bytes that one request holds."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._bytes = memory, 0

    def add(self, count: int) -> None:
        """Hold `count` more bytes.

        Raises:
            RefusedError: 503, all requests together would hold too many.
        """
        if self._memory.used + count > self._memory.limit:
            message = f"the requests in progress hold {self._memory.limit} bytes; try again later"
            raise RefusedError(503, message, close=True)
        self.add_anyway(count)

    def add_anyway(self, count: int) -> None:
        """Hold `count` more bytes even beyond the limit; later requests are refused for it."""
        self._memory.used += count
        self._bytes += count

    def release(self) -> None:
        """Give all bytes back; a second call changes nothing."""
        self._memory.used -= self._bytes
        self._bytes = 0


@dataclass
class Body:
    """A body that has arrived, inflated.

    Attributes:
        parts: its bytes, in pieces as they came.
        size: bytes.
    """

    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, part: bytes) -> None:
        """Append a piece."""
        self.parts.append(part)
        self.size += len(part)

    def join_if_small(self) -> None:
        """Make one piece of a body of up to 1 MiB, which costs less to send."""
        if len(self.parts) > 1 and self.size <= _JOINED:
            self.parts = [b"".join(self.parts)]

    def first(self, count: int) -> Iterator[bytes]:
        """The first `count` bytes, in pieces."""
        for part in self.parts:
            if count <= 0:
                return
            yield part if len(part) <= count else part[:count]
            count -= len(part)


async def read_body(request: web.BaseRequest, held: Held, most: int) -> Body:
    """Read the body of a request and undo its Content-Encoding.

    Args:
        held: account on which the body's bytes are put.
        most: bytes that it may have, inflated.

    Raises:
        RefusedError: 400, it is not what its headers say; 408, it comes too slowly; 413, it is too large;
            415, it has another encoding than gzip or deflate; 503, there is no room for it now.
    """
    if (request.content_length or 0) > most:
        raise _too_large(most)
    inflater = _inflater(request)
    await _continue(request)
    body, begin = Body(), asyncio.get_running_loop().time()
    received = 0
    try:
        async with asyncio.timeout_at(begin + patience(0)) as limit:
            while chunk := await request.content.readany():
                received += len(chunk)
                limit.reschedule(begin + patience(received))
                for part in (chunk,) if inflater is None else inflater.feed(chunk):
                    if body.size + len(part) > most:
                        raise _too_large(most)
                    held.add(len(part) + _PART_OVERHEAD)
                    body.add(part)
                    if inflater is not None:
                        await asyncio.sleep(0)
    except TimeoutError as error:
        raise RefusedError(408, f"only {received} bytes of the body came in time", close=True) from error
    except (aiohttp.ClientPayloadError, web.RequestPayloadError, ValueError) as error:
        raise RefusedError(400, f"the body is broken: {_line(error)}", close=True) from error
    if inflater is not None:
        inflater.end()
    body.join_if_small()
    return body


def patience(count: int) -> float:
    """Seconds that a transfer may take of which `count` bytes have arrived."""
    return _GRACE + count / _SLOWEST


class _Inflater:
    """Undo gzip or deflate piece by piece, so that a small body cannot become large at once."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Inflate more of the body, in pieces of at most 256 KiB."""
        while data:
            try:
                part = self._stream.decompress(data, _STEP)
            except zlib.error as error:
                raise RefusedError(400, f"the body is not gzip or deflate: {error}", close=True) from error
            if self._stream.unused_data:
                raise RefusedError(
                    400, "the body has bytes behind the end of its compressed data", close=True
                )
            data = self._stream.unconsumed_tail
            if part:
                yield part

    def end(self) -> None:
        """Check that the data are complete.

        Raises:
            RefusedError: 400, they are not.
        """
        if not self._stream.eof:
            raise RefusedError(400, "the body ends in the middle of its compressed data")


def _inflater(request: web.BaseRequest) -> _Inflater | None:
    encoding = ", ".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    if encoding in {"", "identity"} or not request.can_read_body:
        return None
    if encoding not in _ENCODINGS:
        raise RefusedError(415, f"Content-Encoding {encoding!r}: expected gzip or deflate, or none")
    return _Inflater()


async def _continue(request: web.BaseRequest) -> None:
    """Tell a caller that waits before it sends the body, as curl does, that it may send it."""
    expected = request.headers.get("Expect", "")
    if not expected or request.version < aiohttp.HttpVersion11:
        return
    if expected.lower() != "100-continue":
        raise RefusedError(417, f"Expect {expected!r}: expected 100-continue", close=True)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # nothing of the answer is sent yet


def _too_large(most: int) -> RefusedError:
    return RefusedError(
        413, f"the body is larger than {most} bytes; send fewer images per request", close=True
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Asynchronous senders of raw bytes over gRPC and HTTP, and the outcome of each request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import grpc  # type: ignore[import-untyped]

__all__ = ["HANG", "GrpcWire", "HttpWire", "Outcome", "Reply", "judge_grpc", "judge_http"]

HANG = 10.0  # seconds without an answer
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_OPTIONS.append(("grpc.use_local_subchannel_pool", 1))  # a connection for each channel
_BROKEN = re.compile("connect|socket|closed|goaway|reset|broken|stream removed", re.IGNORECASE)
_ENOUGH = 2**20  # bytes of an answer that are kept
_WAIT_FOR_MORE = 0.3  # seconds that a server is left waiting for the rest of an incomplete request


class Outcome(StrEnum):
    """The end of one request.

    `ended` stands for a connection that the server closed without an answer where the request's framing was
    broken, which is its right. `lost` stands for the same after a request that could be read.
    """

    ANSWERED = "answered"
    REFUSED = "refused"
    INTERNAL = "INTERNAL"
    HANG = "unanswered"
    LOST = "lost"
    ENDED = "ended"


@dataclass(frozen=True)
class Reply:
    """The reply to one request.

    Attributes:
        outcome: see `Outcome`.
        status: of gRPC by name, or of HTTP.
        message: of the error; empty for an answer.
        seconds: from sending to the end.
        body: the answer, at most its first MiB over HTTP.
        at: time.monotonic() of the end.
    """

    outcome: Outcome
    status: str
    message: str
    seconds: float
    body: bytes = b""
    at: float = 0.0


def judge_grpc(status: str, message: str) -> Outcome:
    """Judge a gRPC status that is not OK. One that is too late for a deadline counts as refused."""
    if status == "UNAVAILABLE" and _BROKEN.search(message):
        return Outcome.LOST
    refused = status not in {"INTERNAL", "UNKNOWN", "ABORTED", "DATA_LOSS", "CANCELLED"}
    return Outcome.REFUSED if refused else Outcome.INTERNAL


def judge_http(status: int) -> Outcome:
    """Judge an HTTP status."""
    if status < 300:
        return Outcome.ANSWERED
    return Outcome.INTERNAL if status >= 500 and status not in {501, 503, 505} else Outcome.REFUSED


class GrpcWire:
    """Channels to one server. Bytes go through undecoded, and no deadline travels with a request."""

    def __init__(self, address: str, channels: int = 4) -> None:
        self._address = address
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(channels)]
        self._next = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def send(self, method: str, body: bytes, stream: bool = False, limit: float = HANG) -> Reply:
        """Call a method with the bytes of a message, and wait `limit` seconds for its end."""
        begin = time.monotonic()
        self._next += 1
        channel = self._channels[self._next % len(self._channels)]
        try:
            answer = await asyncio.wait_for(_call(channel, method, body, stream), limit)
        except TimeoutError:
            return _reply(Outcome.HANG, "", f"no answer within {limit:g} s", begin)
        except grpc.aio.AioRpcError as error:
            status, message = str(error.code().name), str(error.details() or "")
            return _reply(judge_grpc(status, message), status, message, begin)
        return _reply(Outcome.ANSWERED, "OK", "", begin, answer)


async def _call(channel: Any, method: str, body: bytes, stream: bool) -> bytes:
    if not stream:
        return bytes(await channel.unary_unary(method)(body, wait_for_ready=False))

    async def requests() -> AsyncIterator[bytes]:
        yield body

    last = b""
    async for message in channel.stream_stream(method)(requests(), wait_for_ready=False):
        last = bytes(message)
    return last


class HttpWire:
    """One connection to a server, opened when it is needed. One request at a time."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port or 0)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def close(self) -> None:
        """Close the connection."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            with suppress(OSError):
                await streams[1].wait_closed()

    async def send(
        self, request: bytes, framed: bool = True, whole: bool = True, limit: float = HANG
    ) -> Reply:
        """Send the bytes of a request and read one answer.

        Args:
            request: line, headers and body.
            framed: the request can be read as HTTP, so the server has to answer it.
            whole: False if the server has to wait for more than is sent; then the caller leaves soon.
            limit: seconds until it counts as unanswered.
        """
        begin = time.monotonic()
        if not (framed and whole):
            await self.close()
        try:
            status, body = await asyncio.wait_for(self._exchange(request), limit if whole else _WAIT_FOR_MORE)
        except TimeoutError:
            await self.close()
            outcome = Outcome.HANG if whole else Outcome.ENDED
            return _reply(outcome, "", f"no answer within {limit:g} s", begin)
        except (OSError, EOFError, ValueError, LookupError, asyncio.LimitOverrunError) as error:
            await self.close()
            outcome = Outcome.LOST if framed else Outcome.ENDED
            return _reply(outcome, "", f"{type(error).__name__}: {error}"[:200], begin)
        if not (framed and whole):
            await self.close()
        outcome = judge_http(status)
        message = "" if outcome is Outcome.ANSWERED else body[:300].decode("utf-8", "replace")
        return _reply(outcome, str(status), message, begin, body)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        used = self._streams is not None
        try:
            return await self._ask(request)
        except (OSError, EOFError):
            await self.close()
            if not used:
                raise
            # A server may close an idle connection at any time. Only a fresh one proves a loss.
            return await self._ask(request)

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=2**20)
        reader, writer = self._streams
        writer.write(request)
        # A server that refuses at once closes before it has read all. Its answer comes first.
        sending = asyncio.ensure_future(writer.drain())
        try:
            status, headers = await _head(reader)
            body = await _body(reader, headers, status)
            with suppress(OSError):
                await sending
        finally:
            sending.cancel()
        if headers.get("connection", "").lower() == "close" or not sending.done():
            await self.close()
        return status, body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    while True:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(text[0].split(" ")[1])
        if status >= 200:
            break
    pairs = (line.partition(":") for line in text[1:] if line)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str], status: int) -> bytes:
    kept, total = bytearray(), 0
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            kept += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return bytes(kept)
    size = int(headers.get("content-length", 0)) if status != 204 else 0
    while total < size:
        part = await reader.read(min(size - total, 2**16))
        if not part:
            raise EOFError(f"{total} of {size} bytes of the answer")
        total += len(part)
        kept += part if len(kept) < _ENOUGH else b""
    return bytes(kept)


def _reply(outcome: Outcome, status: str, message: str, begin: float, body: bytes = b"") -> Reply:
    now = time.monotonic()
    return Reply(outcome, status, message, now - begin, body, now)

"""Connections of HTTP callers: a limited number, none silent for long, errors in the protocol's form."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import web

from siglip_gateway.doors.refusal import error_answer

__all__ = ["Connections", "is_closed"]

_log = logging.getLogger(__name__)
_SILENCE = 75.0  # seconds for the headers of a request, and between two requests
_LINGER = 5.0  # seconds in which the rest of a refused body is read, so that its sender sees the answer
_MOST_REFUSALS = 256  # connections that wait for a refusal; further ones are closed without
_REFUSAL_TIME = 2.0  # seconds until a refused connection is closed
_REFUSAL_BODY = b'{"error": "the server is too busy: it has no connection left; try again"}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)
_CLOSED = (7, 8)  # of Linux's states: ended by a reset, and by a caller that sends no more
_READ_AHEAD = 2**16  # bytes per connection that wait until their request is read


class Connections:
    """Accept connections up to a limit. Beyond it the oldest idle one makes place.

    Args:
        answer: handler of the requests. It is cancelled when its caller goes away.
        limit: connections at once.

    Attributes:
        server: aiohttp's server, which owns the connections.
        busy: connections that have a request.
    """

    def __init__(
        self, answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], limit: int
    ) -> None:
        self.server = web.Server(answer, handler_cancellation=True)
        self.busy: set[web.RequestHandler] = set()
        self._limit = limit
        self._refusals: set[_Refusal] = set()

    def accept(self) -> asyncio.Protocol:
        """Make the protocol of a new connection."""
        connections = self.server.connections
        if len(connections) >= self._limit:
            idle = next((connection for connection in connections if connection not in self.busy), None)
            if idle is None:
                return _Refusal(self._refusals)
            idle.force_close()
        return _Connection(self.server)

    def close_idle(self) -> None:
        """Close the connections that have no request."""
        for connection in self.server.connections:
            if connection not in self.busy:
                connection.force_close()


def is_closed(transport: asyncio.BaseTransport) -> bool:
    """Tell if the caller has closed a connection, which a busy event loop reads late."""
    found = transport.get_extra_info("socket")
    if found is None:
        return False
    try:
        return found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _CLOSED
    except OSError:  # closed here too, or a system that does not tell
        return False


class _Connection(web.RequestHandler):
    """A connection with this door's limits, and with errors in the protocol's form."""

    __slots__ = ()

    def __init__(self, server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_SILENCE,
            lingering_time=_LINGER,
            read_bufsize=_READ_AHEAD,
            auto_decompress=False,  # it would inflate without a limit
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if is_closed(transport):
            # To read requests of connections that have waited for too long would take the time of those after
            # them, until none is read before its caller has gone.
            cast(asyncio.Transport, transport).abort()
            return
        super().connection_made(transport)
        # An answer counts as sent when the caller's machine has it, so that a time limit can hold for it.
        cast(asyncio.Transport, transport).set_write_buffer_limits(0)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, and a fault of this program."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        if status == 500:
            _log.error("cannot answer %s %s", request.method, request.path, exc_info=exc)
            message = "the HTTP door failed; its log says why"
        return error_answer(status, " ".join((message or "the request is not HTTP").split()), close=True)


class _Refusal(asyncio.Protocol):
    """A connection beyond the limit: its first request is refused, then it is closed.

    Args:
        others: the connections that are being refused.
    """

    def __init__(self, others: set[_Refusal]) -> None:
        self._others, self._answered = others, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._others) >= _MOST_REFUSALS:
            self._transport.abort()
            return
        self._others.add(self)
        asyncio.get_running_loop().call_later(_REFUSAL_TIME, self._transport.abort)

    def data_received(self, _data: bytes) -> None:
        if not self._answered:
            self._answered = True
            self._transport.write(_REFUSAL)
            self._transport.write_eof()  # not closed yet: unread data would destroy the answer

    def connection_lost(self, _error: Exception | None) -> None:
        self._others.discard(self)

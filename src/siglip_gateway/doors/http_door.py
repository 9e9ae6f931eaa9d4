"""The HTTP door: a reverse proxy that keeps from Triton's HTTP server what loses answers or ends it.

Triton 24.10 hands each answer to the thread of its connection through a socket that holds 278 commands. All
busy connections share one thread. When the socket is full, the command is lost without a trace: the caller
never gets its answer, and the connection is never closed. Behind the door Triton has at most 256 connections,
so the socket cannot be full. Further requests wait here, those of each model by themselves, and those beyond
that are refused with 503.

Triton does not notice a caller that goes away either. Its request leaves the queue, or Triton completes it
and the door drops the answer. Bodies are limited, inflated, and sent on with a Content-Length. JSON that
would overflow the stack of Triton's parser is refused, and so are binary strings that are not as long as they
say, with which Triton would refuse other requests. Everything else passes through unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from siglip_gateway.doors import AWAY, DRAIN
from siglip_gateway.doors.admission import Admissions, FullError, GoneError
from siglip_gateway.doors.http_bodies import Body, Held, Memory, patience, read_body
from siglip_gateway.doors.http_connections import Connections, is_closed
from siglip_gateway.doors.http_tensors import check_binary_inputs
from siglip_gateway.doors.json_nesting import pieces_of, refuse_deep_json
from siglip_gateway.doors.json_shapes import refuse_huge_shapes
from siglip_gateway.doors.refusal import SERVER, RefusedError, error_answer
from siglip_gateway.doors.timeout_parameter import ARRIVED, now

__all__ = ["MAX_BODY", "MAX_IN_FLIGHT", "HttpDoor", "Limits", "serve"]

MAX_IN_FLIGHT = 256
# A request has up to 128 images. At 4 MiB each, photos of 12 to 20 megapixels as cameras write them, this is
# 512 MiB. Triton needs up to four times as much memory for a body as it has bytes.
MAX_BODY = 512 * 2**20

_ANSWER_TIME = 1800.0  # seconds
_HEALTH_TIME = 5.0
_IDLE = 2.0  # seconds after which an unused connection to Triton is closed, to free its descriptors
_SPARE_FILES = 128
_BACKLOG = 4096  # connections that the kernel accepts before the door does
_KEPT = 8  # of as many places one is kept from each model, for others
_INFER = re.compile(r"/v2/models/([^/?]+)(?:/versions/[^/?]+)?/infer(?:\?|$)")
_LAST_DATA_RECEIVED = struct.Struct("52xI")  # milliseconds, in Linux's `tcp_info`
_JSON_SIZE = "Inference-Header-Content-Length"
# Headers of one connection, which a proxy does not pass on, and those that it writes anew.
_OF_A_CONNECTION = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
_OF_A_BODY = frozenset(("content-length", "content-encoding", "expect"))
# Triton calls JSON that it cannot use, such as a number for `id`, a failure of its own.
_WRONG_JSON = re.compile(
    rb"failed to parse the request JSON|Shape does not match true shape of"
    rb"|attempt to (access JSON non-|access non-existing|get members for non-object)"
)


@dataclass(frozen=True)
class Limits:
    """How much one process of the door takes on.

    Attributes:
        in_flight: requests that Triton has at once. All processes in front of one Triton together should not
            exceed 256, from which on Triton loses answers.
        of_one_model: inferences of one model among these, at most seven eighths of them.
        waiting: requests of one model that wait for one of these places. Further ones are refused with 503.
        body: bytes of a request's body, inflated.
        connections: of callers.
    """

    in_flight: int = MAX_IN_FLIGHT
    of_one_model: int = MAX_IN_FLIGHT
    waiting: int = 3 * MAX_IN_FLIGHT
    body: int = MAX_BODY
    connections: int = 4096


class HttpDoor:
    """Pass requests to Triton, within limits.

    Args:
        session: the connections to Triton.
        triton: its address, `host:port`.
        launcher: address of the launcher's status server, which answers `GET /health`.
    """

    def __init__(
        self, session: aiohttp.ClientSession, triton: str, launcher: str | None, limits: Limits
    ) -> None:
        self._session, self._triton, self._launcher = session, f"http://{triton}", launcher
        self._limits = limits
        most, waiting = limits.in_flight, limits.waiting
        of_one_model = min(limits.of_one_model, most - most // _KEPT)
        self._admissions = Admissions(of_one_model, waiting, most + waiting, most)
        self.memory = Memory(2 * limits.body)
        self._stopping = False
        self.connections = Connections(self.answer, limits.connections)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, and wait until the caller has the answer."""
        connection = request.protocol
        self.connections.busy.add(connection)
        try:
            answer = await self._answer(request)
            if self._stopping:
                answer.force_close()
            await self._send(request, answer)
            return answer
        finally:
            self.connections.busy.discard(connection)

    async def drain(self, seconds: float) -> None:
        """Answer no further requests, and wait until those in progress are answered."""
        self._stopping = True
        self.connections.close_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.connections.busy or self._admissions.in_flight:
                    await asyncio.sleep(0.02)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        try:
            if request.path == "/health" and self._launcher and request.method in {"GET", "HEAD"}:
                return await self._health(request.method)
            return await self._admit(request)
        except RefusedError as refused:
            return error_answer(refused.status, str(refused), close=refused.close)

    async def _admit(self, request: web.BaseRequest) -> web.Response:
        """Read a request, and have Triton answer it as soon as it has a place."""
        arrived = now() - _microseconds_in_the_kernel(request)  # its caller's patience has begun
        model = _model_of(request.raw_path)
        try:
            self._admissions.check(model)  # before the body is read
            held = self.memory.hold()
            handed_over = False

            def relay() -> Coroutine[Any, Any, web.Response]:
                nonlocal handed_over
                if request.transport is None or is_closed(request.transport):
                    raise GoneError
                handed_over = True  # the memory belongs to the call from now on, which may outlast its caller
                return self._relay(request.method, target, _passed_on(request, body, arrived), body, held)

            try:
                target = self._target(request)
                body = await read_body(request, held, self._limits.body)
                size = _json_size(request)
                text = body.parts if size is None else list(body.first(size))
                await refuse_deep_json(text)
                await refuse_huge_shapes(pieces_of(text))
                if size is None and _JSON_SIZE in request.headers:
                    given = ", ".join(request.headers.getall(_JSON_SIZE))[:100]
                    raise RefusedError(400, f"{_JSON_SIZE}: got {given!r}, expected one number")
                check_binary_inputs(body.parts, body.size, size or 0)
                return await self._admissions.run(model, relay)
            finally:
                if not handed_over:
                    held.release()
        except FullError as full:
            reason = f"the server is too busy: {full.count} requests are in progress; try again"
            raise RefusedError(503, reason) from full
        except GoneError as gone:
            raise RefusedError(408, "the caller has closed the connection", close=True) from gone

    def _target(self, request: web.BaseRequest) -> URL:
        if not request.raw_path.startswith("/"):
            raise RefusedError(400, f"{request.method} {request.raw_path[:100]}: expected a path", close=True)
        return URL(self._triton + request.raw_path, encoded=True)

    async def _relay(
        self, method: str, target: URL, headers: CIMultiDict[str], body: Body, held: Held
    ) -> web.Response:
        """Send a request to Triton and read the whole answer; give back the memory."""
        try:
            data = body.parts[0] if len(body.parts) == 1 else _stream(body) if body.parts else None
            async with self._session.request(
                method, target, data=data, headers=headers, allow_redirects=False
            ) as answer:
                return _passed_back(method, answer, await answer.read())
        except aiohttp.ClientConnectorError as error:
            raise RefusedError(503, AWAY) from error
        except ValueError as error:
            raise RefusedError(400, f"the path or a header is not HTTP: {error}") from error
        except TimeoutError as error:
            raise RefusedError(504, f"Triton did not answer within {_ANSWER_TIME:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RefusedError(
                502, f"Triton broke the connection: {error or type(error).__name__}"
            ) from error
        finally:
            held.release()

    async def _health(self, method: str) -> web.Response:
        url, limit = f"http://{self._launcher}/health", aiohttp.ClientTimeout(total=_HEALTH_TIME)
        try:
            async with self._session.request(method, url, timeout=limit) as answer:
                return _passed_back(method, answer, await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            raise RefusedError(503, "the launcher does not answer") from error

    async def _send(self, request: web.BaseRequest, answer: web.Response) -> None:
        """Send an answer; abort the connection of a caller that does not take it in time."""
        transport, held = request.transport, self.memory.hold()
        size = answer.content_length or 0
        held.add_anyway(size)
        try:
            async with asyncio.timeout(patience(size)):
                await answer.prepare(request)
                await answer.write_eof()
        except TimeoutError:
            if transport is not None:
                transport.abort()
        except ConnectionError:  # the caller is gone, as aiohttp finds out too
            pass
        finally:
            held.release()


async def serve(
    listen: str,
    triton: str,
    launcher: str | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
    max_of_one_model: int = MAX_IN_FLIGHT,
    max_body: int = MAX_BODY,
) -> None:
    """Serve until SIGTERM or SIGINT, then complete the requests in progress, for 30 s at most.

    Args:
        listen: address for callers, `host:port`. Several processes may share it.
        triton: address of Triton's HTTP server.
        launcher: address of the launcher's status server.
        max_in_flight: requests that Triton has at once.
        max_of_one_model: inferences of one model among them.
        max_body: bytes of a request's body, inflated.

    Raises:
        OSError: the address cannot be bound.
    """
    connections = min(Limits.connections, _open_files() - max_in_flight - _SPARE_FILES)
    limits = Limits(max_in_flight, max_of_one_model, body=max_body, connections=max(connections, 1))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with open_door(listen, triton, launcher, limits):
        await stop.wait()


@contextlib.asynccontextmanager
async def open_door(
    listen: str, triton: str, launcher: str | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[HttpDoor, int]]:
    """Run a door; yield it and its port. At the end it drains.

    Raises:
        OSError: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    async with _session() as session:
        door = HttpDoor(session, triton, launcher, limits or Limits())
        accept, loop = door.connections.accept, asyncio.get_running_loop()
        server = await loop.create_server(accept, host, int(port), reuse_port=True, backlog=_BACKLOG)
        try:
            yield door, server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await door.drain(DRAIN)
            await door.connections.server.shutdown(0.5)


def _session() -> aiohttp.ClientSession:
    """Connections to Triton that add, follow and undo nothing. Their number is that of the places."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE),
        timeout=aiohttp.ClientTimeout(total=_ANSWER_TIME),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


def _open_files() -> int:
    """Raise the limit of open files as far as allowed, and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _microseconds_in_the_kernel(request: web.BaseRequest) -> int:
    """How long ago the last bytes of a request came. With thousands of callers they are read late."""
    found = None if request.transport is None else request.transport.get_extra_info("socket")
    if found is None:
        return 0
    try:
        info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECEIVED.size)
        return int(_LAST_DATA_RECEIVED.unpack(info)[0]) * 1000
    except (OSError, struct.error):  # a system that does not tell
        return 0


def _model_of(path: str) -> bytes:
    """The model that an inference asks for; empty for all other requests, which wait for no inference."""
    found = _INFER.match(path)
    return found[1].encode("utf-8", "replace") if found else b""


def _json_size(request: web.BaseRequest) -> int | None:
    """Bytes of a body that Triton reads as JSON; None where it may be all of it."""
    sizes = request.headers.getall(_JSON_SIZE, [])
    return int(sizes[0]) if len(sizes) == 1 and re.fullmatch("[0-9]{1,18}", sizes[0]) else None


def _passed_on(request: web.BaseRequest, body: Body, arrived: int) -> CIMultiDict[str]:
    headers = _without(request.headers, _OF_A_CONNECTION | _OF_A_BODY)
    headers[ARRIVED] = str(arrived)  # a request's own timeout counts from there
    if body.parts or "Content-Length" in request.headers:
        headers["Content-Length"] = str(body.size)
    return headers


def _passed_back(method: str, answer: aiohttp.ClientResponse, body: bytes) -> web.Response:
    # aiohttp writes the length of a body; that of an answer to HEAD is the length of a body not sent.
    dropped = _OF_A_CONNECTION if method == "HEAD" else _OF_A_CONNECTION | {"content-length"}
    headers = _without(answer.headers, dropped)
    headers.setdefault("Server", SERVER)
    status, reason = answer.status, answer.reason
    if status == 500 and _WRONG_JSON.search(body):
        status, reason = 400, None
    return web.Response(
        status=status, reason=reason, headers=headers, body=None if method == "HEAD" else body
    )


def _without(headers: CIMultiDictProxy[str], names: frozenset[str]) -> CIMultiDict[str]:
    """A copy without `names`, and without those that the header Connection names."""
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in names | named)


async def _stream(body: Body) -> AsyncIterator[bytes]:
    for part in body.parts:
        yield part

"""An HTTP door before a server that stands for Triton, in the event loop of a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from siglip_gateway.doors.http_door import HttpDoor, Limits, open_door

__all__ = ["OpenDoor", "exchange", "exchange_bytes", "free_address", "open_before", "request_bytes"]

_DEFAULTS = Limits()
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class OpenDoor:
    """A door, and the port on which it serves."""

    door: HttpDoor
    port: int

    @property
    def url(self) -> str:
        """Address for an HTTP client."""
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def open_before(
    triton: Handler, limits: Limits = _DEFAULTS, launcher: str | None = None
) -> AsyncIterator[OpenDoor]:
    """Open a door before a server with the handler `triton`."""
    server = await asyncio.get_running_loop().create_server(web.Server(triton), "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with open_door("127.0.0.1:0", address, launcher, limits) as (door, port):
            yield OpenDoor(door, port)
    finally:
        server.close()


def request_bytes(body: bytes = b"", *headers: str, path: str = "/v2/models/m/infer") -> bytes:
    """A POST as it goes over the wire, with a Content-Length unless `headers` have a length of their own."""
    if not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        headers = (*headers, f"Content-Length: {len(body)}")
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: test", *headers, "", ""]).encode() + body


async def exchange_bytes(port: int, sent: bytes, seconds: float = 10.0) -> bytes:
    """Send bytes and return all that comes back until the connection is closed.

    Raises:
        TimeoutError: it stays open.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        async with asyncio.timeout(seconds):
            return await reader.read()
    finally:
        writer.close()


async def exchange(port: int, sent: bytes) -> tuple[int, bytes]:
    """Send a request, keep the connection open, and return the status and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            body = await reader.readexactly(int(length.partition(b":")[2]))
        return int(head.split()[1]), body
    finally:
        writer.close()


async def free_address() -> str:
    """An address where nothing listens."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    return f"127.0.0.1:{port}"

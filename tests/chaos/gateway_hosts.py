"""Two small web servers: an allowed one outside, and one inside that a gateway must never reach."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tests.chaos.cases.base import small_photo
from tests.chaos.cases.gateway_urls import redirects
from tests.chaos.gateway_serve import OUTSIDE

__all__ = ["Hosts", "hosts"]


@dataclass
class Hosts:
    """Both servers, which have one port.

    Attributes:
        port: of both.
        inside: first bytes of what the inner one was sent.
        outside: requests to the outer one.
    """

    port: int = 0
    inside: list[bytes] = field(default_factory=list)
    outside: int = 0

    async def answer_inside(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Note a connection. To be connected to is a fault already."""
        with suppress(OSError, TimeoutError):
            self.inside.append(await asyncio.wait_for(reader.read(200), 2))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
        writer.close()

    async def answer_outside(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer as a web server that may be hostile."""
        self.outside += 1
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
            path = head.split(b" ")[1].decode("latin-1")
            await self._answer(path, writer)
        writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        name, _, number = path.strip("/").partition("/")
        targets = redirects(self.port)
        if name in ("redirect", "forever"):
            target = "/forever" if name == "forever" else targets[int(number or 0) % len(targets)]
            writer.write(
                f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n"
                "Connection: close\r\n\r\n".encode()
            )
        elif name == "missing":
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif name == "cut":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nabc")
        elif name == "slow":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            for _ in range(30):
                writer.write(b"x")
                await asyncio.sleep(0.1)
        else:
            bodies = {"page": b"<html>", "large": bytes(2**21), "empty": b""}
            body = bodies.get(name, small_photo())
            coding = "Content-Encoding: gzip\r\n" if name == "gzip" else ""
            writer.write(f"HTTP/1.1 200 OK\r\n{coding}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@asynccontextmanager
async def hosts() -> AsyncIterator[Hosts]:
    """Run both servers."""
    made = Hosts()
    outer = await asyncio.start_server(made.answer_outside, OUTSIDE, 0)
    made.port = outer.sockets[0].getsockname()[1]
    inner = [await asyncio.start_server(made.answer_inside, "127.0.0.1", made.port)]
    if socket.has_ipv6:
        with suppress(OSError):
            inner.append(await asyncio.start_server(made.answer_inside, "::1", made.port))
    try:
        yield made
    finally:
        for server in (outer, *inner):
            server.close()

"""Which answers a client asks again for, how often, and what it raises at the end."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from siglip_serve_client import (
    AccessError,
    AsyncClient,
    Client,
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    UnavailableError,
)

ATTEMPTS = 5


class Refusing(ThreadingHTTPServer):
    """Answers every request with one status, and counts the requests for a model's answer."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.asked = status, 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Refusing

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += self.path.endswith("/infer")
        body = json.dumps({"error": f"refused with {self.server.status}"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Write nothing."""


@contextmanager
def refusing(status: int) -> Iterator[Refusing]:
    """A server that refuses everything."""
    with Refusing(status) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(url: str, kind: str, timeout: float = 30.0) -> None:
    """Embed a text by a client of one kind."""
    if kind == "sync":
        with Client(url, timeout=timeout) as client:
            client.embed_text("a dog")
        return

    async def embed() -> None:
        async with AsyncClient(url, timeout=timeout) as client:
            await client.embed_text("a dog")

    asyncio.run(embed())


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts last a hundredth of a second."""
    monkeypatch.setattr(random, "uniform", lambda _low, _high: 0.01)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("status", [429, 503, 504])
def test_asks_a_busy_server_five_times(status: int, kind: str) -> None:
    with refusing(status) as server, pytest.raises(UnavailableError, match=str(status)) as refused:
        ask(server.url, kind)
    assert type(refused.value) is UnavailableError
    assert server.asked == ATTEMPTS


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidInputError),
        (413, InvalidInputError),
        (401, AccessError),
        (403, AccessError),
        (404, ServerError),
        (500, ServerError),
    ],
)
def test_asks_once_where_another_attempt_cannot_help(status: int, error: type[ClientError]) -> None:
    with refusing(status) as server, pytest.raises(ClientError, match=f"refused with {status}") as refused:
        ask(server.url, "sync")
    assert type(refused.value) is error
    assert server.asked == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_waits_longer_before_each_attempt(kind: str) -> None:
    with refusing(503) as server, pytest.raises(DeadlineError, match=r"did not answer within 0\.9 s"):
        ask(server.url, kind, timeout=0.9)
    # The third attempt comes after 0.4 s at least, the fourth after 1.4 s.
    assert 2 <= server.asked <= 3


def test_draws_pauses_from_their_upper_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.01

    monkeypatch.setattr(random, "uniform", uniform)
    with refusing(503) as server, pytest.raises(UnavailableError):
        ask(server.url, "sync")
    assert drawn == [(0.1, 0.2), (0.3, 0.6), (1.0, 2.0), (3.0, 6.0)]

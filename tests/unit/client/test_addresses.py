"""Addresses that a client accepts, and the ports that they stand for."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from instant_server import instant_server
from siglip_serve_client import AsyncClient, Client, UnreachableError
from siglip_serve_client.commands.main import main

GRPC_IN_PLACE_OF_HTTP = r"is a gRPC port, expected the HTTP port \(8000 by default\), or the address grpc://"
HTTP_IN_PLACE_OF_GRPC = r"is an HTTP port, expected the gRPC port \(8001 by default\), or the address http://"


class _Metrics(BaseHTTPRequestHandler):
    """Triton's metrics port: 200 for every path, one of which has a body, and 405 for other methods."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'nv_inference_count{model="embed_image"} 1\n' if self.path == "/metrics" else b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(405)
        self.end_headers()
        self.wfile.write(b'{"error":"Method Not Allowed"}')

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metrics() -> Iterator[str]:
    """The address of a metrics port, host:port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metrics)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url", ["ftp://host:1", "host", "grpc://host", "http://host/path", "host:port", "http://", "host:99999"]
)
def test_refuses_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected host:port, or grpc://, grpcs://, http:// or https://"):
        Client(url)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_asks_at_the_port_of_the_scheme_unless_another_is_named(scheme: str, port: int) -> None:
    # An address of the loopback on which nothing is expected to listen.
    for url, expected in ((f"{scheme}://127.7.7.7", port), (f"{scheme}://127.7.7.7:1", 1)):
        message = f"no server answers at 127.7.7.7:{expected}$"
        with Client(url, timeout=10) as client, pytest.raises(UnreachableError, match=message):
            client.embed_text("a dog")


def refusal(url: str) -> str:
    """The message of both clients, which is the same, and of the command."""
    with Client(url, timeout=10) as client, pytest.raises(UnreachableError) as caught:
        client.check_health()

    async def ask() -> None:
        async with AsyncClient(url, timeout=10) as client:
            await client.embed_text("a dog")

    with pytest.raises(UnreachableError) as again:
        asyncio.run(ask())
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def test_says_which_port_was_named_in_place_of_another(metrics: str) -> None:
    with instant_server() as server:
        grpc, http = (url.partition("://")[2] for url in (server.grpc_url, server.http_url))
        assert re.search(HTTP_IN_PLACE_OF_GRPC, refusal(http))
        assert re.search(GRPC_IN_PLACE_OF_HTTP, refusal(f"http://{grpc}"))
        assert refusal(f"https://{http}") == f"{http} does not speak TLS, expected http://{http}"
    for url in (metrics, f"http://{metrics}"):
        assert refusal(url).startswith(f"{metrics} is the metrics port; by default 8001 is the gRPC port")


class _Silent(_Metrics):
    """A server that closes the connection of another protocol without an answer."""

    def send_error(self, *_: object) -> None:
        self.close_connection = True


def test_recognises_a_port_that_closes_connections_without_an_answer() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert " is the metrics port; " in refusal(f"127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()


def test_health_says_which_port_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    with instant_server() as server:
        assert main(["health", "--url", server.http_url.removeprefix("http://")]) == 1
    assert re.search(HTTP_IN_PLACE_OF_GRPC, capsys.readouterr().err)

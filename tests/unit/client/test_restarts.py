"""Clients survive a server that ends, breaks connections or loses a model process, and comes back."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from breakable_wire import Wire, wire_to
from instant_server import WIDTH, instant_server
from siglip_serve_client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineError,
    MissingModelError,
    ModelDiedError,
    RestartingError,
    ServerError,
    UnavailableError,
    UnreachableError,
)
from siglip_serve_client._operations import retries
from siglip_serve_client._transports.status import error_of
from tritonclient.grpc import service_pb2, service_pb2_grpc

DIED = "in ensemble 'embed_text', Stub process 'siglip_text_model_0_0' is not healthy."
LIED = (
    "in ensemble 'embed_text', incomplete string data for inference input 'INPUT_TEXT', "
    "expecting string of length 5 but only 0 bytes available"
)
STOPPING = (
    "in ensemble 'embed_text', [request id: <id_unknown>] Server is stopping, "
    "scheduler for model has stopped accepting new inference requests"
)


@pytest.fixture(params=["grpc", "http"])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[str, Wire]]:
    """The address of a server that answers at once, behind a wire, and the wire."""
    with instant_server() as server:
        url = server.grpc_url if request.param == "grpc" else server.http_url
        with wire_to(int(url.rpartition(":")[2])) as made:
            yield f"{request.param}://127.0.0.1:{made.port}", made


def after(seconds: float, wire: Wire, away: float | None) -> None:
    """Cut a wire some seconds from now, and mend it after `away` more."""
    threading.Timer(seconds, wire.cut).start()
    if away is not None:
        threading.Timer(seconds + away, wire.mend).start()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_repeats_requests_whose_connection_breaks(wire: tuple[str, Wire], kind: str) -> None:
    """Requests are under way when the server ends, and others come while it is away."""
    url, cable = wire
    if kind == "sync":
        with Client(url, timeout=60) as client:
            client.embed_text("a dog")
            cable.hold()
            after(0.3, cable, away=0.6)
            with ThreadPoolExecutor(4) as pool:
                texts = ["a dog", "a cat", "a car", "a cow"]
                rows = list(pool.map(client.embed_text, texts))
                rows.append(client.embed_text("a bus"))
    else:

        async def ask() -> list[Any]:
            async with AsyncClient(url, timeout=60) as client:
                await client.embed_text("a dog")
                cable.hold()
                after(0.3, cable, away=0.6)
                return await asyncio.gather(*(client.embed_text(f"{n} dogs") for n in range(5)))

        rows = asyncio.run(ask())
    np.testing.assert_array_equal(rows, np.ones((5, WIDTH)))
    assert cable.connections >= 2


def test_describes_a_server_that_was_away(wire: tuple[str, Wire]) -> None:
    url, cable = wire
    with Client(url, timeout=60) as client:
        client.embed_text("a dog")
        cable.cut()
        threading.Timer(1, cable.mend).start()
        assert client.describe()["dtype"] == ""


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_first_connection_that_is_refused_is_an_error_at_once(scheme: str) -> None:
    begin = time.monotonic()
    with Client(f"{scheme}://127.0.0.1:9") as client, pytest.raises(UnreachableError, match="no server"):
        client.embed_text("a dog")
    assert time.monotonic() - begin < 5


def test_a_lost_server_is_waited_for_once_by_all_requests(wire: tuple[str, Wire]) -> None:
    url, cable = wire
    with Client(url, timeout=60, restart_wait=1.5) as client:
        client.embed_text("a dog")
        cable.cut()
        begin = time.monotonic()
        for longest in (12.0, 5.0):
            with pytest.raises(UnreachableError, match="no server answers"):
                client.embed_text("a dog")
            assert time.monotonic() - begin < longest
            if longest == 12.0:
                assert time.monotonic() - begin > 1.4
            begin = time.monotonic()
        cable.mend()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # gRPC tries to connect every two seconds
            try:
                client.embed_text("a dog")
                break
            except UnreachableError:
                time.sleep(0.2)
        cable.cut()
        threading.Timer(0.5, cable.mend).start()
        client.embed_text("a dog")  # the wait begins anew


def test_the_timeout_ends_the_wait_for_a_lost_server(wire: tuple[str, Wire]) -> None:
    url, cable = wire
    with Client(url, timeout=1.5) as client:
        client.embed_text("a dog")
        cable.cut()
        begin = time.monotonic()
        with pytest.raises(UnreachableError, match="no server answers"):
            client.embed_text("a dog")
        assert 1.4 < time.monotonic() - begin < 10


def test_does_not_wait_where_the_caller_does_not(wire: tuple[str, Wire]) -> None:
    url, cable = wire
    with Client(url, restart_wait=0) as client:
        client.embed_text("a dog")
        cable.cut()
        begin = time.monotonic()
        with pytest.raises(UnavailableError):
            client.embed_text("a dog")
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_address_that_closes_every_connection_is_not_waited_for_long(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_UNPROVEN_WAIT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_all() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=close_all, daemon=True).start()
        begin = time.monotonic()
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        with Client(url) as client, pytest.raises(UnavailableError):
            client.embed_text("a dog")
        assert time.monotonic() - begin < 20
        listener.shutdown(socket.SHUT_RDWR)


class _Failing:
    """Fails a number of requests with one message, then answers."""

    def __init__(self, message: str, code: grpc.StatusCode, status: int, times: int) -> None:
        self.message, self.code, self.status, self.times = message, code, status, times
        self.asked = 0

    def fails(self) -> bool:
        self.asked += 1
        return self.asked <= self.times


class _Silent(_Failing):
    """Fails a number of requests, then does not answer until `end` is set."""

    def __init__(self, message: str, code: grpc.StatusCode, status: int, times: int) -> None:
        super().__init__(message, code, status, times)
        self.end = threading.Event()

    def fails(self) -> bool:
        return super().fails() or self.end.wait()


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, failing: _Failing) -> None:
        self.failing = failing

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in the protocol
        if self.failing.fails():
            context.abort(self.failing.code, self.failing.message)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="EMBEDDING", datatype="FP32", shape=[1, 8])
        answer.raw_output_contents.append(np.ones(8, np.float32).tobytes())
        return answer


class _Handler(BaseHTTPRequestHandler):
    failing: _Failing

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        shown = {"name": "EMBEDDING", "datatype": "FP32", "shape": [1, 8], "data": [1.0] * 8}
        fails = self.failing.fails()
        answer = json.dumps({"error": self.failing.message} if fails else {"outputs": [shown]}).encode()
        self.send_response(self.failing.status if fails else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Write nothing."""


@contextmanager
def serving(scheme: str, failing: _Failing) -> Iterator[str]:
    """The address of a server that fails."""
    if scheme == "http":
        handler = type("FailingHandler", (_Handler,), {"failing": failing})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
        return
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(failing), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"grpc://127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize(
    ("message", "code", "status"),
    [
        (DIED, grpc.StatusCode.INTERNAL, 500),
        (STOPPING, grpc.StatusCode.UNAVAILABLE, 503),
        ("Triton is not running", grpc.StatusCode.UNAVAILABLE, 503),
        ("bad gateway", grpc.StatusCode.CANCELLED, 502),
    ],
)
def test_repeats_what_was_not_computed_until_it_is(
    scheme: str, message: str, code: grpc.StatusCode, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, _high: 0.01)
    failing = _Failing(message, code, status, times=9)  # a busy server is asked five times
    with serving(scheme, failing) as url, Client(url, timeout=60) as client:
        np.testing.assert_array_equal(client.embed_text("a dog"), np.ones(8))
    assert failing.asked == 10


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_gives_up_on_a_model_that_dies_every_time(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_MODEL_WAIT", 1.0)
    failing = _Failing(DIED, grpc.StatusCode.INTERNAL, 500, times=10**6)
    with serving(scheme, failing) as url, Client(url, timeout=60) as client:
        with pytest.raises(ModelDiedError, match="siglip_text_model_0_0' is not healthy") as raised:
            client.embed_text("a dog")
        assert isinstance(raised.value, ServerError)
    assert 3 <= failing.asked <= 6


def test_names_the_last_failure_when_the_time_is_over() -> None:
    failing = _Failing(STOPPING, grpc.StatusCode.UNAVAILABLE, 503, times=10**6)
    with serving("http", failing) as url, Client(url, timeout=1) as client:
        message = "embed_text did not answer within 1 s: Server is stopping"
        with pytest.raises(DeadlineError, match=message):
            client.embed_text("a dog")


def test_names_the_last_failure_when_a_later_attempt_has_no_answer() -> None:
    silent = _Silent(STOPPING, grpc.StatusCode.UNAVAILABLE, 503, times=1)
    with serving("http", silent) as url, Client(url, timeout=2) as client:
        message = "embed_text did not answer within 2 s: Server is stopping"
        with pytest.raises(DeadlineError, match=message):
            client.embed_text("a dog")
        silent.end.set()


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        ("INTERNAL", DIED, ModelDiedError),
        ("500", DIED, ModelDiedError),
        ("INTERNAL", "internal error (RuntimeError), see the server's log", ServerError),
        ("UNAVAILABLE", STOPPING, RestartingError),
        ("UNAVAILABLE", "Stream removed (recvmsg:Connection reset by peer (104))", RestartingError),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", RestartingError),
        ("UNAVAILABLE", "Socket closed", RestartingError),
        ("UNAVAILABLE", "GOAWAY received", RestartingError),
        ("UNAVAILABLE", "sendmsg: Broken pipe (32)", RestartingError),
        ("UNAVAILABLE", "Received http2 header with status: 502", RestartingError),
        ("INTERNAL", "Received RST_STREAM with error code 2", RestartingError),
        ("503", "Request for unknown model: 'siglip_text' has no available versions", RestartingError),
        ("503", "the server does not answer; try again later", RestartingError),
        ("UNAVAILABLE", "'embed_text' version 1 is not at ready state", RestartingError),
        ("UNAVAILABLE", "Exceeds maximum queue size", UnavailableError),
        ("INVALID_ARGUMENT", LIED, UnavailableError),
        ("400", LIED, UnavailableError),
        ("UNAVAILABLE", "Received http2 header with status: 429", UnavailableError),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: "
            "Failed to connect to remote host: Connection refused",
            UnreachableError,
        ),
        ("UNAVAILABLE", "DNS resolution failed for nosuch:8001", UnreachableError),
        ("404", "Request for unknown model: 'nosuch' is not found", MissingModelError),
    ],
)
def test_tells_failures_apart(status: str, message: str, error: type[ClientError]) -> None:
    assert type(error_of(status, message, "host:1")) is error
    if not status.isdecimal():
        assert type(error_of(f"StatusCode.{status}", message, "host:1")) is error

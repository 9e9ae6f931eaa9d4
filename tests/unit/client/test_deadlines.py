"""The time that a call has left travels with each request, and a request that expired in a queue is late."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from siglip_serve_client import AsyncClient, Client, DeadlineError, UnavailableError
from siglip_serve_client._operations.requests import Call
from siglip_serve_client._transports.status import error_of
from tritonclient.grpc import service_pb2, service_pb2_grpc

EXPIRED = "in ensemble 'embed_text', Request timeout expired"
FULL = "in ensemble 'embed_text', Exceeds maximum queue size"
ROW = np.ones((1, 8), np.float32).tobytes()


class Recording:
    """Refuses with each message once, then answers. Keeps the timeout of each request, in seconds."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.timeouts: list[float] = []
        self.deadlines: list[float] = []  # of gRPC, in seconds from the arrival of each request

    def receive(self, microseconds: int) -> str | None:
        """Take in a request; return the message that refuses it, or None."""
        self.timeouts.append(microseconds / 1e6)
        return self.refusals.pop(0) if self.refusals else None


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in the protocol
        self.recording.deadlines.append(context.time_remaining())
        refusal = self.recording.receive(request.parameters["timeout"].int64_param)
        if refusal:
            context.abort(grpc.StatusCode.UNAVAILABLE, refusal)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="EMBEDDING", datatype="FP32", shape=[1, 8])
        answer.raw_output_contents.append(ROW)
        return answer


class Handler(BaseHTTPRequestHandler):
    recording: Recording

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = json.loads(body[: int(self.headers["Inference-Header-Content-Length"])])
        refusal = self.recording.receive(head["parameters"]["timeout"])
        shown = {"name": "EMBEDDING", "datatype": "FP32", "shape": [1, 8], "data": [1.0] * 8}
        answer = json.dumps({"error": refusal} if refusal else {"outputs": [shown]}).encode()
        self.send_response(503 if refusal else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Write nothing."""


@pytest.fixture
def recording() -> Recording:
    return Recording()


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, recording: Recording) -> Iterator[str]:
    """Address of a server that records."""
    if request.param == "http":
        handler = type("RecordingHandler", (Handler,), {"recording": recording})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
        return
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(recording), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"grpc://127.0.0.1:{port}"
        server.stop(0).wait()


def embed(url: str, kind: str, timeout: float) -> None:
    """Embed a text by a client of one kind."""
    if kind == "sync":
        with Client(url, timeout=timeout) as client:
            client.embed_text("a dog")
        return

    async def ask() -> None:
        async with AsyncClient(url, timeout=timeout) as client:
            await client.embed_text("a dog")

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_sends_the_time_that_is_left(kind: str, url: str, recording: Recording) -> None:
    recording.refusals = [FULL]
    embed(url, kind, timeout=60)
    first, second = recording.timeouts
    assert 50 < first <= 60
    assert second <= first - 0.1  # the shortest pause between two attempts


@pytest.mark.parametrize("url", ["grpc"], indirect=True)
def test_waits_for_the_refusal_of_the_server(url: str, recording: Recording) -> None:
    """The deadline of gRPC comes after the end of the wait in a queue.

    The difference is less by the time until a request arrives, and gRPC sends three digits, rounded up.
    """
    with Client(url, timeout=5) as client:
        for text in ("a dog", "a cat", "a car", "a bus", "a cow"):
            client.embed_text(text)
    later = [deadline - sent for sent, deadline in zip(recording.timeouts, recording.deadlines, strict=True)]
    assert 0.1 < max(later) <= 0.27


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_does_not_ask_again_when_a_request_expired_in_a_queue(
    kind: str, url: str, recording: Recording
) -> None:
    recording.refusals = [EXPIRED] * 5
    with pytest.raises(DeadlineError, match="in time: Request timeout expired"):
        embed(url, kind, timeout=60)
    assert len(recording.timeouts) == 1


@pytest.mark.parametrize("status", ["UNAVAILABLE", "StatusCode.UNAVAILABLE", "503"])
def test_tells_an_expired_request_from_a_full_queue(status: str) -> None:
    assert type(error_of(status, EXPIRED, "host:1")) is DeadlineError
    assert type(error_of(status, FULL, "host:1")) is UnavailableError


@pytest.mark.parametrize(
    ("timeout", "microseconds"),
    [(1.5, 1_250_000), (0.2, 150_000), (1e-9, 1), (math.inf, 10**15)],
)
def test_any_timeout_is_a_number_of_the_protocol(timeout: float, microseconds: int) -> None:
    assert Call("embed_text", [], timeout=timeout).microseconds == microseconds

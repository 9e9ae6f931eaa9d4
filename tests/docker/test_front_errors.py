"""The front's own answers have the form of the protocol: JSON over HTTP, a grpc-status over gRPC."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from breakable_wire import wire_to
from front import Front, run_front
from instant_server import WIDTH, instant_server
from programs import free_port
from siglip_serve_client import Client
from tritonclient.grpc import service_pb2, service_pb2_grpc

INFER = "/v2/models/embed_text/infer"
RAW = {"Inference-Header-Content-Length": "0"}


def send(
    front: Front, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Status and error of an answer, which must be JSON."""
    context = ssl.create_default_context(cafile=front.certificate)
    connection = http.client.HTTPSConnection("127.0.0.1", front.port, context=context, timeout=30)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {front.key}", **(headers or {})})
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "application/json", answer.status
        return answer.status, json.loads(answer.read())["error"]
    finally:
        connection.close()


def send_bytes(front: Front, data: bytes, tls: bool = True) -> tuple[int, str]:
    """Status and error of the answer to bytes that need not be HTTP."""
    with socket.create_connection(("127.0.0.1", front.port), timeout=30) as plain:
        context = ssl.create_default_context(cafile=front.certificate)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain as connection:
            connection.sendall(data)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status, json.loads(answer.read())["error"]


def call(
    front: Front, size: int = 10, compression: grpc.Compression = grpc.Compression.NoCompression
) -> tuple[grpc.StatusCode, str]:
    """Code and details of a failed inference over gRPC."""
    credentials = grpc.ssl_channel_credentials(front.certificate.read_bytes())
    with grpc.secure_channel(front.address, credentials, compression=compression) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="embed_text", raw_input_contents=[b"x" * size])
        key = [("authorization", f"Bearer {front.key}")]
        with pytest.raises(grpc.RpcError) as failed:
            stub.ModelInfer(request, metadata=key, timeout=30)
    return failed.value.code(), failed.value.details()


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose server is away."""
    nowhere = f"127.0.0.1:{free_port()}"
    with run_front(nowhere, nowhere, tmp_path_factory.mktemp("lonely")) as running:
        yield running


@contextmanager
def limited(folder: Path, **limits: str) -> Iterator[Front]:
    """A front with limits before a server that answers at once."""
    with instant_server() as server:
        urls = [url.partition("://")[2] for url in (server.http_url, server.grpc_url)]
        with run_front(urls[0], urls[1], folder, **limits) as running:
            yield running


def test_a_server_that_is_away_is_unavailable(lonely: Front) -> None:
    message = "the server does not answer; try again later"
    assert send(lonely, "POST", INFER, b"x", RAW) == (503, message)
    assert send(lonely, "POST", INFER, b"{}") == (503, message)
    assert send(lonely, "GET", "/v2/health/ready") == (503, message)
    for method, path in (("POST", "/v1/embeddings"), ("POST", "/v2/embed"), ("GET", "/health"), ("GET", "/")):
        assert send(lonely, method, path, b"{}" if method == "POST" else b"") == (503, message)
    assert call(lonely) == (grpc.StatusCode.UNAVAILABLE, message)


def test_a_server_that_breaks_the_connection_is_unavailable(tmp_path: Path) -> None:
    message = "the server does not answer; try again later"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset_all() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(1)
                connection.close()

        threading.Thread(target=reset_all, daemon=True).start()
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        with run_front(url, url, tmp_path) as front:
            assert send(front, "POST", INFER, b"x", RAW) == (503, message)
            assert call(front) == (grpc.StatusCode.UNAVAILABLE, message)
        listener.shutdown(socket.SHUT_RDWR)


def test_a_silent_server_is_late(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with run_front(url, url, tmp_path, FRONT_TIMEOUT="1s") as front:
            message = "the server did not answer in time"
            assert send(front, "POST", INFER, b"x", RAW) == (504, message)
            assert call(front) == (grpc.StatusCode.DEADLINE_EXCEEDED, message)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip, gzip", "identity"])
def test_compressed_bodies_are_refused(lonely: Front, coding: str) -> None:
    headers = {**RAW, "Content-Encoding": coding}
    refused = (415, "compressed requests are not taken")
    assert send(lonely, "POST", INFER, gzip.compress(b"x" * 1000), headers) == refused
    assert send(lonely, "POST", INFER, b"{}", {"Content-Encoding": coding}) == refused


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_refused(lonely: Front, compression: grpc.Compression) -> None:
    refused = (grpc.StatusCode.UNIMPLEMENTED, "compressed requests are not taken")
    assert call(lonely, size=10_000, compression=compression) == refused


def test_large_requests_are_refused(tmp_path: Path) -> None:
    with limited(tmp_path, FRONT_MAX_BODY="100k") as front:
        message = "the request is larger than 100k"
        assert send(front, "POST", INFER, b"x" * 200_000, RAW) == (413, message)
        assert call(front, size=200_000) == (grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        status, message = send(front, "POST", INFER, b"[" * 70_000)
        assert status == 413
        assert message.startswith("JSON may be 64 kB")


def test_the_gateway_has_keys_and_limits_of_the_front(lonely: Front, tmp_path: Path) -> None:
    for path in ("/v1/embeddings", "/v2/embed", "/vectorize", "/predict", "/classify", "/explain", "/teams"):
        assert lonely.post(path, b"{}", {}, key="")[0] == 401
        refused = (415, "compressed requests are not taken")
        assert send(lonely, "POST", path, gzip.compress(b"{}"), {"Content-Encoding": "gzip"}) == refused
        assert send(lonely, "GET", path) == (405, "not with this method")
    for path in ("/v1/models", "/meta", "/ping", "/health", "/.well-known/ready"):
        assert lonely.post(path, None, {}, key="")[0] == 401
        assert send(lonely, "DELETE", path) == (405, "not with this method")
    for path in ("/metrics", "/docs", "/v2/embed/x", "/v3/embed"):
        assert send(lonely, "GET", path) == (404, "not found, or closed")
    with limited(tmp_path, FRONT_GATEWAY_MAX_BODY="100k") as front:
        assert send(front, "POST", "/v1/embeddings", b"[" * 200_000) == (
            413,
            "the request is larger than 100k",
        )


def test_too_many_requests_are_refused(tmp_path: Path) -> None:
    with limited(tmp_path, FRONT_RATE="1") as front:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: front.post(INFER, b"x", RAW), range(8)))
        refused = {(status, body) for status, body in answers if status != 200}
        assert refused == {(429, b'{"error":"too many requests of this key"}')}
        assert call(front) == (grpc.StatusCode.UNAVAILABLE, "too many requests of this key")


def test_malformed_http_is_refused_in_json(lonely: Front) -> None:
    malformed = (400, "malformed request, or not encrypted")
    begin = b"POST /v2 HTTP/1.1\r\nHost: a\r\n"
    assert send_bytes(lonely, begin + b"Content-Length: x\r\n\r\n") == malformed
    assert send_bytes(lonely, begin + b"X: " + b"a" * 9_000 + b"\r\n\r\n") == malformed
    assert send_bytes(lonely, b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n", tls=False) == malformed
    assert send_bytes(lonely, b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n") == (
        414,
        "the path is too long",
    )
    message = "this version or coding of HTTP is not taken"
    assert send_bytes(lonely, b"GET /v2 HTTP/7.0\r\n\r\n") == (505, message)
    assert send_bytes(lonely, begin + b"Transfer-Encoding: gzip\r\n\r\n") == (501, message)


def test_the_pages_of_refusals_are_no_way_around_the_key(lonely: Front) -> None:
    status, body = lonely.post("/refused/400", None, {}, key="")
    assert (status, body) == (404, b'{"error":"not found, or closed"}')


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_clients_wait_behind_the_front_for_a_server_that_is_started_again(
    scheme: str, tmp_path: Path
) -> None:
    with instant_server() as server:
        ports = [int(url.rpartition(":")[2]) for url in (server.http_url, server.grpc_url)]
        with wire_to(ports[0]) as http_wire, wire_to(ports[1]) as grpc_wire:
            urls = [f"127.0.0.1:{wire.port}" for wire in (http_wire, grpc_wire)]
            with (
                run_front(urls[0], urls[1], tmp_path) as front,
                Client(
                    f"{scheme}://{front.address}", 16, 60, api_key=front.key, ca_file=front.certificate
                ) as client,
            ):
                client.embed_text("a dog")
                for wire in (http_wire, grpc_wire):
                    wire.cut()
                    threading.Timer(1.5, wire.mend).start()
                row = client.embed_text("a dog")
    np.testing.assert_array_equal(row, np.ones(WIDTH))

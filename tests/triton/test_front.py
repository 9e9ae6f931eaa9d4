"""docker/front, really in front of the server: who gets in, what is open, and that nothing harms the server."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from front import Front
from images import encode, photo
from programs import free_port
from tritonclient.utils import InferenceServerException
from wire import raw_embedding

from siglip_serve.launcher import TritonServer

PICTURE = encode(photo(80, 60), "JPEG")
INFER = "/v2/models/embed_image/infer"
RAW = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
LIMIT = 34 * 2**20


@pytest.fixture(scope="module")
def front(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """With the settings that an operator gets."""
    with Front(tmp_path_factory.mktemp("front"), server.http_url, server.grpc_url) as running:
        yield running
    log = running.log.read_text(encoding="utf-8")
    assert running.key not in log  # whatever the tests have sent
    assert "Bearer" not in log


@pytest.fixture(autouse=True)
def the_server_lives_on(front: Front) -> Iterator[None]:
    yield
    status, body = front.send(INFER, PICTURE, RAW)
    assert status == 200
    assert np.isfinite(raw_embedding(body)).all()


class GrpcFront:
    """Plain tritonclient calls through the front."""

    def __init__(self, front: Front, tls: bool = True) -> None:
        roots = str(front.ca_file) if tls else None
        self.client = triton_grpc.InferenceServerClient(front.url, ssl=tls, root_certificates=roots)
        self.headers = {"authorization": f"Bearer {front.key}"}

    def embed(self, row: bytes = PICTURE, **options: Any) -> Any:
        tensor = triton_grpc.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[row]], dtype=np.object_))
        arguments: dict[str, Any] = {"headers": self.headers, "client_timeout": 30, **options}
        return self.client.infer("embed_image", [tensor], **arguments).as_numpy("EMBEDDING")


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode.")


def error(body: bytes) -> str:
    """The message, in the form of Triton's own."""
    message = json.loads(body)["error"]
    assert isinstance(message, str)
    return message


def test_https_and_grpc_answer_as_the_server_does(front: Front, server: TritonServer) -> None:
    status, body = front.send(INFER, PICTURE, RAW)
    assert status == 200
    through_grpc = GrpcFront(front).embed()
    direct = triton_grpc.InferenceServerClient(server.grpc_url)
    tensor = triton_grpc.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[PICTURE]], dtype=np.object_))
    expected = direct.infer("embed_image", [tensor]).as_numpy("EMBEDDING")
    np.testing.assert_array_equal(raw_embedding(body), expected[0])
    np.testing.assert_array_equal(through_grpc, expected)


def test_one_port_speaks_http_1_and_2(front: Front) -> None:
    for protocol in ("h2", "http/1.1"):
        context = ssl.create_default_context(cafile=str(front.ca_file))
        context.set_alpn_protocols([protocol])
        with (
            socket.create_connection(("127.0.0.1", front.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            assert secured.selected_alpn_protocol() == protocol
            assert secured.version() in {"TLSv1.2", "TLSv1.3"}


def test_request_parameters_reach_the_server_as_headers(front: Front) -> None:
    """Names with underscores too, which nginx drops unless told otherwise."""
    headers = {**RAW, "base64_encoded": "true", "normalized": "true"}
    status, body = front.send(INFER, base64.b64encode(PICTURE), headers)
    assert status == 200
    assert np.linalg.norm(raw_embedding(body)) == pytest.approx(1, abs=1e-5)


def test_errors_of_the_server_pass_through(front: Front) -> None:
    status, body = front.send(INFER, b"not an image", RAW)
    assert status == 400
    assert "not a decodable image" in error(body)
    assert refused(lambda: GrpcFront(front).embed(b"not an image")) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("key", [None, "0" * 64, "tester", " "])
def test_without_a_valid_key(key: str | None, front: Front) -> None:
    for path, body in ((INFER, PICTURE), ("/v2/health/ready", None), ("/nosuch", None)):
        status, answer = front.send(path, body, RAW, key, "POST" if body else "GET")
        assert status == 401
        assert "key" in error(answer)
    caller = GrpcFront(front)
    caller.headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert refused(caller.embed) == "UNAUTHENTICATED"
    assert refused(lambda: caller.client.is_server_live(headers=caller.headers)) == "UNAUTHENTICATED"
    assert refused(lambda: caller.client.get_model_repository_index(headers=caller.headers)) == "UNAUTHENTICATED"


def test_another_scheme_or_a_key_in_the_address_is_no_key(front: Front) -> None:
    for value in (front.key, f"Basic {front.key}", f"Bearer {front.key}x", f"Bearer  {front.key}"):
        assert front.send("/v2", None, {"Authorization": value}, None, "GET")[0] == 401
    assert front.get(f"/v2?key={front.key}", key=None)[0] == 401


def test_without_tls(front: Front) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=10)
    connection.request("GET", "/v2/health/ready", headers={"Authorization": f"Bearer {front.key}"})
    assert connection.getresponse().status == 400
    connection.close()
    assert refused(lambda: GrpcFront(front, tls=False).embed()) == "UNAVAILABLE"


def test_a_body_of_100_mb(front: Front) -> None:
    huge = bytes(100_000_000)
    status, body = front.send(INFER, huge, RAW)
    assert status == 413
    assert "34m" in error(body)
    chunks = (huge[:1_000_000] for _ in range(100))
    assert front.send(INFER, chunks, RAW)[0] == 413
    assert refused(lambda: GrpcFront(front).embed(huge)) == "RESOURCE_EXHAUSTED"


def test_the_largest_image_passes(front: Front) -> None:
    """It is refused by the server, for what it is, and not by the front."""
    largest = bytes(32 * 2**20)
    status, body = front.send(INFER, largest, RAW)
    assert status == 400
    assert "not a decodable image" in error(body)
    assert refused(lambda: GrpcFront(front).embed(largest)) == "INVALID_ARGUMENT"


def nested(depth: int) -> bytes:
    return b'{"inputs":' + b"[" * depth


@pytest.mark.parametrize("chunked", [False, True])
def test_deeply_nested_json_is_not_passed_on(chunked: bool, front: Front) -> None:
    """120,000 brackets kill the server that is tested here."""
    body = nested(200_000)
    status, answer = front.send(INFER, (body[at : at + 50_000] for at in range(0, len(body), 50_000)) if chunked else body, {})
    assert status == 413
    assert "64 kB" in error(answer)


@pytest.mark.parametrize("length", ["65000", "200000", "-1", "1e6", "0x40000", "200000,0", "4 4"])
def test_deeply_nested_json_before_binary_data_is_not_passed_on(length: str, front: Front) -> None:
    status, answer = front.send(INFER, nested(200_000), {"Inference-Header-Content-Length": length})
    assert status == 400
    assert "Inference-Header-Content-Length" in error(answer)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_compressed_requests_are_not_passed_on(encoding: str, front: Front) -> None:
    import zlib

    packed = zlib.compress(nested(200_000))
    assert len(packed) < 1000
    assert front.send(INFER, packed, {"Content-Encoding": encoding})[0] == 415
    assert refused(lambda: GrpcFront(front).embed(compression_algorithm="gzip")) == "UNIMPLEMENTED"


def test_two_lengths_are_one_for_the_server(front: Front) -> None:
    """What the front has checked is what the server reads: the first, whichever way it is spelt."""
    context = ssl.create_default_context(cafile=str(front.ca_file))
    for first in ("Inference-Header-Content-Length", "Inference_Header_Content_Length"):
        connection = http.client.HTTPSConnection("127.0.0.1", front.port, timeout=60, context=context)
        body = nested(200_000)
        connection.putrequest("POST", INFER)
        connection.putheader("Authorization", f"Bearer {front.key}")
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader(first, "0")
        connection.putheader("Inference-Header-Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 400
        assert "not a decodable image" in error(answer)
        connection.close()


def test_small_json_and_its_largest_nesting_pass(front: Front) -> None:
    text = {"name": "INPUT_TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a dog"]}
    status, body = front.send("/v2/models/embed_text/infer", json.dumps({"inputs": [text]}).encode(), {})
    assert status == 200
    assert len(json.loads(body)["outputs"][0]["data"]) == 128
    status, _ = front.send(INFER, nested(65_000), {})
    assert status == 500  # Triton's parser refuses it and lives
    status, _ = front.send(INFER, nested(64_900), {"Inference-Header-Content-Length": "64900"})
    assert status in {400, 500}


OPEN = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/embed_image",
    "/v2/models/embed_image/ready",
    "/v2/models/embed_image/config",
    "/v2/models/embed_image/stats",
    "/v2/models/embed_image/versions/1",
    "/v2/models/embed_image/versions/1/ready",
]


@pytest.mark.parametrize("path", OPEN)
def test_open_paths(path: str, front: Front) -> None:
    assert front.get(path)[0] == 200
    assert front.send(path, b"{}", {})[0] == 405


CLOSED = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/embed_image/load"),
    ("POST", "/v2/repository/models/embed_image/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/a/register"),
    ("POST", "/v2/cudasharedmemory/region/a/register"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/models/embed_image/trace/setting"),
    ("POST", "/v2/models/embed_image/generate"),
    ("POST", "/v2/models/embed_image/generate_stream"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/nosuch"),
    ("GET", "/json/v2/models/embed_image/infer"),
    ("GET", "/v2/models/../repository/index"),
    ("GET", "/v2/models/embed_image/%2e%2e/%2e%2e/logging"),
    ("POST", "/v2/models/embed_image/infer/../../../repository/index"),
    ("POST", "/v2/models/embed_image%2finfer/x"),
    ("GET", "/v2/models/embed_image/config%00"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_closed_paths(method: str, path: str, front: Front) -> None:
    status, _ = front.send(path, b"{}" if method == "POST" else None, {}, method=method)
    assert status in {400, 404}


def test_a_path_is_passed_on_as_it_was_checked(front: Front) -> None:
    """Not as it was written: the server would read the dots otherwise."""
    path = "/v2/repository/../models/embed_image/%69nfer?x=1"
    status, body = front.send(path, PICTURE, RAW)
    assert status == 200
    assert np.isfinite(raw_embedding(body)).all()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods(method: str, front: Front) -> None:
    assert front.get(INFER, method=method)[0] == 405


def test_closed_calls_of_grpc(front: Front) -> None:
    caller = GrpcFront(front)
    options = {"headers": caller.headers}
    client = caller.client
    for call in (
        lambda: client.get_model_repository_index(**options),
        lambda: client.load_model("embed_image", **options),
        lambda: client.unload_model("embed_image", **options),
        lambda: client.get_inference_statistics(**options),
        lambda: client.get_trace_settings(**options),
        lambda: client.get_log_settings(**options),
        lambda: client.get_system_shared_memory_status(**options),
        lambda: client.register_system_shared_memory("a", "/a", 8, **options),
        lambda: client.get_cuda_shared_memory_status(**options),
    ):
        assert refused(call) == "PERMISSION_DENIED"
    credentials = grpc.ssl_channel_credentials(front.ca_file.read_bytes())
    metadata = (("authorization", f"Bearer {front.key}"),)
    with grpc.secure_channel(front.url, credentials) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(iter([b""]), metadata=metadata, timeout=20))
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        for path in ("/inference.Other/Call", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"", metadata=metadata, timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_open_calls_of_grpc(front: Front) -> None:
    caller = GrpcFront(front)
    options = {"headers": caller.headers}
    assert caller.client.is_server_live(**options)
    assert caller.client.is_server_ready(**options)
    assert caller.client.is_model_ready("embed_image", **options)
    assert caller.client.get_server_metadata(**options).name == "triton"
    assert caller.client.get_model_metadata("embed_image", **options).name == "embed_image"
    assert caller.client.get_model_config("embed_image", **options).config.name == "embed_image"


def test_the_access_log_names_the_client_and_no_key(front: Front) -> None:
    front.get("/v2/health/ready?token=in-the-address")
    time.sleep(0.2)
    log = front.log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (line,) = (one for one in lines[-5:] if one["path"] == "/v2/health/ready")
    assert line["client"] == "tester"
    assert line["status"] == "200"
    assert "in-the-address" not in log
    assert front.key not in log


def test_many_connections_at_once(front: Front) -> None:
    failures: list[object] = []

    def send() -> None:
        for _ in range(5):
            status, _ = front.send(INFER, PICTURE, RAW)
            if status != 200:
                failures.append(status)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_keys_are_withdrawn_and_added_by_a_reload(server: TritonServer, tmp_path: Path) -> None:
    with Front(tmp_path, server.http_url, server.grpc_url) as front:
        first = front.key
        front.keys.write_text("", encoding="ascii")
        second = front.add_key("second")
        assert front.get("/v2", key=first)[0] == 200
        front.reload()
        deadline = time.monotonic() + 10
        while front.get("/v2", key=second)[0] != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert front.get("/v2", key=second)[0] == 200
        assert front.get("/v2", key=first)[0] == 401


def test_a_key_has_a_rate(server: TritonServer, tmp_path: Path) -> None:
    with Front(tmp_path, server.http_url, server.grpc_url, FRONT_RATE="1") as front:
        answers = [front.get("/v2")[0] for _ in range(5)]
        assert answers[0] == 200
        assert 429 in answers
        caller = GrpcFront(front)
        codes = {grpc_code(lambda: caller.client.is_server_live(headers=caller.headers)) for _ in range(5)}
        assert "UNAVAILABLE" in codes


def grpc_code(call: Callable[[], Any]) -> str:
    try:
        call()
    except InferenceServerException as failure:
        return str(failure.status()).removeprefix("StatusCode.")
    return "OK"


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    gone = f"127.0.0.1:{free_port()}"
    with Front(tmp_path, gone, gone) as front:
        status, body = front.send(INFER, PICTURE, RAW)
        assert status == 503
        assert "try again" in error(body)
        assert refused(GrpcFront(front).embed) == "UNAVAILABLE"

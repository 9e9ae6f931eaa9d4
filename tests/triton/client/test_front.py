"""The front of `docker/front` before a real server: TLS, keys, limits, and what is closed."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
import tritonclient.grpc as triton
from front import FRONT, Front
from images import encode, photo
from numpy.typing import NDArray
from siglip_serve_client import AccessError, AsyncClient, Client, InvalidInputError
from wire import GrpcCaller

from siglip_serve.launcher import TritonServer

PICTURE = encode(photo(64, 48, 3), "JPEG")
RAW = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
INFER = "/v2/models/embed_image/infer"


@pytest.fixture(autouse=True)
def alive(front: Front) -> Iterator[None]:
    """After every test, a real inference through the front."""
    yield
    status, _ = front.post(INFER, PICTURE, RAW)
    assert status == 200


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_the_right_key_over_tls(server: TritonServer, front: Front, scheme: str) -> None:
    url = f"{scheme}://{front.address}"
    expected = GrpcCaller(server.grpc_url).embed([PICTURE])[0]

    async def embed() -> NDArray[np.float32]:
        async with AsyncClient(url, api_key=front.key, ca_file=front.certificate) as client:
            return await client.embed_image(PICTURE)

    with Client(url, api_key=front.key, ca_file=front.certificate) as client:
        np.testing.assert_allclose(client.embed_image(PICTURE), expected, rtol=1e-3, atol=1e-4)
        assert client.describe()["checkpoint_name"] == "siglip-tiny"
        assert client.embed_texts(["a dog"] * 300).shape[0] == 300
        assert client.explain(PICTURE, ["a dog"], overlays=True).overlays[0].size == (64, 48)
        with pytest.raises(InvalidInputError, match="not a decodable image"):
            client.embed_image(b"no image")
    np.testing.assert_allclose(asyncio.run(embed()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize("key", [None, "0" * 64])
def test_a_wrong_or_missing_key_raises_an_access_error(front: Front, scheme: str, key: str | None) -> None:
    with (
        Client(f"{scheme}://{front.address}", api_key=key, ca_file=front.certificate) as client,
        pytest.raises(AccessError, match="send a valid key"),
    ):
        client.embed_image(PICTURE)
    status, _ = front.post(INFER, PICTURE, RAW, key=key or "")
    assert status == 401


def test_the_front_refuses_connections_without_tls(front: Front) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://{front.address}{INFER}", PICTURE, RAW)
    with pytest.raises(urllib.error.HTTPError) as refused:
        opener.open(request, timeout=10)
    refused.value.close()
    assert refused.value.code == 400
    with grpc.insecure_channel(front.address) as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1)


def test_a_body_of_100_mb_is_refused(front: Front) -> None:
    try:
        status, _ = front.post(INFER, b"\xff" * 100_000_000, RAW)
    except urllib.error.URLError as error:  # refused while it was still being sent
        assert isinstance(error.reason, BrokenPipeError | ConnectionResetError | ssl.SSLError)  # noqa: PT017
    else:
        assert status == 413
    with (
        Client(f"grpcs://{front.address}", api_key=front.key, ca_file=front.certificate) as client,
        pytest.raises(InvalidInputError, match="larger than"),
    ):
        client.embed_image(b"\xff" * 100_000_000)


@pytest.mark.parametrize("depth", [40_000, 160_000])
def test_json_that_is_nested_too_deeply(front: Front, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    status, body = front.post(INFER, nested, {"Content-Type": "application/json"})
    assert (status, b"JSON may be 64 kB" in body) == (413, True)
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(nested)),
    }
    status, body = front.post(INFER, nested, headers)
    assert (status, b"0 to 64999" in body) == (400, True)


def test_json_that_is_small_is_read(front: Front) -> None:
    body = b'{"inputs": [{"name": "INPUT_TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a dog"]}]}'
    status, answer = front.post("/v2/models/embed_text/infer", body, {"Content-Type": "application/json"})
    assert status == 200
    assert b'"EMBEDDING"' in answer


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/embed_image/unload",
        "/v2/repository/models/embed_image/load",
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/cudasharedmemory/status",
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/models/embed_image/trace/setting",
        "/v2/models/embed_image/generate",
        "/v2//repository/index",
        "/v2/models/../repository/index",
        "/v2/%72epository/index",
        "/metrics",
        "/",
    ],
)
def test_http_proxy_closes_what_is_not_inference(front: Front, path: str) -> None:
    status, _ = front.post(path, b"{}", {"Content-Type": "application/json"})
    assert status in (403, 404, 405)  # / is the gateway's page, which is only read


@pytest.mark.parametrize(
    "call",
    [
        lambda client, headers: client.get_model_repository_index(headers=headers),
        lambda client, headers: client.unload_model("embed_image", headers=headers),
        lambda client, headers: client.load_model("embed_image", headers=headers),
        lambda client, headers: client.register_system_shared_memory("x", "x", 1, headers=headers),
        lambda client, headers: client.get_log_settings(headers=headers),
        lambda client, headers: client.update_trace_settings(settings={}, headers=headers),
        lambda client, headers: client.get_inference_statistics(headers=headers),
    ],
)
def test_grpc_proxy_closes_what_is_not_inference(front: Front, call: object) -> None:
    client = triton.InferenceServerClient(front.address, ssl=True, root_certificates=str(front.certificate))
    with pytest.raises(triton.InferenceServerException) as refused:
        call(client, {"authorization": f"Bearer {front.key}"})  # type: ignore[operator]
    assert refused.value.status() in ("StatusCode.PERMISSION_DENIED", "StatusCode.UNIMPLEMENTED")
    client.close()


def test_keys_that_are_none_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("name secret\n")
    environment = {
        **os.environ,
        "FRONT_RUN": str(tmp_path),
        "FRONT_KEYS": str(tmp_path / "keys"),
        "FRONT_CERTIFICATE": str(tmp_path / "keys"),
        "FRONT_CERTIFICATE_KEY": str(tmp_path / "keys"),
    }
    done = subprocess.run(
        ["sh", FRONT / "start.sh", "check"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "line 1: expected NAME and 64" in done.stderr
    assert "secret" not in done.stderr

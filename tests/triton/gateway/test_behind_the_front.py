"""The gateway behind the reverse proxy of docker/front: one TLS port for its APIs and for Triton's."""

from __future__ import annotations

import base64
import gzip
import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from front import Front, run_front
from gateways import encoded
from images import encode, photo
from siglip_serve_client import Client
from wire import TINY

from siglip_serve.launcher import TritonServer

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
TEXT = {"name": "INPUT_TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["a dog"]}


@pytest.fixture(scope="module")
def both(server: TritonServer, gateway_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    address = gateway_url.removeprefix("http://")
    with run_front(server.http_url, server.grpc_url, tmp_path_factory.mktemp("both"), address) as running:
        yield running


def post(front: Front, path: str, body: object, key: str | None = None) -> tuple[int, dict[str, object]]:
    status, answer = front.post(path, json.dumps(body).encode(), {"Content-Type": "application/json"}, key)
    found = json.loads(answer)
    assert isinstance(found, dict)
    return status, found


def test_coheres_path_and_tritons_are_neighbours(both: Front, triton: Client) -> None:
    expected = triton.embed_text("a dog", True)
    status, answer = post(both, "/v2/embed", {"texts": ["a dog"], "embedding_types": ["float"]})
    assert status == 200
    assert isinstance(answer["embeddings"], dict)
    np.testing.assert_array_equal(np.array(answer["embeddings"]["float"][0], np.float32), expected)
    body = {"inputs": [TEXT], "parameters": {"normalized": True}}
    status, answer = post(both, "/v2/models/embed_text/infer", body)
    assert status == 200
    assert isinstance(answer["outputs"], list)
    np.testing.assert_array_equal(np.array(answer["outputs"][0]["data"], np.float32), expected)
    assert both.post("/v2", None, {})[0] == 200
    # Neither takes the other's path.
    assert post(both, "/v2/embed/infer", {})[0] == 404
    assert post(both, "/v2/models/embed", {})[0] == 405


def test_openais_client_goes_through_the_front(both: Front, triton: Client) -> None:
    """Also with pictures above the 64 kB that JSON for Triton may have.

    They fit nginx's buffer of 256 kB. Started by root, it may not write larger ones to the folder of a test.
    """
    large = encode(photo(260, 200), "PNG")
    assert 64_000 < len(large) < 150_000
    with (
        openai.DefaultHttpxClient(
            verify=ssl.create_default_context(cafile=both.certificate), trust_env=False
        ) as transport,
        openai.OpenAI(
            base_url=f"https://{both.address}/v1", api_key=both.key, http_client=transport, max_retries=0
        ) as client,
    ):
        inputs = [f"data:image/png;base64,{encoded(large)}", "a dog"]
        answer = client.embeddings.create(model="any", input=inputs)
        found = np.array([entry.embedding for entry in answer.data], np.float32)
        with pytest.raises(openai.BadRequestError, match="input: the text has"):
            client.embeddings.create(model="any", input="dog " * 300)
    np.testing.assert_array_equal(found, [triton.embed_image(large, True), triton.embed_text("a dog", True)])
    with (
        openai.DefaultHttpxClient(
            verify=ssl.create_default_context(cafile=both.certificate), trust_env=False
        ) as transport,
        openai.OpenAI(
            base_url=f"https://{both.address}/v1", api_key="0" * 64, http_client=transport, max_retries=0
        ) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.embeddings.create(model="any", input="a")
    # The front's own errors are a text, which this client keeps as the body.
    assert caught.value.body == "send a valid key: authorization: Bearer KEY"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/embeddings", {"input": "a"}),
        ("/v2/embed", {"texts": ["a"]}),
        ("/vectorize", {"texts": ["a"], "images": [base64.b64encode(DOG).decode()]}),
        ("/classify", {"image": base64.b64encode(DOG).decode(), "labels": ["a", "b"]}),
    ],
)
def test_every_api_needs_a_key(both: Front, path: str, body: object) -> None:
    assert post(both, path, body)[0] == 200
    for key in ("", "0" * 64):
        assert post(both, path, body, key) == (401, {"error": "send a valid key: authorization: Bearer KEY"})
    assert both.post(path, None, {})[0] == 405
    packed = gzip.compress(json.dumps(body).encode())
    assert both.post(path, packed, {"Content-Encoding": "gzip"})[0] == 415


def test_forms_of_immich_go_through(both: Front) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="entries"\r\n\r\n{"clip":{"visual":{"modelName":"m"}}}'
        b'\r\n--b\r\nContent-Disposition: form-data; name="image"; filename="blob"\r\n\r\n'
        + DOG
        + b"\r\n--b--\r\n"
    )
    status, body = both.post("/predict", form, {"Content-Type": "multipart/form-data; boundary=b"})
    assert status == 200
    assert json.loads(body)["imageWidth"] == 400


def test_probes_and_pages(both: Front) -> None:
    for path in ("/health", "/ping", "/meta", "/v1/models", "/.well-known/ready"):
        assert both.post(path, None, {})[0] in (200, 204)
        assert both.post(path, None, {}, "")[0] == 401
    # The page needs no key. Where there is none, the gateway says so itself.
    status, body = both.post("/page/none.js", None, {}, "")
    assert (status, json.loads(body)["error"]["message"]) == (404, "no such path: /page/none.js")
    assert both.post("/", None, {}, "")[0] in (200, 404)


@pytest.mark.parametrize(
    "path", ["/metrics", "/docs", "/openapi.json", "/page/../metrics", "/v1/embeddings/"]
)
def test_other_paths_are_closed(both: Front, path: str) -> None:
    assert both.post(path, None, {}) == (404, b'{"error":"not found, or closed"}')


def test_large_bodies_are_refused_by_their_own_limit(
    server: TritonServer, gateway_url: str, tmp_path: Path
) -> None:
    address = gateway_url.removeprefix("http://")
    limit = {"FRONT_GATEWAY_MAX_BODY": "100k"}
    with run_front(server.http_url, server.grpc_url, tmp_path, address, **limit) as front:
        status, answer = post(front, "/v1/embeddings", {"input": "a" * 200_000})
        assert (status, answer) == (413, {"error": "the request is larger than 100k"})

"""The APIs of Cohere, Weaviate and Immich, and the gateway's own, in front of a stand-in for Triton."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, WIDTH, StandIn, encoded, gateway, vector
from siglip_serve_client.errors import DeadlineError, ServerError, UnavailableError, UnreachableError
from starlette.testclient import TestClient

from siglip_gateway.apis.cohere import inputs_of
from siglip_gateway.compact import COMPACT, compact
from siglip_gateway.inputs import Text
from siglip_gateway.refusals import Refusal

CLIP_PICTURE = {"clip": {"visual": {"modelName": "ViT-B-32__openai", "options": {}}}}
CLIP_TEXT = {"clip": {"textual": {"modelName": "ViT-B-32__openai", "options": {"language": "de"}}}}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with gateway() as running:
        yield running


def test_cohere_answers_every_embedding_type(client: TestClient) -> None:
    kinds = ["float", *COMPACT, "base64"]
    body = {"model": "m", "input_type": "search_document", "texts": ["a", "b"], "embedding_types": kinds}
    answer = client.post("/v2/embed", json=body).json()
    expected = np.stack([vector("a"), vector("b")])
    found = answer["embeddings"]
    assert list(found) == kinds
    np.testing.assert_array_equal(np.array(found["float"], np.float32), expected)
    for kind in COMPACT:
        np.testing.assert_array_equal(found[kind], compact(expected, kind))
    for row, text in zip(expected, found["base64"], strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), row)
    assert answer["texts"] == ["a", "b"]
    assert answer["images"] == []
    assert isinstance(answer["id"], str)


def test_cohere_describes_images(client: TestClient) -> None:
    answer = client.post("/v2/embed", json={"model": "m", "input_type": "image", "images": [URI]}).json()
    assert answer["images"] == [{"width": 5, "height": 4, "format": "png", "bit_depth": 24}]
    assert list(answer["embeddings"]) == ["float"]
    np.testing.assert_array_equal(np.array(answer["embeddings"]["float"], np.float32), [vector(PNG)])


def test_cohere_mixes_inputs(client: TestClient) -> None:
    text = {"content": [{"type": "text", "text": "a"}]}
    picture = {"content": [{"type": "image_url", "image_url": {"url": URI}}]}
    answer = client.post("/v2/embed", json={"model": "m", "inputs": [picture, text, picture]}).json()
    found = np.array(answer["embeddings"]["float"], np.float32)
    np.testing.assert_array_equal(found, [vector(PNG), vector("a"), vector(PNG)])


def test_cohere_cuts_long_texts_unless_told_otherwise(client: TestClient) -> None:
    assert client.post("/v2/embed", json={"texts": ["too long"]}).status_code == 200
    answer = client.post("/v2/embed", json={"texts": ["a", "too long"], "truncate": "NONE"})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("texts[1]: the text has 301 tokens")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "expected one of texts, images and inputs, got none"),
        ({"texts": ["a"], "images": [URI]}, "got texts and images"),
        ({"texts": ["a", 3]}, "texts[1]: a number"),
        ({"texts": "a"}, "texts: a text, expected a list"),
        ({"images": [URI, "?"]}, "images[1]: not base64"),
        ({"inputs": [{"content": []}]}, "inputs[0]: 0 parts"),
        ({"inputs": [{"content": [{"type": "text", "text": "a"}] * 2}]}, "inputs[0]: 2 parts"),
        ({"inputs": [{}]}, "inputs[0]: an object, expected an object with a list named content"),
    ],
)
def test_cohere_refusals_name_the_input(body: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as caught:
        inputs_of(body)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "fields", [{"embedding_types": ["float16"]}, {"truncate": "START"}, {"output_dimension": 8}]
)
def test_cohere_refuses_what_it_cannot_do(client: TestClient, fields: dict[str, Any]) -> None:
    answer = client.post("/v2/embed", json={"texts": ["a"], **fields})
    assert answer.status_code == 400
    assert answer.json().keys() == {"id", "message"}
    assert next(iter(fields)) in answer.json()["message"]


def test_cohere_accepts_the_width_as_output_dimension(client: TestClient) -> None:
    assert client.post("/v2/embed", json={"texts": ["a"], "output_dimension": WIDTH}).status_code == 200


def test_weaviate_vectorizes_texts_and_images(client: TestClient) -> None:
    answer = client.post("/vectorize", json={"texts": ["a", "too long"], "images": [encoded(PNG)]}).json()
    assert answer.keys() == {"textVectors", "imageVectors"}
    np.testing.assert_array_equal(
        np.array(answer["textVectors"], np.float32), [vector("a"), vector("too long")]
    )
    np.testing.assert_array_equal(np.array(answer["imageVectors"], np.float32), [vector(PNG)])
    assert client.post("/vectorize", json={"texts": ["a"]}).json()["imageVectors"] == []
    assert client.post("/vectorize", json={}).json() == {"textVectors": [], "imageVectors": []}


def test_weaviate_errors_have_one_field(client: TestClient) -> None:
    answer = client.post("/vectorize", json={"images": [encoded(PNG), "?"]})
    assert answer.status_code == 400
    assert answer.json() == {"error": "images[1]: not base64: character 0 is '?'"}


def test_weaviate_probes_and_meta(client: TestClient) -> None:
    for name in ("live", "ready"):
        answer = client.get(f"/.well-known/{name}")
        assert answer.status_code == 204
        assert answer.content == b""
    assert client.get("/meta").json()["model"] == "stand-in"


def predict(client: TestClient, entries: object, **form: Any) -> Any:
    files = {"image": ("filename", form.pop("image"), "image/jpeg")} if "image" in form else {"x": ("", b"")}
    return client.post("/predict", data={"entries": json.dumps(entries), **form}, files=files)


def test_immich_answers_clip_tasks(client: TestClient) -> None:
    answer = predict(client, CLIP_PICTURE, image=PNG).json()
    assert answer.keys() == {"clip", "imageHeight", "imageWidth"}
    assert (answer["imageHeight"], answer["imageWidth"]) == (4, 5)
    np.testing.assert_array_equal(np.array(json.loads(answer["clip"]), np.float32), vector(PNG))
    answer = predict(client, CLIP_TEXT, text="too long").json()
    assert answer.keys() == {"clip"}
    np.testing.assert_array_equal(np.array(json.loads(answer["clip"]), np.float32), vector("too long"))
    answer = client.post("/predict", data={"entries": json.dumps(CLIP_TEXT), "text": "ä & b"}).json()
    np.testing.assert_array_equal(np.array(json.loads(answer["clip"]), np.float32), vector("ä & b"))
    assert client.get("/ping").text == "pong"


@pytest.mark.parametrize(
    ("entries", "form", "status"),
    [
        (CLIP_PICTURE, {}, 400),
        (CLIP_TEXT, {}, 400),
        ({"clip": {"other": {}}}, {"text": "a"}, 400),
        ({"clip": 3}, {"text": "a"}, 400),
        ({}, {"text": "a"}, 422),
        ([], {"text": "a"}, 422),
        ({"ocr": {}}, {"image": PNG}, 501),
        ({"ocr": {}, **CLIP_PICTURE}, {"image": PNG}, 400),
        (CLIP_PICTURE, {"image": b"not an image"}, 400),
    ],
)
def test_immich_refusals_have_a_detail(
    client: TestClient, entries: object, form: dict[str, Any], status: int
) -> None:
    answer = predict(client, entries, **form)
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}


def test_immich_refuses_bodies_that_are_no_form(client: TestClient) -> None:
    assert client.post("/predict", json=CLIP_TEXT).status_code == 422
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/predict", content=b"--x\r\nnonsense", headers=headers).status_code == 422
    assert client.post("/predict", headers={"content-type": "multipart/form-data"}).status_code == 422


class _Upstream(BaseHTTPRequestHandler):
    seen: tuple[str, str, bytes] = ("", "", b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).seen = self.path, self.headers["content-type"], body
        self.send_response(418)
        self.send_header("content-type", "application/x-faces")
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"faces")

    def log_message(self, *_: Any) -> None:
        """Keep the output of the tests short."""


def test_immich_relays_other_tasks_unchanged() -> None:
    with HTTPServer(("127.0.0.1", 0), _Upstream) as upstream:
        threading.Thread(target=upstream.handle_request, daemon=True).start()
        with gateway(immich_upstream=f"http://127.0.0.1:{upstream.server_address[1]}/") as client:
            answer = predict(client, {"facial-recognition": {}}, image=PNG)
    assert (answer.status_code, answer.content) == (418, b"faces")
    assert answer.headers["content-type"] == "application/x-faces"
    assert _Upstream.seen == ("/predict", answer.request.headers["content-type"], answer.request.content)


def test_immich_says_when_the_upstream_does_not_answer() -> None:
    with gateway(immich_upstream="http://127.0.0.1:9") as client:
        answer = predict(client, {"facial-recognition": {}}, image=PNG)
    assert answer.status_code == 502
    assert "facial-recognition" in answer.json()["detail"]


def test_classify_scores_labels() -> None:
    stand_in = StandIn()
    with gateway(stand_in) as client:
        body = {"image": URI, "labels": ["dog", "cat"], "templates": ["a {}"], "softmax": True}
        answer = client.post("/classify", json=body).json()
        assert answer == {"model": "stand-in", "labels": ["dog", "cat"], "probabilities": [0.5, 0.5]}
        assert client.post("/classify", json={"image": URI}).status_code == 400
        assert client.post("/classify", json={"labels": ["a"]}).json()["error"]["param"] == "image"
    assert stand_in.calls[0] == ("classify", PNG, ["dog", "cat"], ["a {}"], True, False)


ERRORS = [
    (UnavailableError("Exceeds maximum queue size"), 503, "1"),
    (UnreachableError("no server answers"), 503, "5"),
    (DeadlineError("late"), 504, "1"),
    (ServerError("INTERNAL: x"), 502, None),
]


@pytest.mark.parametrize(("error", "status", "retry"), ERRORS)
def test_errors_of_triton_become_statuses(error: Exception, status: int, retry: str | None) -> None:
    stand_in = StandIn(error=error)
    with gateway(stand_in) as client:
        answers = [
            client.post("/v1/embeddings", json={"input": "a"}),
            client.post("/v2/embed", json={"texts": ["a"]}),
            client.post("/vectorize", json={"texts": ["a"]}),
            predict(client, CLIP_TEXT, text="a"),
        ]
        assert client.get("/health").status_code == 503
        assert client.get("/.well-known/ready").status_code == status
        assert client.get("/.well-known/live").status_code == 204
    for answer, field in zip(answers, ("error", "message", "error", "detail"), strict=True):
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == retry
        assert field in answer.json()


def test_unknown_paths_and_methods_are_answered_in_the_dialect(client: TestClient) -> None:
    answer = client.get("/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no such path: /nothing"
    assert client.get("/v2/embed").status_code == 405
    assert client.get("/v2/embed").json().keys() == {"id", "message"}
    assert client.get("/vectorize").json().keys() == {"error"}


def test_faults_of_the_gateway_are_answered_in_the_dialect() -> None:
    with gateway(StandIn(error=ZeroDivisionError())) as client:
        answer = client.post("/v2/embed", json={"texts": ["a"]})
    assert answer.status_code == 500
    assert answer.json()["message"] == "the gateway failed"


def test_texts_are_those_of_the_caller() -> None:
    assert inputs_of({"texts": ["a"]}) == [Text("texts[0]", "a")]


def test_the_documentation_lists_the_apis(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v2/embed", "/vectorize", "/predict", "/classify", "/health"} <= paths.keys()
    assert client.get("/docs").status_code == 200

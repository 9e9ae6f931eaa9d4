"""OpenAI's embeddings API and its dialects: every form of a request, and the forms of answers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, WIDTH, StandIn, encoded, gateway, vector

from siglip_gateway.apis.openai import parse
from siglip_gateway.inputs import Link, Picture, Text
from siglip_gateway.refusals import Refusal

BASE64 = encoded(PNG)
LONG = encoded(PNG + bytes(100))
T, P = "text", "picture"

FORMS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("openai text", {"model": "m", "input": "a dog"}, [T]),
    ("openai list", {"model": "m", "input": ["a dog", "a cat"], "encoding_format": "base64"}, [T, T]),
    (
        "vllm picture",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}]}]},
        [P],
    ),
    (
        "vllm bench, with its empty text",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": ""},
                        {"type": "image_url", "image_url": {"url": URI}},
                    ],
                }
            ]
        },
        [P],
    ),
    ("vllm text", {"messages": [{"role": "user", "content": "a dog"}]}, [T]),
    (
        "vllm, several parts",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": URI}},
                        {"type": "text", "text": "a dog"},
                        {"type": "image_url", "image_url": URI},
                    ],
                }
            ]
        },
        [P, T, P],
    ),
    ("infinity pictures", {"input": [URI, URI], "modality": "image"}, [P, P]),
    ("infinity bare base64", {"input": BASE64, "modality": "image"}, [P]),
    ("infinity text", {"input": ["a dog"], "modality": "text"}, [T]),
    ("infinity text that looks like a picture", {"input": [URI], "modality": "text"}, [T]),
    ("nv-clip", {"input": ["a dog", URI, "a cat"]}, [T, P, T]),
    ("jina", {"input": [{"text": "a dog"}, {"image": URI}, {"image": BASE64}]}, [T, P, P]),
    ("sglang", {"input": [{"text": "a dog", "image": None}, {"text": "", "image": URI}]}, [T, P]),
    ("llama-index bytes", {"input": [{"bytes": BASE64}], "encoding_type": "float"}, [P]),
    ("llama-index url as data", {"input": [{"url": URI}], "encoding_type": "float"}, [P]),
    ("litellm", {"input": [LONG, "a dog"]}, [P, T]),
    (
        "parts of content",
        {"input": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": URI}]},
        [T, P],
    ),
    ("one object", {"input": {"image": URI}}, [P]),
    ("data URI without a type", {"input": [f"data:;base64,{BASE64}"]}, [P]),
    ("data URI with upper case", {"input": [URI.replace("data:image/png", "DATA:IMAGE/PNG")]}, [P]),
    ("a text about data", {"input": ["data: the new oil, they say"]}, [T]),
    ("a text about base64", {"input": ["data:text, base64, and more"]}, [T]),
    ("a text with a URL", {"input": ["see https://example.com/x.png for it"]}, [T]),
    ("an empty text", {"input": [""]}, [T]),
]


@pytest.mark.parametrize(("body", "kinds"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_keeps_its_order(body: dict[str, Any], kinds: list[str]) -> None:
    inputs = parse(body).inputs
    assert [T if isinstance(item, Text) else P for item in inputs] == kinds
    for item in inputs:
        if isinstance(item, Picture):
            assert base64.b64decode(item.base64, validate=True)[: len(PNG)] == PNG


def test_a_url_alone_is_a_picture() -> None:
    assert parse({"input": ["https://a.example/x.png", "x"]}).inputs[0] == Link(
        "input[0]", "https://a.example/x.png"
    )
    assert parse({"input": [{"url": "http://a.example/x"}]}).inputs == [
        Link("input[0]", "http://a.example/x")
    ]
    assert parse({"input": ["https://a.example"], "modality": "text"}).inputs == [
        Text("input[0]", "https://a.example")
    ]


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "expected either input or messages", "input"),
    ({"input": []}, "the input is empty", "input"),
    ({"input": None}, "input: null", "input"),
    ({"input": [1, 2, 3]}, "check_embedding_ctx_length", "input"),
    ({"input": [[1, 2], [3]]}, "input[0]: token numbers", "input[0]"),
    ({"input": ["a", 7]}, "input[1]: a number", "input[1]"),
    ({"input": [True]}, "input[0]: a truth value", "input[0]"),
    ({"input": ["a", {"image": "!"}]}, "input[1]: not base64: character 0 is '!'", "input[1]"),
    ({"input": [{"image": "QUJDR"}]}, "input[0]: not base64: 5 characters", "input[0]"),
    ({"input": [{"image": "ü"}]}, "input[0]: not base64", "input[0]"),
    ({"input": [{"image": "data:text/plain;base64,QUJD"}]}, "expected an image", "input[0]"),
    ({"input": ["data:image/png,abc"]}, "expected data:image/...;base64,", "input[0]"),
    ({"input": [{"text": "a", "image": URI}]}, "a text and a picture in one object", "input[0]"),
    ({"input": [{"image": URI, "bytes": BASE64}]}, "expected one picture", "input[0]"),
    ({"input": [{"video": "x"}]}, "an object with video", "input[0]"),
    ({"input": ["a"], "modality": "audio"}, "modality: 'audio'", "modality"),
    ({"input": "a", "encoding_format": "float8"}, "encoding_format: 'float8'", "encoding_format"),
    ({"input": "a", "dimensions": "5"}, "dimensions: a text, expected a whole number", "dimensions"),
    ({"input": "a", "normalized": 1}, "normalized: a number", "normalized"),
    ({"input": "a", "truncate_prompt_tokens": 8}, "expected -1", "truncate_prompt_tokens"),
    ({"messages": [{"content": 3}]}, "messages[0].content: a number", "messages[0].content"),
    ({"messages": "x"}, "messages: a text", "messages"),
]


@pytest.mark.parametrize(("body", "message", "param"), REFUSED)
def test_refusals_name_the_field(body: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert message in caught.value.message
    assert caught.value.status == 400
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [{"truncate": True}, {"truncate": "END"}, {"truncation": True}, {"truncate_prompt_tokens": -1}],
)
def test_texts_are_cut_on_request_only(fields: dict[str, Any]) -> None:
    assert parse({"input": "a", **fields}).truncation
    assert not parse({"input": "a"}).truncation
    assert not parse({"input": "a", "truncate": "NONE"}).truncation


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_mixed_inputs_are_answered_in_order(path: str) -> None:
    stand_in = StandIn()
    other = PNG + b"another"
    with gateway(stand_in) as client:
        answer = client.post(path, json={"input": ["a", URI, "b", {"image": encoded(other)}]}).json()
    expected = [vector("a"), vector(PNG), vector("b"), vector(other)]
    found = [np.array(entry["embedding"], np.float32) for entry in answer["data"]]
    np.testing.assert_array_equal(found, expected)
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
    assert answer["object"] == "list"
    assert answer["model"] == "stand-in"
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0, "texts": 2, "images": 2}
    # The pictures went to Triton in one request, as they came.
    assert ("images", 2, True, True) in stand_in.calls


def test_base64_answers_are_little_endian_float32() -> None:
    with gateway() as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(found, vector("a"))


@pytest.mark.parametrize(("kind", "size"), [("int8", 16), ("uint8", 16), ("binary", 2), ("ubinary", 2)])
def test_compact_answers_have_their_size(kind: str, size: int) -> None:
    with gateway() as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "encoding_type": kind}).json()
    assert len(answer["data"][0]["embedding"]) == size


def test_vectors_have_length_one_unless_told_otherwise() -> None:
    with gateway() as client:
        raw = client.post("/v1/embeddings", json={"input": "a", "normalized": False}).json()
    np.testing.assert_array_equal(np.array(raw["data"][0]["embedding"], np.float32), 2 * vector("a"))
    with gateway(normalized=False) as client:
        raw = client.post("/v1/embeddings", json={"input": "a"}).json()
    np.testing.assert_array_equal(np.array(raw["data"][0]["embedding"], np.float32), 2 * vector("a"))


def test_dimensions_must_be_the_width() -> None:
    with gateway() as client:
        assert client.post("/v1/embeddings", json={"input": "a", "dimensions": WIDTH}).status_code == 200
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": 8})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"
    assert "have 16 dimensions" in answer.json()["error"]["message"]


def test_errors_of_triton_name_the_inputs_of_the_caller() -> None:
    bad = encoded(b"not an image")
    with gateway() as client:
        pictures = client.post("/v1/embeddings", json={"input": ["a", URI, {"image": bad}, {"image": bad}]})
        text = client.post("/v1/embeddings", json={"input": [URI, "a", "too long"]})
    assert pictures.status_code == text.status_code == 400
    assert pictures.json()["error"]["message"] == "input[2]: not an image; input[3]: not an image"
    assert text.json()["error"]["message"].startswith("input[2]: the text has 301 tokens")
    assert text.json()["error"].keys() == {"message", "type", "param", "code"}


def test_many_inputs_are_spread_over_requests() -> None:
    stand_in = StandIn()
    texts = [f"text {number}" for number in range(600)]
    with gateway(stand_in) as client:
        answer = client.post("/v1/embeddings", json={"input": [*texts, *[URI] * 70]}).json()
    assert sorted(call[:2] for call in stand_in.calls if call[0] != "health") == [
        ("images", 6),
        ("images", 32),
        ("images", 32),
        ("texts", 1),  # for the width of the checkpoint
        ("texts", 88),
        ("texts", 256),
        ("texts", 256),
    ]
    found = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    np.testing.assert_array_equal(found[:600], [vector(text) for text in texts])
    np.testing.assert_array_equal(found[600:], [vector(PNG)] * 70)


def test_models_lists_the_checkpoint() -> None:
    with gateway() as client:
        answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert answer["data"][0]["id"] == "stand-in"
    assert answer["data"][0]["object"] == "model"
    assert answer["data"][0]["dimensions"] == WIDTH

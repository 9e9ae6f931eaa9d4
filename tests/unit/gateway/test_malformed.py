"""Malformed bodies, 250 per API: each is answered in the form of its API, with a status of the caller's.

`make chaos` sends many more, to a gateway before a real server.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from gateways import URI, StandIn, gateway
from malformed_json import mutated

BODIES = 250
SEEDS: dict[str, list[Any]] = {
    "/v1/embeddings": [
        {"model": "m", "input": ["a", URI, {"image": URI}, {"text": "b"}], "encoding_format": "float"},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": URI}},
                        {"type": "text", "text": "a"},
                    ],
                }
            ],
            "dimensions": 16,
            "truncate_prompt_tokens": -1,
        },
        {"input": [{"bytes": URI}, {"url": URI}], "encoding_type": "binary", "modality": "image"},
    ],
    "/v2/embed": [
        {"model": "m", "input_type": "image", "images": [URI], "embedding_types": ["float", "int8"]},
        {"texts": ["a", "b"], "truncate": "END", "output_dimension": 16},
        {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": URI}}]}]},
    ],
    "/vectorize": [{"texts": ["a"], "images": [URI]}],
    "/classify": [{"image": URI, "labels": ["a", "b"], "templates": ["{}"], "softmax": True}],
    "/teams": [
        {"crops": [URI, URI], "track_ids": [1, 2], "roles": ["player", ""], "anchors": [-1, 0], "k": 2},
        {"image": URI, "boxes": [[0, 1, 2, 3], [4, 5, 6.5, 7]], "state": "AAAA"},
        {"crops": [URI, URI], "prev_state": "AAAA"},
    ],
    "/explain": [
        {"image": URI, "prompts": ["a", "b"], "templates": ["{}"], "background": ["c"], "size": [3, 4]},
        {"image": URI, "prompts": ["a"], "mode": "absolute", "normalize": "none", "opacity": 0.5},
        {"image": URI, "prompts": ["a"], "colormap": "jet", "overlays": True, "encoding_format": "base64"},
    ],
}
FIELDS = {
    "/v1/embeddings": {"error", "detail"},
    "/v2/embed": {"id", "message"},
    "/vectorize": {"error"},
    "/classify": {"error"},
    "/explain": {"error"},
    "/teams": {"error"},
}


def malformed(seeds: list[Any], random: random.Random) -> bytes:
    body = random.choice(seeds)
    for _ in range(random.randrange(1, 4)):
        body = mutated(body, random, [URI[:30]]) if body else random.choice(seeds)
    data = json.dumps(body).encode()
    if random.random() < 0.2:  # also as text that is cut off, or whose bytes are changed
        at = random.randrange(len(data))
        data = data[:at] if random.random() < 0.5 else data[:at] + random.randbytes(2) + data[at + 2 :]
    return data


@pytest.mark.parametrize("path", SEEDS)
def test_malformed_bodies_are_answered(path: str) -> None:
    generator = random.Random(7)
    statuses = []
    with gateway(StandIn()) as client:
        for number in range(BODIES):
            body = malformed(SEEDS[path], generator)
            answer = client.post(path, content=body)
            statuses.append(answer.status_code)
            assert answer.status_code in {200, 400}, (number, body, answer.text)
            if answer.status_code == 400:
                assert answer.json().keys() == FIELDS[path], (number, body)
    assert statuses.count(400) > 0.3 * BODIES  # otherwise the bodies are not malformed
    assert statuses.count(200) > 0.02 * BODIES


@pytest.mark.parametrize("path", SEEDS)
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"3", b'"a"', b"{", b"\xff", b"NaN", b"[" * 100_000, b'{"input":"\\ud800"}']
)
def test_bodies_that_are_no_object_are_refused(path: str, body: bytes) -> None:
    with gateway(StandIn()) as client:
        answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json().keys() == FIELDS[path]


@pytest.mark.parametrize("name", ["embedding_types", "truncate", "input_type", "texts", "images", "inputs"])
def test_deeply_nested_fields_are_refused(name: str) -> None:
    """A message about a field must not try to write the whole of it."""
    nested = "[" * 1000 + "]" * 1000
    for value in (nested, f"[{nested[1:-1]}]", '{"a":' * 1000 + "1" + "}" * 1000):
        with gateway(StandIn()) as client:
            answer = client.post("/v2/embed", content=f'{{"texts":["a"],"{name}":{value}}}')
        assert answer.status_code in ({200} if name == "input_type" else {400})
        assert len(answer.content) < 1000


def test_a_deeply_nested_size_is_refused() -> None:
    body = f'{{"image":"{URI}","prompts":["a"],"size":{"[" * 1000}{"]" * 1000}}}'
    with gateway(StandIn()) as client:
        answer = client.post("/explain", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("size: a list, nested too deeply, expected")


def test_names_of_a_caller_are_not_repeated_at_length() -> None:
    long = "a" * 100_000
    with gateway(StandIn()) as client:
        answers = [
            client.post("/v1/embeddings", json={"input": [{long: 1}]}),
            client.post("/v1/embeddings", json={"input": "a", "encoding_format": long}),
            client.post("/v2/embed", json={"texts": ["a"], "embedding_types": [long]}),
            client.post("/predict", data={"entries": json.dumps({long: 1})}),
        ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 501]
    assert all(len(answer.content) < 1000 for answer in answers)


def test_malformed_forms_are_answered() -> None:
    generator = random.Random(7)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="entries"\r\n\r\n'
        b'{"clip":{"textual":{"modelName":"m","options":{}}}}\r\n'
        b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\na dog\r\n--b--\r\n'
    )
    statuses = []
    with gateway(StandIn()) as client:
        for number in range(BODIES):
            body = bytearray(form)
            for _ in range(generator.randrange(1, 4)):
                at = generator.randrange(len(body))
                body[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
            answer = client.post(
                "/predict", content=bytes(body), headers={"content-type": "multipart/form-data; boundary=b"}
            )
            statuses.append(answer.status_code)
            assert answer.status_code in {200, 400, 422, 501}, (number, body, answer.text)
            if answer.status_code != 200:
                assert answer.json().keys() == {"detail"}, (number, body)
    assert {200, 422} <= set(statuses)

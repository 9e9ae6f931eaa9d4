"""Malformed bodies, 1,000 per API: each is answered in the form of its API, with a status of the caller's."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from gateways import URI, StandIn, gateway

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
    "/v1/embeddings": {"error"},
    "/v2/embed": {"id", "message"},
    "/vectorize": {"error"},
    "/classify": {"error"},
    "/explain": {"error"},
    "/teams": {"error"},
}
STRANGE: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**53, "", "\x00", "data:", URI[:30], "https://", "ü" * 50, "=" * 9, "A"),
    *([], [[]], [None], [[1, 2]], {}, {"": None}, {"url": {}}, {"content": 1}, ["a"] * 100),
]


def mutated(body: Any, random: random.Random) -> Any:
    """The body with one place replaced, removed, doubled or renamed."""
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []
    left = [body]
    while left:
        node = left.pop()
        keys: Any = node.keys() if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = random.choice(places)
    action = random.randrange(5)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[f"{key}s"] = node.pop(key)
    elif action == 2 and isinstance(node[key], str):
        at = random.randrange(len(node[key]) + 1)
        node[key] = node[key][:at] + random.choice(["", "*", "\n", "é", "="]) + node[key][at + 1 :]
    else:
        node[key] = random.choice(STRANGE)
    return body


def malformed(seeds: list[Any], random: random.Random) -> bytes:
    body = random.choice(seeds)
    for _ in range(random.randrange(1, 4)):
        body = mutated(body, random) if body else random.choice(seeds)
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
        for number in range(1000):
            body = malformed(SEEDS[path], generator)
            answer = client.post(path, content=body)
            statuses.append(answer.status_code)
            assert answer.status_code in {200, 400}, (number, body, answer.text)
            if answer.status_code == 400:
                assert answer.json().keys() == FIELDS[path], (number, body)
    assert statuses.count(400) > 300  # otherwise the bodies are not malformed
    assert statuses.count(200) > 20


@pytest.mark.parametrize("path", SEEDS)
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"3", b'"a"', b"{", b"\xff", b"NaN", b"[" * 100_000, b'{"input":"\\ud800"}']
)
def test_bodies_that_are_no_object_are_refused(path: str, body: bytes) -> None:
    with gateway(StandIn()) as client:
        answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json().keys() == FIELDS[path]


def test_malformed_forms_are_answered() -> None:
    generator = random.Random(7)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="entries"\r\n\r\n'
        b'{"clip":{"textual":{"modelName":"m","options":{}}}}\r\n'
        b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\na dog\r\n--b--\r\n'
    )
    statuses = []
    with gateway(StandIn()) as client:
        for number in range(1000):
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

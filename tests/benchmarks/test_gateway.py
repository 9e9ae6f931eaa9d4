"""The benchmark of the gateway: its requests, what it reads in answers, and how it accounts CPU time."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks import gateway
from benchmarks.json_clients import JsonClient, image_request, rows_of, text_request
from benchmarks.load import Load, Result
from benchmarks.load_clients import JsonForm, Target, connect

ROWS = np.array([[1.0, 2.5], [0.25, -3.0], [1 / 3, 0.0]], np.float32)


def answer(form: JsonForm, encoding: str = "float") -> bytes:
    """An answer with `ROWS`."""
    if form == "weaviate":
        return json.dumps({"textVectors": [], "imageVectors": ROWS.tolist()}).encode()
    if form == "triton_json":
        output = {"name": "EMBEDDING", "shape": [3, 2], "datatype": "FP32", "data": ROWS.ravel().tolist()}
        return json.dumps({"outputs": [output]}).encode()
    rows: Sequence[object] = ROWS.tolist()
    if encoding == "base64":
        rows = [base64.b64encode(row.tobytes()).decode() for row in ROWS]
    return json.dumps({"data": [{"embedding": row} for row in rows]}).encode()


@pytest.mark.parametrize(
    ("form", "encoding"),
    [("openai", "float"), ("openai", "base64"), ("weaviate", "float"), ("triton_json", "float")],
)
def test_rows_of_every_form(form: JsonForm, encoding: str) -> None:
    body = answer(form, encoding)
    assert np.array_equal(rows_of(form, body), ROWS)
    client = connect(Target(form, "127.0.0.1:1", "/"), [b"{}"])
    assert isinstance(client, JsonClient)
    found = client.embedding(body)
    assert found is not None
    assert np.array_equal(found, ROWS.ravel())
    assert client.embedding(b'{"error": "busy"}') is None
    client.close()


def test_requests_hold_all_inputs() -> None:
    pictures = [b"one", b"two"]
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    openai = json.loads(image_request("openai", pictures))
    assert openai["input"] == [f"data:image/jpeg;base64,{text}" for text in texts]
    assert json.loads(image_request("weaviate", pictures))["images"] == texts
    triton = json.loads(image_request("triton_json", pictures))
    assert triton["inputs"][0]["data"] == texts
    assert triton["inputs"][0]["shape"] == [2, 1]
    assert triton["parameters"] == {"normalized": True, "base64_encoded": True}
    assert json.loads(text_request("openai", ["a"]))["input"] == ["a"]
    assert json.loads(text_request("triton_json", ["a"]))["inputs"][0]["data"] == ["a"]


def test_cpu_time_is_added_up_per_kind_and_input() -> None:
    load = Load(Target("openai", "127.0.0.1:1", "/"), [b"{}"], concurrency=1)
    seconds = {
        "siglip_vision_process": 2.0,
        "siglip_text_tokenize": 1.0,
        "siglip_gateway": 0.5,
        "python": 9.0,
    }
    result = Result(load, np.ones(10), 10, Counter(), 0, 0, 0, 0.0, 0.0, seconds)
    used = gateway._cpu(gateway.Way("gateway", "openai", "127.0.0.1:1"), result, batch=4)
    assert used["decoder"] == pytest.approx(1000 * 3 / 40)
    assert used["gateway"] == pytest.approx(1000 * 0.5 / 40)
    assert sum(used.values()) == pytest.approx(1000 * 3.5 / 40)
    peer = gateway._cpu(gateway.Way("peer", "openai", "127.0.0.1:1", pid=1), result, batch=4)
    assert peer == {"peer": pytest.approx(1000 * 12.5 / 40)}


def test_vectors_of_a_peer_are_scaled_before_they_are_compared() -> None:
    unit = ROWS[:2] / np.linalg.norm(ROWS[:2], axis=-1, keepdims=True)
    scaled = gateway._fidelity((3 * unit).reshape(1, -1), unit.reshape(1, -1), batch=2)
    assert float(scaled["largest_difference"]) < 1e-6
    swapped = gateway._fidelity(unit[::-1].reshape(1, -1), unit.reshape(1, -1), batch=2)
    assert float(swapped["cosine_min"]) < 0.5


def test_texts_are_compared_with_the_reference_of_their_place() -> None:
    reference = np.eye(3, dtype=np.float32)
    # Two requests of two texts: the first and the second, the second and the third.
    found = np.stack([reference[[0, 1]].ravel(), reference[[1, 2]].ravel()])
    assert float(gateway._closeness(found, reference, batch=2)) == 1
    assert float(gateway._closeness(found[::-1], reference, batch=2)) == 0
    assert gateway._closeness(found, None, batch=2) == ""

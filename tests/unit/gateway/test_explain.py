"""Heatmaps in the gateway's own API, in front of a stand-in for Triton."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, StandIn, encoded, gateway, vector
from starlette.testclient import TestClient

PROMPTS = ["a dog", "a cat"]
VECTORS = np.stack([vector(prompt) for prompt in PROMPTS])


@pytest.fixture
def client() -> Iterator[TestClient]:
    with gateway(max_text=100) as running:
        yield running


def test_explain_answers_maps_and_scores(client: TestClient) -> None:
    answer = client.post("/explain", json={"image": URI, "prompts": PROMPTS}).json()
    assert answer.keys() == {
        "model",
        "prompts",
        "scores",
        "unattributed",
        "image_size",
        "patch_maps",
        "heatmaps",
    }
    assert answer["model"] == "stand-in"
    assert answer["prompts"] == PROMPTS
    assert answer["image_size"] == [6, 8]
    patches = VECTORS.reshape(2, 4, 4)
    np.testing.assert_array_equal(np.array(answer["patch_maps"], np.float32), patches)
    np.testing.assert_array_equal(np.array(answer["scores"], np.float32), patches.sum((1, 2)))
    np.testing.assert_array_equal(np.array(answer["unattributed"], np.float32), VECTORS[:, 0])
    np.testing.assert_array_equal(np.array(answer["heatmaps"], np.float32), np.resize(VECTORS, (2, 6, 8)))


def test_long_maps_are_written_in_parts(client: TestClient) -> None:
    """A map of more rows than one part holds has all its rows, in their order."""
    body = {"image": URI, "prompts": PROMPTS, "size": [1030, 300]}
    answer = client.post("/explain", json=body).json()
    assert answer["image_size"] == [1030, 300]
    np.testing.assert_array_equal(
        np.array(answer["heatmaps"], np.float32), np.resize(VECTORS, (2, 1030, 300))
    )


def test_heatmaps_as_base64(client: TestClient) -> None:
    body = {"image": URI, "prompts": PROMPTS, "encoding_format": "base64"}
    answer = client.post("/explain", json=body).json()
    found = [np.frombuffer(base64.b64decode(text), "<f4").reshape(6, 8) for text in answer["heatmaps"]]
    np.testing.assert_array_equal(found, np.resize(VECTORS, (2, 6, 8)))


def test_only_what_is_asked_for_is_sent(client: TestClient) -> None:
    body = {"image": encoded(PNG), "prompts": PROMPTS, "heatmaps": False, "overlays": True}
    answer = client.post("/explain", json=body).json()
    assert "heatmaps" not in answer
    assert answer["overlays"] == [f"data:image/png;base64,{encoded(PNG)}"] * 2


def test_all_options_reach_triton() -> None:
    stand_in = StandIn()
    given = {
        "templates": ["a {}"],
        "background": ["sky"],
        "mode": "relative",
        "normalize": "joint",
        "size": [3, 4],
        "colormap": "jet",
        "opacity": 0.25,
    }
    with gateway(stand_in) as client:
        body = {"image": URI, "prompts": PROMPTS, **given, "truncate": True}
        assert client.post("/explain", json=body).status_code == 200
    (call,) = [call for call in stand_in.calls if call[0] == "explain"]
    expected = {**given, "size": (3, 4), "overlays": False, "truncation": True}
    assert call == ("explain", PNG, PROMPTS, expected)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"image": None}, "image", "NoneType, expected"),
    ({"image": "?"}, "image", "not base64"),
    ({"image": encoded(b"no picture")}, "image", "not an image"),
    ({"image": "https://example.com/a.png"}, "image", ""),
    ({"prompts": None}, "prompts", "missing"),
    ({"prompts": []}, "prompts", "missing"),
    ({"prompts": "a dog"}, "prompts", "a text, expected a list"),
    ({"prompts": ["a", 3]}, "prompts[1]", "a number, expected a text"),
    ({"prompts": ["a", ""]}, "prompts[1]", "the text is empty"),
    ({"prompts": ["a", "b" * 101]}, "prompts[1]", "101 characters, at most 100"),
    ({"background": ["a", "b" * 101]}, "background[1]", "101 characters, at most 100"),
    ({"templates": ["a {}", {}]}, "templates[1]", "an object, expected a text"),
    ({"mode": 1}, "mode", "a number, expected a text"),
    ({"size": [1]}, "size", "[1], expected a list of height and width"),
    ({"size": [1, 2, 3]}, "size", "[1, 2, 3], expected a list of height and width"),
    ({"size": [0, 3]}, "size", "[0, 3], expected a list of height and width"),
    ({"size": [True, 3]}, "size", "[True, 3], expected a list of height and width"),
    ({"size": [2**31, 3]}, "size", "[2147483648, 3], expected"),
    ({"size": "3x4"}, "size", "a text, expected a list"),
    ({"opacity": 1.5}, "opacity", "1.5, expected 0 to 1"),
    ({"opacity": True}, "opacity", "a truth value, expected a number from 0 to 1"),
    ({"overlays": 1}, "overlays", "a number, expected true or false"),
    ({"encoding_format": "hex"}, "encoding_format", "'hex', expected one of float, base64"),
    ({"size": [4096, 4096]}, "encoding_format", "33554432 numbers of heatmaps as float"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_refusals_name_the_place(
    client: TestClient, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = client.post("/explain", json={"image": URI, "prompts": PROMPTS, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: {message}")


def test_large_maps_fit_base64(client: TestClient) -> None:
    body = {"image": URI, "prompts": ["a"], "size": [2049, 2048], "encoding_format": "base64"}
    answer = client.post("/explain", json=body)
    assert answer.status_code == 200
    assert client.post("/explain", json={**body, "encoding_format": "float"}).status_code == 400
    assert client.post("/explain", json={**body, "encoding_format": None, "heatmaps": False}).is_success

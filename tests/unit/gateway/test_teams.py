"""Teams in the gateway's own API, in front of a stand-in for Triton."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, StandIn, encoded, gateway
from starlette.testclient import TestClient

STATE = base64.b64encode(b"\0\xff8").decode()
BOXES: list[Any] = [[0, 1.5, 2, 3], [4, 5, 6, 7]]


@pytest.fixture
def client() -> Iterator[TestClient]:
    with gateway() as running:
        yield running


def test_a_fit_of_crops(client: TestClient) -> None:
    answer = client.post("/teams", json={"crops": [URI] * 8, "k": 3}).json()
    assert answer == {
        "model": "stand-in-teams",
        "note": "of jerseys",
        "labels": [0, 1, 2, 0, 1, 2, 0, 1],
        "margin": [index % 3 / 16 for index in range(8)],
        "outlier_score": [1 + index % 3 / 8 for index in range(8)],
        "coordinates": [[index % 3, -(index % 3)] for index in range(8)],
        "region_fallback": [index % 3 == 0 for index in range(8)],
        "state": STATE,
        "status": ["LOW_SUPPORT"],
    }


def test_all_that_is_known_of_crops_reaches_triton() -> None:
    stand_in = StandIn()
    body = {
        "crops": [URI] * 3,
        "track_ids": [2**40, -1, 7],
        "roles": ["player", "", "referee"],
        "anchors": [1, -1, 0],
        "prev_state": STATE,
    }
    with gateway(stand_in) as client:
        assert client.post("/teams", json=body).status_code == 200
    ((_, hints, k, images),) = [call for call in stand_in.calls if call[0] == "fit"]
    assert k == 2
    assert images["crops"] == [PNG] * 3
    assert list(hints["track_ids"]) == [2**40, -1, 7]
    assert hints["roles"] == ["player", "", "referee"]
    assert list(hints["anchors"]) == [1, -1, 0]
    assert hints["prev_state"] == b"\0\xff8"


def test_teams_by_a_state_in_a_frame() -> None:
    stand_in = StandIn()
    with gateway(stand_in) as client:
        answer = client.post("/teams", json={"image": URI, "boxes": BOXES, "state": STATE}).json()
    assert answer["labels"] == [0, 1]
    assert "state" not in answer
    ((_, state, images),) = [call for call in stand_in.calls if call[0] == "teams"]
    assert state == b"\0\xff8"
    assert images["frame"] == PNG
    assert images["boxes"].dtype == np.float32
    np.testing.assert_array_equal(images["boxes"], BOXES)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "crops", "expected either crops, or image and boxes"),
    ({"crops": [URI], "image": URI, "boxes": BOXES}, "crops", "expected either crops, or image and boxes"),
    ({"image": URI}, "boxes", "expected either crops, or image and boxes"),
    ({"crops": URI}, "crops", "crops: a text, expected a list"),
    ({"crops": [URI, "?"]}, "crops[1]", "crops[1]: not base64"),
    ({"crops": [URI, URI, encoded(b"no")]}, "crops[2]", "crops[2]: not an image"),
    ({"crops": [URI] * 9}, "crops", "crops: 9 crops, at most 8 are allowed"),
    ({"image": URI, "boxes": BOXES * 5}, "boxes", "boxes: 10 crops, at most 8 are allowed"),
    ({"image": URI, "boxes": [BOXES[0], 3]}, "boxes[1]", "boxes[1]: a number, expected a list of left"),
    ({"image": URI, "boxes": [[1, 2, 3]]}, "boxes[0]", "boxes[0]: 3 elements, expected a list of left"),
    ({"image": URI, "boxes": [[1, 2, 3, "4"]]}, "boxes[0][3]", "boxes[0][3]: a text, expected a number"),
    ({"image": URI, "boxes": [[1, 2, 3, True]]}, "boxes[0][3]", "boxes[0][3]: a truth value, expected"),
    ({"image": "?", "boxes": BOXES}, "image", "image: not base64"),
    ({"crops": [URI], "track_ids": [1.5]}, "track_ids[0]", "track_ids[0]: a number, expected a whole number"),
    ({"crops": [URI], "track_ids": [2**63]}, "track_ids[0]", "track_ids[0]: 9223372036854775808, expected"),
    (
        {"crops": [URI], "anchors": [0, 2**31]},
        "anchors[1]",
        "anchors[1]: 2147483648, expected a number",
    ),
    ({"crops": [URI], "roles": [1]}, "roles[0]", "roles[0]: a number, expected a text"),
    ({"crops": [URI], "k": "2"}, "k", "k: a text, expected a whole number"),
    ({"crops": [URI], "state": ""}, "state", "state: empty, because the fit found no teams"),
    ({"crops": [URI], "state": "?"}, "state", "state: not base64"),
    ({"crops": [URI], "state": 3}, "state", "state: a number, expected a state as base64"),
    ({"crops": [URI], "prev_state": []}, "prev_state", "prev_state: a list, expected a state as base64"),
    ({"crops": [URI], "state": STATE, "k": 2}, "k", "k: belongs to a fit"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_refusals_name_the_place(body: dict[str, Any], param: str, message: str) -> None:
    with gateway(max_crops=8) as client:
        answer = client.post("/teams", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == param


def test_crops_have_a_limit_of_their_own() -> None:
    with gateway(max_pictures=2, max_inputs=2) as client:
        assert client.post("/teams", json={"crops": [URI] * 40}).status_code == 200
        links = client.post("/teams", json={"crops": ["https://example.com/a.png"] * 3})
    assert links.status_code == 400
    assert "3 pictures as URLs, at most 2" in links.json()["error"]["message"]


def test_a_server_without_teams_says_so() -> None:
    with gateway(StandIn(missing=True)) as client:
        answer = client.post("/teams", json={"crops": [URI] * 8})
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "not_served"
    assert "the inference server does not serve this" in answer.json()["error"]["message"]

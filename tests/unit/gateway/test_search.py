"""Search in the gateway's own API, in front of a stand-in for Triton."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import PNG, URI, WIDTH, StandIn, encoded, gateway, vector
from PIL import Image
from siglip_serve_client.commands.search.collection import CollectionError
from siglip_serve_client.errors import UnreachableError
from starlette.testclient import TestClient

from siglip_gateway.app import create_app
from siglip_gateway.options import GatewayOptions

NAMES = ["dog.png", "cat.png", "deep/bird.png", "none.png"]
WORDS = ["a dog", "a cat", "a bird"]
OTHERS: list[str | bytes] = [*WORDS, PNG]


def index(file: Path, checkpoint: str = "folder/stand-in", width: int = WIDTH) -> str:
    """An index of the vectors of three words and of a picture."""
    rows = np.stack([*map(vector, WORDS), vector(PNG)])[:, :width] * [[1], [3], [0.5], [7]]
    identity = json.dumps({"checkpoint_name": checkpoint})
    np.savez(file, paths=np.array(NAMES), embeddings=rows.astype(np.float32), identity=np.array(identity))
    return str(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three of the four pictures."""
    shown = tmp_path / "shown"
    (shown / "deep").mkdir(parents=True)
    for number, name in enumerate(NAMES[:3]):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(shown / name)
    return shown


@pytest.fixture
def client(tmp_path: Path, folder: Path) -> Iterator[TestClient]:
    with gateway(search=index(tmp_path / "a.npz"), search_images=str(folder)) as running:
        yield running


def test_the_index_is_described(client: TestClient) -> None:
    assert client.get("/search").json() == {
        "available": True,
        "count": 4,
        "dimensions": WIDTH,
        "model": "folder/stand-in",
        "images": True,
    }


@pytest.mark.parametrize(("number", "word"), list(enumerate(WORDS)))
def test_a_text_finds_its_row(client: TestClient, number: int, word: str) -> None:
    answer = client.post("/search", json={"input": word, "k": 2}).json()
    assert answer["model"] == "stand-in"
    first, second = answer["results"]
    assert first == {
        "name": NAMES[number],
        "score": pytest.approx(1.0, abs=1e-6),
        "index": number,
        "image": f"/search/image/{number}",
    }
    others = [float(vector(word) @ vector(other)) for other in OTHERS if other != word]
    assert second["score"] == pytest.approx(max(others), abs=1e-6)


@pytest.mark.parametrize("given", [URI, encoded(PNG), {"image": URI}, [URI]])
def test_a_picture_finds_its_row(client: TestClient, given: Any) -> None:
    fields = {} if given != encoded(PNG) else {"modality": "image"}
    results = client.post("/search", json={"input": given, **fields}).json()["results"]
    assert len(results) == 4
    assert results[0]["name"] == "none.png"
    assert "image" not in results[0]  # there is no such file
    assert [result["score"] for result in results] == sorted(
        (result["score"] for result in results), reverse=True
    )


def test_pictures_of_rows_are_sent(client: TestClient, folder: Path) -> None:
    answer = client.get("/search/image/2")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == (folder / "deep" / "bird.png").read_bytes()
    assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0)) == (2, 0, 0)


@pytest.mark.parametrize("number", ["3", "4", "-1", "1.5", "x", "²", "9" * 30, "..%2Fa.npz"])
def test_pictures_that_are_not_there_are_refused(client: TestClient, number: str) -> None:
    answer = client.get(f"/search/image/{number}")
    assert answer.status_code == 404
    assert answer.json().keys() == {"error"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", "b"]}, "input"),
    ({"input": "a", "k": 0}, "k"),
    ({"input": "a", "k": 101}, "k"),
    ({"input": "a", "k": "3"}, "k"),
    ({"input": "a", "k": True}, "k"),
    ({"input": "too long"}, "input"),
    ({"input": {"image": encoded(b"no picture")}}, "input"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_refusals_name_the_place(client: TestClient, body: dict[str, Any], param: str) -> None:
    answer = client.post("/search", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_long_texts_are_cut_on_request(client: TestClient) -> None:
    assert client.post("/search", json={"input": "too long", "truncate": True}).status_code == 200


def test_pictures_are_not_shown_unless_a_folder_is_named(tmp_path: Path, folder: Path) -> None:
    """Not even those that lie where the names of the index lead."""
    options: dict[str, Any] = {"search": index(tmp_path / "a.npz"), "search_base": str(folder)}
    with gateway(**options) as client:
        assert client.get("/search").json()["images"] is False
        results = client.post("/search", json={"input": "a dog"}).json()["results"]
        assert not any("image" in result for result in results)
        assert client.get("/search/image/0").status_code == 404


def test_a_gateway_without_an_index_says_so() -> None:
    with gateway() as client:
        answer = client.get("/search").json()
        assert (answer["available"], answer["count"], answer["dimensions"]) == (False, 0, 0)
        for refused in (client.post("/search", json={"input": "a"}), client.get("/search/image/0")):
            assert refused.status_code == 501
            assert refused.json()["error"]["code"] == "no_index"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"width": WIDTH - 1}, f"vectors of {WIDTH - 1} numbers, and those of stand-in have {WIDTH}"),
        ({"checkpoint": "folder/another"}, "made with folder/another, and the server runs stand-in"),
    ],
)
def test_an_index_of_another_checkpoint_is_refused(
    tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    with gateway(search=index(tmp_path / "a.npz", **wrong)) as client:
        described = client.get("/search").json()
        assert described["available"] is False
        assert reason in described["reason"]
        answer = client.post("/search", json={"input": "a dog"})
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "index_mismatch"
    assert reason in answer.json()["error"]["message"]


def test_without_triton_the_index_is_described_and_not_searched(tmp_path: Path) -> None:
    stand_in = StandIn(error=UnreachableError("no server answers"))
    with gateway(stand_in, search=index(tmp_path / "a.npz")) as client:
        assert client.get("/search").json()["count"] == 4
        assert client.post("/search", json={"input": "a dog"}).status_code == 503


def test_search_and_its_pictures_need_a_key(tmp_path: Path, folder: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret")
    options: dict[str, Any] = {"search": index(tmp_path / "a.npz"), "search_images": str(folder)}
    with gateway(api_key_file=str(keys), **options) as client:
        for headers, status in (({}, 401), ({"x-api-key": "secret"}, 200)):
            assert client.get("/search", headers=headers).status_code == status
            assert client.get("/search/image/0", headers=headers).status_code == status
            assert client.post("/search", json={"input": "a"}, headers=headers).status_code == status
            body: dict[str, Any] = {"crops": [URI] * 8}
            assert client.post("/teams", json=body, headers=headers).status_code == status
            body = {"image": URI, "prompts": ["a"]}
            assert client.post("/explain", json=body, headers=headers).status_code == status


def test_pictures_count_as_requests_of_the_own_api(client: TestClient) -> None:
    client.get("/search/image/0")
    text = client.get("/metrics").text
    assert 'siglip_gateway_requests_total{api="own",status="200"} 1' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "nothing.npz"}, "nothing.npz: No such file"),
        ({"search_images": "."}, "expected --search with it"),
    ],
)
def test_options_that_cannot_work_are_refused_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CollectionError, match=message):
        create_app(GatewayOptions(**options), StandIn())


def test_a_folder_that_is_missing_is_refused_at_the_start(tmp_path: Path) -> None:
    options = GatewayOptions(search=index(tmp_path / "a.npz"), search_images=str(tmp_path / "none"))
    with pytest.raises(CollectionError, match="no such folder"):
        create_app(options, StandIn())

"""The gateway's own API before a real Triton: its answers are those of the project's own client."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import encoded, gateway_process
from images import encode
from numpy.typing import NDArray
from PIL import Image
from programs import free_port
from siglip_serve_client import Client, Teams
from wire import TINY

from siglip_serve.launcher import TritonServer

SCENE = (TINY / "samples" / "scene.jpg").read_bytes()
PROMPTS = ["elephant", "guitar", "pizza"]


def array(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"mode": "absolute", "normalize": "joint"},
    {"size": [64, 48], "background": ["sky", "grass"], "templates": ["a drawing of a {}.", "{}"]},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_heatmaps_are_those_of_triton(
    http: httpx.Client, triton: Client, options: dict[str, Any], encoding: str
) -> None:
    body = {"image": encoded(SCENE), "prompts": PROMPTS, "encoding_format": encoding, **options}
    answer = http.post("/explain", json=body).json()
    known = {**options, "size": tuple(options["size"])} if "size" in options else options
    expected = triton.explain(SCENE, PROMPTS, **known)
    heatmaps = answer["heatmaps"]
    if encoding == "base64":
        heatmaps = [np.frombuffer(base64.b64decode(text), "<f4") for text in heatmaps]
        heatmaps = np.reshape(heatmaps, (len(PROMPTS), *answer["image_size"]))
    np.testing.assert_array_equal(array(heatmaps), expected.heatmaps)
    for name in ("scores", "unattributed", "patch_maps"):
        np.testing.assert_array_equal(array(answer[name]), getattr(expected, name))
    assert answer["model"] == triton.describe()["checkpoint_name"]


def test_overlays_are_those_of_triton(http: httpx.Client, triton: Client) -> None:
    look: dict[str, Any] = {"colormap": "viridis", "opacity": 0.75, "overlays": True}
    body = {"image": encoded(SCENE), "prompts": PROMPTS[:2], "heatmaps": False, **look}
    answer = http.post("/explain", json=body).json()
    expected = triton.explain(SCENE, PROMPTS[:2], **look).overlays
    for uri, picture in zip(answer["overlays"], expected, strict=True):
        kind, _, data = uri.partition(",")
        assert kind == "data:image/png;base64"
        found = Image.open(io.BytesIO(base64.b64decode(data)))
        assert list(found.size) == answer["image_size"][::-1]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"image": encoded(b"no picture")}, "image", "image: not a decodable image"),
    ({"prompts": ["a", ""]}, "prompts[1]", "prompts[1]: the text is empty"),
    ({"prompts": ["a", "dog " * 300]}, "prompts[1]", "or set truncate"),
    ({"templates": ["{}", "a photo"]}, "templates[1]", "templates[1]: "),
    ({"background": ["a"], "mode": "absolute"}, "background", "background: means nothing in the mode"),
    ({"mode": "Relative"}, "mode", "mode: got 'Relative', expected one of relative, absolute"),
    ({"normalize": "all"}, "normalize", "normalize: got 'all', expected one of none, prompt, joint"),
    ({"colormap": "red"}, "colormap", "colormap: got 'red', expected one of bwr, "),
    ({"size": [100_000, 1], "encoding_format": "base64"}, "size", "size: "),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_refusals_of_triton_name_the_field(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = http.post("/explain", json={"image": encoded(SCENE), "prompts": PROMPTS, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_long_prompts_are_cut_on_request(http: httpx.Client) -> None:
    body = {"image": encoded(SCENE), "prompts": ["dog " * 300], "truncate": True, "heatmaps": False}
    assert http.post("/explain", json=body).status_code == 200


def crop(team: int, seed: int) -> NDArray[np.uint8]:
    """A player on grass, uint8 [96, 48, 3]."""
    pixels = np.full((96, 48, 3), (60, 140, 60), np.float64)
    pixels[16:48, 12:36] = ((200, 30, 40), (240, 240, 240))[team]
    noise = np.random.default_rng(seed).normal(0, 6, pixels.shape)
    return np.asarray((pixels + noise).clip(0, 255), np.uint8)


CROPS = [encode(Image.fromarray(crop(number % 2, number)), "PNG") for number in range(32)]
FRAME = encode(Image.fromarray(np.concatenate([crop(n % 2, n) for n in range(10)], axis=1)), "PNG")
BOXES = [[48 * number, 0, 48 * number + 48, 96] for number in range(10)]


def assert_teams(answer: dict[str, Any], expected: Teams) -> None:
    for name in ("labels", "margin", "outlier_score", "coordinates", "region_fallback"):
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(np.array(answer[name], wanted.dtype), wanted)


def test_teams_are_those_of_triton(http: httpx.Client, triton: Client) -> None:
    known: dict[str, Any] = {
        "track_ids": [number // 2 * 2 + number % 2 for number in range(32)],
        "roles": ["player"] * 31 + ["referee"],
        "anchors": [1, 0] + [-1] * 30,
    }
    expected = triton.fit_teams(crops=CROPS, **known)
    body = {"crops": [encoded(file) for file in CROPS], **known}
    answer = http.post("/teams", json=body).json()
    assert_teams(answer, expected)
    assert base64.b64decode(answer["state"]) == expected.state
    assert tuple(answer["status"]) == expected.status
    assert answer["labels"][:2] == [1, 0]
    described = triton.describe("siglip_base_model")
    assert (answer["model"], answer["note"]) == (described["checkpoint_name"], described["checkpoint_note"])

    again = http.post("/teams", json={"crops": body["crops"][:5], "state": answer["state"]}).json()
    assert_teams(again, triton.classify_teams(crops=CROPS[:5], state=expected.state))
    assert not {"state", "status"} & again.keys()

    kept = http.post("/teams", json={**body, "anchors": None, "prev_state": answer["state"]}).json()
    assert kept["labels"][:31] == answer["labels"][:31]


def test_teams_in_a_frame_are_those_of_triton(http: httpx.Client, triton: Client) -> None:
    expected = triton.fit_teams(frame=FRAME, boxes=BOXES)
    answer = http.post("/teams", json={"image": encoded(FRAME), "boxes": BOXES}).json()
    assert_teams(answer, expected)
    body = {"image": encoded(FRAME), "boxes": BOXES[:3], "state": answer["state"]}
    assert_teams(
        http.post("/teams", json=body).json(),
        triton.classify_teams(frame=FRAME, boxes=BOXES[:3], state=expected.state),
    )
    nothing = http.post("/teams", json={**body, "boxes": []}).json()
    assert nothing["labels"] == []


ENCODED = [encoded(file) for file in CROPS]
BAD_TEAMS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"crops": [*ENCODED, encoded(b"no picture")]}, "crops[32]", "crops[32]: not a decodable image"),
    ({"image": encoded(b"no"), "boxes": BOXES}, "image", "image: not a decodable image"),
    ({"image": encoded(FRAME), "boxes": [*BOXES, [9, 9, 3, 20]]}, "boxes[10]", "boxes[10]: "),
    ({"image": encoded(FRAME), "boxes": [*BOXES, [1e300, 0, 2, 9]]}, "boxes[10]", "boxes[10]: "),
    ({"crops": ENCODED, "k": 9}, "k", "k: got 9, expected 2 to 8"),
    ({"crops": ENCODED, "roles": ["coach"] * 32}, "roles[0]", "roles[0]: got 'coach', expected player"),
    ({"crops": ENCODED, "roles": ["player"]}, "roles", "roles: "),
    ({"crops": ENCODED, "anchors": [0] * 31 + [2]}, "anchors[31]", "anchors[31]: got 2, expected -1"),
    ({"crops": ENCODED, "track_ids": [1] * 32}, "track_ids", "track_ids: 1 tracks of players"),
    ({"crops": ENCODED, "prev_state": "AAAA"}, "prev_state", "prev_state: "),
    ({"crops": ENCODED, "state": "AAAA"}, "state", "state: "),
    ({"crops": ENCODED[:7]}, None, "7 usable crops of players, expected at least 8"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_TEAMS)
def test_refusals_about_teams_name_the_field(
    http: httpx.Client, body: dict[str, Any], param: str | None, message: str
) -> None:
    answer = http.post("/teams", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert answer.json()["error"]["param"] == param


def test_labels_that_are_refused_are_named(http: httpx.Client) -> None:
    answer = http.post("/classify", json={"image": encoded(SCENE), "labels": ["dog", ""], "softmax": True})
    assert answer.json()["error"]["param"] == "labels[1]"
    body = {"image": encoded(SCENE), "labels": ["dog " * 300], "softmax": True}
    assert http.post("/classify", json=body).status_code == 400
    assert http.post("/classify", json={**body, "truncate": True}).status_code == 200


def test_health_tells_of_both_towers_and_the_note(http: httpx.Client, triton: Client) -> None:
    described = triton.describe()
    assert http.get("/health").json() == {
        "status": "healthy",
        "model": described["checkpoint_name"],
        "dimensions": triton.check_health(),
        "towers": {"image": "healthy", "text": "healthy"},
        "drawings_only": True,
        "note": described["checkpoint_note"],
    }


@pytest.fixture(scope="module", params=["npz", "parquet"])
def embedded(
    request: pytest.FixtureRequest, server: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An output of `siglip-serve embed` over the samples of the checkpoint."""
    file = tmp_path_factory.mktemp("search") / f"samples.{request.param}"
    command = [str(Path(sys.executable).with_name("siglip-serve")), "embed", "--url", server.grpc_url]
    subprocess.run([*command, str(TINY / "samples"), "-o", str(file)], check=True, timeout=120)
    return file


def test_search_finds_the_nearest_rows(server: TritonServer, triton: Client, embedded: Path) -> None:
    files = sorted(file for file in (TINY / "samples").iterdir() if file.suffix in {".jpg", ".png"})
    rows = np.stack([triton.embed_image(file) for file in files]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with (
        gateway_process(
            server.grpc_url, "--search", str(embedded), "--search-images", str(TINY / "samples")
        ) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        described = client.get("/search").json()
        assert described == {
            "available": True,
            "count": len(files),
            "dimensions": rows.shape[1],
            "model": triton.describe()["checkpoint_name"],
            "images": True,
        }
        dog = (TINY / "samples" / "dog.jpg").read_bytes()
        for given, query in (
            ("a penguin", triton.embed_text("a penguin", True)),
            ({"image": encoded(dog)}, triton.embed_image(dog, True)),
        ):
            results = client.post("/search", json={"input": given, "k": 5}).json()["results"]
            scores = rows @ query.astype(np.float64)
            expected = np.argsort(-scores)[:5]
            assert [Path(result["name"]) for result in results] == [files[row] for row in expected]
            found = [result["score"] for result in results]
            np.testing.assert_allclose(found, scores[expected], atol=1e-6)
            for result in results:
                answer = client.get(result["image"])
                assert answer.content == Path(result["name"]).read_bytes()


def test_an_index_of_another_checkpoint_is_refused_at_the_start(server: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "other.npz"
    np.savez(file, paths=np.array(["a"]), embeddings=np.ones((1, 3), np.float32), identity=np.array("{}"))
    command = [str(Path(sys.executable).with_name("siglip-serve")), "gateway", "--triton", server.grpc_url]
    command += ["--port", str(free_port()), "--search"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "vectors of 3 numbers" in done.stderr
    done = subprocess.run([*command, "none.npz"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "none.npz: No such file" in done.stderr

"""The gateway's own API before a real Triton: its answers are those of the project's own client."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import encoded
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client import Client
from wire import TINY

from siglip_serve.launcher import TritonServer

SCENE = (TINY / "samples" / "scene.jpg").read_bytes()
PROMPTS = ["elephant", "guitar", "pizza"]


@pytest.fixture(scope="module")
def triton(server: TritonServer) -> Iterator[Client]:
    """The project's own client, straight to Triton."""
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def http(gateway_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway_url, trust_env=False, timeout=60) as client:
        yield client


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

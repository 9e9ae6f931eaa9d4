"""`explain_image` of a real server: sums, places, options and pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from explaining import MAPS, Answer, corner, explain, peak, png, stretched
from images import encode, exif
from numpy.typing import NDArray
from PIL import Image
from wire import TINY, GrpcCaller, HttpCaller, post

from siglip_serve.launcher import TritonServer

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
PROMPTS = ["dog", "a slice of pizza", "grass", "größer als eine Katze"]
TEMPLATES = ["a photo of a {}.", "{}", "a drawing of a {}."]
WORDS = ["thing", "animal", "sky"]
# The turn from an upright picture to the stored one, by EXIF orientation.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
CASES: list[dict[str, Any]] = [
    {},
    {"MODE": ["relative"], "TEMPLATE": TEMPLATES},
    {"BACKGROUND": WORDS},
    {"BACKGROUND": WORDS, "TEMPLATE": TEMPLATES},
    {"MODE": ["absolute"]},
    {"MODE": ["absolute"], "TEMPLATE": TEMPLATES},
]


@pytest.fixture(scope="module")
def grpc(server: TritonServer) -> GrpcCaller:
    return GrpcCaller(server.grpc_url)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def embed_texts(caller: GrpcCaller, texts: list[str]) -> NDArray[np.float32]:
    tensor = caller.module.InferInput("INPUT_TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_)[:, None])
    return caller.client.infer("embed_text", [tensor], parameters={"normalized": True}).as_numpy("EMBEDDING")


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["four", "one"])
@pytest.mark.parametrize("inputs", CASES, ids=lambda case: "-".join(case) + "-".join(case.get("MODE", [])))
def test_maps_and_the_unattributed_part_sum_to_the_cosine(
    prompts: list[str], inputs: dict[str, Any], grpc: GrpcCaller
) -> None:
    found = explain(grpc, DOG, prompts, **inputs)
    templates = inputs.get("TEMPLATE", ["{}"])
    texts = [template.replace("{}", prompt) for prompt in prompts for template in templates]
    classes = unit(embed_texts(grpc, texts).reshape(len(prompts), len(templates), -1).mean(1))
    cosines = classes @ grpc.embed([DOG], normalized=True)[0]
    np.testing.assert_allclose(found["SCORES"], cosines, atol=1e-5)
    total = found["PATCH_MAPS"].sum((1, 2)) + found["UNATTRIBUTED"]
    np.testing.assert_allclose(total, found["SCORES"], atol=1e-5)
    side = found["PATCH_MAPS"].shape[1]
    assert found["PATCH_MAPS"].shape == (len(prompts), side, side)
    assert np.abs(found["PATCH_MAPS"]).max() > 1e-4  # the maps are not empty


def test_relative_maps_subtract_the_mean_map_of_the_background(grpc: GrpcCaller) -> None:
    absolute = explain(grpc, DOG, [*PROMPTS, *WORDS], MODE=["absolute"])["PATCH_MAPS"]
    own, words = absolute[:4], absolute[4:]
    against_words = explain(grpc, DOG, PROMPTS, BACKGROUND=WORDS)["PATCH_MAPS"]
    against_each_other = explain(grpc, DOG, PROMPTS)["PATCH_MAPS"]
    np.testing.assert_allclose(against_words, own - words.mean(0), atol=1e-6)
    np.testing.assert_allclose(against_each_other, own - own.mean(0), atol=1e-6)
    np.testing.assert_allclose(against_each_other.sum(0), 0, atol=1e-6)
    one = explain(grpc, DOG, PROMPTS[:1], BACKGROUND=WORDS)["PATCH_MAPS"]
    np.testing.assert_allclose(one, against_words[:1], atol=1e-6)
    # A single prompt is compared with no other, and still has a map.
    assert np.ptp(explain(grpc, DOG, PROMPTS[:1])["PATCH_MAPS"]) > 1e-4


def test_equal_prompts_have_flat_maps(grpc: GrpcCaller) -> None:
    found = explain(grpc, DOG, ["dog", "dog", "dog"])
    assert np.abs(found["PATCH_MAPS"]).max() < 1e-6
    assert np.ptp(found["HEATMAPS"]) < 0.5  # rounding errors are not scaled up to the range 0 to 1


# ---- places


@pytest.fixture(scope="module")
def expected(grpc: GrpcCaller) -> tuple[float, float]:
    """The place of the penguin on the upright square."""
    place = peak(explain(grpc, png(corner()), ["penguin"], SIZE=[96, 96])["HEATMAPS"][0])
    assert place[0] < 0.4
    assert place[1] > 0.6
    return place


def place_of(grpc: GrpcCaller, data: bytes, **inputs: Any) -> tuple[float, float]:
    return peak(explain(grpc, data, ["penguin"], **inputs)["HEATMAPS"][0])


def patch(grpc: GrpcCaller) -> float:
    """The side of a patch as a fraction of the picture's side."""
    shape = grpc.client.get_model_config("siglip_vision_features", as_json=True)["config"]["output"]
    patches = next(int(one["dims"][0]) for one in shape if one["name"] == "PATCH_EMBEDDINGS")
    return float(patches**-0.5)


@pytest.mark.parametrize("size", [(300, 600), (640, 250), (60, 1000)], ids=str)
def test_maximum_stays_in_place_on_a_stretched_picture(
    size: tuple[int, int], grpc: GrpcCaller, expected: tuple[float, float]
) -> None:
    width, height = size
    found = explain(grpc, png(stretched(width, height)), ["penguin"])["HEATMAPS"]
    scale = min(1, 512 / max(size))
    assert found.shape == (1, round(height * scale), round(width * scale))
    assert peak(found[0]) == pytest.approx(expected, abs=patch(grpc))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_turns_pictures_upright_by_their_exif_orientation(
    orientation: int, kind: str, grpc: GrpcCaller, expected: tuple[float, float]
) -> None:
    upright = stretched(420, 240)
    turn = TURNS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"compress_level": 1}
    data = encode(stored, kind, exif=exif(orientation), **options)
    outputs = ("HEATMAPS", "PATCH_MAPS", "OVERLAY")
    found = explain(grpc, data, ["penguin"], outputs, OPACITY=[0.0])
    assert found["HEATMAPS"].shape == (1, 240, 420)
    assert peak(found["HEATMAPS"][0]) == pytest.approx(expected, abs=patch(grpc))
    with Image.open(
        io.BytesIO(found["OVERLAY"][0])
    ) as overlay:  # at opacity 0, only the upright picture is left
        difference = np.asarray(overlay, dtype=int) - np.asarray(upright, dtype=int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("size", [(5, 3), (1, 96), (97, 1), (1, 1)], ids=str)
def test_explains_a_tiny_picture_like_its_enlargement(size: tuple[int, int], grpc: GrpcCaller) -> None:
    tiny = stretched(*size)
    large = tiny.resize((96, 96), Image.Resampling.BICUBIC)
    given = explain(grpc, png(tiny), ["penguin", "sky"])["HEATMAPS"]
    assert given.shape == (2, size[1], size[0])
    scaled = explain(grpc, png(tiny), ["penguin", "sky"], SIZE=[30, 50])["HEATMAPS"]
    same = explain(grpc, png(large), ["penguin", "sky"], SIZE=[30, 50])["HEATMAPS"]
    for own, there in zip(scaled, same, strict=True):
        assert peak(own) == pytest.approx(peak(there), abs=patch(grpc))
        assert np.corrcoef(own.ravel(), there.ravel())[0, 1] > 0.99


def test_scales_maps_of_a_huge_picture_to_512_pixels(grpc: GrpcCaller, expected: tuple[float, float]) -> None:
    data = encode(stretched(6000, 4000), "JPEG", quality=60)
    found = explain(grpc, data, ["penguin"], (*MAPS, "OVERLAY"))
    assert found["HEATMAPS"].shape == (1, 341, 512)
    assert peak(found["HEATMAPS"][0]) == pytest.approx(expected, abs=patch(grpc))
    with Image.open(io.BytesIO(found["OVERLAY"][0])) as overlay:
        assert overlay.size == (512, 341)


# ---- options


def ranges(found: Answer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    maps = found["HEATMAPS"]
    return maps.min((1, 2)), maps.max((1, 2))


def test_normalizes_heatmaps_per_prompt_or_jointly(grpc: GrpcCaller) -> None:
    patches = explain(grpc, DOG, PROMPTS)["PATCH_MAPS"]
    # One pixel per patch, so that no pixel is interpolated.
    size = list(patches.shape[1:])
    by_default = explain(grpc, DOG, PROMPTS, SIZE=size)
    plain = explain(grpc, DOG, PROMPTS, SIZE=size, NORMALIZE=["none"])
    own = explain(grpc, DOG, PROMPTS, SIZE=size, NORMALIZE=["prompt"])
    joint = explain(grpc, DOG, PROMPTS, SIZE=size, NORMALIZE=["joint"])
    np.testing.assert_allclose(by_default["HEATMAPS"], plain["HEATMAPS"], atol=1e-6)
    np.testing.assert_allclose(plain["HEATMAPS"], patches, atol=1e-6)
    low, high = ranges(own)
    np.testing.assert_allclose(low, 0, atol=1e-5)
    np.testing.assert_allclose(high, 1, atol=1e-5)
    wanted = (patches - patches.min()) / np.ptp(patches)
    np.testing.assert_allclose(joint["HEATMAPS"], wanted, atol=1e-4)
    low, high = ranges(joint)
    assert (low > 0.01).any() or (high < 0.99).any()
    for found in (own, joint):
        np.testing.assert_allclose(found["PATCH_MAPS"], patches, atol=1e-6)


def test_computes_only_the_requested_outputs(grpc: GrpcCaller) -> None:
    for names in (*((name,) for name in (*MAPS, "OVERLAY")), ("SCORES", "OVERLAY"), ("PATCH_MAPS", "SCORES")):
        assert all(len(array) == 4 for array in explain(grpc, DOG, PROMPTS, names).values())
    statistics = grpc.client.get_inference_statistics("explain_overlays", as_json=True)["model_stats"][0]
    before = int(statistics.get("execution_count", 0))
    explain(grpc, DOG, PROMPTS)
    statistics = grpc.client.get_inference_statistics("explain_overlays", as_json=True)["model_stats"][0]
    assert int(statistics.get("execution_count", 0)) == before  # no picture was painted


def test_overlays_use_the_colormap_and_the_opacity(grpc: GrpcCaller) -> None:
    pictures: Mapping[str, NDArray[np.uint8]] = {}
    asked: dict[str, Any] = {"OPACITY": [1.0], "SIZE": [60, 90], "NORMALIZE": ["prompt"]}
    for name in ("jet", "viridis", "cividis"):
        found = explain(grpc, DOG, PROMPTS, ("OVERLAY", "HEATMAPS"), COLORMAP=[name], **asked)
        assert len(found["OVERLAY"]) == len(PROMPTS)
        for file, heat in zip(found["OVERLAY"], found["HEATMAPS"], strict=True):
            with Image.open(io.BytesIO(file)) as image:
                assert (image.format, image.size, image.mode) == ("PNG", (90, 60), "RGB")
                pixels = np.asarray(image).astype(int)
            hot, cold = (np.unravel_index(find(heat), heat.shape) for find in (np.argmax, np.argmin))
            if name == "jet":  # red where the map is high, blue where it is low
                assert pixels[hot].argmax() == 0
                assert pixels[cold].argmax() == 2
            else:  # these colormaps grow lighter
                assert pixels[hot].sum() > pixels[cold].sum() + 200
        pictures = {**pictures, name: pixels.astype(np.uint8)}
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    half = explain(grpc, DOG, PROMPTS, ("OVERLAY",), SIZE=[60, 90])["OVERLAY"]
    given = explain(grpc, DOG, PROMPTS, ("OVERLAY",), SIZE=[60, 90], OPACITY=[0.5], COLORMAP=["bwr"])[
        "OVERLAY"
    ]
    assert list(half) == list(given)


@pytest.mark.parametrize("normalization", ["none", "joint", "prompt"])
def test_overlays_are_white_at_zero_on_a_scale_for_all_prompts(normalization: str, grpc: GrpcCaller) -> None:
    """NORMALIZE `prompt` alone gives each map its own scale, and zero is white there too."""
    patches = explain(grpc, DOG, PROMPTS)["PATCH_MAPS"]
    # As many pixels as patches, so that nothing lies between two of them.
    asked: dict[str, Any] = {"SIZE": list(patches.shape[1:]), "OPACITY": [1.0], "NORMALIZE": [normalization]}
    for file, patch_map in zip(
        explain(grpc, DOG, PROMPTS, ("OVERLAY",), **asked)["OVERLAY"], patches, strict=True
    ):
        with Image.open(io.BytesIO(file)) as image:
            red, green, blue = np.moveaxis(np.asarray(image).astype(int), -1, 0)
        most = np.abs(patch_map if normalization == "prompt" else patches).max()
        paler = np.rint(255 * (1 - np.abs(patch_map) / most))
        np.testing.assert_allclose(green, paler, atol=3)
        np.testing.assert_array_equal(red[patch_map > 0], 255)
        np.testing.assert_array_equal(blue[patch_map < 0], 255)


# ---- protocols


def test_http_with_binary_tensors_agrees(server: TritonServer, grpc: GrpcCaller) -> None:
    http = HttpCaller(server.http_url)
    asked: dict[str, Any] = {"BACKGROUND": WORDS, "SIZE": [40, 50], "TEMPLATE": TEMPLATES}
    for name, array in explain(grpc, DOG, PROMPTS, **asked).items():
        np.testing.assert_allclose(explain(http, DOG, PROMPTS, **asked)[name], array, atol=1e-6)


def json_request(server: TritonServer, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    url = f"http://{server.http_url}/v2/models/explain_image/infer"
    status, answer = post(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return status, json.loads(answer)


def test_json_takes_and_returns_base64(server: TritonServer, grpc: GrpcCaller) -> None:
    body = {
        "inputs": [
            {
                "name": "INPUT_IMAGE",
                "shape": [1, 1],
                "datatype": "BYTES",
                "data": [base64.b64encode(DOG).decode()],
            },
            {"name": "PROMPTS", "shape": [2], "datatype": "BYTES", "data": PROMPTS[:2]},
            {"name": "SIZE", "shape": [2], "datatype": "INT32", "data": [12, 16]},
        ],
        "parameters": {"base64_encoded": True},
    }
    status, answer = json_request(server, body)
    assert status == 200, answer
    found = {one["name"]: one for one in answer["outputs"]}
    assert set(found) == {*MAPS, "OVERLAY"}  # all outputs, since none was named
    expected = explain(grpc, DOG, PROMPTS[:2], SIZE=[12, 16])
    for name in MAPS:
        assert found[name]["shape"] == list(expected[name].shape)
        np.testing.assert_allclose(found[name]["data"], expected[name].ravel(), atol=1e-6)
    for text in found["OVERLAY"]["data"]:  # JSON cannot hold the bytes of a PNG
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            assert image.size == (16, 12)
    status, answer = json_request(server, {**body, "outputs": [{"name": "SCORES"}]})
    assert [one["name"] for one in answer["outputs"]] == ["SCORES"]


def test_refuses_a_raw_post(server: TritonServer) -> None:
    """A raw post has room for one input only."""
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
    url = f"http://{server.http_url}/v2/models/explain_image/infer"
    status, answer = post(url, DOG, headers)
    assert status == 400
    assert "Raw request must only have 1 input" in json.loads(answer)["error"]

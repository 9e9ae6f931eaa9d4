"""Image embeddings of a real server, over gRPC and HTTP."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from images import encode, image_files, photo
from numpy.typing import NDArray
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipModel
from wire import TINY, GrpcCaller, HttpCaller, post_image, raw_embedding

from siglip_serve.launcher import TritonServer

PHOTO = encode(photo(500, 375), "JPEG", quality=90)


@pytest.fixture(scope="module")
def reference() -> SiglipModel:
    return SiglipModel.from_pretrained(TINY).eval()


def reference_pixels(files: list[bytes]) -> torch.Tensor:
    processor = SiglipImageProcessorPil.from_pretrained(TINY)
    images = [Image.open(io.BytesIO(data)) for data in files]
    return processor(images=images, return_tensors="pt")["pixel_values"]


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize(("mode", "least"), [("pil", 0.999999), ("fast", 0.999)])
def test_image_outputs_equal_transformers(
    mode: str, least: float, server: TritonServer, exact_server: TritonServer, reference: SiglipModel
) -> None:
    files = [encode(photo(120 + 31 * seed, 300 - 17 * seed, seed), "JPEG", quality=92) for seed in range(12)]
    caller = GrpcCaller((exact_server if mode == "pil" else server).grpc_url)
    ours = caller.call("siglip_vision_features", files, ["EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS"])
    with torch.inference_mode():
        theirs = reference.vision_model(reference_pixels(files))
    tokens = theirs.last_hidden_state.numpy()
    assert cosines(ours["EMBEDDING"], theirs.pooler_output.numpy()).min() >= least
    assert cosines(ours["MEAN_EMBEDDING"], tokens.mean(1)).min() >= least
    assert cosines(ours["PATCH_EMBEDDINGS"], tokens).min() >= (least if mode == "pil" else 0.98)


def test_embeds_every_kind_of_file(server: TritonServer) -> None:
    files = list(image_files().values())
    embeddings = GrpcCaller(server.grpc_url).embed(files)
    assert embeddings.shape[0] == len(files)
    assert np.isfinite(embeddings).all()


def test_all_ways_to_send_agree(server: TritonServer) -> None:
    grpc, http = GrpcCaller(server.grpc_url), HttpCaller(server.http_url)
    expected = grpc.embed([PHOTO])
    assert expected.dtype == np.float32
    encoded = base64.b64encode(PHOTO)
    status, body = post_image(server.http_url, PHOTO)
    assert status == 200
    for way, got in {
        "siglip_vision": grpc.embed([PHOTO], "siglip_vision"),
        "http": http.embed([PHOTO]),
        "raw post": raw_embedding(body)[None],
        "base64, grpc": grpc.embed([encoded], base64_encoded=True),
        "base64, http": http.embed([encoded], base64_encoded=True),
        "named model": grpc.embed([PHOTO], embed_model="siglip_vision"),
        "batch": http.embed([PHOTO] * 3)[2:],
    }.items():
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=way)


def test_raw_post_takes_parameters_as_headers(server: TritonServer) -> None:
    _, plain = post_image(server.http_url, PHOTO)
    status, body = post_image(
        server.http_url, base64.b64encode(PHOTO), {"base64_encoded": "true", "normalized": "true"}
    )
    assert status == 200
    unit, embedding = raw_embedding(body), raw_embedding(plain)
    assert np.linalg.norm(unit) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(unit, embedding / np.linalg.norm(embedding), atol=1e-5)


def test_normalizes_only_on_request(server: TritonServer) -> None:
    caller = GrpcCaller(server.grpc_url)
    plain, unit = caller.embed([PHOTO]), caller.embed([PHOTO], normalized=True)
    assert abs(np.linalg.norm(plain) - 1) > 0.01
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), rtol=1e-4, atol=1e-6)


def test_metadata_names_the_checkpoints_dimensions(server: TritonServer) -> None:
    client = GrpcCaller(server.grpc_url).client
    config = json.loads((TINY / "config.json").read_text())["vision_config"]
    outputs = {o.name: list(o.shape) for o in client.get_model_metadata("siglip_vision_model").outputs}
    tokens = (config["image_size"] // config["patch_size"]) ** 2
    assert outputs["EMBEDDING"] == [-1, config["hidden_size"]]
    assert outputs["PATCH_EMBEDDINGS"] == [-1, tokens, config["hidden_size"]]
    parameters = client.get_model_config("siglip_vision_model").config.parameters
    expected = {
        "checkpoint_name": TINY.name,
        "checkpoint_revision": "local",
        "dtype": "float32",
        "preprocess": "fast",
        "color": "stored",
    }
    assert {name: parameters[name].string_value for name in expected} == expected


def test_concurrent_requests_keep_their_own_rows(server: TritonServer) -> None:
    """Sends 50 requests of 1 to 16 rows over both protocols; each row is recognised by its embedding."""
    pictures = [encode(photo(90, 70, seed), "JPEG") for seed in range(40)]
    grpc = GrpcCaller(server.grpc_url)
    known = np.concatenate([grpc.embed([picture]) for picture in pictures])
    rng = np.random.default_rng(7)
    requests = [rng.integers(len(pictures), size=rng.integers(1, 17)) for _ in range(50)]

    def send(number: int) -> NDArray[np.float32]:
        rows = [pictures[i] for i in requests[number]]
        # Threads must not share a client of HTTP.
        return grpc.embed(rows) if number % 2 else HttpCaller(server.http_url).embed(rows)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(len(requests))))
    for rows, answer in zip(requests, answers, strict=True):
        assert answer.shape == (len(rows), known.shape[1])
        nearest = ((answer[:, None] - known[None]) ** 2).sum(-1).argmin(1)
        assert nearest.tolist() == rows.tolist()
        np.testing.assert_allclose(answer, known[rows], rtol=1e-3, atol=1e-4)


def test_vision_model_takes_pixels(server: TritonServer) -> None:
    caller = GrpcCaller(server.grpc_url)
    pixels = caller.call("siglip_vision_process", [PHOTO], ["PIXEL_VALUES"])["PIXEL_VALUES"]
    assert pixels.dtype == np.uint8
    tensor = caller.module.InferInput("PIXEL_VALUES", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    only = [caller.module.InferRequestedOutput("MEAN_EMBEDDING")]
    result = caller.client.infer("siglip_vision_model", [tensor], outputs=only)
    assert result.as_numpy("EMBEDDING") is None
    assert np.isfinite(result.as_numpy("MEAN_EMBEDDING")).all()

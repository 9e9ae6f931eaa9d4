"""Malformed inputs: status and row of the refusal, and the answers of other requests."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from images import encode, malformed_files, photo, png
from tritonclient.utils import InferenceServerException
from wire import GrpcCaller, HttpCaller, post, post_image

from siglip_serve.launcher import TritonServer

GOOD = encode(photo(80, 60), "JPEG")


def refusal(call: Callable[[], Any]) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", malformed_files())
def test_refuses_a_malformed_file_and_serves_its_neighbours(name: str, exact_server: TritonServer) -> None:
    """The malformed row stands between good ones. Another request is sent at the same time."""
    bad = malformed_files()[name]
    caller = GrpcCaller(exact_server.grpc_url)
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(caller.embed, [GOOD, GOOD])
        error = refusal(lambda: caller.embed([GOOD, bad, GOOD]))
        assert np.isfinite(neighbour.result()).all()
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "INPUT_IMAGE[1]: " in error.message()
    assert "Traceback" not in error.message()
    assert ".py" not in error.message()
    status, body = post_image(exact_server.http_url, bad)
    assert status == 400 or not bad  # Triton itself refuses a request without a body
    assert "INPUT_IMAGE[0]: " in json.loads(body)["error"] or not bad


@pytest.mark.parametrize(
    ("rows", "parameters", "expected"),
    [
        ([b"not base64!"], {"base64_encoded": True}, "INPUT_IMAGE[0]: not base64"),
        ([base64.b64encode(GOOD), GOOD], {"base64_encoded": True}, "INPUT_IMAGE[1]: not base64"),
        ([base64.b64encode(GOOD)[:-3]], {"base64_encoded": True}, "expected a multiple of 4, padded with ="),
        ([base64.b64encode(GOOD)], {}, "INPUT_IMAGE[0]: not a decodable image"),
        ([GOOD], {"base64": True}, "parameter 'base64': unknown"),
        ([GOOD], {"base64_encoded": "yes"}, "parameter 'base64_encoded': got 'yes'"),
        ([GOOD], {"normalized": 3}, "parameter 'normalized': got 3"),
        (
            [GOOD],
            {"embed_model": "clip"},
            "parameter 'embed_model': got 'clip', expected one of siglip_vision",
        ),
        ([GOOD], {"embed_model": "clip" * 100}, "parameter 'embed_model': got 'clipclip"),
        ([GOOD, bytes(2**20 + 1)], {}, "INPUT_IMAGE[1]: 1048577 bytes, at most 1048576 are allowed"),
        ([png(100_000, 1)], {}, "INPUT_IMAGE[0]: 100000x1 pixels, at most 65535 a side"),
        ([png(5000, 5000)], {}, "INPUT_IMAGE[0]: 5000x5000 pixels"),
        ([b"", b"", GOOD, b""], {}, "INPUT_IMAGE[3]: empty"),
        ([b"x"] * 9, {}, "and 4 more"),
        ([GOOD] * 1000, {}, "batch-size must be <="),
    ],
)
def test_refuses_a_wrong_request(
    rows: list[bytes], parameters: dict[str, Any], expected: str, exact_server: TritonServer
) -> None:
    error = refusal(lambda: GrpcCaller(exact_server.grpc_url).embed(rows, **parameters))
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert expected in error.message()


@pytest.mark.parametrize(
    ("model", "name", "array", "expected"),
    [
        (
            "embed_image",
            "INPUT_IMAGE",
            np.array([[GOOD, GOOD]], dtype=np.object_),
            "unexpected shape for input 'INPUT_IMAGE' for model 'embed_image'. Expected [-1,1], got [1,2]",
        ),
        (
            "embed_image",
            "INPUT_IMAGE",
            np.zeros((1, 1), dtype=np.float32),
            "input 'INPUT_IMAGE' data-type is 'FP32', but model 'embed_image' expects 'BYTES'",
        ),
        (
            "embed_image",
            "IMAGE",
            np.array([[GOOD]], dtype=np.object_),
            "unexpected inference input 'IMAGE' for model 'embed_image'",
        ),
        (
            "siglip_vision_model",
            "PIXEL_VALUES",
            np.zeros((1, 3, 64, 64), dtype=np.uint8),
            "unexpected shape for input 'PIXEL_VALUES' for model 'siglip_vision_model'",
        ),
        (
            "siglip_vision_model",
            "PIXEL_VALUES",
            np.zeros((1, 64, 64, 3), dtype=np.float32),
            "input 'PIXEL_VALUES' data-type is 'FP32', but model 'siglip_vision_model' expects 'UINT8'",
        ),
    ],
)
def test_refuses_a_wrong_tensor(
    model: str, name: str, array: np.ndarray[Any, Any], expected: str, exact_server: TritonServer
) -> None:
    caller = GrpcCaller(exact_server.grpc_url)
    kind = {"object": "BYTES", "uint8": "UINT8", "float32": "FP32"}[str(array.dtype)]
    tensor = caller.module.InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    error = refusal(lambda: caller.client.infer(model, [tensor]))
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert expected in error.message()


def test_refuses_a_request_without_rows(exact_server: TritonServer) -> None:
    caller = HttpCaller(exact_server.http_url)
    tensor = caller.module.InferInput("INPUT_IMAGE", [0, 1], "BYTES")
    tensor.set_data_from_numpy(np.zeros((0, 1), dtype=np.object_))
    error = refusal(lambda: caller.client.infer("embed_image", [tensor]))
    assert error.status() == "400"
    assert "expected 1 string elements for inference input 'INPUT_IMAGE'" in error.message()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "INPUT_IMAGE[0]: empty, expected the bytes of an image file"),
        (b"{", 400, "failed to parse the request JSON buffer"),
        (b"{}", 400, "attempt to access non-existing object member 'inputs'"),
        (b'{"inputs": 3}', 400, "attempt to access JSON non-array as array"),
        (
            b'{"inputs":[{"name":"INPUT_IMAGE","shape":[1,1],"datatype":"BYTES"}]}',
            400,
            "Input must set only one of the following fields: 'data'",
        ),
    ],
)
def test_refuses_broken_json(body: bytes, status: int, message: str, exact_server: TritonServer) -> None:
    url = f"http://{exact_server.http_url}/v2/models/embed_image/infer"
    found, answer = post(url, body, {"Content-Type": "application/json"})
    assert found == status
    assert message in json.loads(answer)["error"]
    assert np.isfinite(GrpcCaller(exact_server.grpc_url).embed([GOOD])).all()


def test_refuses_a_string_length_beyond_the_data(exact_server: TritonServer) -> None:
    """The length field of the binary tensor promises more bytes than follow."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "INPUT_IMAGE",
                    "shape": [1, 1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": 12},
                }
            ]
        }
    ).encode()
    body = header + struct.pack("<I", 2**31 - 1) + b"12345678"
    url = f"http://{exact_server.http_url}/v2/models/embed_image/infer"
    status, answer = post(url, body, {"Inference-Header-Content-Length": str(len(header))})
    assert (status, b"INPUT_IMAGE[0]: its length says 2147483647 bytes, but 8 follow" in answer) == (
        400,
        True,
    )
    assert np.isfinite(GrpcCaller(exact_server.grpc_url).embed([GOOD])).all()


def test_refuses_an_unknown_parameter_each_time(exact_server: TritonServer) -> None:
    caller = GrpcCaller(exact_server.grpc_url)
    for _ in range(3):
        error = refusal(lambda: caller.embed([GOOD], normalize=True))
        assert "parameter 'normalize': unknown" in error.message()


def test_answers_each_request_of_a_batch_of_bad_ones(exact_server: TritonServer) -> None:
    caller = GrpcCaller(exact_server.grpc_url)
    with ThreadPoolExecutor(16) as pool:
        errors = list(pool.map(lambda _: refusal(lambda: caller.embed([b"bad"])), range(64)))
    assert {error.status() for error in errors} == {"StatusCode.INVALID_ARGUMENT"}
    assert np.isfinite(caller.embed([GOOD])).all()

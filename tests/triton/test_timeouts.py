"""Triton's parameter `timeout`, which our models heed: what has waited for longer is not computed."""

from __future__ import annotations

import json
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from images import encode, photo
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor
from wire import post

from siglip_serve.launcher import TritonServer

MICROSECOND, MINUTE = 1, 60_000_000
Tensors = dict[str, tuple[str, list[int], bytes]]  # datatype, shape, bytes by name


def strings(shape: list[int], *rows: bytes) -> tuple[str, list[int], bytes]:
    return "BYTES", shape, serialize_byte_tensor(np.array(rows, dtype=np.object_)).item()


PICTURE = strings([1, 1], encode(photo(60, 40), "JPEG"))
TEXT = strings([1, 1], b"a dog")
REQUESTS: dict[str, Tensors] = {
    "embed_image": {"INPUT_IMAGE": PICTURE},
    "embed_text": {"INPUT_TEXT": TEXT},
    "classify_image": {"INPUT_IMAGE": PICTURE, "LABELS": strings([2], b"dog", b"cat")},
    "explain_image": {"INPUT_IMAGE": PICTURE, "PROMPTS": strings([1], b"a dog")},
    "siglip_vision_process": {"INPUT_IMAGE": PICTURE},
    "siglip_vision_model": {"PIXEL_VALUES": ("UINT8", [1, 96, 96, 3], bytes(96 * 96 * 3))},
    "siglip_text_tokenize": {"INPUT_TEXT": TEXT},
}


def over_grpc(server: TritonServer, model: str, tensors: Tensors, timeout: int) -> tuple[str, str]:
    message: Any = service_pb2.ModelInferRequest(model_name=model)
    message.parameters["timeout"].int64_param = timeout
    for name, (datatype, shape, data) in tensors.items():
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(data)
    with grpc.insecure_channel(server.grpc_url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def over_http(server: TritonServer, model: str, tensors: Tensors, timeout: int) -> tuple[str, str]:
    inputs = [
        {
            "name": name,
            "shape": shape,
            "datatype": datatype,
            "parameters": {"binary_data_size": len(data)},
        }
        for name, (datatype, shape, data) in tensors.items()
    ]
    text = json.dumps({"inputs": inputs, "parameters": {"timeout": timeout}}).encode()
    body = text + b"".join(data for _, _, data in tensors.values())
    url = f"http://{server.http_url}/v2/models/{model}/infer"
    status, answer = post(url, body, {"Inference-Header-Content-Length": str(len(text))})
    return ("OK", "") if status == 200 else (str(status), json.loads(answer[:2000])["error"])


@pytest.mark.parametrize(("send", "refused"), [(over_grpc, "UNAVAILABLE"), (over_http, "503")])
@pytest.mark.parametrize("model", REQUESTS)
def test_a_request_that_waited_for_too_long_is_not_computed(
    model: str, send: Any, refused: str, server: TritonServer
) -> None:
    tensors = REQUESTS[model]
    assert send(server, model, tensors, MINUTE) == ("OK", "")
    status, told = send(server, model, tensors, MICROSECOND)
    assert (status, told.endswith("Request timeout expired")) == (refused, True)
    assert send(server, model, tensors, 0) == ("OK", "")  # no limit

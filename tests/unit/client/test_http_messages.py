"""Requests and answers over HTTP, compared with those of tritonclient."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from siglip_serve_client import ServerError
from siglip_serve_client._operations.requests import Call, Tensor, strings
from siglip_serve_client._transports.http_messages import (
    HttpAnswer,
    infer_request,
    parameters_request,
    read_parameters,
    register_request,
    withdraw_request,
)

INPUTS = [
    strings("INPUT_IMAGE", "image", [b"JPEG \xff", b""], columns=True),
    Tensor("BOXES", "FP32", (2, 4), np.arange(8, dtype=np.float32).reshape(2, 4)),
    Tensor("K", "INT32", (1,), np.array([2], dtype=np.int32)),
    Tensor("NONE", "FP32", (0, 4), np.empty((0, 4), np.float32)),
    Tensor("FRAME", "UINT8", (2, 2, 3), region="region-1", size=12),
    strings("CROPS", "crops", []),
]


def by_tritonclient(call: Call) -> tuple[bytes, int]:
    inputs = []
    for tensor in call.inputs:
        made = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        if tensor.array is None:
            made.set_shared_memory(tensor.region, tensor.size)
        else:
            made.set_data_from_numpy(tensor.array)
        inputs.append(made)
    outputs = [triton.InferRequestedOutput(name, binary_data=True) for name in call.outputs] or None
    body, size = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, parameters=dict(call.parameters) or None, timeout=call.microseconds
    )
    return body, int(size)


@pytest.mark.parametrize("outputs", [(), ("LABELS", "MARGIN")])
@pytest.mark.parametrize("parameters", [{}, {"normalized": True, "color_order": "BGR"}])
def test_a_request_is_that_of_tritonclient(outputs: tuple[str, ...], parameters: dict[str, Any]) -> None:
    call = Call("fit_teams", INPUTS, parameters, outputs=outputs)
    request = infer_request(call)
    body, size = by_tritonclient(call)
    own = int(request.headers["Inference-Header-Content-Length"])
    assert (request.method, request.path) == ("POST", "/v2/models/fit_teams/infer")
    assert json.loads(request.body[:own]) == json.loads(body[:size])
    assert request.body[own:] == body[size:]


def answer_of(outputs: list[dict[str, Any]], data: bytes, binary: bool = True) -> HttpAnswer:
    head = json.dumps({"outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    return HttpAnswer(head + data, headers)


def output(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def test_outputs_are_read_by_name() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    text = b"\x02\0\0\0OK\x01\0\0\0x"
    outputs = [
        output("EMBEDDING", "FP32", [2, 3], rows.nbytes),
        output("STATUS", "BYTES", [2], len(text)),
        output("NONE", "INT32", [0], 0),
        output("FALLBACK", "BOOL", [2], 2),
    ]
    answer = answer_of(outputs, rows.tobytes() + text + b"\x01\x00")
    np.testing.assert_array_equal(answer.as_numpy("EMBEDDING"), rows)  # type: ignore[arg-type]
    read = {name: answer.as_numpy(name) for name in ("STATUS", "NONE", "FALLBACK")}
    assert [None if array is None else array.tolist() for array in read.values()] == [
        [b"OK", b"x"],
        [],
        [True, False],
    ]
    assert answer.as_numpy("OTHER") is None


def test_outputs_in_json_are_read() -> None:
    outputs = [{"name": "SCORES", "datatype": "FP32", "shape": [2], "data": [0.5, 1]}]
    array = answer_of(outputs, b"", binary=False).as_numpy("SCORES")
    assert array is not None
    assert array.dtype == np.float32
    assert array.tolist() == [0.5, 1.0]


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    answer = answer_of([output("EMBEDDING", "FP32", [2, 3], 8)], bytes(8))
    with pytest.raises(ValueError, match="reshape"):
        answer.as_numpy("EMBEDDING")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b"\xff"])
def test_a_body_that_is_no_answer_of_triton_is_a_server_error(body: bytes) -> None:
    with pytest.raises(ServerError, match="not one of Triton"):
        HttpAnswer(body, {})


def test_regions_and_parameters_have_paths_of_their_own() -> None:
    assert parameters_request("siglip_vision_model").path == "/v2/models/siglip_vision_model/config"
    assert parameters_request("siglip_vision_model").method == "GET"
    register, withdraw = register_request("region-1", 12), withdraw_request("region-1")
    assert register.path == "/v2/systemsharedmemory/region/region-1/register"
    assert json.loads(register.body) == {"key": "region-1", "offset": 0, "byte_size": 12}
    assert withdraw.path == "/v2/systemsharedmemory/region/region-1/unregister"
    body = json.dumps({"name": "m", "parameters": {"dtype": {"string_value": "int8"}}}).encode()
    assert read_parameters(body) == {"dtype": "int8"}
    assert read_parameters(b'{"name": "m"}') == {}

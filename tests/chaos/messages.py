"""Inference requests as the bytes that travel: a protobuf message, or JSON with the tensors behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

__all__ = [
    "INFER",
    "Infer",
    "Tensor",
    "grpc_bytes",
    "http_bytes",
    "http_outputs_of",
    "http_parts",
    "http_request",
    "of_array",
    "of_rows",
    "outputs_of",
]

INFER = "/inference.GRPCInferenceService/ModelInfer"
_DATATYPES = {"f4": "FP32", "u1": "UINT8", "i4": "INT32", "i8": "INT64", "f8": "FP64", "b1": "BOOL"}
_DTYPES = {name: np.dtype(f"<{kind}" if kind[1] != "1" else kind) for kind, name in _DATATYPES.items()}
_KINDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


@dataclass(frozen=True)
class Tensor:
    """An input tensor, whose parts may contradict each other.

    Attributes:
        name: of the input.
        datatype: Triton's name of the type.
        shape: as it is told to the server.
        data: the bytes that are sent.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Infer:
    """A request to a model, which either protocol can carry.

    Attributes:
        model: its name.
        inputs: its tensors.
        parameters: of the request, by name; values of other types than bool, int, float and str are sent over
            HTTP alone.
        outputs: names of the wanted outputs, or none for all.
    """

    model: str
    inputs: Sequence[Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()


def of_rows(name: str, rows: Sequence[bytes], shape: Sequence[int] | None = None) -> Tensor:
    """Make a BYTES tensor, of the shape `[n, 1]` unless another is given."""
    data = b"".join(struct.pack("<I", len(row)) + row for row in rows)
    return Tensor(name, "BYTES", tuple(shape if shape is not None else (len(rows), 1)), data)


def of_array(name: str, array: NDArray[Any]) -> Tensor:
    """Make a tensor of numbers."""
    return Tensor(name, _DATATYPES[array.dtype.str[1:]], array.shape, array.tobytes())


def grpc_bytes(request: Infer) -> bytes:
    """Serialize a ModelInferRequest."""
    message = service_pb2.ModelInferRequest(model_name=request.model)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name, value in request.parameters.items():
        kind = _KINDS.get(type(value))
        if kind == "int64_param" and not -(2**63) <= value < 2**63:
            kind = "uint64_param" if 0 <= value < 2**64 else None
        if kind:
            setattr(message.parameters[name], kind, value)
    for name in request.outputs:
        message.outputs.add(name=name)
    return bytes(message.SerializeToString(deterministic=True))


def http_parts(request: Infer) -> tuple[dict[str, Any], bytes]:
    """Make the JSON of a request, as an object, and the bytes of its tensors."""
    about: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in request.inputs
        ]
    }
    about["parameters"] = {**request.parameters, "binary_data_output": True}
    if request.outputs:
        about["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
    return about, b"".join(tensor.data for tensor in request.inputs)


def http_request(
    path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    """Write a request of HTTP/1.1 with its length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def http_bytes(request: Infer) -> bytes:
    """Write the whole POST of a request."""
    about, data = http_parts(request)
    text = json.dumps(about).encode()
    path = f"/v2/models/{request.model}/infer"
    return http_request(path, text + data, {"Inference-Header-Content-Length": str(len(text))})


def outputs_of(body: bytes) -> dict[str, NDArray[Any]]:
    """Read the outputs of numbers and bytes from a ModelInferResponse."""
    answer = service_pb2.ModelInferResponse.FromString(body)
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return {output.name: _array(output.datatype, output.shape, data) for output, data in pairs}


def http_outputs_of(body: bytes) -> dict[str, NDArray[Any]]:
    """Read the outputs from the body of an answer over HTTP: JSON, and the tensors behind it."""
    about, at = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    found: dict[str, NDArray[Any]] = {}
    for output in about["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = _array(output["datatype"], output["shape"], body[at : at + size])
        at += size
    return found


def _array(datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    if datatype == "BYTES":
        return np.array(_rows(data), dtype=np.object_)
    return np.frombuffer(data, _DTYPES[datatype]).reshape(tuple(shape))


def _rows(data: bytes) -> list[bytes]:
    rows, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        rows.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return rows

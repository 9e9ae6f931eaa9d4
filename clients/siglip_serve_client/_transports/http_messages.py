"""Requests and answers of Triton's HTTP protocol: JSON, and behind it the bytes of the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from siglip_serve_client._operations.requests import Call, Tensor
from siglip_serve_client.errors import ServerError

__all__ = [
    "HttpAnswer",
    "HttpRequest",
    "infer_request",
    "parameters_request",
    "read_parameters",
    "register_request",
    "withdraw_request",
]

_JSON_SIZE = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class HttpRequest:
    """A request over HTTP, for any library that sends it."""

    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"


def infer_request(call: Call) -> HttpRequest:
    """The POST of a call."""
    about: dict[str, Any] = {"inputs": []}
    parts: list[bytes] = []
    for tensor in call.inputs:
        data = _data(tensor)
        if data is None:
            where = {"shared_memory_region": tensor.region, "shared_memory_byte_size": tensor.size}
        else:
            where = {"binary_data_size": len(data)}
            parts.append(data)
        about["inputs"].append(
            {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype, "parameters": where}
        )
    parameters: dict[str, str | bool | int] = {**call.parameters, "timeout": call.microseconds}
    if call.outputs:
        about["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in call.outputs]
    else:
        parameters["binary_data_output"] = True
    about["parameters"] = parameters
    head = json.dumps(about).encode()
    headers = {"Content-Type": "application/octet-stream", _JSON_SIZE: str(len(head))}
    return HttpRequest(f"/v2/models/{call.model}/infer", b"".join([head, *parts]), headers)


def _data(tensor: Tensor) -> bytes | None:
    """The bytes of an input, or None if they are in shared memory."""
    if tensor.array is None:
        return None
    if tensor.datatype == "BYTES":
        packed = serialize_byte_tensor(tensor.array)
        return packed.item() if packed.size else b""
    return np.ascontiguousarray(tensor.array).tobytes()


def parameters_request(model: str) -> HttpRequest:
    """The GET of a model's configuration."""
    return HttpRequest(f"/v2/models/{model}/config", method="GET")


def read_parameters(body: bytes) -> dict[str, str]:
    """The string parameters in the configuration of a model."""
    described = json.loads(body).get("parameters", {})
    return {name: value["string_value"] for name, value in described.items()}


def register_request(name: str, size: int) -> HttpRequest:
    """The POST that lets the server know a region of shared memory."""
    about = json.dumps({"key": name, "offset": 0, "byte_size": size}).encode()
    headers = {"Content-Type": "application/json"}
    return HttpRequest(f"/v2/systemsharedmemory/region/{name}/register", about, headers)


def withdraw_request(name: str) -> HttpRequest:
    """The POST that lets the server forget a region."""
    return HttpRequest(f"/v2/systemsharedmemory/region/{name}/unregister")


class HttpAnswer:
    """The outputs in the body of an answer of status 200.

    Args:
        headers: of the answer, by names in any case.

    Raises:
        ServerError: the body is not an answer of Triton.
    """

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        given = headers.get(_JSON_SIZE)
        begin = len(body) if given is None else int(given)
        try:
            outputs = json.loads(body[:begin])["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"the answer is not one of Triton: {error}") from error
        self._outputs: dict[str, tuple[dict[str, Any], bytes | None]] = {}
        for described in outputs:
            size = described.get("parameters", {}).get("binary_data_size")
            data = None if size is None else body[begin : begin + size]
            self._outputs[described["name"]] = described, data
            begin += size or 0

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """An output by its name, or None if there is none.

        Raises:
            ValueError: its shape does not fit its bytes.
        """
        if name not in self._outputs:
            return None
        described, data = self._outputs[name]
        datatype = described["datatype"]
        if data is None:
            array = np.array(described["data"], dtype=triton_to_np_dtype(datatype))
        elif datatype == "BYTES":
            array = deserialize_bytes_tensor(data)
        else:
            array = np.frombuffer(data, dtype=triton_to_np_dtype(datatype))
        return np.asarray(array.reshape(described["shape"]))

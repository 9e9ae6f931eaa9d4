"""Plain calls of tritonclient and of HTTP, without the project's client."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from numpy.typing import NDArray
from paths import ROOT

__all__ = [
    "JERSEY",
    "OPENER",
    "ROOT",
    "TINY",
    "GrpcCaller",
    "HttpCaller",
    "decoded",
    "post",
    "post_image",
    "raw_embedding",
]

# A proxy of the environment must not see requests to this machine.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TINY = ROOT / "checkpoints" / "siglip-tiny"
JERSEY = ROOT / "checkpoints" / "siglip-tiny-jersey"


class _Caller:
    module: Any
    client: Any

    def embed(
        self, rows: Sequence[bytes], model: str = "embed_image", **parameters: Any
    ) -> NDArray[np.float32]:
        """Return EMBEDDING of the rows, sent as one request."""
        return self.call(model, rows, ["EMBEDDING"], **parameters)["EMBEDDING"]

    def call(
        self, model: str, rows: Sequence[bytes], outputs: Sequence[str], **parameters: Any
    ) -> dict[str, NDArray[Any]]:
        """Return the named outputs of a model whose only input is INPUT_IMAGE."""
        tensor = self.module.InferInput("INPUT_IMAGE", [len(rows), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(rows, dtype=np.object_).reshape(-1, 1))
        result = self.client.infer(
            model,
            [tensor],
            parameters=parameters or None,
            outputs=[self.module.InferRequestedOutput(name) for name in outputs],
        )
        return {name: result.as_numpy(name) for name in outputs}


class GrpcCaller(_Caller):
    """Calls over gRPC; `url` is host:port."""

    def __init__(self, url: str) -> None:
        self.module = triton_grpc
        self.client = triton_grpc.InferenceServerClient(url)


class HttpCaller(_Caller):
    """Calls over HTTP with binary tensors; `url` is host:port."""

    def __init__(self, url: str) -> None:
        self.module = triton_http
        self.client = triton_http.InferenceServerClient(url)


def decoded(metrics_url: str) -> int:
    """Read how many images a server has decoded since its start; `metrics_url` is host:port."""
    with OPENER.open(f"http://{metrics_url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    counts = re.findall(r"^siglip_serve_images_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return round(sum(map(float, counts)))


def post(url: str, data: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Send a plain POST; return status and body."""
    request = urllib.request.Request(url, data, dict(headers))
    try:
        with OPENER.open(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post_image(http_url: str, data: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Post the bytes of an image without any JSON; return status and body.

    Triton answers it with JSON that describes the tensor, and behind it the tensor's own bytes.
    """
    raw = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
    return post(f"http://{http_url}/v2/models/embed_image/infer", data, raw | dict(headers or {}))


def raw_embedding(body: bytes) -> NDArray[np.float32]:
    """Return the one FP32 row of an answer to `post_image`."""
    description, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    size = description["outputs"][0]["parameters"]["binary_data_size"]
    return np.frombuffer(body[-size:], dtype=np.float32)

"""A server in this process that answers at once, over gRPC and HTTP, with embeddings of ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

__all__ = ["WIDTH", "InstantServer", "instant_server"]

WIDTH = 8
_ROW = np.ones((1, WIDTH), np.float32).tobytes()


@dataclass(frozen=True)
class InstantServer:
    """The two URLs of a running server."""

    grpc_url: str
    http_url: str


@contextmanager
def instant_server(parameters: Mapping[str, str] | None = None) -> Iterator[InstantServer]:
    """Run it; `parameters` are in the configuration of every model."""
    given = dict(parameters or {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"given": given}))
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    rpc = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(given), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    try:
        yield InstantServer(f"grpc://127.0.0.1:{port}", f"http://127.0.0.1:{http.server_address[1]}")
    finally:
        rpc.stop(0).wait()
        http.shutdown()
        http.server_close()


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, given: dict[str, str]) -> None:
        self.given = given

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        tensor = answer.outputs.add(name="EMBEDDING", datatype="FP32")
        tensor.shape.extend([1, WIDTH])
        answer.raw_output_contents.append(_ROW)
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        answer = service_pb2.ModelConfigResponse()
        for name, value in self.given.items():
            answer.config.parameters[name].string_value = value
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    given: dict[str, str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        shown = {"name": "EMBEDDING", "datatype": "FP32", "shape": [1, WIDTH]}
        head = json.dumps({"outputs": [{**shown, "parameters": {"binary_data_size": len(_ROW)}}]}).encode()
        self._answer(head + _ROW, {"Inference-Header-Content-Length": str(len(head))})

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.send_error(404)
            return
        described = {name: {"string_value": value} for name, value in self.given.items()}
        self._answer(json.dumps({"parameters": described}).encode(), {})

    def _answer(self, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return

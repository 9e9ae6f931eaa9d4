"""A gRPC server of ModelInfer in this process that hands on messages as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc  # type: ignore[import-untyped]

__all__ = ["raw_grpc_server"]


@contextmanager
def raw_grpc_server(infer: Callable[[bytes, Any], bytes]) -> Iterator[str]:
    """Run it; `infer` takes the message and gRPC's context. Yields `host:port`."""
    handler = grpc.unary_unary_rpc_method_handler(infer)
    server = grpc.server(ThreadPoolExecutor(8))
    methods = {"ModelInfer": handler}
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()

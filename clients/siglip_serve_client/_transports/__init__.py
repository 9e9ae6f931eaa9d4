"""Transports: the ways to the server, gRPC and HTTP."""

from __future__ import annotations

from siglip_serve_client._operations.requests import Transport
from siglip_serve_client._transports.endpoint import Endpoint
from siglip_serve_client._transports.grpc_transport import GrpcTransport
from siglip_serve_client._transports.http_transport import HttpTransport

__all__ = ["connect"]


def connect(endpoint: Endpoint, connections: int) -> Transport:
    """A transport to the server, which connects with its first request.

    Args:
        connections: limit of open HTTP connections, or 0 for none.
    """
    return HttpTransport(endpoint, connections) if endpoint.http else GrpcTransport(endpoint)

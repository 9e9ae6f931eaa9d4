"""The client of SigLIP Serve: plain Python over gRPC, no torch."""

from siglip_serve_client._client import Client
from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    UnavailableError,
    UnreachableError,
)

__all__ = [
    "Client",
    "ClientError",
    "DeadlineError",
    "InvalidInputError",
    "ServerError",
    "UnavailableError",
    "UnreachableError",
]

"""The clients of SigLIP Serve: plain Python over gRPC or HTTP, no torch."""

from siglip_serve_client._async_client import AsyncClient
from siglip_serve_client._client import Client
from siglip_serve_client._explain import Explanation
from siglip_serve_client._team_tracker import TeamTracker, resolve_goalkeepers
from siglip_serve_client._teams import TeamFit, Teams
from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    DeadlineError,
    InvalidInputError,
    ServerError,
    SharedMemoryError,
    UnavailableError,
    UnreachableError,
)

__all__ = [
    "AccessError",
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineError",
    "Explanation",
    "InvalidInputError",
    "ServerError",
    "SharedMemoryError",
    "TeamFit",
    "TeamTracker",
    "Teams",
    "UnavailableError",
    "UnreachableError",
    "resolve_goalkeepers",
]

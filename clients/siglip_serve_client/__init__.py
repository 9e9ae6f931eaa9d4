"""The clients of SigLIP Serve: plain Python over gRPC or HTTP, no torch."""

from siglip_serve_client._async_client import AsyncClient
from siglip_serve_client._client import Client
from siglip_serve_client._operations.explain import ExplainOptions, Explanation
from siglip_serve_client._operations.teams import TeamFit, TeamImages, Teams
from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    DeadlineError,
    InvalidInputError,
    MissingModelError,
    ModelDiedError,
    RestartingError,
    ServerError,
    SharedMemoryError,
    UnavailableError,
    UnreachableError,
)
from siglip_serve_client.team_tracker import TeamTracker, resolve_goalkeepers

__all__ = [
    "AccessError",
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineError",
    "ExplainOptions",
    "Explanation",
    "InvalidInputError",
    "MissingModelError",
    "ModelDiedError",
    "RestartingError",
    "ServerError",
    "SharedMemoryError",
    "TeamFit",
    "TeamImages",
    "TeamTracker",
    "Teams",
    "UnavailableError",
    "UnreachableError",
    "resolve_goalkeepers",
]

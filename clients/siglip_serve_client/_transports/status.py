"""Statuses of gRPC and HTTP as errors of this package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from siglip_serve_client.errors import (
    AccessError,
    ClientError,
    DeadlineError,
    InvalidInputError,
    MissingModelError,
    ModelDiedError,
    RestartingError,
    ServerError,
    UnavailableError,
    UnreachableError,
)

__all__ = ["check_status", "error_of", "is_triton"]

# Triton writes these before a message; they tell the caller nothing.
_PREFIX = re.compile(r"^(\[request id: \S+\] |in ensemble '[^']*', )+")
# Triton says so of a request that waited in a queue for longer than its timeout.
_EXPIRED = "Request timeout expired"
# Triton says so of requests that a dead model process had, or that came for it.
_DIED = "is not healthy"
# Triton says so while it ends or a model is loaded, and a door in front of Triton while there is none.
_STARTING = re.compile(
    "Server is stopping|has no available versions|is not at ready state|not running|does not answer|"
    "http2 header with status: 50[23]"
)
# Triton says so of a model that it does not have.
_MISSING = re.compile("unknown model: .* is not found")
# gRPC says so of a channel that had a server, and lost it.
_BROKEN = re.compile(
    "Connection reset|Broken pipe|[Ss]tream removed|RST_STREAM|GOAWAY|recvmsg|sendmsg|keepalive|ping timeout|"
    "(Socket|Transport|Connection) clos(ed|ing)"
)
# gRPC says so where no server answers.
_ABSENT = re.compile("connect|DNS resolution", re.IGNORECASE)
_STATUS: Mapping[str, type[ClientError]] = {
    "INVALID_ARGUMENT": InvalidInputError,
    "RESOURCE_EXHAUSTED": InvalidInputError,
    "400": InvalidInputError,
    "413": InvalidInputError,
    "UNAUTHENTICATED": AccessError,
    "PERMISSION_DENIED": AccessError,
    "401": AccessError,
    "403": AccessError,
    "UNAVAILABLE": UnavailableError,
    "429": UnavailableError,
    "502": RestartingError,
    "503": UnavailableError,
    "504": UnavailableError,
}

# Statuses that gRPC itself gives to a call whose connection broke.
_LOST = {"UNAVAILABLE", "INTERNAL", "UNKNOWN"}


def error_of(status: str, message: str, address: str) -> ClientError:
    """The error for a status: of gRPC by its name, of HTTP by its number."""
    status, message = status.removeprefix("StatusCode."), _PREFIX.sub("", message)
    if status == "DEADLINE_EXCEEDED":
        return DeadlineError(f"{address} did not answer in time")
    if status in {"UNAVAILABLE", "503"} and _EXPIRED in message:
        return DeadlineError(f"{address} did not answer in time: {message}")
    if status == "UNAVAILABLE" and "restricted" in message:
        return AccessError(message)
    if status in {"INTERNAL", "500"} and _DIED in message:
        return ModelDiedError(f"{status}: {message}")
    if _MISSING.search(message):
        return MissingModelError(f"{status}: {message}")
    if status == "CANCELLED" or (status in _LOST and _BROKEN.search(message)):
        return RestartingError(f"{address} broke the connection: {message}")
    if status in {"UNAVAILABLE", "503"} and _STARTING.search(message):
        return RestartingError(message)
    if status == "UNAVAILABLE" and _ABSENT.search(message):
        return UnreachableError(f"no server answers at {address}")
    kind = _STATUS.get(status)
    return kind(message) if kind else ServerError(f"{status or 'no status'}: {message}")


def is_triton(status: int, body: bytes) -> bool:
    """Tell an answer of Triton or a busy proxy from one of a server that does not know the path."""
    if status == 405:  # of Triton's metrics port, with a message in JSON
        return False
    return status not in (400, 404) or body.lstrip().startswith(b"{")


def check_status(status: int, body: bytes, address: str) -> None:
    """Check the status of an HTTP answer.

    Raises:
        ClientError: it is not 200. The message is that of the body.
    """
    if status == 200:
        return
    text = body.decode(errors="replace")
    try:
        message = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        message = re.sub(r"<[^>]*>|\s+", " ", text).strip()[:300] or f"HTTP status {status}"
    raise error_of(str(status), message, address)

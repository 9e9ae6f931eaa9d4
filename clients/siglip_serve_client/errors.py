"""The errors of the clients.

ClientError
├── InvalidInputError    the server refused the input (INVALID_ARGUMENT). The message says which row and why
├── UnavailableError     the server cannot serve the request now, and a retry may help
│   ├── DeadlineError    the server did not answer in time
│   └── UnreachableError no server answers at the address, or the port is one of another protocol
├── AccessError          the server, or a proxy in front of it, does not let this caller in
├── ServerError          the server failed (any other status)
└── SharedMemoryError    a frame cannot reach the server through shared memory. The message says why
"""

from __future__ import annotations

__all__ = [
    "AccessError",
    "ClientError",
    "DeadlineError",
    "InvalidInputError",
    "ServerError",
    "SharedMemoryError",
    "UnavailableError",
    "UnreachableError",
]


class ClientError(Exception):
    """Base of all errors of the client."""


class InvalidInputError(ClientError):
    """The server refused the input. The message names the row."""


class AccessError(ClientError):
    """The server, or a proxy in front of it, does not let this caller in."""


class UnavailableError(ClientError):
    """The server cannot serve the request now, for example because its queue is full."""


class DeadlineError(UnavailableError):
    """The server did not answer in time. A request that runs there is finished, a waiting one is dropped."""


class UnreachableError(UnavailableError):
    """No server answers at the address, or its port is one of another protocol."""


class ServerError(ClientError):
    """The server failed."""


class SharedMemoryError(ClientError):
    """A frame cannot reach the server through shared memory."""

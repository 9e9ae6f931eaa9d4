"""The errors of the clients.

ClientError
├── InvalidInputError    the server refused the input (INVALID_ARGUMENT). The message says which row and why
├── UnavailableError     the server cannot serve the request now, and a retry may help
│   ├── DeadlineError    the server did not answer in time
│   ├── RestartingError  the server ended, or is being started, before it answered
│   └── UnreachableError no server answers at the address, or the port is one of another protocol
├── AccessError          the server, or a proxy in front of it, does not let this caller in
├── ServerError          the server failed (any other status)
│   ├── MissingModelError  the server does not serve the model
│   └── ModelDiedError   a process of the server died before it answered
└── SharedMemoryError    a frame cannot reach the server through shared memory. The message says why
"""

from __future__ import annotations

__all__ = [
    "AccessError",
    "ClientError",
    "DeadlineError",
    "InvalidInputError",
    "MissingModelError",
    "ModelDiedError",
    "RestartingError",
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


class RestartingError(UnavailableError):
    """The server ended, broke the connection, or is being started, before it answered."""


class UnreachableError(UnavailableError):
    """No server answers at the address, or its port is one of another protocol."""


class ServerError(ClientError):
    """The server failed."""


class MissingModelError(ServerError):
    """The server does not serve the model."""


class ModelDiedError(ServerError):
    """A model's process died before it answered. The server starts it again."""


class SharedMemoryError(ClientError):
    """A frame cannot reach the server through shared memory."""

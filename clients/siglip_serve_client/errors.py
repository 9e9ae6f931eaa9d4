"""What a client raises.

ClientError
├── InvalidInputError    the server refused the input (INVALID_ARGUMENT); the message says which row and why
├── UnavailableError     the server is too busy, or did not answer in time; a retry may help
│   └── UnreachableError nobody answers at the address
└── ServerError          the server failed (any other status)
"""

from __future__ import annotations

__all__ = ["ClientError", "InvalidInputError", "ServerError", "UnavailableError", "UnreachableError"]


class ClientError(Exception):
    """Base of all errors of the client."""


class InvalidInputError(ClientError):
    """The server refused the input; the message names the row."""


class UnavailableError(ClientError):
    """The server is too busy, or did not answer in time."""


class UnreachableError(UnavailableError):
    """Nobody answers at the address."""


class ServerError(ClientError):
    """The server failed."""

"""What a client raises.

ClientError
├── InvalidInputError    the server refused the input (INVALID_ARGUMENT); the message says which row and why
├── UnavailableError     nobody answers at the address, or the server is too busy; a retry may help
└── ServerError          the server failed (any other status)
"""

from __future__ import annotations

__all__ = ["ClientError", "InvalidInputError", "ServerError", "UnavailableError"]


class ClientError(Exception):
    """Base of all errors of the client."""


class InvalidInputError(ClientError):
    """The server refused the input; the message names the row."""


class UnavailableError(ClientError):
    """No server answers, or it is too busy."""


class ServerError(ClientError):
    """The server failed."""

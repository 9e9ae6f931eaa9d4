"""Errors of a validation, each told in one line.

- `ValidationError`: the base of all
- `DatasetError`: the folder is not of ImageNet's shape, or a file in it is unusable
- `CacheError`: the cache folder is in use or unusable
- `ServerError`: the server cannot be reached, lacks a model, or failed
- `RefusedError`, a `ServerError`: the server refuses one input with INVALID_ARGUMENT
"""

from __future__ import annotations

__all__ = ["CacheError", "DatasetError", "RefusedError", "ServerError", "ValidationError"]


class ValidationError(Exception):
    """Base of everything that ends a validation. Its text is the line that the user reads."""


class DatasetError(ValidationError):
    """The folder is not of ImageNet's shape, or a file in it is unusable."""


class CacheError(ValidationError):
    """The cache folder is in use by another run, or cannot be used."""


class ServerError(ValidationError):
    """The server cannot be reached, lacks a model, or failed."""


class RefusedError(ServerError):
    """The server refuses an input as invalid."""

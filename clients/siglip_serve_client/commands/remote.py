"""File systems of URIs such as `s3://bucket/key`.

pyarrow reads and writes `s3://` and `gs://` itself. fsspec opens every other scheme, such as `hf://` and
`https://`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from siglip_serve_client.commands.install_hint import install_hint

__all__ = ["RemoteError", "is_remote", "place_of"]

_OWN = ("s3", "gs", "gcs")  # schemes that pyarrow has a file system for


class RemoteError(Exception):
    """A URI cannot be opened. The message names it and the reason."""


def is_remote(path: str) -> bool:
    """Return True for a URI, such as `s3://bucket/key`, and False for a path of this machine."""
    return "://" in path and not path.startswith("file://")


def place_of(uri: str) -> tuple[Any, str]:
    """Find the file system of a URI (`pyarrow.fs.FileSystem`), and the path in it.

    Raises:
        RemoteError: it is no URI, or there is no file system for its scheme.
    """
    scheme, _, rest = uri.partition("://")
    base, question, query = rest.partition("?")
    if scheme not in _OWN:
        return _foreign(scheme), uri if scheme in ("http", "https") else rest
    if "=" not in query:  # a question mark in a name
        base, query = base + question + query, ""
    return _native(scheme, base.partition("/")[0], query), base.rstrip("/")


@lru_cache(maxsize=64)
def _native(scheme: str, bucket: str, query: str) -> Any:
    try:
        from pyarrow.fs import FileSystem

        filesystem, _ = FileSystem.from_uri(f"{scheme}://{bucket}" + (f"?{query}" if query else ""))
    except ValueError as error:  # pyarrow's, for what is no URI
        raise RemoteError(f"{scheme}://{bucket}: {error}") from error
    except ModuleNotFoundError as error:
        raise RemoteError(f"{scheme}://: {error}; `{install_hint('parquet')}` adds it") from error
    return filesystem


@lru_cache(maxsize=16)
def _foreign(scheme: str) -> Any:
    try:
        import fsspec
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))
    except ModuleNotFoundError as error:
        raise RemoteError(f"{scheme}://: {error}; `{install_hint('bulk')}` adds fsspec") from error
    except (ValueError, ImportError) as error:
        raise RemoteError(f"{scheme}://: {error}") from error

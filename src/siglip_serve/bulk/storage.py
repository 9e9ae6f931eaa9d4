"""Files that a job reads and writes: local paths, and URIs of object storage."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip_serve_client.commands.remote import RemoteError, is_remote, place_of

from siglip_serve.errors import InvalidInputError

__all__ = [
    "FileRange",
    "Folder",
    "StorageError",
    "is_remote",
    "list_below",
    "local_path",
    "open_file",
    "read_bytes",
    "read_stream",
    "size_of",
]

_STALE = 3600.0  # seconds after which a file that was never finished is removed


class StorageError(InvalidInputError):
    """A path or URI cannot be read or written. The message names it and the reason."""


def read_bytes(path: str, most: int) -> bytes:
    """Read a file's first `most` bytes.

    Raises:
        OSError: it cannot be read.
    """
    if not is_remote(path):
        return FileRange(local_path(path), 0, most).read()
    with read_stream(path) as stream:
        return bytes(stream.read(most))


@dataclass(frozen=True)
class FileRange:
    """A part of a file of this machine, to be read by the process that needs it.

    Attributes:
        path: of this machine.
        start: its first byte.
        size: bytes that are read at most.
    """

    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Read it.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123 - called for each picture
            if self.start:
                file.seek(self.start)
            parts = []
            left = self.size
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def read_stream(path: str) -> Any:
    """Open a file to be read from its beginning, as a Python or pyarrow file.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_remote(path):
        return Path(local_path(path)).open("rb")
    filesystem, place = _place(path)
    return filesystem.open_input_stream(place, compression=None)


def open_file(path: str) -> Any:
    """Open a file to be read at any place, as a Python or pyarrow file.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_remote(path):
        return Path(local_path(path)).open("rb")
    filesystem, place = _place(path)
    return filesystem.open_input_file(place)


def size_of(path: str) -> int | None:
    """Bytes of a file, or None for a folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    if not is_remote(path):
        found = Path(local_path(path))
        return None if found.is_dir() else found.stat().st_size
    from pyarrow.fs import FileType

    filesystem, place = _place(path)
    info = filesystem.get_file_info(place)
    if info.type == FileType.NotFound:
        raise FileNotFoundError(f"{path}: no such file or folder")
    if info.type == FileType.Directory:
        return None
    return int(info.size)


def list_below(path: str) -> Iterator[str]:
    """Paths of all files in a folder and below it, sorted within each folder, without hidden ones."""
    if is_remote(path):
        yield from _list_remote(path)
        return
    for where, folders, files in os.walk(local_path(path)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(where, name) for name in sorted(files) if not name.startswith("."))  # noqa: PTH118


def local_path(path: str) -> str:
    """Path of a `file://` URI, or the path itself."""
    return path.removeprefix("file://")


class Folder:
    """The folder of an output. A file appears under its name as a whole, or not at all.

    Args:
        path: of this machine, or a URI.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/") if is_remote(path) else os.path.abspath(local_path(path))  # noqa: PTH100 - no links are followed

    def join(self, name: str) -> str:
        """Path or URI of a file of this folder."""
        base, question, query = self.path.partition("?")
        return f"{base.rstrip('/')}/{name}{question}{query}"

    def names(self, folder: str) -> list[str]:
        """Names of the finished files in one of the folders below, none if there is no such folder."""
        if not is_remote(self.path):
            with suppress(FileNotFoundError), os.scandir(self.join(folder)) as entries:
                return [entry.name for entry in entries if not entry.name.startswith(".")]
            return []
        from pyarrow.fs import FileSelector, FileType

        filesystem, place = _place(self.join(folder))
        found = filesystem.get_file_info(FileSelector(place, allow_not_found=True))
        return [info.base_name for info in found if info.type == FileType.File]

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if there is none."""
        try:
            with read_stream(self.join(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: Any) -> None:
        """Write a file as a whole: bytes, or anything with the buffer interface.

        Raises:
            OSError: it cannot be written.
        """
        with self.writing(name) as sink:
            sink.write(data)

    def writing(self, name: str) -> _Writing:
        """Open a file to be written in parts. It appears when the `with` statement ends without an error."""
        return _Writing(self.join(name))

    def remove_stale(self) -> None:
        """Remove what killed writers have left behind on this machine's disk."""
        if is_remote(self.path):
            return  # an upload that was never finished is no file
        for file in Path(self.path).glob("*/.*.tmp"):
            with suppress(OSError):
                if file.stat().st_mtime < time.time() - _STALE:
                    file.unlink()


class _Writing:
    def __init__(self, path: str) -> None:
        self._path = path
        self._aside = ""
        self._parts: list[bytes] = []
        self._file: Any = None

    def __enter__(self) -> _Writing:
        if not is_remote(self._path):
            target = Path(self._path)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._aside = str(target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp"))
            self._file = open(self._aside, "wb")  # noqa: PTH123 - closed in __exit__
        return self

    def write(self, data: Any) -> None:
        """Append bytes."""
        if self._file is None:
            self._parts.append(bytes(data))  # an upload that is closed early would appear cut off
        else:
            self._file.write(data)

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._file is None:
            if kind is None:
                self._upload()
            return
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._aside, self._path)  # noqa: PTH105
        finally:
            with suppress(FileNotFoundError):  # it has its name
                os.unlink(self._aside)  # noqa: PTH108

    def _upload(self) -> None:
        filesystem, place = _place(self._path)
        with filesystem.open_output_stream(place) as stream:
            for part in self._parts:
                stream.write(part)


def _list_remote(path: str) -> Iterator[str]:
    from pyarrow.fs import FileSelector, FileType

    filesystem, place = _place(path)
    base, question, query = path.partition("?")
    for info in filesystem.get_file_info(FileSelector(place, recursive=True)):
        if info.type == FileType.File and not info.base_name.startswith("."):
            rest = info.path.removeprefix(place).lstrip("/")
            yield f"{base.rstrip('/')}/{rest}{question}{query}"


def _place(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Raises:
        StorageError: it is no URI, or there is no file system for its scheme.
    """
    try:
        return place_of(uri)
    except RemoteError as error:
        raise StorageError(str(error)) from error

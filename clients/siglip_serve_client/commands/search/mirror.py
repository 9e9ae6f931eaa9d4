"""Local copies of outputs in object storage: a search reads all vectors, and maps files into memory."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from siglip_serve_client.commands.remote import RemoteError, is_remote, place_of
from siglip_serve_client.commands.search.collection import CollectionError

__all__ = ["local_output"]

_CONNECTIONS = 8
_READ = 2**22  # bytes at once
_ASIDE = ".tmp"  # of a file that is being written
_STALE = 3600.0  # seconds after which such a file was left by a killed process
# Of a folder of `siglip-serve bulk`, what a search reads. Not the index, which is made in the copy.
_DESCRIPTION, _FOLDERS = "bulk.json", ("embeddings", "embeddings.lance")


@dataclass(frozen=True)
class _File:
    """A remote file: its name below the output, path, bytes, and when it was written if that is known."""

    name: str
    place: str
    size: int
    written: int | None  # nanoseconds

    def is_at(self, path: Path) -> bool:
        """Tell if `path` is a copy of the file."""
        with suppress(FileNotFoundError):
            found = path.stat()
            return found.st_size == self.size and self.written in (None, found.st_mtime_ns)
        return False


def local_output(output: str, cache: Path) -> Path:
    """Path of an output. One in object storage is copied first, as far as the copy lacks files or has others.

    Args:
        output: a path of this machine, or a URI.
        cache: folder of the copies. Each URI has a folder of its own there.

    Raises:
        CollectionError: the URI cannot be read, there is nothing, or the copy does not fit on the disk.
    """
    if not is_remote(output):
        return Path(output)
    try:
        return _copy(output.rstrip("/"), cache)
    except RemoteError as error:
        raise CollectionError(str(error)) from error
    except OSError as error:
        raise CollectionError(f"{output}: {error}") from error


def _copy(uri: str, cache: Path) -> Path:
    filesystem, place = place_of(uri)
    files = list(_files(uri, filesystem, place))
    own = cache / hashlib.sha256(uri.encode()).hexdigest()[:16]
    wanted = [file for file in files if not file.is_at(own / file.name)]
    size = sum(file.size for file in wanted)
    own.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(own).free
    if size > free:
        raise CollectionError(
            f"{uri}: {size / 1e9:.1f} GB to copy, and {cache} has room for {free / 1e9:.1f} GB; "
            "--cache names another folder"
        )
    _remove_others(own, {file.name for file in files})
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc=f"copying {uri}", disable=None) as bar,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        for done in pool.map(lambda file: _fetch(filesystem, file, own / file.name), wanted):
            bar.update(done)
    if wanted:
        print(f"siglip-serve: copied {len(wanted)} of {len(files)} files to {own}", file=sys.stderr)
    return own / files[0].name if files[0].place == place else own


def _files(uri: str, filesystem: Any, place: str) -> Iterator[_File]:
    """The files of an output that a search reads.

    Raises:
        CollectionError: there is none.
    """
    from pyarrow.fs import FileSelector, FileType

    info = filesystem.get_file_info(place)
    if info.type == FileType.NotFound:
        raise CollectionError(f"{uri}: no such file or folder")
    if info.type == FileType.File:
        yield _File(info.base_name, info.path, info.size, info.mtime_ns)
        return
    count = 0
    for info in filesystem.get_file_info(FileSelector(place, recursive=True)):
        name = info.path.removeprefix(place).lstrip("/")
        is_read = name == _DESCRIPTION or name.partition("/")[0] in _FOLDERS
        if info.type == FileType.File and is_read and info.extension != _ASIDE[1:]:
            count += 1
            yield _File(name, info.path, info.size, info.mtime_ns)
    if not count:
        raise CollectionError(f"{uri}: has no {_DESCRIPTION}, so it is no output of siglip-serve bulk")


def _fetch(filesystem: Any, file: _File, target: Path) -> int:
    """Copy a file, which appears as a whole, and return its bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_ASIDE}")
    try:
        with filesystem.open_input_stream(file.place, compression=None) as source, aside.open("wb") as sink:
            shutil.copyfileobj(source, sink, _READ)
        if file.written is not None:
            os.utime(aside, ns=(file.written, file.written))
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return file.size


def _remove_others(own: Path, names: set[str]) -> None:
    """Remove what is no longer there remotely, and what a killed copy has left."""
    latest = time.time() - _STALE
    for folder in _FOLDERS:
        for path in (own / folder).rglob("*"):
            if path.is_dir() or path.relative_to(own).as_posix() in names:
                continue
            if path.suffix != _ASIDE or path.stat().st_mtime < latest:  # another search may copy just now
                path.unlink()

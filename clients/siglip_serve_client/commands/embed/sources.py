"""Images that a command line names: files, folders, patterns, tar archives, Parquet columns."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip_serve_client.commands.embed.archives import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    ArchiveMember,
    printable,
)
from siglip_serve_client.commands.install_hint import install_hint

__all__ = ["Item", "Sources", "SourcesError"]

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ROWS = 64  # of a Parquet column in memory at once
_NAMED = 5  # of the files that are left out


class SourcesError(Exception):
    """An argument names no images. The message gives the argument and the reason."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: the path as given, `shard.tar/member`, or `table.parquet#row`.
        read: its bytes, or an OSError if they cannot be read.
    """

    key: str
    read: Callable[[], bytes]


class Sources:
    """Arguments of the command, in their order.

    Args:
        given: files, folders, patterns with `*`, `?`, `[` or `{000..009}`.
        column: column of Parquet files. Its cells are bytes, or structs with a member `bytes`.
        all_files: take every file of a folder or tar archive for an image, whatever its suffix. Hidden ones
            in folders are not read.
        output: the file that the command writes. It and the files of its run are not searched for images.

    Raises:
        SourcesError: an argument names nothing.
    """

    def __init__(
        self,
        given: Sequence[str],
        column: str = "image",
        *,
        all_files: bool = False,
        output: Path | None = None,
    ) -> None:
        if not given:
            raise SourcesError("no images are named")
        self._given, self._column, self._all_files = tuple(given), column, all_files
        self._left_out, self._some_left_out = 0, list[str]()
        self._output = output.absolute() if output else None
        self._paths: list[Path] = []
        for argument in given:
            found = list(_paths(argument))
            if not found:
                what = "no file matches" if _is_pattern(argument) else "no such file or folder"
                raise SourcesError(f"{argument}: {what}")
            self._paths += found

    def count(self) -> int | None:
        """The number of images, or None with tar archives, which would have to be read.

        Raises:
            SourcesError: there are none. The message names files that are left out.
        """
        total = 0
        for path in self._files():
            if _is_tar(path):
                return None
            total += _parquet(path).metadata.num_rows if _is_parquet(path) else 1
        if not total:
            raise SourcesError(self.no_images())
        return total

    def left_out(self) -> str | None:
        """A sentence about the files that the last iteration or count left out, or None if there are none."""
        if not self._left_out:
            return None
        more = self._left_out - len(self._some_left_out)
        files = "file is" if self._left_out == 1 else "files are"
        names = ", ".join(self._some_left_out) + (f" and {more} more" if more else "")
        return f"{self._left_out} {files} left out for the suffix: {names}; --all-files reads them too"

    def no_images(self) -> str:
        """The message for arguments without an image."""
        reason = self.left_out()
        more = len(self._given) - _NAMED
        names = ", ".join(self._given[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{names}: no images" + (f"; {reason}" if reason else "")

    def __iter__(self) -> Iterator[Item]:
        for path in self._files():
            if _is_tar(path):
                yield from self._tar_items(path)
            elif _is_parquet(path):
                yield from _parquet_items(path, self._column)
            else:
                yield Item(printable(str(path)), path.read_bytes)

    def _files(self) -> Iterator[Path]:
        self._left_out, self._some_left_out = 0, []
        for path in self._paths:
            yield from self._below(path) if path.is_dir() else (path,)

    def _below(self, folder: Path) -> Iterator[Path]:
        """Images in a folder and below it, sorted, without hidden ones and linked folders."""
        for where, folders, files in os.walk(folder):
            own = self._own_names(where)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in own)
            for name in sorted(set(files) - own):
                path = Path(where, name)
                wanted = _is_tar(path) or _is_parquet(path) or self._is_image(path)
                if wanted and not name.startswith("."):
                    yield path
                elif not name.startswith("."):
                    self._leave_out(path)

    def _own_names(self, folder: str) -> set[str]:
        """Names in a folder that belong to this run: its output, its parts and its list of failures."""
        if self._output is None or Path(folder).absolute() != self._output.parent:
            return set()
        return {self._output.name + end for end in ("", ".partial", ".failed.csv")}

    def _is_image(self, path: Path) -> bool:
        return self._all_files or path.suffix.lower() in IMAGE_SUFFIXES

    def _leave_out(self, path: Path) -> None:
        self._left_out += 1
        if len(self._some_left_out) < _NAMED:
            self._some_left_out.append(printable(str(path)))

    def _tar_items(self, path: Path) -> Iterator[Item]:
        try:
            # A stream: nothing is sought or extracted.
            with tarfile.open(path, "r|*", tarinfo=ArchiveMember) as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if self._is_image(path / member.name):
                        file = archive.extractfile(member)
                        data = file.read() if file is not None else b""
                        yield Item(printable(f"{path}/{member.name}"), lambda data=data: data)  # type: ignore[misc]
                    else:
                        self._leave_out(path / member.name)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            yield Item(
                printable(str(path)), _failing(OSError(f"not a tar archive, or a damaged one: {error}"))
            )


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _is_pattern(argument: str) -> bool:
    return not Path(argument).exists() and (glob.has_magic(argument) or _BRACES.search(argument) is not None)


def _paths(argument: str) -> Iterator[Path]:
    if not _is_pattern(argument):
        if Path(argument).exists():
            yield Path(argument)
        return
    braces = _BRACES.search(argument)
    if braces is not None:
        first, last = braces.groups()
        for number in range(int(first), int(last) + 1):
            yield from _paths(
                argument[: braces.start()] + f"{number:0{len(first)}}" + argument[braces.end() :]
            )
        return
    parts = Path(argument).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    for name in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207 - of any folder, as given
        path = Path(name)
        # Through linked folders, `**` may find files without end.
        if not any(Path(*path.parts[:end]).is_symlink() for end in range(fixed + 1, len(path.parts))):
            yield path


def _parquet_items(path: Path, column: str) -> Iterator[Item]:
    table = _parquet(path)
    if column not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise SourcesError(f"{path}: has no column {column!r}, but {names}; name one with --column")
    row = 0
    for batch in table.iter_batches(_ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield Item(printable(f"{path}#{row}"), _cell(value))
            row += 1


def _cell(value: Any) -> Callable[[], bytes]:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        return _failing(OSError(f"the cell holds {type(data).__name__}, expected bytes"))
    return lambda: data


def _failing(error: OSError) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise SourcesError(f"{path}: {error}; `{install_hint('parquet')}` adds it") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise SourcesError(f"{path}: not a Parquet file: {error}") from error

"""Pictures of rows: files, members of tar archives, cells of Parquet files."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any

from siglip_serve_client.commands.embed.archives import TAR_SUFFIXES
from siglip_serve_client.commands.embed.stored import StoredError, open_parquet

__all__ = ["read_picture"]


def read_picture(name: str, path: str, base: Path, column: str) -> bytes:
    """The bytes of the picture of a row.

    Args:
        name: the row's id: a path, `shard.tar/member` or `table.parquet#row`.
        path: of the file that the picture was read from, or an empty text if only the id tells it.
        base: folder that paths start from.
        column: of Parquet files.

    Raises:
        OSError: there is no such file, or none that can be read. The message says why.
    """
    archive = _archive(name, path)
    if archive is not None:
        return _member(base / archive, name[len(archive) + 1 :])
    table, mark, row = name.rpartition("#")
    if mark and row.isdecimal() and path in ("", table):
        return _cell(base / table, column, int(row))
    return (base / (path or name)).read_bytes()


def _archive(name: str, path: str) -> str | None:
    """The tar archive that an id begins with, or None."""
    if path:
        return path if path.lower().endswith(TAR_SUFFIXES) and name.startswith(f"{path}/") else None
    lower = name.lower()
    ends = [lower.find(f"{end}/") + len(end) for end in TAR_SUFFIXES if f"{end}/" in lower]
    return name[: min(ends)] if ends else None


def _member(archive: Path, name: str) -> bytes:
    try:
        with tarfile.open(archive) as opened:
            # The first of its name, and no further header than that is read.
            found = next((member for member in opened if member.name == name and member.isfile()), None)
            file = None if found is None else opened.extractfile(found)
            if file is None:
                raise OSError(f"{archive}: has no member {name}")
            return file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise OSError(f"{archive}: {error}") from error


def _cell(file: Path, column: str, row: int) -> bytes:
    try:
        with open_parquet(file) as table:
            cell = _value(table, column, row)
    except (ValueError, KeyError, StoredError) as error:
        raise OSError(f"{file}: {error}") from error
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise OSError(f"{file}: row {row} of {column!r} holds no bytes")
    return data


def _value(table: Any, column: str, row: int) -> Any:
    start = 0
    for group in range(table.metadata.num_row_groups):
        stop = start + table.metadata.row_group(group).num_rows
        if row < stop:
            for batch in table.iter_batches(64, row_groups=[group], columns=[column]):
                if row < start + len(batch):
                    return batch.column(0)[row - start].as_py()
                start += len(batch)
        start = stop
    raise ValueError(f"has no row {row}")

"""Files of vectors and of the columns beside them: arrays on disk, Parquet files, Lance datasets."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.embed.stored import StoredError, open_parquet, read_header
from siglip_serve_client.commands.install_hint import install_hint

__all__ = ["ArrayPart", "LancePart", "ParquetPart", "Part", "parquet_rows", "zip_array"]

_VECTORS = "embedding"
_TYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}  # Arrow's names
Rows = NDArray[np.int64]


class Part(Protocol):
    """Vectors [rows, W] that are stored together. Few of them are in memory at a time.

    Attributes:
        dtype: as stored.
        stored_width: W, the numbers of a row as they are stored.
    """

    rows: int
    stored_width: int
    dtype: np.dtype[Any]

    def blocks(self, most: int) -> Iterator[NDArray[Any]]:
        """All rows in their order, in blocks of at most `most`."""

    def take(self, rows: Rows) -> NDArray[Any]:
        """Some rows, in the order given."""

    def texts(self, column: str, rows: Rows | None = None) -> Sequence[str]:
        """The texts of a column for some rows in the order given, or for all. Empty without the column."""


class ArrayPart:
    """An array in memory or in a mapped file, with the texts beside it.

    Args:
        vectors: [N, W].
        columns: texts [N] by name, or the Parquet file that has them.
    """

    def __init__(self, vectors: NDArray[Any], columns: dict[str, Any] | Path) -> None:
        if vectors.ndim != 2:
            raise ValueError(f"embeddings of the shape {list(vectors.shape)}, expected [N, D]")
        self.vectors, self._columns = vectors, columns
        self.rows, self.stored_width = vectors.shape
        self.dtype = vectors.dtype
        if isinstance(columns, Path) and (count := parquet_rows(columns)) != self.rows:
            raise ValueError(f"{count} rows in {columns.name} for {self.rows} embeddings")

    def blocks(self, most: int) -> Iterator[NDArray[Any]]:
        for start in range(0, self.rows, most):
            yield self.vectors[start : start + most]

    def take(self, rows: Rows) -> NDArray[Any]:
        return np.asarray(self.vectors[rows])

    def texts(self, column: str, rows: Rows | None = None) -> Sequence[str]:
        if isinstance(self._columns, Path):
            return _parquet_texts(self._columns, column, rows)
        found = self._columns.get(column, ())
        return found if rows is None or not len(found) else [found[row] for row in rows.tolist()]


class ParquetPart:
    """A Parquet file, whose row groups are read one after the other.

    Args:
        file: with the column `embedding`, lists of a fixed size.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with open_parquet(file) as table:
            self.rows = table.metadata.num_rows
            kind = table.schema_arrow.field(_VECTORS).type
            self.schema_arrow = table.schema_arrow
        self.stored_width, self.dtype = _fixed_size(kind)

    def blocks(self, most: int) -> Iterator[NDArray[Any]]:
        with open_parquet(self.file) as table:
            for batch in table.iter_batches(most, columns=[_VECTORS]):
                yield _matrix(batch.column(0), self.stored_width)

    def take(self, rows: Rows) -> NDArray[Any]:
        found = np.empty((len(rows), self.stored_width), self.dtype)
        for places, column in _groups(self.file, _VECTORS, rows):
            # A column of a group may consist of several pieces.
            found[places[0]] = _matrix(column.take(places[1]).combine_chunks(), self.stored_width)
        return found

    def texts(self, column: str, rows: Rows | None = None) -> Sequence[str]:
        return _parquet_texts(self.file, column, rows)


class LancePart:
    """A Lance dataset with the columns of a Parquet file."""

    def __init__(self, folder: Path) -> None:
        try:
            import lance
        except ModuleNotFoundError as error:
            raise StoredError(f"{folder}: {error}; `{install_hint('lance')}` adds it") from error
        # It warns of child processes, and none of a search reads the dataset.
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        self._data = lance.dataset(str(folder))
        self.rows = self._data.count_rows()
        self.schema = self._data.schema
        self.stored_width, self.dtype = _fixed_size(self.schema.field(_VECTORS).type)

    def blocks(self, most: int) -> Iterator[NDArray[Any]]:
        for batch in self._data.to_batches(columns=[_VECTORS], batch_size=most, scan_in_order=True):
            yield _matrix(batch.column(0), self.stored_width)

    def take(self, rows: Rows) -> NDArray[Any]:
        column = self._data.take(rows, columns=[_VECTORS]).column(0)
        return _matrix(column.combine_chunks(), self.stored_width)

    def texts(self, column: str, rows: Rows | None = None) -> Sequence[str]:
        if column not in self.schema.names:
            return []
        if rows is None:
            return list(self._data.to_table(columns=[column]).column(0).to_pylist())
        return list(self._data.take(rows, columns=[column]).column(0).to_pylist())


def parquet_rows(file: Path) -> int:
    """Count the rows of a Parquet file."""
    with open_parquet(file) as table:
        return int(table.metadata.num_rows)


def zip_array(file: Path, name: str) -> NDArray[Any]:
    """An array of a .npz file, which stays on disk where it is not compressed.

    Raises:
        ValueError, KeyError, BadZipFile, OSError: there is none, or it is malformed.
    """
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            shape, fortran, kind = read_header(member)
            if kind.hasobject:
                raise ValueError(f"{name} holds Python objects")
            order: Literal["F", "C"] = "F" if fortran else "C"
            if info.compress_type != zipfile.ZIP_STORED or not shape or 0 in shape:
                return np.frombuffer(member.read(), kind).reshape(shape, order=order)
            begin = member.tell()
    with file.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        head = raw.read(4)
    header = 30 + int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
    offset = info.header_offset + header + begin
    return np.memmap(file, kind, "r", offset, shape, order)


def _fixed_size(kind: Any) -> tuple[int, np.dtype[Any]]:
    width = getattr(kind, "list_size", None)
    if width is None:
        raise ValueError(f"{_VECTORS} is {kind}, expected lists of a fixed size")
    stored = str(kind.value_type)
    return int(width), np.dtype(_TYPES.get(stored, stored))


def _matrix(column: Any, width: int) -> NDArray[Any]:
    """The lists of an Arrow array as an array [n, width], without a copy."""
    if column.null_count:
        raise ValueError(f"{column.null_count} rows of {_VECTORS} are missing")
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)


def _groups(file: Path, column: str, rows: Rows) -> Iterator[tuple[tuple[Rows, Rows], Any]]:
    """Read the row groups that have some of the rows.

    Returns:
        Places in `rows` and rows in the group, and the column of the group.
    """
    with open_parquet(file) as table:
        metadata = table.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(counts)])
        owners = np.searchsorted(starts, rows, side="right") - 1
        for group in np.unique(owners).tolist():
            places = np.flatnonzero(owners == group)
            yield (places, rows[places] - starts[group]), table.read_row_group(group, [column]).column(0)


def _parquet_texts(file: Path, column: str, rows: Rows | None) -> list[str]:
    with open_parquet(file) as table:
        if column not in table.schema_arrow.names:
            return []
        if rows is None:
            return list(table.read([column]).column(0).to_pylist())
    found = [""] * len(rows)
    for (places, inner), cells in _groups(file, column, rows):
        for place, text in zip(places.tolist(), cells.take(inner).to_pylist(), strict=True):
            found[place] = text
    return found

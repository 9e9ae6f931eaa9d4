"""Vectors in files, read in blocks: outputs of `siglip-serve embed` (.npz, .parquet), and .npy arrays."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.install_hint import install_hint

__all__ = ["StoredError", "StoredVectors", "identity_of", "open_parquet", "read_header"]

_BLOCK = 4096  # rows in memory at once
_ARRAY = "embeddings"
_KINDS = (".npz", ".parquet", ".npy")
_METADATA = b"siglip_serve."


class StoredError(Exception):
    """A file holds no vectors. The message names it and the reason."""


@dataclass
class StoredVectors:
    """Vectors [rows, width] of a file. They are not in memory.

    Args:
        path: a .npz file with the array `embeddings`, a .parquet file, or a .npy file with one array.
        column: column of .parquet files.

    Attributes:
        identity: what the file says of itself, such as `checkpoint_name`. Empty for .npy.

    Raises:
        StoredError: the file cannot be read, or holds no vectors.
    """

    path: Path
    column: str = "embedding"
    rows: int = field(init=False)
    width: int = field(init=False)
    identity: Mapping[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.suffix not in _KINDS:
            raise StoredError(f"{self.path}: expected a file of {', '.join(_KINDS)}")
        with self._named():
            if self.path.suffix == ".parquet":
                self._open_parquet()
            else:
                self._open_array()
        if not self.rows or not self.width:
            raise StoredError(f"{self.path}: {self.rows} vectors of width {self.width}")

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All vectors in their order, in blocks [n, width] float32.

        Raises:
            StoredError: the file is cut off or damaged.
        """
        with self._named():
            yield from self._parquet_blocks() if self.path.suffix == ".parquet" else self._array_blocks()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise StoredError(f"{self.path}: {reason}") from error

    @contextmanager
    def _array(self) -> Iterator[IO[bytes]]:
        """The bytes of the array's .npy form."""
        if self.path.suffix == ".npy":
            with self.path.open("rb") as file:
                yield file
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{_ARRAY}.npy") as file:
                yield file

    def _open_array(self) -> None:
        with self._array() as file:
            (self.rows, self.width), _ = _header(file)
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as content:
                if "identity" in content:
                    self.identity = json.loads(str(content["identity"]))

    def _array_blocks(self) -> Iterator[NDArray[np.float32]]:
        with self._array() as file:
            _, dtype = _header(file)
            row = self.width * dtype.itemsize
            for start in range(0, self.rows, _BLOCK):
                count = min(_BLOCK, self.rows - start)
                data = file.read(count * row)
                if len(data) != count * row:
                    raise EOFError(f"cut off in row {start + len(data) // row} of {self.rows}")
                yield np.frombuffer(data, dtype).reshape(count, self.width).astype(np.float32)

    def _open_parquet(self) -> None:
        table = open_parquet(self.path)
        names = table.schema_arrow.names
        if self.column not in names:
            raise ValueError(f"no column {self.column!r}, but {', '.join(names)}")
        self.rows = table.metadata.num_rows
        self.identity = identity_of(table)
        self.width = len(next(self._cells(table))[0]) if self.rows else 0

    def _parquet_blocks(self) -> Iterator[NDArray[np.float32]]:
        start = 0
        for cells in self._cells(open_parquet(self.path)):
            for offset, cell in enumerate(cells):
                if len(cell) != self.width:
                    raise ValueError(f"row {start + offset} has {len(cell)} values, expected {self.width}")
            yield np.stack(cells).astype(np.float32)
            start += len(cells)

    def _cells(self, table: Any) -> Iterator[list[NDArray[Any]]]:
        """The column's cells, as an array each."""
        start = 0
        for batch in table.iter_batches(_BLOCK, columns=[self.column]):
            cells = batch.column(0).to_numpy(zero_copy_only=False)
            for offset, cell in enumerate(cells):
                if not isinstance(cell, np.ndarray) or cell.dtype.kind != "f":
                    raise ValueError(f"row {start + offset} of {self.column!r} is no list of numbers")
            yield list(cells)
            start += len(cells)


def open_parquet(path: Path) -> Any:
    """Open a file as `pyarrow.parquet.ParquetFile`.

    Raises:
        StoredError: pyarrow is missing. The message says what installs it.
        OSError, ValueError: the file cannot be read, or is no Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise StoredError(f"{path}: {error}; `{install_hint('parquet')}` adds it") from error
    try:
        # Mapped: otherwise the columns of a whole row group are read into memory.
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"not a Parquet file: {error}") from error


def identity_of(table: Any) -> dict[str, str]:
    """Read what a Parquet file says of itself, as `StoredVectors.identity`.

    Args:
        table: with its Arrow schema as `schema_arrow`.
    """
    return {
        name.removeprefix(_METADATA).decode(): value.decode()
        for name, value in (table.schema_arrow.metadata or {}).items()
        if name.startswith(_METADATA)
    }


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the beginning of an array in .npy form: shape, if it is stored by columns, and dtype.

    Raises:
        ValueError: it is none, or of another version.
    """
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of the .npy version {version}, expected (1, 0) or (2, 0)")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)  # type: ignore[no-untyped-call]
    return shape, by_columns, dtype


def _header(file: IO[bytes]) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and dtype of an array of vectors."""
    shape, by_columns, dtype = read_header(file)
    if len(shape) != 2 or dtype.kind != "f" or by_columns:
        order = " by columns" if by_columns else ""
        raise ValueError(f"an array {dtype}{list(shape)}{order}, expected floats [rows, width] by rows")
    return (int(shape[0]), int(shape[1])), dtype

"""Search in the embeddings that `siglip-serve embed` wrote: an exact search by cosine, block by block.

The vectors of an uncompressed `.npz` file stay on disk and are read through the page cache. Those of other
files lie in memory as float32.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.commands.embed.stored import StoredError, identity_of, open_parquet, read_header

__all__ = ["Hit", "IndexFileError", "SearchIndex"]

_BLOCK = 2**22  # numbers of a block: 16 MiB as float32
# Rows beyond those asked for that are scored once more in float64, because float32 may order rows of almost
# the same score in another way.
_MARGIN = 64


class IndexFileError(Exception):
    """The file is no output of `siglip-serve embed`. The message names the file and the reason."""


@dataclass(frozen=True)
class Hit:
    """A row of an index, and its cosine with what was searched for."""

    index: int
    score: float


@dataclass(eq=False)
class SearchIndex:
    """An index.

    Attributes:
        names: of the rows, str [N].
        vectors: float [N, D], of any length.
        identity: settings that the vectors were made with, such as `checkpoint_name`.
    """

    names: Sequence[str] | NDArray[np.str_]
    vectors: NDArray[np.floating[Any]]
    identity: Mapping[str, str]
    _inverse: NDArray[np.float32] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, file: Path) -> SearchIndex:
        """Open an output of `siglip-serve embed`.

        Raises:
            IndexFileError: the file cannot be read, or is none.
        """
        readers = {".npz": _read_npz, ".parquet": _read_parquet}
        try:
            reader = readers[file.suffix]
        except KeyError:
            raise IndexFileError(f"{file}: expected a .npz or .parquet file") from None
        try:
            index = reader(file)
        except StoredError as error:
            raise IndexFileError(str(error)) from error
        except OSError as error:
            raise IndexFileError(f"{file}: {error.strerror or error}") from error
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise IndexFileError(f"{file}: no output of siglip-serve embed ({error})") from error
        index.check(file)
        return index

    def check(self, file: Path) -> None:
        """Check that the parts belong together.

        Raises:
            IndexFileError: they do not.
        """
        shape = self.vectors.shape
        if len(shape) != 2 or not all(shape) or self.vectors.dtype.kind != "f":
            found = f"embeddings of the shape {list(shape)} and the type {self.vectors.dtype}"
            raise IndexFileError(f"{file}: {found}, expected numbers [N, D]")
        if len(self.names) != len(self.vectors):
            raise IndexFileError(f"{file}: {len(self.names)} paths for {len(self.vectors)} embeddings")

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.vectors.shape[1])

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that the vectors were made with, or an empty text."""
        return self.identity.get("checkpoint_name", "")

    def __len__(self) -> int:
        return len(self.vectors)

    def name(self, index: int) -> str:
        """The name of a row, as text that can be written as JSON."""
        return str(self.names[index]).encode(errors="replace").decode()

    def search(self, query: NDArray[np.float32], count: int) -> list[Hit]:
        """The rows of the largest cosine, best first. Of equal rows the first comes first.

        Rows that are zero or not finite have no cosine and are never found.

        Args:
            query: float [D], not zero.
            count: of rows at most.
        """
        unit = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
        single = unit.astype(np.float32)
        inverse = self._inverse_lengths()
        best = np.empty(0, np.int64)
        scores = np.empty(0, np.float32)
        for start, block in self._blocks():
            with np.errstate(over="ignore", invalid="ignore"):
                found = (block @ single) * inverse[start : start + len(block)]
            found[np.isnan(found)] = -np.inf
            rows = _largest(found, count + _MARGIN)
            best, scores = np.concatenate([best, start + rows]), np.concatenate([scores, found[rows]])
            kept = _largest(scores, count + _MARGIN)
            best, scores = best[kept], scores[kept]
        best = np.sort(best[scores > -np.inf])
        rows64 = np.asarray(self.vectors[best], np.float64)
        exact = (rows64 @ unit) / np.linalg.norm(rows64, axis=1)
        order = np.argsort(-exact, kind="stable")[:count]
        return [Hit(int(best[row]), float(exact[row])) for row in order]

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        rows = max(1, _BLOCK // self.width)
        for start in range(0, len(self), rows):
            yield start, np.asarray(self.vectors[start : start + rows], np.float32)

    def _inverse_lengths(self) -> NDArray[np.float32]:
        """One over the length of each vector, float32 [N], and NaN where there is none."""
        with self._lock:
            if self._inverse is None:
                inverse = np.empty(len(self), np.float32)
                for start, block in self._blocks():
                    squares = np.einsum("ij,ij->i", block, block, dtype=np.float64)
                    squares[(squares == 0) | ~np.isfinite(squares)] = np.nan
                    inverse[start : start + len(block)] = 1 / np.sqrt(squares)
                self._inverse = inverse
            return self._inverse


def _largest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The places of the largest scores, in no order."""
    if len(scores) <= count:
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[-count:]


def _read_npz(file: Path) -> SearchIndex:
    with zipfile.ZipFile(file) as archive:
        names, vectors = (_member(file, archive, name) for name in ("paths", "embeddings"))
        identity = json.loads(str(_member(file, archive, "identity")))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"paths are {names.dtype} of the shape {list(names.shape)}")
    if not isinstance(identity, dict):
        raise ValueError("identity is no JSON object")  # noqa: TRY004 - the file is at fault
    return SearchIndex(names, vectors, {name: str(value) for name, value in identity.items()})


def _member(file: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive, which stays on disk where it is not compressed."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, fortran, kind = read_header(member)
        if kind.hasobject:
            raise ValueError(f"{name} holds Python objects")
        if info.compress_type != zipfile.ZIP_STORED or not shape or 0 in shape:
            return np.frombuffer(member.read(), kind).reshape(shape, order="F" if fortran else "C")
        begin = member.tell()
    with file.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        head = raw.read(4)
    header = 30 + int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
    offset = info.header_offset + header + begin
    return np.memmap(file, kind, "r", offset, shape, "F" if fortran else "C")


def _read_parquet(file: Path) -> SearchIndex:
    with open_parquet(file) as table:
        kind = table.schema_arrow.field("embedding").type
        width = getattr(kind, "list_size", None)
        if width is None:
            raise ValueError(f"embedding is {kind}, expected lists of a fixed size")
        vectors = np.empty((table.metadata.num_rows, width), np.float32)
        names: list[str] = []
        for batch in table.iter_batches(columns=["path", "embedding"]):
            flat = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
            start = len(names)
            names += batch.column("path").to_pylist()
            vectors[start : len(names)] = flat.reshape(-1, width)
        return SearchIndex(names, vectors, identity_of(table))

"""Stored embeddings: a folder of `siglip-serve bulk`, or an output of `siglip-serve embed`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.embed.stored import StoredError, identity_of
from siglip_serve_client.commands.search.kinds import Kind, kind_of, unit_rows
from siglip_serve_client.commands.search.parts import ArrayPart, LancePart, ParquetPart, Part, zip_array

__all__ = ["Collection", "CollectionError", "open_collection"]

_DESCRIPTION, _FORMATS, _VERSION = "bulk.json", ("parquet", "npy", "lance"), 1
_BLOCK = 2**21  # numbers of a block: 8 MiB as float32, of which scores come fastest


class CollectionError(Exception):
    """The embeddings cannot be read, or are none. The message names the file and the reason."""


@dataclass(eq=False)
class Collection:
    """Vectors [rows, width], of any length, in files.

    Attributes:
        where: the folder or the file.
        parts: at least one, of one kind and width.
        kind: of stored numbers.
        width: D, numbers or bits of a vector.
        identity: settings that the vectors were made with, such as `checkpoint_name`.
        names: of the files of the parts.
        id_column: `id`, or `path` in outputs of `embed`.
    """

    where: Path
    parts: Sequence[Part]
    kind: Kind
    width: int
    identity: Mapping[str, str]
    names: Sequence[str] = ()
    id_column: str = "id"

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first row of each part, and the number of all rows."""
        return np.cumsum([0, *(part.rows for part in self.parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that the vectors were made with, or an empty text."""
        return self.identity.get("checkpoint_name", "")

    def blocks(self, first_part: int = 0) -> Iterator[tuple[int, NDArray[Any]]]:
        """All vectors as they are stored, from a part on, in blocks of 8 MiB, each with its first row.

        Raises:
            CollectionError: a file is damaged, or is no longer there.
        """
        most = max(1, _BLOCK // self.parts[0].stored_width)
        for start, part in zip(self.starts[first_part:].tolist(), self.parts[first_part:], strict=False):
            row = start
            try:
                for block in part.blocks(most):
                    yield row, block
                    row += len(block)
            except (OSError, ValueError) as error:
                raise CollectionError(f"{self.where}: row {row}: {error}") from error

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some vectors as they are stored, in the order given."""
        found = np.empty((len(rows), self.parts[0].stored_width), self.parts[0].dtype)
        for places, inner, part in self._places(rows):
            found[places] = part.take(inner)
        return found

    def unit(self, block: NDArray[Any]) -> NDArray[np.float32]:
        """Stored rows as float32 [N, D] of length 1. Rows that are zero or not finite are NaN."""
        return unit_rows(block, self.kind, self.width)

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of some rows, in the order given."""
        return self.texts(self.id_column, rows)

    def texts(self, column: str, rows: NDArray[np.int64]) -> list[str]:
        """The texts of a column for some rows, in the order given, empty where the column is missing."""
        found = [""] * len(rows)
        for places, inner, part in self._places(rows):
            for place, text in zip(places.tolist(), part.texts(column, inner), strict=False):
                found[place] = text
        return found

    def all_ids(self) -> Sequence[str]:
        """The ids of all rows."""
        if len(self.parts) == 1:
            return self.parts[0].texts(self.id_column)
        return [text for part in self.parts for text in part.texts(self.id_column)]

    def loaded(self) -> Self:
        """The collection with its vectors in memory, where they do not lie in mapped files."""
        parts: list[Part] = []
        for part in self.parts:
            if isinstance(part, ArrayPart):
                parts.append(part)
                continue
            vectors = np.empty((part.rows, part.stored_width), part.dtype)
            row = 0
            for block in part.blocks(max(1, _BLOCK // part.stored_width)):
                vectors[row : row + len(block)] = block
                row += len(block)
            parts.append(ArrayPart(vectors, {self.id_column: part.texts(self.id_column)}))
        return replace(self, parts=parts)

    def _places(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Part]]:
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            yield places, rows[places] - self.starts[owner], self.parts[owner]


def open_collection(path: Path) -> Collection:
    """Open a folder of `siglip-serve bulk`, or a .npz or .parquet file of `siglip-serve embed`.

    Raises:
        CollectionError: there is none, it cannot be read, or it holds no embeddings.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.suffix not in (".npz", ".parquet"):
            expected = "a folder of siglip-serve bulk, or a .npz or .parquet file"
            raise CollectionError(f"{path}: {'' if path.exists() else 'no such folder; '}expected {expected}")
        return _open_npz(path) if path.suffix == ".npz" else _open_parquet(path)
    except StoredError as error:
        raise CollectionError(str(error)) from error
    except OSError as error:
        raise CollectionError(f"{error.filename or path}: {error.strerror or error}") from error
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        maker = "bulk" if path.is_dir() else "embed"
        raise CollectionError(f"{path}: no output of siglip-serve {maker} ({error})") from error


def _open_folder(folder: Path) -> Collection:
    file = folder / _DESCRIPTION
    if not file.is_file():
        raise CollectionError(f"{folder}: has no {_DESCRIPTION}, so it is no output of siglip-serve bulk")
    described = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise ValueError(f"{_DESCRIPTION} is no JSON object")  # noqa: TRY004 - the file is at fault
    if described.get("version") != _VERSION:
        raise CollectionError(f"{file}: version {described.get('version')!r}, expected {_VERSION}")
    if described.get("format") not in _FORMATS:
        expected = ", ".join(_FORMATS)
        raise CollectionError(f"{file}: format {described.get('format')!r}, expected one of {expected}")
    identity = {name: _as_text(value) for name, value in described.items() if value is not None}
    parts = _parts(folder, described["format"])
    width = described["width"]
    if not isinstance(width, int) or width < 1:
        raise CollectionError(f"{file}: width {width!r}, expected a whole number of at least 1")
    return _checked(folder, parts, identity, "id", width)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parts(folder: Path, form: str) -> list[tuple[Path, Part]]:
    """The parts of a folder that have rows, in the order of their names."""
    if form == "lance":
        data = folder / "embeddings.lance"
        found: list[tuple[Path, Part]] = [(data, LancePart(data))] if data.is_dir() else []
    elif form == "npy":
        files = sorted((folder / "embeddings").glob("[!.]*.npy"))
        found = [(file, _open_npy(file)) for file in files]
    else:
        files = sorted((folder / "embeddings").glob("[!.]*.parquet"))
        found = [(file, ParquetPart(file)) for file in files]
    return [(file, part) for file, part in found if part.rows]


def _open_npy(file: Path) -> ArrayPart:
    vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    return ArrayPart(vectors, file.with_suffix(".rows.parquet"))


def _open_npz(file: Path) -> Collection:
    names, vectors = zip_array(file, "paths"), zip_array(file, "embeddings")
    identity = json.loads(str(zip_array(file, "identity")))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"paths are {names.dtype} of the shape {list(names.shape)}")
    if not isinstance(identity, dict):
        raise ValueError("identity is no JSON object")  # noqa: TRY004 - the file is at fault
    columns = {"path": names}
    if len(names) != len(vectors):
        raise ValueError(f"{len(names)} paths for {len(vectors)} embeddings")
    with zipfile.ZipFile(file) as archive:
        if "sha256.npy" in archive.namelist():
            columns["sha256"] = zip_array(file, "sha256")
    part = ArrayPart(vectors, columns)
    texts = {name: str(value) for name, value in identity.items()}
    return _checked(file, [(file, part)] if vectors.size else [], texts, "path")


def _open_parquet(file: Path) -> Collection:
    part = ParquetPart(file)
    if "path" not in part.schema_arrow.names:
        raise ValueError(f"no column 'path', but {', '.join(part.schema_arrow.names)}")
    return _checked(file, [(file, part)] if part.rows else [], identity_of(part), "path")


def _checked(
    path: Path,
    parts: Sequence[tuple[Path, Part]],
    identity: Mapping[str, str],
    id_column: str,
    width: int | None = None,
) -> Collection:
    """A collection of parts that belong together."""
    if not parts:
        raise CollectionError(f"{path}: has no embeddings")
    first = parts[0][1]
    width = first.stored_width if width is None else width
    named = identity.get("dtype", "") if id_column == "id" else ""
    for file, part in parts:
        kind = kind_of(part.dtype, named)
        expected = -(-width // 8) if kind == "binary" else width
        if part.stored_width != expected or part.dtype != first.dtype:
            came = f"{part.dtype} of width {part.stored_width}"
            raise CollectionError(f"{file}: embeddings of {came}, expected {first.dtype} of width {expected}")
    kind = kind_of(first.dtype, named)
    names = [file.name for file, _ in parts]
    return Collection(path, [part for _, part in parts], kind, width, identity, names, id_column)

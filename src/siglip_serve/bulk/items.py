"""Pictures of a unit, one after another: what belongs to them, and the reason where one cannot be read."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from siglip_serve_client.commands.embed.archives import ArchiveMember, printable

from siglip_serve.bulk.storage import (
    FileRange,
    StorageError,
    is_remote,
    local_path,
    open_file,
    read_bytes,
    read_stream,
)
from siglip_serve.bulk.units import InputOptions, Unit
from siglip_serve.errors import SiglipServeError

__all__ = ["Columns", "Item", "check_columns", "read_items"]

_AHEAD = 64  # pictures with a file of their own that are read at the same time
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # gzip, bzip2, xz, zstd
_ROWS = 64  # of a table in memory at once


@dataclass(frozen=True)
class Columns:
    """Columns that belong to the pictures.

    Attributes:
        image: column of tables with the pictures: bytes, structs with a member `bytes`, or paths.
        text: column with their captions, or none. In a tar archive it is the suffix of the member beside the
            picture, or a key of the JSON member there.
        kept: further ones that are copied to the output as text.
        max_bytes: most bytes of a picture that are read.
        base: folder of the relative paths in listings and tables.
    """

    image: str = "image"
    text: str = ""
    kept: tuple[str, ...] = ()
    max_bytes: int = 32 * 2**20
    base: str = ""

    @property
    def all_kept(self) -> tuple[str, ...]:
        """Columns that are copied, the captions first."""
        return tuple(dict.fromkeys(((self.text,) if self.text else ()) + self.kept))


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        key: its path or URI, `shard.tar/member` or `table.parquet#row`.
        path: of the file that holds it.
        data: the encoded picture, or where its bytes lie on this machine.
        values: what the kept columns hold, None where there is nothing.
        error: the reason if it cannot be read.
    """

    key: str
    path: str
    data: bytes | FileRange = b""
    values: dict[str, str | None] = field(default_factory=dict)
    error: str = ""


def read_items(unit: Unit, columns: Columns, options: InputOptions) -> Iterator[Item]:
    """Read a unit from its beginning.

    Raises:
        OSError: the file of the unit cannot be opened, or its reading was interrupted.
        StorageError: a table has not the columns. The message names those that it has.
    """
    if unit.kind == "listing":
        yield from _listed(unit, columns)
    elif unit.kind == "tar":
        yield from _archived(unit, columns, options)
    else:
        yield from _tabled(unit, columns)


def check_columns(unit: Unit, columns: Columns) -> None:
    """Check that the table of a unit has the columns of a job.

    Raises:
        StorageError: it has not. The message names those that it has.
        OSError: it cannot be read.
    """
    next(_rows(unit, columns), None)


def _listed(unit: Unit, columns: Columns) -> Iterator[Item]:
    remote: list[str] = []  # consecutive lines, to be read at the same time
    for path in _lines(unit):
        if is_remote(path):
            remote.append(path)
            continue
        yield from _read_remote(remote, columns)
        remote = []
        yield _local(path, path, columns, dict.fromkeys(columns.all_kept))
    yield from _read_remote(remote, columns)


def _local(key: str, path: str, columns: Columns, values: dict[str, str | None]) -> Item:
    """A picture in a file of its own on this machine, which is read where it is decoded."""
    where = os.path.join(columns.base, local_path(path))  # noqa: PTH118
    return Item(printable(key), printable(where), FileRange(where, 0, columns.max_bytes + 1), values)


def _read_remote(paths: Sequence[str], columns: Columns) -> Iterator[Item]:
    values: dict[str, str | None] = dict.fromkeys(columns.all_kept)
    return _ahead(lambda path: _read_alone(path, path, columns, values), iter(paths))


def _lines(unit: Unit) -> Iterator[str]:
    """Lines that begin in the unit's part of the listing."""
    with open_file(unit.source) as file:
        file.seek(max(unit.start - 1, 0))
        rest = file.read(unit.end - max(unit.start - 1, 0))
        while not rest.endswith(b"\n") and (more := file.read(4096)):
            head, newline, _ = more.partition(b"\n")
            rest += head + newline
    if unit.start:  # the line before begins in the part before
        rest = rest.partition(b"\n")[2]
    for raw in rest.splitlines():
        line = raw.strip()
        if line.startswith(b'"'):
            yield _unquoted(line)
        elif line:
            yield line.decode("utf-8", "surrogateescape")


def _unquoted(line: bytes) -> str:
    """A path that is written as JSON. Other text is a path that begins with a quote."""
    try:
        path = str(json.loads(line))
        path.encode("utf-8", "surrogateescape")
        return path
    except ValueError:
        return line.decode("utf-8", "surrogateescape")


def _read_alone(key: str, where: str, columns: Columns, values: dict[str, str | None]) -> Item:
    try:
        return Item(printable(key), printable(where), read_bytes(where, columns.max_bytes + 1), values)
    except (OSError, ValueError, SiglipServeError) as error:  # ValueError: names that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return Item(printable(key), printable(where), values=values, error=printable(reason))


def _ahead(read: Callable[[Any], Item], arguments: Iterator[Any]) -> Iterator[Item]:
    """Results in order, while the next ones are being read."""
    waiting: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(read, argument))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _archived(unit: Unit, columns: Columns, options: InputOptions) -> Iterator[Item]:
    """Pictures of a tar archive. Members of one sample follow each other and share the name up to a dot."""
    sample: list[_Member] = []
    damage = ""
    try:
        with _open_archive(unit.source) as (archive, length):
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would be kept until the end
                if not member.isfile():
                    continue
                if sample and _stem(sample[0].name) != _stem(member.name):
                    yield from _sample(unit, sample, columns)
                    sample = []
                found = _read_member(unit, archive, member, columns, options, length)
                if found is not None:
                    sample.append(found)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        damage = f"not a tar archive, or a damaged one: {error}"
    yield from _sample(unit, sample, columns)
    if damage:
        yield Item(printable(unit.source), printable(unit.source), error=damage)


@dataclass(frozen=True)
class _Member:
    """A member of an archive that belongs to a sample, and whether it is a picture."""

    name: str
    data: bytes | FileRange
    picture: bool


@contextmanager
def _open_archive(path: str) -> Iterator[tuple[tarfile.TarFile, int]]:
    """An archive, and its bytes if its members can be read where they lie, or else 0."""
    with read_stream(path) as stream:
        in_place = not is_remote(path) and stream.peek(2)[:2] not in _COMPRESSED
        if not in_place:  # a stream: nothing is sought or extracted
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=ArchiveMember) as archive:
                yield archive, 0
            return
    with (
        Path(local_path(path)).open("rb", buffering=0) as file,
        tarfile.open(fileobj=file, mode="r:", tarinfo=ArchiveMember) as archive,
    ):
        yield archive, os.fstat(file.fileno()).st_size


def _read_member(
    unit: Unit,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    columns: Columns,
    options: InputOptions,
    length: int,
) -> _Member | None:
    picture = options.is_image(member.name)
    if not picture and not columns.all_kept:
        return None
    most = columns.max_bytes + 1
    if picture and length and not member.issparse():
        if member.offset_data + member.size > length:
            raise tarfile.ReadError("unexpected end of data")
        place = FileRange(local_path(unit.source), member.offset_data, min(member.size, most))
        return _Member(member.name, place, True)
    file = archive.extractfile(member)
    return _Member(member.name, file.read(most) if file is not None else b"", picture)


def _stem(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _sample(unit: Unit, members: Sequence[_Member], columns: Columns) -> Iterator[Item]:
    pictures = [member for member in members if member.picture]
    if not pictures:
        return
    texts = {member.name: member.data for member in members if isinstance(member.data, bytes)}
    values = _beside(texts, columns.all_kept) if columns.all_kept else {}
    for member in pictures:
        key = printable(f"{unit.source}/{member.name}")
        yield Item(key, printable(unit.source), member.data, values)


def _beside(members: Mapping[str, bytes], wanted: Sequence[str]) -> dict[str, str | None]:
    """Texts of a sample, by suffix of the member or by key of its JSON member."""
    own = {PurePosixPath(name).suffix.lstrip("."): data for name, data in members.items()}
    try:
        described = json.loads(own.get("json", b"{}"))
    except ValueError:
        described = {}
    found: dict[str, str | None] = {}
    for name in wanted:
        if name in own and name != "json":
            found[name] = own[name].decode("utf-8", "replace")
        else:
            found[name] = _as_text(described.get(name) if isinstance(described, dict) else None)
    return found


def _tabled(unit: Unit, columns: Columns) -> Iterator[Item]:
    def read(row: tuple[int, dict[str, Any]]) -> Item:
        number, cells = row
        key = f"{unit.source}#{number}"
        values = {name: _as_text(cells[name]) for name in columns.all_kept}
        cell = cells[columns.image]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(cell, dict) and data is None:
            data = cell.get("path")
        if isinstance(data, bytes):
            return Item(printable(key), printable(unit.source), data, values)
        if isinstance(data, str):
            if is_remote(data):
                return _read_alone(key, data, columns, values)
            return _local(key, data, columns, values)
        reason = f"the cell holds {type(data).__name__}, expected bytes or a path"
        return Item(printable(key), printable(unit.source), values=values, error=reason)

    yield from _ahead(read, _rows(unit, columns))


def _rows(unit: Unit, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the unit with their numbers in the whole table."""
    wanted = [columns.image, *columns.all_kept]
    if unit.kind == "lance":
        import lance

        table = lance.dataset(unit.source)
        _require(unit.source, table.schema.names, wanted)
        number = unit.start << 32  # as Lance numbers the rows of a fragment
        fragment: Any = table.get_fragment(unit.start)
        for batch in fragment.to_batches(columns=wanted, batch_size=_ROWS):
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows
        return
    from pyarrow import parquet

    with open_file(unit.source) as file:
        opened = parquet.ParquetFile(file)
        _require(unit.source, opened.schema_arrow.names, wanted)
        number = sum(opened.metadata.row_group(group).num_rows for group in range(unit.start))
        for batch in opened.iter_batches(_ROWS, row_groups=[unit.start], columns=wanted):
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows


def _require(path: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise StorageError(f"{path}: has no column {missing[0]!r}, but {', '.join(names)}")


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):  # JSON can hold half of a surrogate pair, which no column can
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json.dumps(value, default=str)

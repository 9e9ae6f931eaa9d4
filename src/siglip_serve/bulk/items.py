"""Pictures of a unit, one after another: what belongs to them, and the reason where one cannot be read."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from siglip_serve_client.commands.embed.archives import ArchiveMember, printable

from siglip_serve.bulk.storage import is_remote, open_file, read_bytes, read_stream
from siglip_serve.bulk.units import InputOptions, Unit

__all__ = ["Columns", "Item", "read_items"]

_AHEAD = 64  # pictures with a file of their own that are read at the same time
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
        return ((self.text,) if self.text else ()) + self.kept


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        key: its path or URI, `shard.tar/member` or `table.parquet#row`.
        path: of the file that holds it.
        data: the encoded picture.
        values: what the kept columns hold, None where there is nothing.
        error: the reason if it cannot be read.
    """

    key: str
    path: str
    data: bytes = b""
    values: dict[str, str | None] = field(default_factory=dict)
    error: str = ""


def read_items(unit: Unit, columns: Columns, options: InputOptions) -> Iterator[Item]:
    """Read a unit from its beginning.

    Raises:
        OSError: the file of the unit cannot be opened, or its reading was interrupted.
        ValueError: a table has not the columns. The message names those that it has.
    """
    if unit.kind == "listing":
        yield from _listed(unit, columns)
    elif unit.kind == "tar":
        yield from _archived(unit, columns, options)
    else:
        yield from _tabled(unit, columns)


def _listed(unit: Unit, columns: Columns) -> Iterator[Item]:
    def read(path: str) -> Item:
        where = path if is_remote(path) else os.path.join(columns.base, path)  # noqa: PTH118
        return _read_alone(path, where, columns)

    yield from _ahead(read, _lines(unit))


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
            yield str(json.loads(line))
        elif line:
            yield line.decode("utf-8", "surrogateescape")


def _read_alone(key: str, where: str, columns: Columns, values: dict[str, str | None] | None = None) -> Item:
    kept: dict[str, str | None] = dict.fromkeys(columns.all_kept) if values is None else values
    try:
        return Item(printable(key), printable(where), read_bytes(where, columns.max_bytes + 1), kept)
    except OSError as error:
        return Item(printable(key), printable(where), values=kept, error=error.strerror or str(error))


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
    with read_stream(unit.source) as stream:
        sample: list[tuple[str, bytes]] = []
        try:
            # A stream: nothing is sought or extracted.
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=ArchiveMember) as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if sample and _stem(sample[0][0]) != _stem(member.name):
                        yield from _sample(unit, sample, columns, options)
                        sample = []
                    sample.append((member.name, _content(archive, member, columns.max_bytes + 1)))
        except (tarfile.TarError, EOFError, zlib.error) as error:
            yield from _sample(unit, sample, columns, options)
            reason = f"not a tar archive, or a damaged one: {error}"
            yield Item(printable(unit.source), printable(unit.source), error=reason)
            return
        yield from _sample(unit, sample, columns, options)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    file = archive.extractfile(member)
    return file.read(most) if file is not None else b""


def _stem(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _sample(
    unit: Unit, members: Sequence[tuple[str, bytes]], columns: Columns, options: InputOptions
) -> Iterator[Item]:
    pictures = [(name, data) for name, data in members if options.is_image(name)]
    if not pictures:
        return
    values = _beside(members, columns.all_kept) if columns.all_kept else {}
    for name, data in pictures:
        yield Item(printable(f"{unit.source}/{name}"), printable(unit.source), data, values)


def _beside(members: Sequence[tuple[str, bytes]], wanted: Sequence[str]) -> dict[str, str | None]:
    """Texts of a sample, by suffix of the member or by key of its JSON member."""
    own = {PurePosixPath(name).suffix.lstrip("."): data for name, data in members}
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
            where = data if is_remote(data) else os.path.join(columns.base, data)  # noqa: PTH118
            return _read_alone(key, where, columns, values)
        reason = f"the cell holds {type(data).__name__}, expected bytes or a path"
        return Item(printable(key), printable(unit.source), values=values, error=reason)

    yield from _ahead(read, _rows(unit, columns))


def _rows(unit: Unit, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the unit with their numbers in the whole table."""
    wanted = [columns.image, *columns.all_kept]
    if unit.kind == "lance":
        import lance

        table = lance.dataset(unit.source)
        _check_columns(unit.source, table.schema.names, wanted)
        number = unit.start << 32  # as Lance numbers the rows of a fragment
        fragment: Any = table.get_fragment(unit.start)
        for batch in fragment.to_batches(columns=wanted, batch_size=_ROWS):
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows
        return
    from pyarrow import parquet

    with open_file(unit.source) as file:
        opened = parquet.ParquetFile(file)
        _check_columns(unit.source, opened.schema_arrow.names, wanted)
        number = sum(opened.metadata.row_group(group).num_rows for group in range(unit.start))
        for batch in opened.iter_batches(_ROWS, row_groups=[unit.start], columns=wanted):
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows


def _check_columns(path: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]!r}, but {', '.join(names)}")


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json.dumps(value, default=str)

"""Parts of a declared table, and the Markdown that they become with the rows of a CSV file."""

from __future__ import annotations

import csv
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

__all__ = [
    "RESULTS",
    "Cell",
    "Column",
    "Key",
    "Source",
    "Summary",
    "Table",
    "TableError",
    "figure",
    "markdown",
]

RESULTS = Path(__file__).with_name("results")

Row = Mapping[str, str]
Where = Mapping[str, str | tuple[str, ...]]

_REDUCE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "largest": max,
    "mean": statistics.fmean,
    "median": statistics.median,
}


class TableError(ValueError):
    """A page names a table that does not exist, or a table finds no row in its CSV."""


@dataclass(frozen=True)
class Source:
    """Rows of a CSV file in `benchmarks/results`.

    Attributes:
        file: name of the file.
        where: value, or one of several values, that each column must have.
    """

    file: str
    where: Where


@dataclass(frozen=True)
class Cell:
    """A figure: the chosen rows' fields put into a template.

    Attributes:
        template: such as `{p50_ms:.2f}`; numeric fields are numbers.
        where: which of the source's rows.
        reduce: how the values of several rows become one: `last` (the newest), `largest`, `mean`, `median`.
        over: conditions that replace those of `where`; each field is then divided by its value in these rows.
    """

    template: str
    where: Where
    reduce: str = "last"
    over: Where | None = None


@dataclass(frozen=True)
class Column:
    """A heading and the cells below it."""

    heading: str
    cell: Cell


@dataclass(frozen=True)
class Key:
    """A leading column, whose values tell the rows of a table apart.

    Attributes:
        heading: of the column.
        field: column of the CSV.
        names: what to print for each value, in the order of the rows; values that are not named are left out.
            Without names all values are printed, in the order of the file, or numbers by their size.
    """

    heading: str
    field: str
    names: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """A table with one row for each combination of the keys' values that the source has."""

    source: Source
    keys: tuple[Key, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Summary:
    """A table whose rows come from different files.

    Attributes:
        headings: of all columns.
        rows: for each row its source and its cells; a string is printed as it is.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[Source, tuple[str | Cell, ...]], ...]


@cache
def _rows_of(path: Path) -> tuple[Row, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def _select(rows: Iterable[Row], where: Where) -> list[Row]:
    def fits(row: Row) -> bool:
        return all(
            row[name] in ((value,) if isinstance(value, str) else value) for name, value in where.items()
        )

    return [row for row in rows if fits(row)]


def _source_rows(source: Source, results: Path) -> list[Row]:
    rows = _select(_rows_of(results / source.file), source.where)
    if not rows:
        raise TableError(f"{source.file}: no row with {dict(source.where)}")
    return rows


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _value(rows: Sequence[Row], name: str, reduce: str) -> float | None:
    values = [float(row[name]) for row in rows if row[name] not in ("", "nan")]
    return _REDUCE[reduce](values) if values else None


def _text(cell: Cell, rows: Sequence[Row]) -> str:
    """The cell's text; empty where the chosen rows have no value."""
    chosen = _select(rows, cell.where)
    if not chosen:
        return ""
    values: dict[str, float] = {}
    for name in _fields(cell.template):
        value = _value(chosen, name, cell.reduce)
        if cell.over is not None and value is not None:
            base = _value(_select(rows, {**cell.where, **cell.over}), name, cell.reduce)
            value = None if base is None else value / base
        if value is None:
            return ""
        values[name] = value
    text = cell.template.format(**values)
    return text.removeprefix("-") if re.fullmatch(r"-0\.?0*", text) else text


def _grid(headings: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _as_they_are(rows: Sequence[Row], field: str) -> dict[str, str]:
    """Values of a column without names: in the order of the file, numbers by their size."""
    values = list(dict.fromkeys(row[field] for row in rows))
    if all(value.isdecimal() for value in values):
        values.sort(key=int)
    return {value: value for value in values}


def _table(table: Table, results: Path) -> tuple[list[str], list[tuple[str, list[Row]]]]:
    rows = _source_rows(table.source, results)
    names = [key.names if key.names is not None else _as_they_are(rows, key.field) for key in table.keys]
    orders = [list(values) for values in names]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        values = tuple(row[key.field] for key in table.keys)
        if all(value in order for value, order in zip(values, orders, strict=True)):
            groups.setdefault(values, []).append(row)
    ranked = sorted(groups, key=lambda vs: [order.index(v) for v, order in zip(vs, orders, strict=True)])
    body = [
        [
            *(known[value] for known, value in zip(names, values, strict=True)),
            *(_text(column.cell, groups[values]) for column in table.columns),
        ]
        for values in ranked
    ]
    headings = [key.heading for key in table.keys] + [column.heading for column in table.columns]
    used = [row for group in groups.values() for row in group]
    return _grid(headings, body), [(table.source.file, used)]


def _summary(table: Summary, results: Path) -> tuple[list[str], list[tuple[str, list[Row]]]]:
    body: list[list[str]] = []
    used: list[tuple[str, list[Row]]] = []
    for source, cells in table.rows:
        rows = _source_rows(source, results)
        body.append([cell if isinstance(cell, str) else _text(cell, rows) for cell in cells])
        used.append((source.file, rows))
    return _grid(table.headings, body), used


def _caption(used: Sequence[tuple[str, list[Row]]], page: Path, results: Path) -> str:
    """Devices, days and links to the CSV files."""
    rows = [row for _, some in used for row in some]
    devices = dict.fromkeys(row["device"] for row in rows)
    days = sorted({row["date"] for row in rows})
    links = [
        f"[{name}]({os.path.relpath(results / name, page.parent)})"
        for name in dict.fromkeys(n for n, _ in used)
    ]
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(devices)}. {when}. {', '.join(links)}."


def markdown(table: Table | Summary, page: Path, results: Path = RESULTS) -> str:
    """Lines of the table, and below them the devices, the days and links to the CSV files.

    Args:
        table: what to print.
        page: where it is printed, for relative links.
        results: directory of the CSV files.

    Raises:
        TableError: no row has what the table's source asks for.
    """
    lines, used = _table(table, results) if isinstance(table, Table) else _summary(table, results)
    return "\n".join([*lines, "", _caption(used, page, results)])


def figure(cell: Cell, source: Source, results: Path = RESULTS) -> str:
    """Text of a single figure.

    Raises:
        TableError: no row has it.
    """
    text = _text(cell, _source_rows(source, results))
    if not text:
        raise TableError(f"{source.file}: no figure for {cell.template} with {dict(cell.where)}")
    return text

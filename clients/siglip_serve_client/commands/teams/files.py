"""The files of `siglip-serve teams`: crops and boxes to read, labels to write."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.teams import TeamFit, Teams

__all__ = [
    "Boxes",
    "MisuseError",
    "crop_paths",
    "read_boxes",
    "short_names",
    "track_numbers",
    "track_of",
    "write_labels",
]

_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_CORNERS = ("x0", "y0", "x1", "y1")


class MisuseError(Exception):
    """The command line, or a file that it names, is wrong."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of N players in a frame, with the tracks and roles of their file.

    Attributes:
        corners: float32 [N, 4] of x0, y0, x1, y1.
        tracks: [N], "" where a track is unknown.
        roles: [N], "" for players, or None if the file has no roles.
    """

    corners: NDArray[np.float32]
    tracks: list[str]
    roles: list[str] | None


def crop_paths(given: Iterable[Path]) -> list[Path]:
    """The files that are named, and the image files of the folders, at any depth, in their names' order.

    Raises:
        MisuseError: a folder without any.
    """
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        found = [file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()]
        if not found:
            raise MisuseError(f"{path}: a folder without image files ({', '.join(sorted(_SUFFIXES))})")
        paths += sorted(found, key=_natural)
    return paths


def _natural(path: Path) -> list[tuple[int, str]]:
    # 2.jpg before 10.jpg
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without their endings, and without the folders that all of them share."""
    folders = zip(*(Path(path).parent.parts for path in paths), strict=False)
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, folders)))
    return [Path(*Path(path).parts[shared:]).with_suffix("").as_posix() for path in paths]


def track_of(path: Path, pattern: re.Pattern[str] | None) -> str:
    """The match of the pattern's first group in the path, or of the pattern without groups, else ""."""
    found = pattern.search(path.as_posix()) if pattern else None
    if found is None:
        return ""
    return (found.group(1) or "") if found.re.groups else found.group()


def track_numbers(tracks: Sequence[str]) -> NDArray[np.int64] | None:
    """The number of each track [N], -1 for "", or None if no track is known."""
    known = {track: number for number, track in enumerate(dict.fromkeys(filter(None, tracks)))}
    if not known:
        return None
    return np.array([known.get(track, -1) for track in tracks], dtype=np.int64)


def read_boxes(path: Path) -> Boxes:
    """Boxes from a CSV file with a header, or a JSON list of objects or of lists of four numbers.

    The columns or members are x0, y0, x1, y1, and if known track_id and role. Others are ignored.

    Raises:
        OSError: the file cannot be read.
        MisuseError: the file has another form. The message names the row.
    """
    rows = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    corners = [_corners(row, f"{path}, box {number}") for number, row in enumerate(rows)]
    return Boxes(
        np.array(corners, dtype=np.float32).reshape(-1, 4),
        [_text(row.get("track_id")) for row in rows],
        [_text(row.get("role")) for row in rows] if any("role" in row for row in rows) else None,
    )


def _csv_rows(path: Path) -> list[Mapping[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            rows: list[Mapping[str, Any]] = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise MisuseError(f"{path}: not a CSV file: {error}") from error
    missing = [name for name in _CORNERS if name not in columns]
    if missing:
        raise MisuseError(f"{path}: its header has no column {', '.join(missing)}; got {', '.join(columns)}")
    return rows


def _json_rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise MisuseError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, list):
        raise MisuseError(f"{path}: a JSON {type(content).__name__}, expected a list of boxes")
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(content):
        if isinstance(row, list) and len(row) == len(_CORNERS):
            rows.append(dict(zip(_CORNERS, row, strict=True)))
        elif isinstance(row, dict):
            rows.append(row)
        else:
            raise MisuseError(f"{path}, box {number}: expected [x0, y0, x1, y1], or an object of these names")
    return rows


def _corners(row: Mapping[str, Any], where: str) -> list[float]:
    try:
        return [float(row[name]) for name in _CORNERS]
    except KeyError as error:
        raise MisuseError(f"{where}: has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        values = ", ".join(str(row[name]) for name in _CORNERS)
        raise MisuseError(f"{where}: got {values}, expected four numbers") from error


def _text(value: Any) -> str:
    # Trackers write -1 where they have no track yet.
    return "" if value is None or str(value).strip() == "-1" else str(value).strip()


def write_labels(
    path: Path, names: Sequence[str], tracks: Sequence[str], teams: Teams, corners: NDArray[np.float32] | None
) -> None:
    """Write the answer for each player, as .csv or .json by the ending of the path.

    Columns, or members of `players`: name, track, label, margin, outlier_score, x, y, region_fallback, and
    for boxes x0, y0, x1, y1. Numbers that are not finite are empty or null. JSON also has `status` of a fit.
    """
    rows = [_row(number, names, tracks, teams) for number in range(len(teams))]
    if corners is not None:
        for row, box in zip(rows, corners.tolist(), strict=True):
            row.update(zip(_CORNERS, box, strict=True))
    if path.suffix == ".json":
        content: dict[str, Any] = {"players": rows}
        if isinstance(teams, TeamFit):
            content = {"status": list(teams.status), **content}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [*_row_names(), *(_CORNERS if corners is not None else ())]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _row_names() -> list[str]:
    return ["name", "track", "label", "margin", "outlier_score", "x", "y", "region_fallback"]


def _row(number: int, names: Sequence[str], tracks: Sequence[str], teams: Teams) -> dict[str, Any]:
    x, y = teams.coordinates[number]
    values = (
        names[number],
        tracks[number] or None,
        int(teams.labels[number]),
        _finite(teams.margin[number]),
        _finite(teams.outlier_score[number]),
        _finite(x),
        _finite(y),
        bool(teams.region_fallback[number]),
    )
    return dict(zip(_row_names(), values, strict=True))


def _finite(value: np.float32) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None

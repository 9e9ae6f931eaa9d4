"""Division of inputs into units: each picture in exactly one, and the same units in every run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bulk_inputs import outcome, small_jpeg, write_parquet, write_pictures, write_tar

from siglip_serve.bulk.items import Columns, read_items
from siglip_serve.bulk.storage import Folder, StorageError
from siglip_serve.bulk.units import InputOptions, Unit, copy_plans, plan_units


def plan(inputs: list[str], output: Path, notes: list[str] | None = None, **options: object) -> list[Unit]:
    given = InputOptions(**options)  # type: ignore[arg-type]
    note: Callable[[str], None] = (notes if notes is not None else []).append
    return list(plan_units(inputs, given, Folder(str(output)), note))


def keys(units: list[Unit], columns: Columns | None = None) -> list[str]:
    options = InputOptions()
    return [item.key for unit in units for item in read_items(unit, columns or Columns(), options)]


@pytest.mark.parametrize("items", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "no final newline"])
def test_every_line_is_in_one_part(tmp_path: Path, items: int, end: str, last: bool) -> None:
    names = ["a.jpg", "ein Bär mit Füßen.jpg", "写真.jpg", "x" * 300 + ".jpg", "b.jpg", '"', "c d.jpg"]
    names += [f"{number}.jpg" for number in range(40)]
    lines = [*names[:3], "", *names[3:]]
    listing = tmp_path / "names.txt"
    listing.write_bytes((end.join(lines) + (end if last else "")).encode())
    units = plan([str(listing)], tmp_path / "out", items=items)
    assert keys(units) == names
    assert len({unit.name for unit in units}) == len(units)
    if items < 10:
        assert len(units) > 3


def test_names_that_a_line_cannot_hold_are_quoted(tmp_path: Path) -> None:
    names = ["line\nbreak.jpg", " spaces ", '"quotes".jpg', os.fsdecode(b"not utf-8 \xff.jpg"), "tab\t.jpg"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(small_jpeg(1))
    units = plan([str(folder)], tmp_path / "out", all_files=True)
    items = [item for unit in units for item in read_items(unit, Columns(), InputOptions())]
    assert [outcome(item) for item in items] == [small_jpeg(1)] * 5
    assert sorted(item.path for item in items) == sorted(
        f"{folder}/{name}".encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for name in names
    )


def test_quoted_lines_and_bad_ones_are_single_pictures(tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, [1], "line\nbreak.jpg")
    lines = [
        json.dumps(str(path)),
        '"half a quote',
        '"nul \\u0000"',
        '"half a pair \\ud800"',
        "foo://bar/a.jpg",
    ]
    listing = tmp_path / "names.txt"
    listing.write_text("\n".join(lines))
    (unit,) = plan([str(listing)], tmp_path / "out")
    good, *others = read_items(unit, Columns(base=str(tmp_path)), InputOptions())
    assert outcome(good) == path.read_bytes()
    assert len(others) == 4
    assert all(isinstance(outcome(item), str) for item in others)
    assert "foo://" in others[3].error


def test_a_folder_is_searched_once(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_pictures(folder / "below", range(5))
    write_tar(folder / "shard.tar", {"a.jpg": small_jpeg(1)})
    write_parquet(folder / "table.parquet", {"image": [small_jpeg(1)] * 5}, rows=2)
    (folder / "notes.md").touch()
    (folder / ".hidden.jpg").touch()
    notes: list[str] = []
    units = plan([str(folder)], output, notes, items=2)
    assert sorted(unit.kind for unit in units) == ["listing"] * 3 + ["parquet"] * 3 + ["tar"]
    assert notes == [f"{folder}: 1 file is left out for the suffix; --all-files reads them too"]
    write_pictures(folder / "below", range(5, 9))
    assert plan([str(folder)], output, items=2) == units
    copy_plans(Folder(str(output)), Folder(str(tmp_path / "copy")))
    assert [one.name for one in plan([str(folder)], tmp_path / "copy", items=2)] == [u.name for u in units]


def test_patterns_and_braces(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:03}.tar", {"a.jpg": small_jpeg(number)})
    output = tmp_path / "out"
    found = plan([f"{tmp_path}/{{003..010}}.tar"], output)
    assert [Path(unit.source).name for unit in found] == [f"{number:03}.tar" for number in range(3, 11)]
    assert len(plan([f"{tmp_path}/*1.tar"], output)) == 2
    twice = plan([f"{tmp_path}/*.tar", f"{tmp_path}/{{000..011}}.tar"], output)
    assert len({unit.name for unit in twice}) == 12
    with pytest.raises(StorageError, match=r"\*\.gif: no file matches"):
        plan([f"{tmp_path}/*.gif"], output)
    with pytest.raises(StorageError, match=r"012\.tar: no such file or folder"):
        plan([f"{tmp_path}/{{010..012}}.tar"], output)


def test_single_pictures_are_one_unit(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, range(3))
    (unit,) = plan([str(path) for path in paths], tmp_path / "out")
    assert keys([unit]) == [str(path) for path in paths]


def test_a_listing_that_has_changed_is_refused(tmp_path: Path) -> None:
    listing = tmp_path / "names.txt"
    listing.write_text("a.jpg\n")
    output = tmp_path / "out"
    assert len(plan([str(listing)], output)) == len(plan([str(listing)], output)) == 1
    listing.write_text("a.jpg\nb.jpg\n")
    with pytest.raises(StorageError, match=r"names\.txt: had 6 bytes when the job began, and has 12"):
        plan([str(listing)], output)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.tar", None, "no such file or folder"),
        ("missing.txt", None, "no such file or folder"),
        ("missing", None, "no such file or folder"),
        ("empty.txt", b"\n", "no lines"),
        ("wrong.parquet", b"PAR1", "not a Parquet file that can be read"),
    ],
)
def test_inputs_without_pictures_are_named(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=f"{name}: {reason}"):
        plan([str(path)], tmp_path / "out")

"""Reading of units: tar archives with captions, damaged ones, Parquet and Lance tables."""

from __future__ import annotations

import json
from pathlib import Path

import lance
import pyarrow
import pytest
from bulk_inputs import outcome, small_jpeg, write_parquet, write_pictures, write_tar

from siglip_serve.bulk.items import Columns, Item, read_items
from siglip_serve.bulk.storage import Folder, StorageError
from siglip_serve.bulk.units import InputOptions, plan_units


def read(path: Path, columns: Columns | None = None, **options: bool) -> list[Item]:
    given = InputOptions(**options)
    units = plan_units([str(path)], given, Folder(str(path.parent / "plans")), print)
    return [item for unit in units for item in read_items(unit, columns or Columns(), given)]


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    members = {
        "a/1.jpg": b"first",
        "a/1.txt": "ein Bär".encode(),
        "a/1.json": json.dumps({"caption": "a bear", "width": 3, "bad": "\ud800"}).encode(),
        "b/1.json": b"{",
        "b/1.left.png": b"second",
        "b/1.right.png": b"third",
        "b/2.txt": b"without a picture",
    }
    path = write_tar(tmp_path / "shard.tar", members)
    columns = Columns(text="txt", kept=("caption", "width", "bad", "none"))
    first, second, third = read(path, columns)
    assert first.values == {"txt": "ein Bär", "caption": "a bear", "width": "3", "bad": "?", "none": None}
    assert (first.key, first.path, outcome(first)) == (f"{path}/a/1.jpg", str(path), b"first")
    assert second.values == third.values == dict.fromkeys(columns.all_kept)
    assert (outcome(second), outcome(third)) == (b"second", b"third")


def test_other_members_are_read_on_demand(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", {"a.jpg": b"1", "b.picture": b"2"})
    assert [outcome(item) for item in read(path)] == [b"1"]
    assert [outcome(item) for item in read(path, all_files=True)] == [b"1", b"2"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_pictures_before_the_end_of_a_cut_archive_are_kept(tmp_path: Path, mode: str, cut: float) -> None:
    members = {f"{number:02}.jpg": small_jpeg(number) for number in range(20)}
    suffix = ".tar" if mode == "w" else ".tar.gz"
    whole = write_tar(tmp_path / f"whole{suffix}", members, mode)
    assert [outcome(item) for item in read(whole)] == list(members.values())
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    # Zeros fill an archive up to 10,240 bytes, and the first 1,024 of them are its end.
    path.write_bytes(data[: int(cut * (len(data) if mode == "w:gz" else 20 * 3_500))])
    *kept, last = read(path)
    assert 2 < len(kept) < 20
    assert [outcome(item) for item in kept] == list(members.values())[: len(kept)]
    assert (last.key, last.data) == (str(path), b"")
    assert last.error.startswith("not a tar archive, or a damaged one: ")


def test_a_damaged_header_ends_an_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", {f"{number}.jpg": b"x" * 512 for number in range(5)})
    data = bytearray(path.read_bytes())
    data[3 * 1024 + 148 : 3 * 1024 + 156] = b"99999999"  # the checksum of the fourth member
    path.write_bytes(data)
    *kept, last = read(path)
    assert [item.key.rpartition("/")[2] for item in kept] == ["0.jpg", "1.jpg", "2.jpg"]
    assert "byte 3072" in last.error


def test_cells_of_parquet_files(tmp_path: Path) -> None:
    (alone,) = write_pictures(tmp_path, [3])
    path = tmp_path / "table.parquet"
    write_parquet(path, {"image": [b"1", b"2", None], "caption": ["x", None, "z"], "n": [1, 2, 3]}, rows=2)
    columns = Columns(text="caption", kept=("n",), base=str(tmp_path))
    first, second, third = read(path, columns)
    assert (first.key, first.data, first.values) == (f"{path}#0", b"1", {"caption": "x", "n": "1"})
    assert second.values == {"caption": None, "n": "2"}
    assert third.key == f"{path}#2"
    assert third.error == "the cell holds NoneType, expected bytes or a path"
    structs = [{"bytes": b"4", "path": None}, {"bytes": None, "path": alone.name}]
    path = write_parquet(tmp_path / "structs.parquet", {"image": structs})
    assert [outcome(item) for item in read(path, Columns(base=str(tmp_path)))] == [b"4", alone.read_bytes()]
    names = {"picture": [str(alone), alone.name, "missing.jpg"]}
    path = write_parquet(tmp_path / "paths.parquet", names)
    whole, relative, missing = read(path, Columns(image="picture", base=str(tmp_path)))
    assert outcome(whole) == outcome(relative) == alone.read_bytes()
    assert outcome(missing) == "No such file or directory"


def test_a_missing_column_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "table.parquet", {"image": [b"1"], "text": ["a"]})
    with pytest.raises(StorageError, match=r"table\.parquet: has no column 'caption', but image, text"):
        read(path, Columns(text="caption"))


def test_rows_of_a_lance_dataset(tmp_path: Path) -> None:
    path = tmp_path / "set.lance"
    table = pyarrow.table({"image": [b"1", b"2", b"3"], "caption": ["x", None, "z"]})
    lance.write_dataset(table, str(path), max_rows_per_file=2)
    items = read(path, Columns(text="caption"))
    assert [outcome(item) for item in items] == [b"1", b"2", b"3"]
    assert [item.values["caption"] for item in items] == ["x", None, "z"]
    assert [item.key for item in items] == [f"{path}#0", f"{path}#1", f"{path}#{1 << 32}"]
    with pytest.raises(StorageError, match=r"set\.lance: has no column 'picture', but image, caption"):
        read(path, Columns(image="picture"))

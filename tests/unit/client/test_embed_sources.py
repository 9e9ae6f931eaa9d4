"""Where `siglip-serve embed` finds images."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from siglip_serve_client.commands.embed.sources import Sources, SourcesError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/2.JPG", "b/10.png", "a/1.jpeg", "a/note.txt", "a/.hidden.jpg", ".git/x.jpg", "z.webp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "images" / "b" / "loop").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*given: str, column: str = "image") -> dict[str, bytes]:
    items = list(Sources(given, column))
    keys = [item.key for item in items]
    assert len(keys) == len(set(keys))
    return {item.key: item.read() for item in items}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_folders_are_searched_in_order(folder: Path) -> None:
    assert folder.is_dir()
    got = found("images")
    assert list(got) == ["images/z.webp", "images/a/1.jpeg", "images/b/10.png", "images/b/2.JPG"]
    assert got["images/b/10.png"] == b"b/10.png"
    assert Sources(["images"]).count() == 4


@pytest.mark.parametrize("suffix", ["JFIF", "jpe", "Mpo", "apng", "AVIFS", "TIF"])
def test_suffixes_of_images_in_any_case(folder: Path, suffix: str) -> None:
    path = folder / "more" / f"1.{suffix}"
    path.parent.mkdir()
    path.write_bytes(b"x")
    sources = Sources(["more"])
    assert (sources.count(), [item.key for item in sources]) == (1, [f"more/1.{suffix}"])
    assert sources.left_out() is None


def test_files_that_are_left_out_are_counted_and_named(folder: Path) -> None:
    for name in ("c.heic", "0a1b2c"):
        (folder / "images" / name).write_bytes(b"x")
    sources = Sources(["images"])
    assert sources.left_out() is None
    for _ in range(2):  # a count and an iteration do not add up
        assert (sources.count(), len(list(sources))) == (4, 4)
        message = (
            "3 files are left out for the suffix: images/0a1b2c, images/c.heic, images/a/note.txt; --all"
        )
        assert str(sources.left_out()).startswith(message)
    everything = Sources(["images"], all_files=True)
    assert everything.count() == 7
    assert [item.key for item in everything][:3] == ["images/0a1b2c", "images/c.heic", "images/z.webp"]
    assert everything.left_out() is None


def test_only_the_first_names_of_many_files_are_given(folder: Path) -> None:
    for number in range(12):
        (folder / "images" / "b" / f"{number:02}.txt").write_bytes(b"x")
    sources = Sources(["images/b"])
    list(sources)
    names = ", ".join(f"images/b/{number:02}.txt" for number in range(5))
    assert sources.left_out() == (
        f"12 files are left out for the suffix: {names} and 7 more; --all-files reads them too"
    )


def test_a_folder_without_images_is_refused(folder: Path) -> None:
    (folder / "none").mkdir()
    with pytest.raises(SourcesError, match=r"^none: no images$"):
        Sources(["none"]).count()
    (folder / "none" / "0a1b2c").write_bytes(b"x")
    message = r"^none: no images; 1 file is left out for the suffix: none/0a1b2c; --all-files reads them too$"
    with pytest.raises(SourcesError, match=message):
        Sources(["none"]).count()


def test_the_output_is_not_among_the_images(folder: Path) -> None:
    for name in ("o.parquet", "o.parquet.failed.csv", "o.parquet.partial/lock"):
        path = folder / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    sources = Sources(["images"], all_files=True, output=Path("images/o.parquet"))
    assert (sources.count(), len(list(sources))) == (5, 5)
    assert not [item.key for item in sources if "o.parquet" in item.key]


def test_members_of_an_archive_that_are_left_out_are_named(folder: Path) -> None:
    with tarfile.open(folder / "a.TAR", "w") as archive:
        for name in ("1.JFIF", "1.json"):
            add(archive, name, b"x")
    sources = Sources(["a.TAR"])
    assert [item.key for item in sources] == ["a.TAR/1.JFIF"]
    assert str(sources.left_out()).startswith("1 file is left out for the suffix: a.TAR/1.json;")
    assert [item.key for item in Sources(["a.TAR"], all_files=True)] == ["a.TAR/1.JFIF", "a.TAR/1.json"]


def test_files_and_patterns(folder: Path) -> None:
    assert list(found("images/a/note.txt")) == ["images/a/note.txt"]  # named, so wanted
    assert list(found("images/**/*.png")) == ["images/b/10.png"]
    assert list(found("images/b/[0-9]*")) == ["images/b/10.png", "images/b/2.JPG"]
    (folder / "odd[1].jpg").write_bytes(b"odd")
    assert found("odd[1].jpg") == {"odd[1].jpg": b"odd"}
    Path("bytes").mkdir()
    Path(os.fsdecode(b"bytes/\xff.jpg")).write_bytes(b"x")
    assert list(found("bytes")) == ["bytes/\\xff.jpg"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_tar_archives_and_shards(folder: Path, suffix: str) -> None:
    for number in range(9, 12):
        mode = "w:gz" if suffix.endswith("gz") else "w"
        with tarfile.open(folder / f"shard-{number:03}.{suffix}", mode) as archive:  # type: ignore[call-overload]
            add(archive, f"{number}.jpg", b"%d" % number)
            add(archive, f"{number}.json", b"{}")
            add(archive, f"deep/{number}.png", b"deep")
    got = found(f"shard-{{009..010}}.{suffix}")
    assert list(got) == [
        f"shard-009.{suffix}/9.jpg",
        f"shard-009.{suffix}/deep/9.png",
        f"shard-010.{suffix}/10.jpg",
        f"shard-010.{suffix}/deep/10.png",
    ]
    assert got[f"shard-010.{suffix}/10.jpg"] == b"10"
    assert Sources([f"shard-009.{suffix}"]).count() is None


def test_a_damaged_archive_is_an_unreadable_image(folder: Path) -> None:
    (folder / "bad.tar").write_bytes(b"no archive" * 100)
    (item,) = Sources(["bad.tar"])
    with pytest.raises(OSError, match="not a tar archive"):
        item.read()


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_an_archive_that_is_cut_or_damaged_anywhere_is_noticed(folder: Path, suffix: str) -> None:
    whole = folder / f"whole.{suffix}"
    with tarfile.open(whole, "w:gz" if suffix == "tgz" else "w") as archive:
        for number in range(4):
            add(archive, f"{number}.jpg", os.urandom(1000))
    data = whole.read_bytes()
    end = 4 * 1536 if suffix == "tar" else len(data)  # behind it there are only zeros
    cut = {f"cut at {at}": data[:at] for at in range(100, end, 97 if suffix == "tar" else 211)}
    cut |= {f"cut at {at}": data[:at] for at in range(512, end, 512)}
    if suffix == "tar":
        cut["damaged"] = data[:3072] + b"\xff" * 512 + data[3584:]
    for name, content in cut.items():
        (folder / f"bad.{suffix}").write_bytes(content)
        items = list(Sources([f"bad.{suffix}"]))
        for item in items[:-1]:
            assert len(item.read()) == 1000, name
        with pytest.raises(OSError, match="not a tar archive, or a damaged one"):
            items[-1].read()
    assert len(found(f"whole.{suffix}")) == 4


def test_columns_of_parquet(folder: Path) -> None:
    rows = [{"bytes": b"%d" % number, "path": "x"} for number in range(150)] + [{"bytes": None, "path": "y"}]
    table = pyarrow.table({"image": rows, "raw": [b"r"] * 151, "label": [1] * 151})
    pyarrow.parquet.write_table(table, folder / "data.parquet", row_group_size=40)
    items = list(Sources(["data.parquet"]))
    assert [item.key for item in items] == [f"data.parquet#{row}" for row in range(151)]
    assert items[149].read() == b"149"
    with pytest.raises(OSError, match="NoneType, expected bytes"):
        items[150].read()
    assert set(found("data.parquet", column="raw").values()) == {b"r"}
    assert Sources(["data.parquet"]).count() == 151
    with pytest.raises(SourcesError, match="no column 'picture', but image, raw, label"):
        list(Sources(["data.parquet"], "picture"))
    (folder / "no.parquet").write_bytes(b"x")
    with pytest.raises(SourcesError, match="not a Parquet file"):
        list(Sources(["no.parquet"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "no images"), (["nosuch.jpg"], "no such file or folder"), (["images", "*.xyz"], "no file matches")],
)
def test_refuses_arguments_that_name_no_images(folder: Path, given: list[str], message: str) -> None:
    assert folder.is_dir()
    with pytest.raises(SourcesError, match=message):
        Sources(given)

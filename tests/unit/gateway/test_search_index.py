"""The index of the search: its formats, its cosines, and the files that it may show."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client.commands.embed.output import Store

from siglip_gateway import search_index
from siglip_gateway.refusals import Refusal
from siglip_gateway.search_images import SearchImages
from siglip_gateway.search_index import IndexFileError, SearchIndex

IDENTITY = {"normalized": "false", "checkpoint_name": "some/checkpoint"}
NAMES = [f"pictures/{number}.jpg" for number in range(300)]


def vectors(count: int = 300, width: int = 24) -> NDArray[np.float32]:
    generator = np.random.default_rng(3)
    lengths = generator.uniform(0.01, 100, (count, 1))
    return (generator.normal(size=(count, width)) * lengths).astype(np.float32)


def written(file: Path, rows: NDArray[np.float32]) -> Path:
    """An output of `siglip-serve embed`."""
    with Store(file, IDENTITY) as store:
        for number, (name, row) in enumerate(zip(NAMES, rows, strict=False)):
            store.add(name, "0", row)
            if number % 100 == 7:
                store.flush()
        store.finish()
    return file


def nearest(rows: NDArray[np.float32], query: NDArray[np.float32], count: int) -> tuple[list[int], Any]:
    """The rows of the largest cosine in the plain way, in float64."""
    wide = rows.astype(np.float64)
    cosines = wide @ query.astype(np.float64)
    cosines /= np.linalg.norm(wide, axis=1) * np.linalg.norm(query.astype(np.float64))
    order = np.argsort(-cosines, kind="stable")[:count]
    return list(order), cosines[order]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_output_of_embed_is_read(tmp_path: Path, suffix: str) -> None:
    rows = vectors()
    index = SearchIndex.open(written(tmp_path / f"index{suffix}", rows))
    assert (len(index), index.width, index.checkpoint) == (300, 24, "some/checkpoint")
    np.testing.assert_array_equal(index.vectors, rows)
    assert [index.name(number) for number in range(300)] == NAMES
    assert isinstance(index.vectors, np.memmap) is (suffix == ".npz")


@pytest.mark.parametrize("kind", ["<f2", "<f8"])
def test_compressed_files_and_other_types_are_read(tmp_path: Path, kind: str) -> None:
    rows = vectors().astype(kind)
    file = tmp_path / "index.npz"
    identity = np.array(json.dumps(IDENTITY))
    np.savez_compressed(file, paths=np.array(NAMES), embeddings=np.asfortranarray(rows), identity=identity)
    index = SearchIndex.open(file)
    np.testing.assert_array_equal(index.vectors, rows)
    query = rows[17].astype(np.float32)
    assert [hit.index for hit in index.search(query, 5)] == nearest(rows, query, 5)[0]


@pytest.mark.parametrize("block", [24, 24 * 7, 2**22])
@pytest.mark.parametrize("count", [1, 20, 300, 1000])
def test_a_search_finds_the_largest_cosines(monkeypatch: pytest.MonkeyPatch, block: int, count: int) -> None:
    """Blocks of one row, of seven, and of all rows give the same."""
    monkeypatch.setattr(search_index, "_BLOCK", block)
    monkeypatch.setattr(search_index, "_MARGIN", 2)
    rows = vectors()
    index = SearchIndex(NAMES, rows, IDENTITY)
    for query in vectors(4, 24) + 1:
        expected, cosines = nearest(rows, query, count)
        hits = index.search(query, count)
        assert [hit.index for hit in hits] == expected
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-12)


def test_rows_of_almost_the_same_cosine_are_ordered_exactly() -> None:
    """Their cosines differ by 1e-9, which float32 does not tell apart."""
    angles = 1.0 - np.arange(40) * 1e-9
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    index = SearchIndex(NAMES[:40], rows, IDENTITY)
    hits = index.search(np.array([1, 0], np.float32), 40)
    assert [hit.index for hit in hits] == list(range(39, -1, -1))


def test_equal_rows_keep_their_order_and_rows_without_a_cosine_are_not_found() -> None:
    rows = np.ones((6, 3), np.float32)
    rows[1], rows[2, 0], rows[3, 1] = 0, np.inf, np.nan
    hits = SearchIndex(NAMES[:6], rows, IDENTITY).search(np.ones(3, np.float32), 10)
    assert [hit.index for hit in hits] == [0, 4, 5]
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 1])


def archive(**arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


GOOD: dict[str, Any] = {
    "paths": np.array(NAMES),
    "embeddings": vectors(),
    "identity": np.array(json.dumps(IDENTITY)),
}
BAD: list[tuple[str, bytes | None, str]] = [
    ("a.npz", None, "No such file"),
    ("a.csv", b"", "expected a .npz or .parquet file"),
    ("a.npz", b"", "no output of siglip-serve embed"),
    ("a.npz", b"PK\x03\x04 nothing", "no output of siglip-serve embed"),
    ("a.npz", archive(**GOOD)[:-3000], "no output of siglip-serve embed"),
    ("a.npz", archive(paths=GOOD["paths"]), "embeddings.npy"),
    ("a.npz", archive(**{**GOOD, "paths": GOOD["paths"][:-1]}), "299 paths for 300 embeddings"),
    ("a.npz", archive(**{**GOOD, "paths": np.arange(300)}), "paths are int64"),
    ("a.npz", archive(**{**GOOD, "paths": np.array(NAMES, object)}), "paths holds Python objects"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros(300, np.float32)}), "shape [300]"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros((300, 4), np.int8)}), "the type int8"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros((300, 0), np.float32)}), "shape [300, 0]"),
    ("a.npz", archive(**{**GOOD, "identity": np.array("[]")}), "identity is no JSON object"),
    ("a.npz", archive(**{**GOOD, "identity": np.array("{")}), "no output of siglip-serve embed"),
    ("a.parquet", b"PAR1 nothing", "no output of siglip-serve embed"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_other_files_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(IndexFileError) as caught:
        SearchIndex.open(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_member_that_is_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """Its header claims more rows than there are."""
    with (
        zipfile.ZipFile(tmp_path / "good.npz", "w") as made,
        zipfile.ZipFile(io.BytesIO(archive(**GOOD))) as given,
    ):
        for info in given.infolist():
            data = given.read(info)
            made.writestr(info.filename, data.replace(b"(300, 24)", b"(999, 24)"))
    with pytest.raises(IndexFileError, match="no output of siglip-serve embed"):
        SearchIndex.open(tmp_path / "good.npz")


def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"], "embedding": [[1.0, 2.0]]}), file)
    with pytest.raises(IndexFileError, match="expected lists of a fixed size"):
        SearchIndex.open(file)
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"]}), file)
    with pytest.raises(IndexFileError, match="embedding"):
        SearchIndex.open(file)


def picture(file: Path, kind: str = "PNG") -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, kind)
    return file.read_bytes()


def test_pictures_are_found_by_the_names_of_the_index(tmp_path: Path) -> None:
    """In the folder, from the base, and without the folders that all names have in common."""
    folder, base = tmp_path / "base" / "shown", tmp_path / "base"
    data = [picture(folder / "a.png"), picture(folder / "deep" / "b.jpg", "JPEG")]
    for names in (
        ["a.png", "deep/b.jpg"],
        ["shown/a.png", "shown/deep/b.jpg"],
        ["far/away/a.png", "far/away/deep/b.jpg"],
        [str(folder / "a.png"), str(folder / "deep" / "b.jpg")],
    ):
        images = SearchImages(folder, base, names)
        assert images.read(0, 10**6) == (data[0], "image/png")
        assert images.read(1, 10**6) == (data[1], "image/jpeg")


def test_no_file_outside_of_the_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "shown"
    folder.mkdir()
    outside = tmp_path / "secret.png"
    picture(outside)
    picture(tmp_path / "shown2" / "a.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    names = [
        "../secret.png",
        str(outside),
        "link.png",
        "loop.png",
        "folder.png",
        "linked/secret.png",
        "../shown2/a.png",
        "x/../../secret.png",
        "none.png",
        "a\0.png",
        "b" * 5000 + ".png",
        "",
    ]
    for index, name in enumerate(names):
        images = SearchImages(folder, tmp_path, names)
        assert images.find(index) is None, name
        with pytest.raises(Refusal) as caught:
            images.read(index, 10**6)
        assert caught.value.status == 404


def test_only_pictures_are_sent(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif", "TIFF")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.txt").write_text("a text")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.tif").read_bytes())
    picture(tmp_path / "e.png")
    names = ["a.tif", "b.png", "c.txt", "d.jpg", "e.png"]
    images = SearchImages(tmp_path, tmp_path, names)
    statuses = []
    for index in range(5):
        with pytest.raises(Refusal) as caught:
            images.read(index, 10)
        statuses.append(caught.value.status)
    assert statuses == [404, 415, 404, 413, 413]
    with pytest.raises(Refusal) as caught:
        images.read(3, 10**6)
    assert caught.value.status == 415

"""Files that are searched, and those that are refused with the reason."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_outputs import write_bulk
from numpy.typing import NDArray
from siglip_serve_client.commands.embed.output import Store
from siglip_serve_client.commands.search.checkpoints import mismatch
from siglip_serve_client.commands.search.collection import Collection, CollectionError, open_collection

IDENTITY = {"normalized": "false", "checkpoint_name": "some/checkpoint"}
NAMES = [f"pictures/{number}.jpg" for number in range(30)]
ROWS = np.random.default_rng(0).standard_normal((30, 16), np.float32)
ALL = np.arange(30)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_output_of_embed_is_opened(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    with Store(file, IDENTITY) as store:
        for number, (name, row) in enumerate(zip(NAMES, ROWS, strict=True)):
            store.add(name, f"digest {number}", row)
            if number % 11 == 7:
                store.flush()
        store.finish()
    found = open_collection(file)
    assert (len(found), found.width, found.kind, found.checkpoint) == (30, 16, "float32", "some/checkpoint")
    np.testing.assert_array_equal(found.take(ALL), ROWS)
    assert (found.ids(ALL), list(found.all_ids())) == (NAMES, NAMES)
    assert found.texts("sha256", np.array([29, 3])) == ["digest 29", "digest 3"]
    assert found.texts("caption", np.array([1])) == [""]
    if suffix == ".npz":
        part: Any = found.parts[0]
        assert isinstance(part.vectors, np.memmap)


@pytest.mark.parametrize("form", ["parquet", "npy", "lance"])
def test_rows_of_several_units_are_taken_in_the_order_asked_for(tmp_path: Path, form: str) -> None:
    found = open_collection(write_bulk(tmp_path / "out", ROWS, form))
    rows = np.array([29, 0, 9, 10, 11, 0])
    np.testing.assert_array_equal(found.take(rows), ROWS[rows])
    assert found.ids(rows) == [f"{row}.jpg" for row in rows]
    blocks = list(found.blocks())
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), ROWS)
    assert blocks[0][0] == 0
    loaded = found.loaded()
    np.testing.assert_array_equal(loaded.take(rows), ROWS[rows])
    assert list(loaded.all_ids()) == [f"{row}.jpg" for row in ALL]


def archive(**arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


GOOD: dict[str, Any] = {
    "paths": np.array(NAMES),
    "embeddings": ROWS,
    "identity": np.array(json.dumps(IDENTITY)),
}
BAD: list[tuple[str, bytes | None, str]] = [
    ("a.npz", None, "No such file"),
    ("a", None, "no such folder; expected a folder of siglip-serve bulk, or a .npz or .parquet file"),
    ("a.csv", b"", "expected a folder of siglip-serve bulk, or a .npz or .parquet file"),
    ("a.npz", b"", "no output of siglip-serve embed"),
    ("a.npz", b"PK\x03\x04 nothing", "no output of siglip-serve embed"),
    ("a.npz", archive(**GOOD)[:-1000], "no output of siglip-serve embed"),
    ("a.npz", archive(paths=GOOD["paths"]), "embeddings.npy"),
    ("a.npz", archive(**{**GOOD, "paths": GOOD["paths"][:-1]}), "29 paths for 30 embeddings"),
    ("a.npz", archive(**{**GOOD, "paths": np.arange(30)}), "paths are int64"),
    ("a.npz", archive(**{**GOOD, "paths": np.array(NAMES, object)}), "paths holds Python objects"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros(30, np.float32)}), "shape [30]"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros((30, 4), np.int16)}), "the type int16"),
    ("a.npz", archive(**{**GOOD, "embeddings": np.zeros((30, 0), np.float32)}), "has no embeddings"),
    ("a.npz", archive(**{**GOOD, "identity": np.array("[]")}), "identity is no JSON object"),
    ("a.npz", archive(**{**GOOD, "identity": np.array("{")}), "no output of siglip-serve embed"),
    ("a.parquet", b"PAR1 nothing", "no output of siglip-serve embed"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_other_files_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(CollectionError) as caught:
        open_collection(file)
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
            made.writestr(info.filename, data.replace(b"(30, 16)", b"(99, 16)"))
    with pytest.raises(CollectionError, match="no output of siglip-serve embed"):
        open_collection(tmp_path / "good.npz")


def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"], "embedding": [[1.0, 2.0]]}), file)
    with pytest.raises(CollectionError, match="expected lists of a fixed size"):
        open_collection(file)
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"]}), file)
    with pytest.raises(CollectionError, match="embedding"):
        open_collection(file)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"version": 2}, "bulk.json: version 2, expected 1"),
        ({"format": "csv"}, "format 'csv', expected one of parquet, npy, lance"),
        ({"format": "npy"}, "has no embeddings"),
        ({"format": "lance"}, "has no embeddings"),
        ({"width": 17}, "a-0.parquet: embeddings of float32 of width 16, expected float32 of width 17"),
        ({"width": "x"}, "width 'x', expected a whole number"),
        ({"dtype": "int8"}, "embeddings of the type float32, expected int8"),
    ],
)
def test_folders_that_do_not_fit_their_description_are_refused(
    tmp_path: Path, described: dict[str, Any], message: str
) -> None:
    folder = write_bulk(tmp_path / "out", ROWS)
    about = json.loads((folder / "bulk.json").read_text())
    (folder / "bulk.json").write_text(json.dumps({**about, **described}))
    with pytest.raises(CollectionError) as caught:
        open_collection(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_folders_with_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=r"has no bulk\.json"):
        open_collection(tmp_path)
    folder = write_bulk(tmp_path / "mixed", ROWS)
    other = write_bulk(tmp_path / "other", ROWS[:, :8])
    (other / "embeddings" / "a-0.parquet").rename(folder / "embeddings" / "c-0.parquet")
    with pytest.raises(CollectionError, match=r"c-0\.parquet: embeddings of float32 of width 8, expected"):
        open_collection(folder)
    folder = write_bulk(tmp_path / "short", ROWS, "npy")
    np.save(folder / "embeddings" / "b-0.npy", ROWS[:3])
    with pytest.raises(CollectionError, match=r"20 rows in b-0\.rows\.parquet for 3 embeddings"):
        open_collection(folder)


@pytest.mark.parametrize(
    ("name", "width", "revision", "message"),
    [
        ("some/siglip", 16, "abc", None),
        ("folder/siglip", 16, "local", None),
        ("siglip", 16, "", None),
        ("some/siglip", 8, "abc", "vectors of 16 numbers, and those of some/siglip have 8"),
        ("some/clip", 16, "abc", "made with some/siglip, and the server runs some/clip"),
        ("some/siglip", 16, "def", "made with revision abc of some/siglip, and the server runs revision def"),
    ],
)
def test_another_checkpoint_is_told(name: str, width: int, revision: str, message: str | None) -> None:
    identity = {"checkpoint_name": "some/siglip", "checkpoint_revision": "abc"}
    found = mismatch(Collection(Path("a"), [], "float32", 16, identity), name, width, revision)
    assert found == message if message is None else message in str(found)

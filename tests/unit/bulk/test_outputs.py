"""Files of the output: every type of vector in every format, and files that cannot be written."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from pyarrow import concat_tables, parquet
from siglip_serve_client.compact import compact, unit

from siglip_serve.bulk.items import Columns
from siglip_serve.bulk.job import Format, Job, VectorType
from siglip_serve.bulk.outputs import Rows, finish_output, finished_units, write_unit
from siglip_serve.bulk.storage import Folder
from siglip_serve.config import Settings

WIDTH = 20


def rows(count: int, seed: int = 0) -> Rows:
    vectors = np.random.default_rng(seed).normal(0, 2, (count, WIDTH)).astype(np.float32)
    columns: dict[str, list[Any]] = {
        "id": [f"{seed}-{number}" for number in range(count)],
        "path": ["a.tar"] * count,
        "sha256": ["0"] * count,
        "size": [1] * count,
        "height": [2] * count,
        "width": [3] * count,
        "caption": ["x"] * count,
    }
    halves = [vectors[: count // 2], vectors[count // 2 :]]
    return Rows(columns, halves, [-part for part in halves], [number % 2 == 1 for number in range(count)])


def job(
    output: Path, form: Format = "parquet", vectors: VectorType = "float32", normalized: bool = False
) -> Job:
    return Job(Settings(checkpoint="x"), str(output), form, vectors, normalized, Columns(text="caption"))


@pytest.mark.parametrize(
    ("kind", "normalized"),
    [
        ("float32", False),
        ("float32", True),
        ("float16", False),
        ("float16", True),
        ("int8", False),
        ("binary", False),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "npy", "lance"])
def test_vectors_are_stored_as_asked_for(
    tmp_path: Path, form: Format, kind: VectorType, normalized: bool
) -> None:
    folder, given = Folder(str(tmp_path)), job(tmp_path, form, kind, normalized)
    made = {"first": rows(5), "none": rows(0), "second": rows(3, seed=1)}
    for name, content in made.items():
        write_unit(folder, given, name, content, WIDTH)
    assert finished_units(folder, form) == set(made)
    finish_output(folder, form)
    found: dict[str, dict[str, object]] = {}
    if form == "lance":
        table = lance.dataset(str(tmp_path / "embeddings.lance")).to_table()
    else:
        files = [tmp_path / "embeddings" / f"{name}{'.rows' * (form == 'npy')}.parquet" for name in made]
        tables = [parquet.read_table(file) for file in files]
        assert len({str(one.schema.remove_metadata()) for one in tables}) == 1
        table = concat_tables(tables)
    found = {row["id"]: row for row in table.to_pylist()}
    assert len(found) == table.num_rows == 8
    for name, content in made.items():
        whole = np.concatenate(content.embeddings)
        right = (
            (unit(whole) if normalized else whole).astype(kind)
            if kind.startswith("float")
            else compact(whole, "ubinary" if kind == "binary" else kind)
        )
        keys = content.columns["id"]
        if form == "npy":
            got = np.load(tmp_path / "embeddings" / f"{name}.npy")
            assert got.dtype == right.dtype
        else:
            got = np.array([found[key]["embedding"] for key in keys], right.dtype)
        np.testing.assert_allclose(got.reshape(right.shape), right, rtol=1e-6 if kind == "float32" else 1e-3)
        texts = [found[key]["text_embedding"] for key in keys]
        assert [text is None for text in texts] == content.no_text


def test_a_lance_dataset_grows_when_a_job_resumes(tmp_path: Path) -> None:
    folder, given = Folder(str(tmp_path)), job(tmp_path, "lance")
    for number in range(3):
        write_unit(folder, given, f"u{number}", rows(4, seed=number), WIDTH)
        finish_output(folder, "lance")
        table = lance.dataset(str(tmp_path / "embeddings.lance")).to_table()
        assert sorted(table["id"].to_pylist()) == [f"{a}-{b}" for a in range(number + 1) for b in range(4)]


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # fails as a full disk does
    try:
        folder.write("embeddings/a.parquet", b"x" * 100)
        with pytest.raises(OSError, match="File too large"):
            folder.write("embeddings/b.parquet", b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.names("embeddings") == ["a.parquet"]
    assert [path.name for path in (tmp_path / "embeddings").iterdir()] == ["a.parquet"]


def test_files_of_killed_writers_are_removed_when_they_are_old(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("embeddings/a.parquet", b"x")
    for name, age in (("old", 7200), ("new", 0)):
        path = tmp_path / "embeddings" / f".{name}.parquet.1234.tmp"
        path.touch()
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    folder.remove_stale()
    left = sorted(path.name for path in (tmp_path / "embeddings").iterdir())
    assert left == [".new.parquet.1234.tmp", "a.parquet"]

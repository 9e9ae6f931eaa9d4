"""Outputs opened by the programs that people open them with (extra `bulk-readers`): equal vectors in all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bulk_inputs import small_jpeg, write_tar
from bulk_jobs import bulk
from numpy.typing import NDArray
from pyarrow import parquet

COUNT = 20


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of two archives by format, with captions beside every other picture."""
    for package in ("pandas", "polars", "datasets", "duckdb", "lancedb"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("readers")
    for shard in range(2):
        members = {f"{number:02}.jpg": small_jpeg(100 * shard + number) for number in range(COUNT // 2)}
        members |= {f"{number:02}.txt": b"a dog" for number in range(0, COUNT // 2, 2)}
        write_tar(root / "in" / f"{shard}.tar", dict(sorted(members.items())))
    made = {}
    for form, vectors in (("parquet", "float32"), ("parquet", "float16"), ("lance", "float32")):
        output = root / f"{form}-{vectors}"
        words = ("--format", form, "--vectors", vectors, "--text-column", "txt", "--threads", "1")
        ended = bulk(root / "in", "-o", output, *words)
        assert ended.returncode == 0, ended.stderr
        made[output.name] = output
    return made


def right(output: Path) -> tuple[list[str], NDArray[np.float32]]:
    table = parquet.read_table(output / "embeddings").sort_by("id")
    return table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("kind", ["parquet-float32", "parquet-float16"])
def test_parquet_is_read_by_all(outputs: dict[str, Path], kind: str) -> None:
    import datasets
    import duckdb
    import pandas
    import polars

    folder = outputs[kind] / "embeddings"
    keys, vectors = right(outputs[kind])
    assert len(keys) == COUNT
    frame = pandas.read_parquet(folder).sort_values("id")
    assert frame["id"].tolist() == keys
    assert np.array_equal(np.stack(frame["embedding"].tolist()).astype(np.float32), vectors)
    assert frame["text_embedding"].isna().sum() == COUNT // 2
    lazy = polars.scan_parquet(folder / "*.parquet").sort("id").collect()
    assert lazy["id"].to_list() == keys
    assert np.array_equal(np.array(lazy["embedding"].to_list(), np.float32), vectors)
    query = f"select id, embedding from '{folder}/*.parquet' order by id"
    found = duckdb.sql(query).fetchall()
    assert np.array_equal(np.array([row[1] for row in found], np.float32), vectors)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=str(outputs[kind] / "cache")
    ).sort("id")
    assert np.array_equal(np.array(loaded["embedding"], np.float32), vectors)


def test_duckdb_finds_neighbours(outputs: dict[str, Path]) -> None:
    import duckdb

    keys, vectors = right(outputs["parquet-float32"])
    folder = outputs["parquet-float32"] / "embeddings"
    width = vectors.shape[1]
    ranked = duckdb.execute(
        f"select id from '{folder}/*.parquet' "
        f"order by array_cosine_similarity(embedding::float[{width}], ?::float[{width}]) desc",
        [vectors[3].tolist()],
    ).fetchall()
    assert ranked[0][0] == keys[3]


def test_lance_is_read_and_searched(outputs: dict[str, Path]) -> None:
    import lancedb

    _, vectors = right(outputs["parquet-float32"])
    output = outputs["lance-float32"]
    table = lancedb.connect(str(output)).open_table("embeddings")
    found = table.to_arrow().sort_by("id")
    assert np.array_equal(np.array(found["embedding"].to_pylist(), np.float32), vectors)
    nearest = (
        table.search(vectors[5], vector_column_name="embedding").distance_type("cosine").limit(1).to_list()
    )
    assert nearest[0]["id"] == found["id"][5].as_py()

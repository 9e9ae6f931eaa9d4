"""Object storage: inputs and outputs in the S3 of moto on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_inputs import BROKEN, small_jpeg, write_tar
from bulk_jobs import bulk, search
from programs import free_port
from pyarrow import fs, parquet

_KEYS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "its-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    port = free_port()
    program = Path(sys.executable).with_name("moto_server")
    with subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            store = _store(url)
            end = time.monotonic() + 60
            while True:
                try:
                    store.create_dir("pictures")
                    break
                except OSError:
                    assert time.monotonic() < end
                    time.sleep(0.2)
            yield url
        finally:
            server.kill()


def _store(url: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        endpoint_override=url,
        access_key="a-key",
        secret_key="its-secret",
        region="us-east-1",
        allow_bucket_creation=True,
    )


def test_a_job_reads_and_writes_buckets(endpoint: str, tmp_path: Path) -> None:
    store = _store(endpoint)
    store.create_dir("results")

    def put(name: str, data: bytes) -> None:
        with store.open_output_stream(f"pictures/{name}") as stream:
            stream.write(data)

    for number in range(5):
        put(f"alone/{number}.jpg", small_jpeg(number))
    put("alone/notes.md", b"")
    for number in range(2):
        shard = write_tar(tmp_path / "shard.tar", {"a.jpg": small_jpeg(10 + number), "b.jpg": BROKEN})
        put(f"shards/{number:03}.tar", shard.read_bytes())
    names = ["s3://pictures/alone/0.jpg", "s3://pictures/alone/none.jpg", "s3://pictures/alone/1.jpg"]
    put("names.txt", "\n".join(names).encode())
    inputs = ["s3://pictures/alone", "s3://pictures/shards/*.tar", "s3://pictures/names.txt"]
    variables = {**_KEYS, "AWS_ENDPOINT_URL": endpoint}
    words = [*inputs, "-o", "s3://results/out", "--unit-items", "2"]
    ended = bulk(*words, **variables)
    assert ended.returncode == 1, ended.stderr
    assert "1 file is left out for the suffix" in ended.stderr
    found = _rows(store, "results/out/embeddings")
    keys = [row["id"] for row in found]
    expected = [f"s3://pictures/alone/{number}.jpg" for number in (0, 0, 1, 1, 2, 3, 4)]
    assert sorted(keys) == sorted([*expected, *(f"s3://pictures/shards/00{n}.tar/a.jpg" for n in range(2))])
    same = [row["embedding"] for row in found if row["id"] == expected[0]]
    assert same[0] == pytest.approx(same[1], abs=0.05)
    failed = _rows(store, "results/out/failed")
    assert sorted(row["id"] for row in failed) == [
        "s3://pictures/alone/none.jpg",
        "s3://pictures/shards/000.tar/b.jpg",
        "s3://pictures/shards/001.tar/b.jpg",
    ]
    _check_resume(store, words, variables)
    _check_search(store, tmp_path / "copies", variables)


def _check_resume(store: fs.S3FileSystem, words: list[str], variables: dict[str, str]) -> None:
    """Without one of its files, a second run makes this file alone."""
    before = _times(store)
    lost = next(path for path in before if "000-" in path)
    store.delete_file(lost)
    ended = bulk(*words, **variables)
    assert f"resuming: {len(before) - 1} of {len(before)} units are finished" in ended.stderr
    after = _times(store)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {lost}


def _check_search(store: fs.S3FileSystem, cache: Path, variables: dict[str, str]) -> None:
    """A search copies what it lacks, and finds what a search in a local output would."""
    words = ["s3://results/out", "--cache", str(cache), "--duplicates", "0.999"]
    ended = search(*words, **variables)
    assert ended.returncode == 0, ended.stderr
    files = len(_times(store)) + 1  # with the description
    assert f"copied {files} of {files} files to {cache}" in ended.stderr
    assert "s3://pictures/alone/0.jpg" in ended.stdout
    again = search(*words, **variables)
    assert "copied" not in again.stderr
    assert again.stdout == ended.stdout
    (copy,) = cache.iterdir()
    changed, gone = sorted((copy / "embeddings").iterdir())[:2]
    os.utime(changed)
    store.delete_file(f"results/out/embeddings/{gone.name}")
    assert f"copied 1 of {files - 1} files" in search(*words, **variables).stderr
    assert not gone.exists()
    for output, reason in (
        ("s3://results/none", "s3://results/none: no such file or folder"),
        ("s3://results/out/failed", "has no bulk.json"),
        ("what://results", "Protocol not known: what"),
    ):
        refused = search(output, *words[1:], **variables)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert reason in refused.stderr


def _times(store: fs.S3FileSystem) -> dict[str, object]:
    found = store.get_file_info(fs.FileSelector("results/out/embeddings"))
    return {info.path: info.mtime for info in found}


def _rows(store: fs.S3FileSystem, folder: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for info in store.get_file_info(fs.FileSelector(folder)):
        rows += parquet.read_table(info.path, filesystem=store).to_pylist()
    return rows

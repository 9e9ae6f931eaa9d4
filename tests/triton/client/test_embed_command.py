"""`siglip-serve embed` and `classify` against real servers, killed and restarted ones among them."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from images import encode, photo
from wire import TINY, GrpcCaller

from siglip_serve.launcher import TritonServer

PROGRAM = str(Path(sys.executable).parent / "siglip-serve")


def command(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, cwd=folder
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 pictures, one of which is none."""
    (tmp_path / "images").mkdir()
    for number in range(30):
        data = encode(photo(60 + number, 50, number), "JPEG") if number != 4 else b"no image"
        (tmp_path / "images" / f"{number:02}.jpg").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_folder_becomes_a_table(server: TritonServer, folder: Path, scheme: str) -> None:
    url = f"{scheme}://{server.http_url if scheme == 'http' else server.grpc_url}"
    arguments = ["embed", "images", "images/07.jpg", "-o", "out.parquet", "--url", url, "--part-rows", "8"]
    done = command(*arguments, folder=folder)
    assert done.returncode == 1, done.stderr
    assert "images/04.jpg: INPUT_IMAGE[0]: not a decodable image" in done.stderr
    assert "out.parquet: 29 embeddings" in done.stdout
    table = pyarrow.parquet.read_table(folder / "out.parquet")
    paths = [f"images/{number:02}.jpg" for number in range(30) if number != 4]
    assert table["path"].to_pylist() == paths
    data = [(folder / path).read_bytes() for path in paths]
    assert table["sha256"].to_pylist() == [hashlib.sha256(one).hexdigest() for one in data]
    expected = GrpcCaller(server.grpc_url).embed(data)
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, rtol=1e-3, atol=1e-4)
    assert table.schema.metadata[b"siglip_serve.checkpoint_name"] == b"siglip-tiny"
    with (folder / "out.parquet.failed.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["images/04.jpg"]
    again = command(*arguments, folder=folder)
    assert (again.returncode, again.stdout) == (2, "")
    assert "out.parquet: exists; --overwrite replaces it" in again.stderr


def test_tar_and_parquet_and_lists(server: TritonServer, folder: Path) -> None:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        archive.add(folder / "images", "images")
    rows = [path.read_bytes() for path in sorted((folder / "images").iterdir())[5:9]]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), folder / "data.parquet")
    (folder / "list.txt").write_text("images/01.jpg\n\nimages/02.jpg\n")
    done = command(
        "embed", "shard.tar", "data.parquet", "--from-file", "list.txt", "-o", "out.npz", "--normalized",
        "--url", server.grpc_url, folder=folder,
    )  # fmt: skip
    assert done.returncode == 1
    with np.load(folder / "out.npz") as found:
        assert len(found["paths"]) == 29 + 4 + 2
        assert found["paths"][29:31].tolist() == ["data.parquet#0", "data.parquet#1"]
        np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(found["embeddings"][29], found["embeddings"][4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", "-o", "out.npz"], "nosuch: no such file"),
        (["images", "-o", "out.txt"], "expected a .parquet or .npz"),
        (["-o", "out.npz"], "no images"),
        (["images", "-o", "out.npz", "--url", "ftp://x"], "expected host:port"),
    ],
)
def test_misuse_is_found_before_anything_runs(folder: Path, arguments: list[str], message: str) -> None:
    done = command("embed", *arguments, folder=folder)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["images"]


def test_a_missing_server_is_named(folder: Path) -> None:
    done = command("embed", "images", "-o", "out.npz", "--url", "127.0.0.1:9", folder=folder)
    assert done.returncode == 1
    assert "no server answers at 127.0.0.1:9" in done.stderr


def test_classify(server: TritonServer, folder: Path) -> None:
    for name in ("dog.jpg", "pizza.jpg"):
        (folder / name).write_bytes((TINY / "samples" / name).read_bytes())
    done = command(
        "classify", "dog.jpg", "images/04.jpg", "pizza.jpg", "--label", "dog", "--label", "pizza",
        "--softmax", "--template", "a photo of a {}.", "--url", server.grpc_url, folder=folder,
    )  # fmt: skip
    assert done.returncode == 1
    rows = list(csv.reader(done.stdout.splitlines()))
    assert rows[0] == ["path", "label", "dog", "pizza"]
    assert [row[:2] for row in rows[1:]] == [["dog.jpg", "dog"], ["pizza.jpg", "pizza"]]
    assert "images/04.jpg: INPUT_IMAGE[0]: not a decodable image" in done.stderr

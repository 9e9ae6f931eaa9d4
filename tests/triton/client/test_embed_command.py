"""`siglip-serve embed` and `classify` against real servers, killed and restarted ones among them."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from images import encode, photo
from programs import free_port
from wire import ROOT, TINY, GrpcCaller

from siglip_serve.launcher import ServeOptions, TritonServer

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


def alone(port: int, log: Path) -> TritonServer:
    return TritonServer(
        ServeOptions(
            ROOT / "model_repository",
            str(TINY),
            models=("embed_image",),
            grpc_port=port,
            log_file=log,
            settings={"dtype": "float32"},
        )
    )


def parts(output: Path) -> int:
    return len(list(Path(f"{output}.partial").glob("part-*.npz")))


def wait_for_parts(output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while parts(output) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_command_and_server_are_killed_and_every_row_is_there_once(tmp_path: Path, log: Path) -> None:
    port = free_port()
    (tmp_path / "images").mkdir()
    pictures = [encode(photo(48, 40, number), "JPEG") for number in range(20)]
    for number in range(1200):
        (tmp_path / "images" / f"{number:04}.jpg").write_bytes(pictures[number % 20])
    arguments = ["embed", "images", "-o", "out.npz", "--url", f"127.0.0.1:{port}", "--part-rows", "50"]
    output = tmp_path / "out.npz"
    with alone(port, log) as running:
        first = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE)
        wait_for_parts(output, 3)
        first.kill()
        first.communicate(timeout=30)
        assert not output.exists()
        second = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        wait_for_parts(output, parts(output) + 2)
        os.kill(running.pid, signal.SIGKILL)  # the launcher starts it again on the same port
        _, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    assert "resuming after" in errors
    assert "waiting for the server" in errors
    with np.load(output) as found:
        assert found["paths"].tolist() == [f"images/{number:04}.jpg" for number in range(1200)]
        digests = [hashlib.sha256(picture).hexdigest() for picture in pictures]
        assert found["sha256"].tolist() == digests * 60
        embeddings = found["embeddings"].reshape(60, 20, -1)
    np.testing.assert_allclose(
        embeddings, np.broadcast_to(embeddings[:1], embeddings.shape), rtol=1e-3, atol=1e-4
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "log", "out.npz"]


def test_ctrl_c_keeps_what_is_done(server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture = encode(photo(48, 40, 1), "JPEG")
    for number in range(800):
        (tmp_path / "images" / f"{number:04}.jpg").write_bytes(picture)
    arguments = ["embed", "images", "-o", "out.npz", "--url", server.grpc_url, "--part-rows", "20"]
    # Shells start background processes, and so whatever runs the tests there, with this signal ignored.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_for_parts(tmp_path / "out.npz", 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert parts(tmp_path / "out.npz") >= 2
    assert command(*arguments, folder=tmp_path).returncode == 0
    with np.load(tmp_path / "out.npz") as found:
        assert len(set(found["paths"].tolist())) == len(found["paths"]) == 800

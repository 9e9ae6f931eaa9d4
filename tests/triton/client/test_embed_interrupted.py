"""`siglip-serve embed` is killed or interrupted, and so is its server: every row is there once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from images import encode, photo

from siglip_serve.launcher import TritonServer

COUNT = 800
PROGRAM = str(Path(sys.executable).parent / "siglip-serve")


def parts(output: Path) -> int:
    return len(list(Path(f"{output}.partial").glob("part-*.npz")))


def wait_for_parts(output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while parts(output) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_command_and_server_are_killed_and_every_row_is_there_once(
    mortal_server: TritonServer, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    pictures = [encode(photo(48, 40, number), "JPEG") for number in range(20)]
    for number in range(COUNT):
        (tmp_path / "images" / f"{number:04}.jpg").write_bytes(pictures[number % 20])
    arguments = ["embed", "images", "-o", "out.npz", "--url", mortal_server.grpc_url, "--part-rows", "25"]
    output = tmp_path / "out.npz"
    first = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for_parts(output, 3)
    first.kill()
    first.communicate(timeout=30)
    assert not output.exists()
    second = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_parts(output, parts(output) + 2)
    os.kill(mortal_server.pid, signal.SIGKILL)  # the launcher starts it again on the same port
    _, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    assert "resuming after" in errors
    assert "waiting for the server" in errors
    with np.load(output) as found:
        assert found["paths"].tolist() == [f"images/{number:04}.jpg" for number in range(COUNT)]
        digests = [hashlib.sha256(picture).hexdigest() for picture in pictures]
        assert found["sha256"].tolist() == digests * (COUNT // 20)
        embeddings = found["embeddings"].reshape(-1, 20, found["embeddings"].shape[1])
    np.testing.assert_allclose(
        embeddings, np.broadcast_to(embeddings[:1], embeddings.shape), rtol=1e-3, atol=1e-4
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.npz"]


def test_ctrl_c_keeps_what_is_done(mortal_server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture = encode(photo(48, 40, 1), "JPEG")
    for number in range(800):
        (tmp_path / "images" / f"{number:04}.jpg").write_bytes(picture)
    arguments = ["embed", "images", "-o", "out.npz", "--url", mortal_server.grpc_url, "--part-rows", "20"]
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
    assert subprocess.run([PROGRAM, *arguments], cwd=tmp_path, check=False, timeout=120).returncode == 0
    with np.load(tmp_path / "out.npz") as found:
        assert len(set(found["paths"].tolist())) == len(found["paths"]) == 800

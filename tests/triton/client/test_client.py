"""The client and the commands `embed` and `health`, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images import encode, photo
from siglip_serve_client import Client, DeadlineError, InvalidInputError, UnavailableError
from wire import GrpcCaller

from siglip_serve.launcher import TritonServer

NOBODY = "127.0.0.1:9"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "siglip-serve")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.jpg" for number in range(30)]
    for number, path in enumerate(paths):
        path.write_bytes(encode(photo(60 + number, 50, number), "JPEG"))
    return paths


def test_embeddings_come_in_the_callers_order(server: TritonServer, pictures: list[Path]) -> None:
    expected = GrpcCaller(server.grpc_url).embed([path.read_bytes() for path in pictures])
    with Client(server.grpc_url) as client:
        got = list(client.embed_images(pictures))
        one = client.embed_image(pictures[3].read_bytes(), normalized=True)
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(one, expected[3] / np.linalg.norm(expected[3]), rtol=1e-3, atol=1e-4)


def test_an_image_that_fails_yields_its_error_in_its_place(
    server: TritonServer, pictures: list[Path]
) -> None:
    pictures[4].write_bytes(b"no image")
    pictures[7].unlink()
    with Client(server.grpc_url) as client:
        got = list(client.embed_images(pictures))
    assert isinstance(got[4], InvalidInputError)
    assert isinstance(got[7], FileNotFoundError)
    assert sum(isinstance(result, np.ndarray) for result in got) == 28


def test_a_late_answer_is_not_asked_for_again(server: TritonServer, pictures: list[Path]) -> None:
    with Client(server.grpc_url, timeout=0.001) as client, pytest.raises(DeadlineError, match="in time"):
        client.embed_image(pictures[0])


def test_nobody_answers() -> None:
    with Client(NOBODY) as client, pytest.raises(UnavailableError, match=f"no server answers at {NOBODY}"):
        client.check_health()


def test_health(server: TritonServer) -> None:
    good, bad = command("health", "--url", server.grpc_url), command("health", "--url", NOBODY)
    assert (good.returncode, bad.returncode) == (0, 1)
    assert "healthy" in good.stdout
    assert "no server answers" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["embed", "--help"], ["health", "--help"]]
)
def test_help(arguments: list[str]) -> None:
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: siglip-serve")

"""`Client` runs its operations in an event loop in a thread: forks, exits and collected clients."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from instant_server import WIDTH, InstantServer, instant_server
from siglip_serve_client import Client

FORK = """
import os, sys, signal
from siglip_serve_client import Client
client = Client(sys.argv[1])
client.embed_image(b"x")
list(client.embed_images([b"x"] * 3))
child = os.fork()
signal.alarm(20)
assert client.embed_image(b"x").shape == Client(sys.argv[1]).embed_image(b"x").shape
assert len(list(client.embed_images([b"x"] * 3))) == 3
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
LEFT_OPEN = """
import sys
from siglip_serve_client import Client
client = Client(sys.argv[1])
results = client.embed_images([b"x"] * 100)
next(results)
"""


@pytest.fixture(scope="module")
def instant() -> Iterator[InstantServer]:
    with instant_server() as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, instant: InstantServer) -> str:
    return instant.grpc_url if request.param == "grpc" else instant.http_url


def run(script: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, url]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_an_http_client_works_in_a_forked_process_and_in_its_parent(instant: InstantServer) -> None:
    # Not over gRPC, whose library now and then hangs in a child of a process that has used it.
    done = run(FORK, instant.http_url)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_quietly_with_an_iteration_under_way(url: str) -> None:
    done = run(LEFT_OPEN, url)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_client_that_is_not_closed_is_closed_when_it_is_collected(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(url)
    assert client.embed_image(b"x").shape == (WIDTH,)
    del client
    gc.collect()
    with Client(url) as other:  # the loop closes the first one before it answers
        assert other.embed_image(b"x").shape == (WIDTH,)
    assert caplog.text == ""


def test_a_closed_client_connects_again(url: str) -> None:
    client = Client(url)
    for _ in range(2):
        assert np.isfinite(client.embed_image(b"x")).all()
        client.close()


def test_an_iteration_reads_ahead_as_far_as_it_is_told(url: str) -> None:
    taken: list[int] = []

    def images() -> Iterator[bytes]:
        for number in range(100):
            taken.append(number)
            yield b"x"

    with Client(url, concurrency=3) as client:
        results = client.embed_images(images())
        next(results)
        assert len(taken) <= 6
        assert sum(isinstance(outcome, np.ndarray) for outcome in results) == 99

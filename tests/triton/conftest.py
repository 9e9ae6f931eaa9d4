"""Real servers for the tests, started once per session on free ports of the loopback interface.

A test that needs other options starts its own server, with only the models that it calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from front import Front, run_front
from gateways import gateway_process
from wire import JERSEY, ROOT, TINY

from siglip_serve.launcher import ServeOptions, TritonServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The bundled checkpoints in float32, all other settings at their defaults."""
    log_file = tmp_path_factory.mktemp("server") / "log"
    options = ServeOptions(
        ROOT / "model_repository",
        str(TINY),
        log_file=log_file,
        settings={"dtype": "float32", "teams_checkpoint": str(JERSEY)},
    )
    with TritonServer(options) as running:
        yield running


@pytest.fixture(scope="session")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The bundled checkpoints with the pixels of the published accuracies: PIL's, in float32.

    Its limits of an image are small, and clients may share memory with it.
    """
    settings = {
        "dtype": "float32",
        "teams_checkpoint": str(JERSEY),
        "preprocess": "pil",
        "max_image_bytes": str(2**20),
        "max_image_pixels": "1000000",
    }
    log_file = tmp_path_factory.mktemp("exact_server") / "log"
    options = ServeOptions(
        ROOT / "model_repository", str(TINY), log_file=log_file, settings=settings, shared_memory=True
    )
    with TritonServer(options) as running:
        yield running


@pytest.fixture(scope="session")
def sharing_server(exact_server: TritonServer) -> TritonServer:
    """A server with which clients may share memory; images of up to 1 MiB and 1,000,000 pixels fit."""
    return exact_server


@pytest.fixture(scope="session")
def mortal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of `embed_image` whose processes tests kill: two decode processes.

    It was started by a thread that has ended. Its decode processes do without torch, so they start quickly.
    """
    folder = tmp_path_factory.mktemp("mortal_server")
    settings = {"dtype": "float32", "decoders": "2", "preprocess": "pil"}
    running = TritonServer(
        ServeOptions(
            ROOT / "model_repository",
            str(TINY),
            models=("embed_image",),
            log_file=folder / "log",
            settings=settings,
        )
    )
    thread = threading.Thread(target=running.start)
    thread.start()
    thread.join()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def front(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A reverse proxy with TLS and keys before `server`."""
    with run_front(server.http_url, server.grpc_url, tmp_path_factory.mktemp("front")) as running:
        yield running


@pytest.fixture(scope="session")
def gateway_url(server: TritonServer) -> Iterator[str]:
    """The URL of a gateway in front of `server`, with all options at their defaults."""
    with gateway_process(server.grpc_url) as url:
        yield url


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log file of a server that one test starts."""
    return tmp_path / "log"

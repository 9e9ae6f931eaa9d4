"""Real servers for the tests: started once a session, on free ports of the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from front import Front, run_front
from wire import JERSEY, ROOT, TINY

from siglip_serve.launcher import ServeOptions, TritonServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The bundled checkpoints with the settings a user gets, but in float32."""
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
    """The bundled checkpoint as the published accuracies rest on it: PIL pixels, float32; small limits."""
    settings = {
        "dtype": "float32",
        "preprocess": "pil",
        "max_image_bytes": str(2**20),
        "max_image_pixels": "1000000",
    }
    log_file = tmp_path_factory.mktemp("exact_server") / "log"
    options = ServeOptions(ROOT / "model_repository", str(TINY), log_file=log_file, settings=settings)
    with TritonServer(options) as running:
        yield running


@pytest.fixture(scope="session")
def front(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """TLS and keys before `server`."""
    with run_front(server.http_url, server.grpc_url, tmp_path_factory.mktemp("front")) as running:
        yield running


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a server of one test writes its log."""
    return tmp_path / "log"

"""The clients of the gateway's tests: one of Triton itself, and one of plain HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from siglip_serve_client import Client

from siglip_serve.launcher import TritonServer


@pytest.fixture(scope="module")
def triton(server: TritonServer) -> Iterator[Client]:
    """The project's own client, straight to Triton."""
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def http(gateway_url: str) -> Iterator[httpx.Client]:
    """A client of the gateway."""
    with httpx.Client(base_url=gateway_url, trust_env=False, timeout=60) as client:
        yield client

"""Callers that give up: a real server does not compute what no one waits for."""

from __future__ import annotations

import asyncio
import time

import pytest
from images import encode, photo
from siglip_serve_client import AsyncClient, Client, DeadlineError
from wire import decoded

from siglip_serve.launcher import TritonServer

REQUESTS = 200
PICTURE = encode(photo(2400, 1600), "JPEG")


async def give_up(url: str, timeout: float) -> list[object]:
    """Send all requests at once; return what each of them ended with."""
    async with AsyncClient(url, timeout=timeout) as client:
        return await asyncio.gather(
            *(client.embed_image(PICTURE) for _ in range(REQUESTS)), return_exceptions=True
        )


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_drops_the_requests_of_callers_that_gave_up(server: TritonServer, scheme: str) -> None:
    address = server.grpc_url if scheme == "grpc" else server.http_url
    metrics = f"{server.address}:{server.metrics_port}"
    with Client(f"{scheme}://{address}") as client:
        client.embed_image(PICTURE)
        outcomes = asyncio.run(give_up(f"{scheme}://{address}", timeout=0.3))
        before = decoded(metrics)
        begin = time.monotonic()
        client.embed_image(PICTURE)
        waited = time.monotonic() - begin
        time.sleep(2)
    late = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(outcome) for outcome in late} == {DeadlineError}
    assert len(late) > REQUESTS / 2  # or this test asks for too little
    for_no_one = decoded(metrics) - before - 1
    # Some were being decoded. Over HTTP some arrived after their callers had gone.
    assert for_no_one <= REQUESTS / 5
    assert waited < 5

"""The real Triton behind the HTTP door: bodies of every kind, overload, callers that give up."""

from __future__ import annotations

import asyncio
import collections
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import tritonclient.http
from images import encode, photo
from wire import raw_embedding

from siglip_serve.launcher import TritonServer

IMAGE = encode(photo(500, 375), "JPEG")
NO_IMAGE = b"x"  # refused after a way through all of the server, which takes less time than an embedding
URL = "/v2/models/embed_image/infer"
JSON_SIZE = "Inference-Header-Content-Length"
RAW = {JSON_SIZE: "0"}  # the body is the image
DEEP = "[" * 200_000 + "]" * 200_000


def run(server: TritonServer, check: Any) -> Any:
    """Run a test with a session that opens as many connections as it needs."""

    async def connected() -> Any:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://{server.http_url}", connector=connector) as session:
            return await check(session)

    return asyncio.run(connected())


async def status_and_body(answer: Any) -> tuple[int, bytes]:
    async with answer as came:
        return came.status, await came.read()


def embed(server: TritonServer, **options: str) -> Any:
    client = tritonclient.http.InferenceServerClient(server.http_url)
    try:
        tensor = tritonclient.http.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[IMAGE]], dtype=object))
        return client.infer("embed_image", [tensor], **options).as_numpy("EMBEDDING")
    finally:
        client.close()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_published_client_may_compress(algorithm: str, server: TritonServer) -> None:
    packed = embed(server, request_compression_algorithm=algorithm, response_compression_algorithm=algorithm)
    np.testing.assert_allclose(packed, embed(server), atol=1e-5)


def test_chunked_bodies_are_served(server: TritonServer) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(IMAGE), 999):
            yield IMAGE[begin : begin + 999]

    async def check(session: aiohttp.ClientSession) -> None:
        status, body = await status_and_body(session.post(URL, data=chunks(), headers=RAW))
        assert status == 200
        np.testing.assert_allclose(raw_embedding(body), embed(server)[0], atol=1e-5)

    run(server, check)


@pytest.mark.parametrize("binary", [False, True])
def test_deeply_nested_json_is_refused_and_the_server_lives(binary: bool, server: TritonServer) -> None:
    async def check(session: aiohttp.ClientSession) -> None:
        pid = server.pid
        text = f'{{"inputs": {DEEP}}}'.encode()
        body, headers = (text + IMAGE, {JSON_SIZE: str(len(text))}) if binary else (text, {})
        status, answer = await status_and_body(session.post(URL, data=body, headers=headers))
        assert (status, json.loads(answer)) == (400, {"error": "the JSON is nested deeper than 64 levels"})
        assert (await status_and_body(session.post(URL, data=IMAGE, headers=RAW)))[0] == 200
        assert server.pid == pid

    run(server, check)


def test_too_large_a_body_is_refused_before_it_is_read(server: TritonServer) -> None:
    async def check(_session: aiohttp.ClientSession) -> None:
        host, _, port = server.http_url.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Length: {2**40}\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 413 ")
        writer.close()

    run(server, check)


def test_a_burst_is_answered_and_leaves_no_descriptor(server: TritonServer) -> None:
    async def one(session: aiohttp.ClientSession) -> int:
        return (await status_and_body(session.post(URL, data=NO_IMAGE, headers=RAW)))[0]

    async def check(session: aiohttp.ClientSession) -> None:
        assert await one(session) == 400
        before = psutil.Process(server.pid).num_fds()
        answers = await asyncio.wait_for(asyncio.gather(*(one(session) for _ in range(1300))), 120)
        seen = collections.Counter(answers)
        assert seen.keys() == {400, 503}
        assert seen[400] >= 256
        deadline = time.monotonic() + 5
        while (now := psutil.Process(server.pid).num_fds()) > before and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert now <= before

    run(server, check)


def test_callers_that_give_up_leave_the_server_alone(server: TritonServer) -> None:
    async def give_up(call: Awaitable[Any], seconds: float) -> bool:
        try:
            await asyncio.wait_for(call, seconds)
        except TimeoutError:
            return True
        return False

    async def check(session: aiohttp.ClientSession) -> None:
        pid = server.pid
        host, _, port = server.http_url.partition(":")
        slow = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        for _, writer in slow:
            writer.write(f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf".encode())
        calls = [status_and_body(session.post(URL, data=IMAGE, headers=RAW)) for _ in range(200)]
        gone = await asyncio.gather(*(give_up(call, 0.05 + 0.001 * i) for i, call in enumerate(calls)))
        assert sum(gone) > 50
        assert (await status_and_body(session.post(URL, data=IMAGE, headers=RAW)))[0] == 200
        assert server.pid == pid
        for _, writer in slow:
            writer.close()

    run(server, check)

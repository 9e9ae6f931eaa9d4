"""Bodies at the HTTP door: encodings, sizes, time and memory."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import zlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from http_doors import OpenDoor, exchange, exchange_bytes, open_before, request_bytes

from siglip_gateway.doors import http_bodies
from siglip_gateway.doors.http_door import Limits

LIMIT = 2**20
JSON_SIZE = "Inference-Header-Content-Length"


async def digest(request: web.BaseRequest) -> web.Response:
    """Answer with what Triton would need to know of a body."""
    body = await request.content.read()  # without the limit of `request.read`
    came = {"size": len(body), "crc": zlib.crc32(body), "length": request.headers.get("Content-Length")}
    came |= {name: request.headers.get(name) for name in ("Content-Encoding", "Transfer-Encoding", JSON_SIZE)}
    return web.Response(body=json.dumps(came).encode())


def expected(body: bytes) -> dict[str, object]:
    return {
        "size": len(body),
        "crc": zlib.crc32(body),
        "length": str(len(body)),
        "Content-Encoding": None,
        "Transfer-Encoding": None,
        JSON_SIZE: None,
    }


async def pieces(data: bytes, count: int) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), count):
        yield data[begin : begin + count]


async def post(opened: OpenDoor, data: object, **headers: str) -> tuple[int, dict[str, object]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.request("POST", f"{opened.url}/v2", data=data, headers=named) as answer:
        return answer.status, await answer.json(content_type=None)


@pytest.mark.parametrize("size", [1, 1000, 300_000, LIMIT, 5 * LIMIT])
def test_bodies_arrive_whole_with_a_length(size: int) -> None:
    body = os.urandom(size)

    async def check() -> None:
        async with open_before(digest) as opened:
            for data in (io.BytesIO(body), pieces(body, 10_000 if size > 1000 else 7)):
                came = await post(opened, data, Inference_Header_Content_Length="0")
                assert came == (200, expected(body) | {JSON_SIZE: "0"})

    asyncio.run(check())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP", "x-gzip"])
@pytest.mark.parametrize("size", [10, 900_000])
def test_compressed_bodies_are_inflated(encoding: str, size: int) -> None:
    body = os.urandom(size // 2) + b"x" * (size // 2)
    packed = zlib.compress(body) if encoding == "deflate" else gzip.compress(body)

    async def check() -> None:
        async with open_before(digest) as opened:
            for data in (packed, pieces(packed, 1000)):
                headers = {"Content_Encoding": encoding, "Inference_Header_Content_Length": "0"}
                assert await post(opened, data, **headers) == (200, expected(body) | {JSON_SIZE: "0"})

    asyncio.run(check())


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (request_bytes(b"x", "Content-Encoding: br"), 415, "expected gzip or deflate"),
        (request_bytes(b"x", "Content-Encoding: gzip, gzip"), 415, "expected gzip or deflate"),
        (request_bytes(b"plain", "Content-Encoding: gzip"), 400, "not gzip or deflate"),
        (request_bytes(gzip.compress(b"1" * 99)[:-9], "Content-Encoding: gzip"), 400, "in the middle"),
        (request_bytes(gzip.compress(b"1") + b"2", "Content-Encoding: gzip"), 400, "behind the end"),
        (request_bytes(b"", f"Content-Length: {LIMIT + 1}"), 413, "send fewer images"),
        (request_bytes(b"", "Content-Length: 9999999999999"), 413, "send fewer images"),
        (request_bytes(b"1", "Expect: the-unexpected"), 417, "expected 100-continue"),
    ],
)
def test_refuses_bodies_with_a_reason(sent: bytes, status: int, message: str) -> None:
    async def check() -> None:
        async with open_before(digest, Limits(body=LIMIT)) as opened:
            came, body = await exchange(opened.port, sent)
        assert came == status
        assert message in json.loads(body)["error"]

    asyncio.run(check())


@pytest.mark.parametrize("bomb", [gzip.compress(b"\0" * 64 * LIMIT), zlib.compress(b"\0" * 64 * LIMIT, 9)])
def test_a_small_body_cannot_become_large(bomb: bytes) -> None:
    async def check() -> None:
        encoding = "gzip" if bomb[:2] == b"\x1f\x8b" else "deflate"
        async with open_before(digest, Limits(body=LIMIT)) as opened:
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, opened.door.memory.used)
                    await asyncio.sleep(0)

            watching = asyncio.create_task(watch())
            status, answer = await exchange(opened.port, request_bytes(bomb, f"Content-Encoding: {encoding}"))
            watching.cancel()
            assert (status, "larger than" in json.loads(answer)["error"]) == (413, True)
            assert 0 < most <= LIMIT + 2**18
            assert opened.door.memory.used == 0

    asyncio.run(check())


def test_chunks_without_end_are_refused_at_the_limit() -> None:
    async def check() -> None:
        async with open_before(digest, Limits(body=LIMIT)) as opened:
            chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            sent = request_bytes(chunk * 17, "Transfer-Encoding: chunked")
            status, _ = await exchange(opened.port, sent)
            assert status == 413
            assert opened.door.memory.used == 0

    asyncio.run(check())


def test_all_bodies_together_are_limited() -> None:
    enough = asyncio.Event()

    async def hold(request: web.BaseRequest) -> web.Response:
        await request.read()
        await enough.wait()
        return web.Response()

    async def check() -> None:
        async with open_before(hold, Limits(body=LIMIT)) as opened:
            sent = request_bytes(b"x" * (LIMIT - 4096))
            first = [asyncio.create_task(exchange(opened.port, sent)) for _ in range(2)]
            while opened.door.memory.used < 2 * (LIMIT - 4096):
                await asyncio.sleep(0.01)
            status, body = await exchange(opened.port, sent)
            assert (status, "try again" in json.loads(body)["error"]) == (503, True)
            enough.set()
            assert [status for status, _ in await asyncio.gather(*first)] == [200, 200]
            assert opened.door.memory.used == 0
            assert (await exchange(opened.port, sent))[0] == 200

    asyncio.run(check())


def test_a_caller_that_asks_before_it_sends_is_told_to_continue() -> None:
    async def check() -> None:
        async with open_before(digest, Limits(body=LIMIT)) as opened:
            reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
            writer.write(request_bytes(b"", "Content-Length: 3", "Expect: 100-continue"))
            async with asyncio.timeout(5):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(b"123")
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            refused = request_bytes(b"", f"Content-Length: {LIMIT + 1}", "Expect: 100-continue")
            assert (await exchange(opened.port, refused))[0] == 413

    asyncio.run(check())


def test_a_body_that_drips_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bodies, "_GRACE", 0.4)

    async def check() -> None:
        async with open_before(digest) as opened:
            reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
            writer.write(request_bytes(b"", "Content-Length: 1000"))
            answer = asyncio.create_task(reader.readline())
            begin = asyncio.get_running_loop().time()
            while not answer.done():
                writer.write(b"x")
                await asyncio.sleep(0.05)
            assert (await answer).startswith(b"HTTP/1.1 408 ")
            assert 0.3 < asyncio.get_running_loop().time() - begin < 3
            writer.close()

    asyncio.run(check())


def test_a_steady_body_may_take_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bodies, "_GRACE", 0.4)
    monkeypatch.setattr(http_bodies, "_SLOWEST", 1000)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(10):
            await asyncio.sleep(0.1)
            yield b"x" * 300

    async def check() -> None:
        async with open_before(digest) as opened:
            assert await post(opened, slow()) == (200, expected(b"x" * 3000))

    asyncio.run(check())


def test_a_caller_that_does_not_read_its_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bodies, "_GRACE", 0.4)
    monkeypatch.setattr(http_bodies, "_SLOWEST", 2**30)

    async def large(_: web.BaseRequest) -> web.Response:
        return web.Response(body=b"x" * 30 * LIMIT)

    async def check() -> None:
        async with open_before(large) as opened:
            _, writer = await asyncio.open_connection("127.0.0.1", opened.port, limit=1)
            writer.write(request_bytes())
            async with asyncio.timeout(5):
                while not opened.door.memory.used:
                    await asyncio.sleep(0.01)
                while opened.door.memory.used or opened.door.connections.server.connections:
                    await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(check())


def test_a_caller_that_breaks_off_its_body_reaches_nobody() -> None:
    seen = 0

    async def count(_: web.BaseRequest) -> web.Response:
        nonlocal seen
        seen += 1
        return web.Response()

    async def check() -> None:
        async with open_before(count) as opened:
            _, writer = await asyncio.open_connection("127.0.0.1", opened.port)
            writer.write(request_bytes(b"half", "Content-Length: 8"))
            await asyncio.sleep(0.2)
            assert opened.door.memory.used > 0
            writer.close()
            await asyncio.sleep(0.2)
            assert opened.door.memory.used == 0
            assert await exchange_bytes(opened.port, request_bytes(b"", "Connection: close"))

    asyncio.run(check())
    assert seen == 1

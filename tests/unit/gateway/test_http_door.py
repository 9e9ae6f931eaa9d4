"""The HTTP door passes requests through, and answers in the protocol's form what it does not pass."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from http_doors import exchange, exchange_bytes, free_address, open_before, request_bytes

from siglip_gateway.doors import http_connections
from siglip_gateway.doors.http_door import Limits, open_door
from siglip_gateway.doors.json_nesting import MOST_LEVELS
from siglip_gateway.doors.timeout_parameter import now

DEEP = b"[" * (MOST_LEVELS + 1) + b"]" * (MOST_LEVELS + 1)
JSON_SIZE = "Inference-Header-Content-Length"


async def echo(request: web.BaseRequest) -> web.Response:
    """Answer with what came, as JSON."""
    body = await request.read()
    came = {
        "method": request.method,
        "path": request.raw_path,
        "headers": [[name, value] for name, value in request.headers.items()],
        "body": body.decode("latin-1"),
    }
    return web.Response(body=json.dumps(came).encode())


async def size(request: web.BaseRequest) -> web.Response:
    """Answer with the number of bytes that came."""
    return web.Response(text=str(len(await request.read())))


def error_of(body: bytes) -> str:
    answer = json.loads(body)
    assert answer.keys() == {"error"}
    return str(answer["error"])


def test_passes_requests_through_unchanged() -> None:
    async def check() -> None:
        headers = {
            JSON_SIZE: "2",
            "triton-restricted-key": "secret",
            "normalized": "false",
            "Content-Type": "application/octet-stream",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "Arrived": "5",
        }
        begin = now()
        async with open_before(echo) as opened:
            sent = request_bytes(
                b"{}\x00\xff", *(f"{n}: {v}" for n, v in headers.items()), path="/v2/a%2Fb?x=%20&y"
            )
            status, body = await exchange(opened.port, sent)
        came = json.loads(body)
        assert (status, came["method"], came["path"]) == (200, "POST", "/v2/a%2Fb?x=%20&y")
        assert came["body"] == "{}\x00\xff"
        passed = dict(came["headers"])
        assert passed.pop("Content-Length") == "4"
        assert passed.pop("Host") == "test"
        # In place of the caller's own. The kernel counts in steps of up to 10 ms.
        assert begin - 20_000 <= int(passed.pop("arrived")) <= now()
        assert passed == {
            name: value for name, value in headers.items() if name not in ("Connection", "X-Hop", "Arrived")
        }

    asyncio.run(check())


def test_a_request_has_arrived_when_its_bytes_came_and_not_when_they_were_read() -> None:
    async def check() -> None:
        async with open_before(echo) as opened:
            reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
            writer.write(request_bytes(b"{}", "Connection: close"))
            time.sleep(0.3)  # the door gets no turn either
            read_from = now()
            answer = await reader.read()
            writer.close()
        headers = dict(json.loads(answer.partition(b"\r\n\r\n")[2])["headers"])
        assert int(headers["arrived"]) <= read_from - 250_000

    asyncio.run(check())


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "PROPFIND"])
def test_passes_answers_back_unchanged(method: str) -> None:
    async def triton(request: web.BaseRequest) -> web.Response:
        headers = {
            "X-Own": "1",
            JSON_SIZE: "3",
            "Content-Type": "application/json",
            "Connection": "X-Hop",
            "X-Hop": "1",
        }
        return web.Response(status=418, reason="Short", body=request.method.encode(), headers=headers)

    async def check() -> None:
        async with open_before(triton) as opened, aiohttp.request(method, f"{opened.url}/v2") as answer:
            assert (answer.status, answer.reason) == (418, "Short")
            assert await answer.read() == (b"" if method == "HEAD" else method.encode())
            assert answer.headers["Content-Length"] == str(len(method))
            assert (answer.headers["X-Own"], answer.headers[JSON_SIZE]) == ("1", "3")
            assert answer.headers["Content-Type"] == "application/json"
            assert "X-Hop" not in answer.headers

    asyncio.run(check())


def test_connections_to_triton_are_used_again() -> None:
    ports = set()

    async def triton(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername"))
        return web.Response()

    async def check() -> None:
        async with open_before(triton) as opened:
            for _ in range(5):
                assert (await exchange(opened.port, request_bytes(b"1")))[0] == 200

    asyncio.run(check())
    assert len(ports) == 1


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (DEEP, ()),
        (DEEP + b"\x00" * 9, (f"{JSON_SIZE}: {len(DEEP)}",)),
        (DEEP, (f"{JSON_SIZE}: -9",)),  # not a number that Triton takes: all of it may be read as JSON
        (DEEP, (f"{JSON_SIZE}: 2", f"{JSON_SIZE}: {len(DEEP)}")),
    ],
)
def test_refuses_json_that_is_nested_too_deeply(body: bytes, headers: tuple[str, ...]) -> None:
    async def check() -> None:
        async with open_before(echo) as opened:
            status, answer = await exchange(opened.port, request_bytes(body, *headers))
        assert status == 400
        assert "nested deeper" in error_of(answer)

    asyncio.run(check())


def test_brackets_in_binary_tensors_are_no_json() -> None:
    async def check() -> None:
        async with open_before(size) as opened:
            sent = request_bytes(b"{}" + DEEP, f"{JSON_SIZE}: 2")
            assert await exchange(opened.port, sent) == (200, str(len(DEEP) + 2).encode())

    asyncio.run(check())


def binary(lie: int) -> tuple[bytes, str]:
    """A body with one string that says that it is `lie` bytes longer, and the header for it."""
    about = {"name": "X", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 8}}
    text = json.dumps({"inputs": [about]}).encode()
    return text + struct.pack("<I", 4 + lie) + b"four", f"{JSON_SIZE}: {len(text)}"


def test_refuses_strings_that_are_not_as_long_as_they_say() -> None:
    async def check() -> None:
        async with open_before(size) as opened:
            for lie, status in ((0, 200), (1, 400)):
                body, header = binary(lie)
                found, answer = await exchange(opened.port, request_bytes(body, header))
                assert found == status
            assert error_of(answer) == "X[0]: its length says 5 bytes, but 4 follow"

    asyncio.run(check())


@pytest.mark.parametrize("binary", [True, False])
def test_refuses_a_shape_that_overflows(binary: bool) -> None:
    async def check() -> None:
        async with open_before(size) as opened:
            text = json.dumps(
                {"inputs": [{"name": "X", "shape": [2**32, 2**32], "datatype": "FP32"}]}
            ).encode()
            headers = (f"{JSON_SIZE}: {len(text)}",) if binary else ()
            status, answer = await exchange(opened.port, request_bytes(text + b"four" * binary, *headers))
            assert status == 400
            assert "shape [4294967296, 4294967296], expected at most" in error_of(answer)

    asyncio.run(check())


@pytest.mark.parametrize("given", ["+9", "0x9", "-9", "nine"])
def test_refuses_a_length_of_the_json_that_is_not_one_number(given: str) -> None:
    async def check() -> None:
        async with open_before(size) as opened:
            body, header = binary(1)
            for headers in ((f"{JSON_SIZE}: {given}",), (header, f"{JSON_SIZE}: {given}")):
                status, answer = await exchange(opened.port, request_bytes(body, *headers))
                assert status == 400
                assert error_of(answer).startswith(f"{JSON_SIZE}: got '")
                assert error_of(answer).endswith("', expected one number")

    asyncio.run(check())


def test_says_that_triton_is_away() -> None:
    async def check() -> None:
        async with open_door("127.0.0.1:0", await free_address()) as (_, port):
            answer = await exchange_bytes(port, request_bytes(b"1", "Connection: close"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in head
        assert "Triton is not running" in error_of(body)

    asyncio.run(check())


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"nonsense\r\n\r\n"]
)
def test_says_that_triton_broke_the_connection(answer: bytes) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def check() -> None:
        server = await asyncio.start_server(break_off, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with open_door("127.0.0.1:0", address) as (_, port):
            status, body = await exchange(port, request_bytes())
        server.close()
        assert status == 502
        assert "Triton broke the connection" in error_of(body)

    asyncio.run(check())


def test_relays_health_to_the_launcher() -> None:
    async def health(request: web.BaseRequest) -> web.Response:
        assert request.path == "/health"
        return web.json_response({"status": "restarting"}, status=503)

    async def check() -> None:
        server = await asyncio.get_running_loop().create_server(web.Server(health), "127.0.0.1", 0)
        launcher = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with (
            open_before(echo, launcher=launcher) as opened,
            aiohttp.ClientSession(opened.url) as session,
        ):
            async with session.get("/health") as answer:
                assert (answer.status, await answer.json()) == (503, {"status": "restarting"})
            async with session.head("/health") as answer:
                assert answer.status == 503
            server.close()
            async with session.post("/health") as answer:
                assert (await answer.json(content_type=None))["path"] == "/health"
        async with (
            open_before(echo, launcher=await free_address()) as opened,
            aiohttp.request("GET", f"{opened.url}/health") as answer,
        ):
            assert answer.status == 503
            assert "launcher" in error_of(await answer.read())

    asyncio.run(check())


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"FOO /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://other/v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nLong: " + b"x" * 9000 + b"\r\n\r\n",
    ],
)
def test_refuses_what_is_not_http(sent: bytes) -> None:
    async def check() -> None:
        async with open_before(echo) as opened:
            head, _, body = (await exchange_bytes(opened.port, sent)).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400", head
        assert error_of(body)

    asyncio.run(check())


def test_answers_headers_that_are_not_ascii() -> None:
    async def check() -> None:
        async with open_before(echo) as opened:
            sent = request_bytes(b"1", "X: placeholder").replace(b"placeholder", b"\xe9\xff")
            status, body = await exchange(opened.port, sent)
        assert status in (200, 400), body

    asyncio.run(check())


def test_a_full_door_closes_the_oldest_idle_connection() -> None:
    async def check() -> None:
        async with open_before(size, Limits(connections=2)) as opened:
            idle = [await asyncio.open_connection("127.0.0.1", opened.port) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert (await exchange(opened.port, request_bytes(b"12")))[0] == 200
            async with asyncio.timeout(5):
                assert await idle[0][0].read() == b""
            idle[1][1].write(request_bytes(b"123"))
            assert (await idle[1][0].readline()).startswith(b"HTTP/1.1 200 ")
            for _, writer in idle:
                writer.close()

    asyncio.run(check())


def test_a_door_with_busy_connections_refuses_further_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "_REFUSAL_TIME", 0.5)
    monkeypatch.setattr(http_connections, "_MOST_REFUSALS", 2)
    enough = asyncio.Event()

    async def wait(_: web.BaseRequest) -> web.Response:
        await enough.wait()
        return web.Response()

    async def check() -> None:
        async with open_before(wait, Limits(connections=1)) as opened:
            first = asyncio.create_task(exchange(opened.port, request_bytes()))
            await asyncio.sleep(0.1)
            silent = asyncio.create_task(exchange_bytes(opened.port, b""))
            refused = await exchange_bytes(opened.port, request_bytes(b"x" * 300_000))
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert "no connection left" in error_of(refused.partition(b"\r\n\r\n")[2])
            assert await silent == b""
            enough.set()
            assert (await first)[0] == 200

    asyncio.run(check())


async def slowly(data: bytes, pause: float) -> AsyncIterator[bytes]:
    """Bytes one by one."""
    for value in data:
        yield bytes([value])
        await asyncio.sleep(pause)


def test_closes_connections_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "_SILENCE", 0.3)

    async def drip(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun = asyncio.create_task(reader.read())
        try:
            async for byte in slowly(b"GET / HTTP/1.1\r\nX: " + b"x" * 200, 0.05):
                if begun.done():
                    break
                writer.write(byte)
            return await begun
        finally:
            writer.close()

    async def check() -> None:
        async with open_before(size) as opened:
            async with asyncio.timeout(5):
                assert await drip(opened.port) == b""  # headers that never end
            assert await exchange_bytes(opened.port, b"", 5) == b""
            answer = await exchange_bytes(opened.port, request_bytes(b"1"), 5)  # one request, then nothing
            assert answer.startswith(b"HTTP/1.1 200 ")

    asyncio.run(check())


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Unable to parse 'id': attempt to access JSON non-string as string", 400),
        ("failed to parse the request JSON buffer: Missing a name for object member. at 1", 400),
        ("attempt to access non-existing object member 'inputs'", 400),
        ("Unable to parse 'data': Shape does not match true shape of 'data' field", 400),
        ("failed to get request params.: attempt to get members for non-object", 400),
        ("Failed to process the request(s) for model 'm', message: Stub process is not healthy.", 500),
    ],
)
def test_json_of_a_wrong_type_is_the_fault_of_the_caller(message: str, status: int) -> None:
    async def fail(_: web.BaseRequest) -> web.Response:
        return web.json_response({"error": message}, status=500)

    async def check() -> None:
        async with open_before(fail) as opened:
            found, body = await exchange(opened.port, request_bytes(b"{}"))
        assert (found, error_of(body)) == (status, message)

    asyncio.run(check())

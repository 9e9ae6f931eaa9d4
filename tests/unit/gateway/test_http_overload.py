"""More requests than the HTTP door takes on, callers that give up, and its end."""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from http_doors import exchange, free_address, open_before, request_bytes

from siglip_gateway.doors import http_door
from siglip_gateway.doors.http_door import Limits


class Gate:
    """A server that answers when it may, and remembers what it had at once."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.now = self.most = self.seen = self.broken = 0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        await request.read()
        self.seen += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.may_answer.wait()
        finally:
            self.now -= 1
        self.broken += request.transport is None
        return web.Response(text="done")

    async def until(self, now: int) -> None:
        """Wait until it has `now` requests."""
        async with asyncio.timeout(5):
            while self.now != now:
                await asyncio.sleep(0.01)


def test_every_request_is_answered_or_refused() -> None:
    async def check() -> None:
        gate = Gate()
        async with (
            open_before(gate.answer, Limits(in_flight=8, waiting=12)) as opened,
            aiohttp.ClientSession(opened.url, connector=aiohttp.TCPConnector(limit=0)) as session,
        ):

            async def one() -> tuple[int, str | None, bytes]:
                async with session.post("/v2/models/m/infer", data=b"x" * 1000) as answer:
                    return answer.status, answer.headers.get("Retry-After"), await answer.read()

            sent = [asyncio.create_task(one()) for _ in range(200)]
            async with asyncio.timeout(60):
                while sum(task.done() for task in sent) < 181:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            refused = [task for task in sent if task.done()]
            assert len(refused) == 181
            for task in refused:
                status, retry, body = task.result()
                assert (status, retry) == (503, "1")
                assert "too busy" in json.loads(body)["error"]
            gate.may_answer.set()
            answers = await asyncio.gather(*sent)
            assert collections.Counter(status for status, _, _ in answers) == {200: 19, 503: 181}
            assert gate.most == 7  # of eight places one is for other models
            assert (await one())[0] == 200

    asyncio.run(check())


def test_requests_of_one_model_hold_up_no_others() -> None:
    async def check() -> None:
        gate = Gate()

        async def answer(request: web.BaseRequest) -> web.Response:
            is_slow = request.path == "/v2/models/slow/versions/1/infer"
            return await gate.answer(request) if is_slow else web.Response(text="done")

        async with (
            open_before(answer, Limits(in_flight=8, waiting=100)) as opened,
            aiohttp.ClientSession(opened.url, connector=aiohttp.TCPConnector(limit=0)) as session,
        ):

            async def one(path: str) -> int:
                async with session.post(path, data=b"x") as answer:
                    return answer.status

            slow = [asyncio.create_task(one("/v2/models/slow/versions/1/infer")) for _ in range(20)]
            await gate.until(7)
            await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                assert await one("/v2/models/fast/infer") == 200
                assert await one("/v2/models/slow/ready") == 200
            gate.may_answer.set()
            assert await asyncio.gather(*slow) == [200] * 20
            assert gate.most == 7

    asyncio.run(check())


def test_a_caller_that_gives_up_does_not_reach_triton() -> None:
    async def check() -> None:
        gate = Gate()
        async with open_before(gate.answer, Limits(in_flight=2, waiting=1)) as opened:
            impatient = [await asyncio.open_connection("127.0.0.1", opened.port) for _ in range(2)]
            for _, writer in impatient:
                writer.write(request_bytes(b"1"))
            await gate.until(2)
            for _, writer in impatient:
                writer.close()
            await asyncio.sleep(0.2)
            waiting = asyncio.create_task(exchange(opened.port, request_bytes(b"2")))
            await asyncio.sleep(0.1)
            assert (await exchange(opened.port, request_bytes(b"3")))[0] == 503  # forgotten ones count
            gate.may_answer.set()
            assert (await waiting)[0] == 200
            assert (gate.broken, gate.most, opened.door.memory.used) == (0, 2, 0)

    asyncio.run(check())


def test_a_connection_that_is_closed_before_the_door_takes_it_is_not_read() -> None:
    async def check() -> None:
        gate = Gate()
        gate.may_answer.set()
        async with open_before(gate.answer) as opened:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", opened.port)) as caller:
                    caller.sendall(request_bytes(b"1"))
            assert (await exchange(opened.port, request_bytes(b"2")))[0] == 200
            assert (opened.door.connections.server.requests_count, gate.seen) == (1, 1)

    asyncio.run(check())


def test_a_caller_that_has_gone_when_it_is_let_in_does_not_reach_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        gate = Gate()
        gate.may_answer.set()
        async with open_before(gate.answer, Limits(in_flight=1, waiting=1)) as opened:
            with monkeypatch.context() as patch:  # as if the event loop had not come to the end of it yet
                patch.setattr(http_door, "is_closed", lambda _transport: True)
                assert (await exchange(opened.port, request_bytes(b"1")))[0] == 408
            assert (await exchange(opened.port, request_bytes(b"2")))[0] == 200
            assert (gate.seen, opened.door.memory.used) == (1, 0)

    asyncio.run(check())


def test_a_waiting_caller_that_gives_up_makes_place_at_once() -> None:
    async def check() -> None:
        gate = Gate()
        async with open_before(gate.answer, Limits(in_flight=1, waiting=1)) as opened:
            first = asyncio.create_task(exchange(opened.port, request_bytes(b"1")))
            await gate.until(1)
            gone = asyncio.create_task(exchange(opened.port, request_bytes(b"2")))
            await asyncio.sleep(0.1)
            gone.cancel()
            await asyncio.sleep(0.1)
            third = asyncio.create_task(exchange(opened.port, request_bytes(b"3")))
            await asyncio.sleep(0.1)
            gate.may_answer.set()
            assert [(await first)[0], (await third)[0]] == [200, 200]
            assert gate.seen == 2

    asyncio.run(check())


def test_the_end_waits_for_what_is_in_progress() -> None:
    async def check() -> None:
        gate = Gate()
        async with open_before(gate.answer, Limits(in_flight=1)) as opened:
            idle = await asyncio.open_connection("127.0.0.1", opened.port)
            sent = [asyncio.create_task(exchange(opened.port, request_bytes(b"1"))) for _ in range(3)]
            half = await asyncio.open_connection("127.0.0.1", opened.port)
            half[1].write(request_bytes(b"1", "Content-Length: 2"))
            await gate.until(1)
            await asyncio.sleep(0.2)
            draining = asyncio.create_task(opened.door.drain(10))
            assert await idle[0].read() == b""
            half[1].write(b"2")
            gate.may_answer.set()
            assert [(await task)[0] for task in sent] == [200] * 3
            answer = await half[0].read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"Connection: close" in answer
            await draining
            idle[1].close()
            half[1].close()

    asyncio.run(check())


@asynccontextmanager
async def door_process(listen: str, triton: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a door as the launcher does, and end it."""
    words = ["http", "--listen", listen, "--triton", triton, "--max-in-flight", "4"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "siglip_gateway.doors", *words, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_open(address: str) -> None:
    """Wait until something listens at an address."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return writer.close()


def test_sigterm_completes_requests_and_exits_with_0() -> None:
    async def check() -> None:
        gate, address = Gate(), await free_address()
        server = await asyncio.get_running_loop().create_server(web.Server(gate.answer), "127.0.0.1", 0)
        triton = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with door_process(address, triton) as process:
            await until_open(address)
            sent = asyncio.create_task(exchange(int(address.partition(":")[2]), request_bytes(b"1")))
            await gate.until(1)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert process.returncode is None
            gate.may_answer.set()
            assert await sent == (200, b"done")
            assert await asyncio.wait_for(process.wait(), 10) == 0
        server.close()

    asyncio.run(check())

"""The senders: each planted end of a request is told apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from programs import free_port
from raw_grpc import raw_grpc_server

from tests.chaos.messages import INFER, http_request
from tests.chaos.wires import GrpcWire, HttpWire, Outcome, Reply, judge_grpc, judge_http

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = http_request("/v2/models/m/infer", b"body")


@asynccontextmanager
async def http_server(behave: Behaviour) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.close()


def http_reply(behave: Behaviour, **keywords: Any) -> Reply:
    async def ask() -> Reply:
        async with http_server(behave) as address:
            wire = HttpWire(address)
            reply = await wire.send(REQUEST, **keywords)
            await wire.close()
            return reply

    return asyncio.run(ask())


def answering(raw: bytes) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(REQUEST))
        writer.write(raw)
        await writer.drain()

    return behave


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def closing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readexactly(10)


@pytest.mark.parametrize(
    ("raw", "outcome", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Outcome.ANSWERED, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            Outcome.ANSWERED,
            b"ok",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 X\r\nContent-Length: 1\r\n\r\nx", Outcome.REFUSED, b"x"),
        (b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n", Outcome.REFUSED, b""),
        (b"HTTP/1.1 500 X\r\nContent-Length: 1\r\n\r\nx", Outcome.INTERNAL, b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", Outcome.LOST, b""),
        (b"nonsense\r\n\r\n", Outcome.LOST, b""),
    ],
)
def test_answers_over_http(raw: bytes, outcome: Outcome, body: bytes) -> None:
    reply = http_reply(answering(raw))
    assert (reply.outcome, reply.body) == (outcome, body)


def test_silence_over_http_is_a_hang() -> None:
    reply = http_reply(silent, limit=0.2)
    assert reply.outcome is Outcome.HANG
    assert 0.15 < reply.seconds < 2


def test_silence_is_right_where_the_server_has_to_wait_for_more() -> None:
    assert http_reply(silent, whole=False).outcome is Outcome.ENDED


def test_a_closed_connection_is_a_loss_only_where_the_request_can_be_read() -> None:
    assert http_reply(closing).outcome is Outcome.LOST
    assert http_reply(closing, framed=False).outcome is Outcome.ENDED


def test_an_idle_connection_that_was_closed_is_opened_again() -> None:
    async def once_per_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")(reader, writer)

    async def ask() -> list[Outcome]:
        async with http_server(once_per_connection) as address:
            wire = HttpWire(address)
            found = []
            for _ in range(3):
                found.append((await wire.send(REQUEST)).outcome)
                await asyncio.sleep(0.05)
            await wire.close()
            return found

    assert asyncio.run(ask()) == [Outcome.ANSWERED] * 3


def test_a_server_that_is_gone_is_a_loss_over_both_protocols() -> None:
    async def ask() -> list[Outcome]:
        address = f"127.0.0.1:{free_port()}"
        async with GrpcWire(address, 1) as wire:
            return [(await wire.send(INFER, b"")).outcome, (await HttpWire(address).send(REQUEST)).outcome]

    assert asyncio.run(ask()) == [Outcome.LOST] * 2


def test_answers_over_grpc() -> None:
    def infer(request: bytes, context: Any) -> bytes:
        if request == b"slow":
            time.sleep(1)
        if request in {b"INTERNAL", b"UNAVAILABLE", b"INVALID_ARGUMENT"}:
            context.abort(grpc.StatusCode[request.decode()], "Exceeds maximum queue size")
        return b"answer"

    async def ask(address: str) -> list[Outcome]:
        async with GrpcWire(address, 1) as wire:
            bodies = (b"x", b"INTERNAL", b"UNAVAILABLE", b"INVALID_ARGUMENT", b"slow")
            return [(await wire.send(INFER, body, limit=0.5)).outcome for body in bodies]

    refused = Outcome.REFUSED
    with raw_grpc_server(infer) as address:
        found = asyncio.run(ask(address))
    assert found == [Outcome.ANSWERED, Outcome.INTERNAL, refused, refused, Outcome.HANG]


@pytest.mark.parametrize(
    ("status", "message", "outcome"),
    [
        ("UNAVAILABLE", "Socket closed", Outcome.LOST),
        ("UNAVAILABLE", "failed to connect to all addresses", Outcome.LOST),
        ("UNAVAILABLE", "Exceeds maximum queue size", Outcome.REFUSED),
        ("UNKNOWN", "", Outcome.INTERNAL),
        ("DEADLINE_EXCEEDED", "", Outcome.REFUSED),
        ("NOT_FOUND", "", Outcome.REFUSED),
    ],
)
def test_grpc_statuses(status: str, message: str, outcome: Outcome) -> None:
    assert judge_grpc(status, message) is outcome


def test_http_statuses() -> None:
    statuses = (200, 400, 413, 500, 501, 502, 503, 504)
    internal = [status for status in statuses if judge_http(status) is Outcome.INTERNAL]
    assert internal == [500, 502, 504]
    assert judge_http(200) is Outcome.ANSWERED

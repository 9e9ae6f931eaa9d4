"""The gRPC door before a server that records what reaches it."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from recording_triton import METHOD, STREAM, UNLIMITED, RecordingTriton
from tritonclient.grpc import service_pb2

from siglip_gateway.doors import AWAY, grpc_door
from siglip_gateway.doors.grpc_door import GrpcDoor, open_door

OTHER = "/inference.GRPCInferenceService/ServerReady"
SMALL = service_pb2.ModelInferRequest(model_name="embed_image", id="1").SerializeToString()


def strings(*rows: bytes, lie: int = 0, count: int | None = None) -> bytes:
    """A request for these rows, the last of which says that it is `lie` bytes longer."""
    packed = [struct.pack("<I", len(row)) + row for row in rows[:-1]]
    packed.append(struct.pack("<I", len(rows[-1]) + lie) + rows[-1])
    message = service_pb2.ModelInferRequest(model_name="embed_image")
    message.inputs.add(name="INPUT_IMAGE", datatype="BYTES", shape=[count or len(rows), 1])
    message.raw_input_contents.append(b"".join(packed))
    return bytes(message.SerializeToString())


@dataclass
class House:
    """A caller, the door, and what stands for Triton."""

    triton: RecordingTriton
    door: GrpcDoor
    channel: Any

    async def ask(self, message: bytes = SMALL, method: str = METHOD, **options: Any) -> bytes:
        return bytes(await self.channel.unary_unary(method)(message, **options))

    async def forgotten(self) -> None:
        """Wait until Triton has answered what no caller waits for."""
        await self.door.drain(10)
        assert self.door.in_flight == 0


@asynccontextmanager
async def house(max_in_flight: int = 100) -> AsyncIterator[House]:
    triton = RecordingTriton()
    triton.gate.set()
    await triton.start()
    triton_url = f"127.0.0.1:{triton.port}"
    try:
        async with (
            open_door("127.0.0.1:0", triton_url, max_in_flight, max_in_flight) as (door, _, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel,
        ):
            yield House(triton, door, channel)
    finally:
        await triton.stop()


def with_house(test: Callable[[House], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def run() -> None:
        async with house(**options) as built:
            await test(built)

    asyncio.run(run())


def timeout_in(message: bytes) -> int:
    return int(service_pb2.ModelInferRequest.FromString(message).parameters["timeout"].int64_param)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing is logged: neither an error of a handler nor an exception that was never retrieved."""
    yield
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("method", [METHOD, OTHER, "/grpc.health.v1.Health/Check"])
def test_passes_bytes_and_metadata_both_ways(method: str) -> None:
    async def test(built: House) -> None:
        own = (b"", SMALL, strings(random.Random(0).randbytes(5_000_000)))
        for message in own if method == METHOD else (*own, random.Random(0).randbytes(5_000_000)):
            call = built.channel.unary_unary(method)(
                message, metadata=(("triton-grpc-protocol-key", "secret"), ("some-bin", b"\0\xff"))
            )
            assert await call == message
            assert built.triton.messages.pop() == message
        assert built.triton.metadata["triton-grpc-protocol-key"] == "secret"
        assert built.triton.metadata["some-bin"] == b"\0\xff"
        assert dict(await call.trailing_metadata()) == {"of-triton": "yes", "of-triton-bin": b"\0\xff"}
        assert dict(await call.initial_metadata()) == {"first": "yes"}

    with_house(test)


def test_passes_messages_that_the_caller_compressed() -> None:
    async def test(built: House) -> None:
        message = strings(bytes(100_000))
        assert await built.ask(message, compression=grpc.Compression.Gzip) == message

    with_house(test)


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK], ids=lambda code: code.name
)
def test_passes_every_status(code: grpc.StatusCode) -> None:
    async def test(built: House) -> None:
        built.triton.refusal = code, "Exceeds maximum queue size, größer"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await built.ask()
        assert (caught.value.code(), caught.value.details()) == built.triton.refusal
        assert ("of-refusal", "yes") in tuple(caught.value.trailing_metadata())
        stream = built.channel.stream_stream(STREAM)()
        await stream.write(SMALL)
        assert await refusal(stream.read()) == built.triton.refusal

    with_house(test)


@pytest.mark.parametrize(
    ("message", "code"), [("Unable to parse request", "INVALID_ARGUMENT"), ("Unable to parse", "INTERNAL")]
)
def test_bytes_that_are_no_message_are_the_fault_of_the_caller(message: str, code: str) -> None:
    async def test(built: House) -> None:
        built.triton.refusal = grpc.StatusCode.INTERNAL, message
        found, told = await refusal(built.ask())
        assert (found.name, told) == (code, message)

    with_house(test)


def test_a_deadline_becomes_the_timeout_of_a_request_and_of_nothing_else() -> None:
    async def test(built: House) -> None:
        await built.ask(timeout=5)
        await built.ask()
        await built.ask(method=OTHER, timeout=5)
        first, *others = built.triton.messages
        assert 3_750_000 < timeout_in(first) <= 4_800_000  # gRPC rounds up to three digits
        assert others == [SMALL, SMALL]
        assert built.triton.deadlines == [None] * 3

    with_house(test)


def test_a_request_that_its_deadline_took_from_a_queue_is_late() -> None:
    """A timeout of the caller's own keeps the status that Triton gives it."""

    async def test(built: House) -> None:
        built.triton.refusal = grpc.StatusCode.UNAVAILABLE, "Request timeout expired"
        own = service_pb2.ModelInferRequest(model_name="embed_image")
        own.parameters["timeout"].int64_param = 1
        for message, code in ((SMALL, "DEADLINE_EXCEEDED"), (own.SerializeToString(), "UNAVAILABLE")):
            assert (await refusal(built.ask(message, timeout=5)))[0].name == code
        assert (await refusal(built.ask()))[0].name == "UNAVAILABLE"

    with_house(test)


def test_neither_early_deadlines_nor_cancels_reach_triton() -> None:
    async def test(built: House) -> None:
        rng = random.Random(0)

        async def give_up() -> None:
            for _ in range(25):
                call = built.channel.unary_unary(METHOD)(SMALL, timeout=rng.uniform(0.0005, 0.05))
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.uniform(0, 0.03))
                    call.cancel()
                with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                    await call

        built.triton.gate.clear()
        begin = time.monotonic()
        await asyncio.gather(*(give_up() for _ in range(8)))
        # Triton gets few calls of callers that gave up, and one more every 500 ms; the others never reach it.
        assert 4 <= len(built.triton.messages) < 16 + (time.monotonic() - begin) / 0.5
        built.triton.gate.set()
        await built.forgotten()
        assert (built.triton.cancelled, built.triton.answered) == (0, len(built.triton.messages))
        assert set(built.triton.deadlines) == {None}
        assert await built.ask() == SMALL

    with_house(test, max_in_flight=1000)


def test_refuses_what_exceeds_the_limit_and_counts_forgotten_calls() -> None:
    async def test(built: House) -> None:
        built.triton.gate.clear()
        gone = [asyncio.ensure_future(refusal(built.ask(timeout=0.2))) for _ in range(2)]
        assert [(await call)[0] for call in gone] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
        waiting = [asyncio.ensure_future(built.ask()) for _ in range(2)]
        await asyncio.sleep(0.2)
        code, message = await refusal(built.ask(timeout=5))
        assert (code, "queue size: 4 calls are in progress" in message) == (grpc.StatusCode.UNAVAILABLE, True)
        assert len(built.triton.messages) == 2
        built.triton.gate.set()
        assert await asyncio.gather(*waiting) == [SMALL, SMALL]
        await built.forgotten()
        assert await built.ask() == SMALL

    with_house(test, max_in_flight=2)


def test_a_call_that_is_late_when_it_is_let_in_does_not_reach_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC tells a busy event loop late that the deadline of a call has passed."""

    async def test(built: House) -> None:
        with monkeypatch.context() as patch:
            told = iter([False, True])  # when it came, and when it is let in
            patch.setattr(grpc_door, "_is_late", lambda _context: next(told))
            code, message = await refusal(built.ask())
        assert (code, message) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed on the way")
        assert await built.ask() == SMALL
        assert len(built.triton.messages) == 1

    with_house(test, max_in_flight=1)


def test_a_burst_of_calls_is_answered_or_refused() -> None:
    """gRPC itself would end those beyond the first 1,000 that no handler has taken with CANCELLED."""

    async def test(built: House) -> None:
        found = await asyncio.gather(*(built.ask() for _ in range(4000)), return_exceptions=True)
        codes = [answer.code() for answer in found if isinstance(answer, grpc.aio.AioRpcError)]
        assert set(codes) <= {grpc.StatusCode.UNAVAILABLE}
        assert found.count(SMALL) + len(codes) == 4000

    with_house(test, max_in_flight=100)


def test_neither_a_stream_nor_a_probe_waits_for_inferences() -> None:
    async def test(built: House) -> None:
        built.triton.gate.clear()
        waiting = [asyncio.ensure_future(built.ask()) for _ in range(2)]
        stream = built.channel.stream_stream(STREAM)()
        await stream.write(SMALL)
        await asyncio.sleep(0.2)
        probe = asyncio.ensure_future(built.ask(b"", OTHER))
        await asyncio.sleep(0.2)
        arrived = len(built.triton.messages)
        built.triton.gate.set()
        await stream.done_writing()
        assert arrived == 3
        assert await asyncio.gather(*waiting, probe) == [SMALL, SMALL, b""]

    with_house(test, max_in_flight=1)


def test_answers_a_call_without_a_message() -> None:
    async def test(built: House) -> None:
        call = built.channel.stream_unary(METHOD)()
        await call.done_writing()
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")

    with_house(test)


def test_says_that_triton_is_away_and_is_back_soon() -> None:
    async def test(built: House) -> None:
        await built.ask()
        built.triton.gate.clear()
        waiting = asyncio.create_task(built.ask())
        stream = built.channel.stream_stream(STREAM)()
        await stream.write(SMALL)
        await until(lambda: len(built.triton.messages) == 3)
        await built.triton.stop()
        away = (grpc.StatusCode.UNAVAILABLE, AWAY)
        assert await refusal(waiting) == away
        assert await refusal(stream.read()) == away
        async with asyncio.timeout(1):
            assert await refusal(built.ask()) == away
        built.triton.gate.set()
        await built.triton.start()
        async with asyncio.timeout(2):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    assert await built.ask() == SMALL
                    break
                await asyncio.sleep(0.02)

    with_house(test)


def test_streams_pass_each_message_with_the_time_that_is_left() -> None:
    async def test(built: House) -> None:
        stream = built.channel.stream_stream(STREAM)(timeout=5, metadata=(("key", "secret"),))
        for _ in range(3):
            await stream.write(SMALL)
            assert 3_750_000 < timeout_in(await stream.read()) <= 4_800_000  # gRPC rounds up to three digits
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        assert built.triton.metadata["key"] == "secret"
        await built.forgotten()

    with_house(test)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_stream_that_is_given_up_ends_in_good_order_for_triton(how: str) -> None:
    async def test(built: House) -> None:
        built.triton.gate.clear()
        stream = built.channel.stream_stream(STREAM)(timeout=0.3 if how == "deadline" else None)
        for _ in range(5):
            await stream.write(SMALL)
        await until(lambda: len(built.triton.messages) > 0)
        if how == "cancel":
            stream.cancel()
        else:
            assert (await refusal(stream.read()))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.1)
        assert built.door.in_flight > 0
        built.triton.gate.set()
        await built.forgotten()
        assert built.triton.cancelled == 0
        # gRPC itself may drop what the client had written but the door had not read when the call ended.
        assert 1 <= len(built.triton.messages) <= 5

    with_house(test)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class Late:
    """The context of a call whose deadline has passed."""

    async def read(self) -> bytes:
        return SMALL

    def time_remaining(self) -> float:
        return 0.0

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.AbortError(f"{code.name} {details}")


def test_a_call_that_arrives_too_late_is_not_passed_on() -> None:
    async def test(built: House) -> None:
        handler = built.door.service(type("Details", (), {"method": METHOD})).stream_unary
        with pytest.raises(grpc.aio.AbortError, match="DEADLINE_EXCEEDED the deadline passed"):
            await handler(None, Late())
        assert built.triton.messages == []

    with_house(test)


LIES = [
    (strings(b"honest", b"liar", lie=1), "INPUT_IMAGE[1]: its length says 5 bytes, but 4 follow"),
    (strings(b"liar", lie=2**32 - 5), "INPUT_IMAGE[0]: its length says 4294967295 bytes, but 4 follow"),
    (strings(b"a", b"b", count=3), "INPUT_IMAGE: 2 strings, expected 3 for the shape [3, 1]"),
    (b"\x0b", "Unable to parse request: wire type 3: expected 0, 1, 2 or 5"),
]


@pytest.mark.parametrize(("message", "told"), LIES)
@pytest.mark.parametrize("timeout", [None, 5])
def test_strings_that_are_not_as_long_as_they_say_do_not_reach_triton(
    message: bytes, told: str, timeout: float | None
) -> None:
    async def test(built: House) -> None:
        refused = grpc.StatusCode.INVALID_ARGUMENT, told
        assert await refusal(built.ask(message, timeout=timeout)) == refused
        stream = built.channel.stream_stream(STREAM)(timeout=timeout)
        await stream.write(SMALL)
        assert service_pb2.ModelInferRequest.FromString(await stream.read()).id == "1"
        await stream.write(message)
        assert await refusal(stream.read()) == refused
        await built.forgotten()
        assert not [passed for passed in built.triton.messages if passed.startswith(message)]
        assert await built.ask() == SMALL

    with_house(test)

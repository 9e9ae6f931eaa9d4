"""The gRPC door: it passes calls to Triton and keeps from it that their callers gave up.

A deadline that expires early, or a cancelled call, ends the server of Triton 24.10 with a segmentation fault
in its gRPC handler. Behind the door each call runs in a task of its own, without a deadline, until Triton has
answered. A caller that gives up leaves this task alone. So that nothing is computed for such a caller, the
time that it still waits becomes the request parameter `timeout`, after which our models drop the request.

A request whose strings are not as long as they say is refused here. Triton would refuse other requests with
it. All others pass through as bytes, and so do answers. Metadata, status codes and messages stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
from grpc.aio import EOF, AioRpcError, BaseError  # type: ignore[import-untyped]

from siglip_gateway.doors import AWAY, DRAIN
from siglip_gateway.doors.admission import Admissions, FullError, GoneError
from siglip_gateway.doors.grpc_tensors import check_request, model_of
from siglip_gateway.doors.length_prefixes import TensorError
from siglip_gateway.doors.protobuf_fields import Field
from siglip_gateway.doors.timeout_parameter import now, with_timeout

__all__ = ["MAX_WAITING", "GrpcDoor", "open_door", "serve"]

T = TypeVar("T")

_SERVICE = "/inference.GRPCInferenceService/"
_INFER, _STREAM = f"{_SERVICE}ModelInfer", f"{_SERVICE}ModelStreamInfer"

# gRPC's own words for a connection that is not there or broke. Triton's messages have none of them.
_NO_CONNECTION = re.compile("connect|socket|stream removed|goaway|broken pipe|cancelling all", re.IGNORECASE)
_NOT_A_MESSAGE = "Unable to parse request"  # gRPC's words for bytes that are no message of the method
_EXPIRED = "Request timeout expired"  # Triton's words, and our models', for a request that waited too long
_LATE = "the deadline passed on the way"

MAX_WAITING = 2048
_MAX_OTHERS = 2048  # streams, and calls of other methods than ModelInfer

_LARGEST = 512 * 2**20  # bytes of a request: sixteen times the largest image of the default settings
_MOST_UNREAD = 2**17  # calls; gRPC itself drops those that it has had for 30 s
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", _LARGEST),
    ("grpc.max_send_message_length", -1),  # of what Triton answers, the caller chooses what it takes
    ("grpc.so_reuseport", 1),
    # From 1,000 calls on that no handler has taken yet, gRPC would end further ones with CANCELLED. Here each
    # gets an answer or a refusal that says why.
    ("grpc.server.max_pending_requests", _MOST_UNREAD),
    ("grpc.server.max_pending_requests_hard_limit", _MOST_UNREAD),
    # Connections of hosts that vanished are closed, and callers may ping as often as every 10 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # Triton is on this machine and back within seconds
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # the caller decides what is sent again
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment is not meant for this machine
)


class GrpcDoor(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A handler of every method, which asks Triton.

    Args:
        channel: to Triton.
        max_in_flight: inferences of one model that Triton has at once. Further ones wait here.
        max_waiting: inferences of one model that wait. Further ones are refused with UNAVAILABLE.
    """

    def __init__(self, channel: Any, max_in_flight: int, max_waiting: int = MAX_WAITING) -> None:
        self._channel = channel
        self._triton_infer = channel.unary_unary(_INFER)
        self._infer_handler = grpc.stream_unary_rpc_method_handler(self._infer)
        self._inferences = Admissions(max_in_flight, max_waiting, 2 * MAX_WAITING)
        # Streams, which may stay open for hours, and probes wait for no inference.
        self._others = Admissions(_MAX_OTHERS, 0, _MAX_OTHERS)
        self._sending: set[asyncio.Task[None]] = set()  # a task that nothing refers to may be collected

    def service(self, handler_call_details: Any) -> Any:
        """Choose the handler of a method; ModelStreamInfer is the only one of Triton's that streams."""
        method = handler_call_details.method
        if method == _INFER:
            return self._infer_handler
        if method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.stream_unary_rpc_method_handler(partial(self._other, method))

    @property
    def in_flight(self) -> int:
        """Calls that Triton has not answered; a stream is one."""
        return self._inferences.in_flight + self._others.in_flight

    async def drain(self, seconds: float) -> None:
        """Wait until Triton has answered all calls, those of callers that gave up included."""
        await asyncio.gather(self._inferences.drain(seconds), self._others.drain(seconds))

    async def _infer(self, _requests: AsyncIterator[bytes], context: Any) -> bytes:
        request = await _only_request(context)
        await _refuse_late(context)
        fields = await _checked(request, context)
        request, by_deadline = with_timeout(request, fields, context.time_remaining(), now())
        ask = partial(_ask_in_time, self._triton_infer, request, context)
        admitted = self._inferences.run(model_of(request, fields), ask)
        return await _pass_answer(admitted, context, by_deadline)

    async def _other(self, method: str, _requests: AsyncIterator[bytes], context: Any) -> bytes:
        request = await _only_request(context)
        await _refuse_late(context)
        ask = partial(_ask, self._channel.unary_unary(method), request, context)
        admitted = self._others.run(b"", ask)
        return await _pass_answer(admitted, context, by_deadline=False)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await _refuse_late(context)

        refused: list[str] = []

        async def ask() -> Any:
            call = self._channel.stream_stream(_STREAM)(metadata=_metadata(context))
            # A caller that gives up ends `requests`, which closes the way to Triton in good order. Triton's
            # answers are read to the end.
            sending = asyncio.create_task(_pass_requests(requests, call, context, refused))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
            await _pass_answers(call, context)
            return call

        call = await _or_refuse(self._others.run(b"", ask), context)
        if refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refused[0])
        await _pass_status(call, context, by_deadline=False)


async def _or_refuse(admitted: Coroutine[Any, Any, T], context: Any) -> T:
    """Wait for a call's place and answer.

    Raises:
        grpc.aio.AbortError: the call is refused.
    """
    try:
        return await admitted
    except FullError as full:
        reason = f"Exceeds maximum queue size: {full.count} calls are in progress; try again"
        return await context.abort(grpc.StatusCode.UNAVAILABLE, reason)
    except GoneError:
        return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, _LATE)


async def _only_request(context: Any) -> bytes:
    """Read the request of a unary call.

    Raises:
        grpc.aio.AbortError: there is none; gRPC itself would leave such a call without a status.
    """
    request = await context.read()
    if request is EOF:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    return request


def _ask_in_time(triton: Any, request: bytes, context: Any) -> Coroutine[Any, Any, tuple[Any, bytes]]:
    """Ask Triton as `_ask` does.

    Raises:
        GoneError: the caller has given up, which gRPC has not told yet.
    """
    if _is_late(context):
        raise GoneError
    return _ask(triton, request, context)


async def _ask(triton: Any, request: bytes, context: Any) -> tuple[Any, bytes]:
    """Ask Triton; return the call and its answer, which is empty where the status of the call is an error."""
    call = triton(request, metadata=_metadata(context))
    try:
        return call, await call
    except AioRpcError:  # the call keeps its status, for the caller if it is still there
        return call, b""


async def _pass_answer(
    admitted: Coroutine[Any, Any, tuple[Any, bytes]], context: Any, by_deadline: bool
) -> bytes:
    """Wait for Triton's answer and pass its metadata and status on; `by_deadline` as in `_pass_status`."""
    call, answer = await _or_refuse(admitted, context)
    await _pass_initial_metadata(call, context)
    await _pass_status(call, context, by_deadline)
    return answer


async def _refuse_late(context: Any) -> None:
    """Abort a call whose caller has given up already."""
    if _is_late(context):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, _LATE)


def _is_late(context: Any) -> bool:
    left = context.time_remaining()
    return left is not None and left <= 0


async def _checked(request: bytes, context: Any) -> list[Field]:
    """Find the fields of a request.

    Raises:
        grpc.aio.AbortError: it is refused.
    """
    try:
        return check_request(request)
    except (IndexError, ValueError) as error:
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _refusal(error))


def _refusal(error: Exception) -> str:
    return str(error) if isinstance(error, TensorError) else f"{_NOT_A_MESSAGE}: {error}"


async def _pass_requests(requests: AsyncIterator[bytes], call: Any, context: Any, refused: list[str]) -> None:
    """Pass on the requests of a stream, up to one that is refused, whose error is put into `refused`."""
    with suppress(AioRpcError, BaseError, asyncio.InvalidStateError):  # Triton has ended the stream
        async for request in requests:
            try:
                fields = check_request(request)
            except (IndexError, ValueError) as error:
                refused.append(_refusal(error))
                break
            bounded, _ = with_timeout(request, fields, context.time_remaining(), now())
            await call.write(bounded)
    await call.done_writing()


async def _pass_answers(call: Any, context: Any) -> None:
    with suppress(AioRpcError):  # the call keeps its status
        answer = await call.read()
        with suppress(BaseError):
            await _pass_initial_metadata(call, context)
        while answer is not EOF:
            with suppress(BaseError):  # a caller that has gone does not end the reading
                await context.write(answer)
            answer = await call.read()


async def _pass_initial_metadata(call: Any, context: Any) -> None:
    metadata = tuple(await call.initial_metadata())
    if metadata:
        await context.send_initial_metadata(metadata)


async def _pass_status(call: Any, context: Any, by_deadline: bool) -> None:
    """Give the caller the trailing metadata and the status of Triton's answer.

    Args:
        call: to Triton, complete.
        context: of the caller.
        by_deadline: the request's timeout was made from the caller's deadline.

    Raises:
        grpc.aio.AbortError: the status is an error.
    """
    code, trailing = await call.code(), tuple(await call.trailing_metadata())
    if code is grpc.StatusCode.OK:
        context.set_trailing_metadata(trailing)
        return
    details = await call.details()
    if by_deadline and _EXPIRED in details:
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    if code is grpc.StatusCode.INTERNAL and details == _NOT_A_MESSAGE:
        code = grpc.StatusCode.INVALID_ARGUMENT
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.search(details):
        details = AWAY
    await context.abort(code, details, trailing)


def _metadata(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """The caller's metadata without what gRPC itself sets for each connection."""
    return tuple(
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key != "user-agent" and not key.startswith("grpc-")
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Keep out of the log that an answer could not be sent, because its caller had gone."""
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


@asynccontextmanager
async def open_door(
    listen: str, triton: str, max_in_flight: int, max_waiting: int = MAX_WAITING
) -> AsyncIterator[tuple[GrpcDoor, Any, int]]:
    """Listen at `listen`; yield the door, its running `grpc.aio.Server` and its port.

    The limits are those of `GrpcDoor`.

    Raises:
        OSError: the address cannot be bound.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    async with grpc.aio.insecure_channel(triton, options=_CHANNEL_OPTIONS) as channel:
        door = GrpcDoor(channel, max_in_flight, max_waiting)
        server = grpc.aio.server(handlers=[door], options=_SERVER_OPTIONS)
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"{listen} cannot be bound") from error
        await server.start()
        try:
            yield door, server, port
        finally:
            await server.stop(0)


async def serve(listen: str, triton: str, max_in_flight: int) -> None:
    """Serve until SIGTERM or SIGINT; running calls then complete within `DRAIN` seconds.

    Args:
        listen: `host:port`, which other processes of this user may share.
        triton: `host:port` of Triton's gRPC.
        max_in_flight: see `GrpcDoor`.

    Raises:
        OSError: the address cannot be bound.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_door(listen, triton, max_in_flight) as (door, server, _):
        await stop.wait()
        end = time.monotonic() + DRAIN
        await server.stop(DRAIN)
        await door.drain(max(end - time.monotonic(), 0))

"""A gRPC server that stands for Triton: it echoes messages, and records what reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc  # type: ignore[import-untyped]

__all__ = ["METHOD", "STREAM", "UNLIMITED", "RecordingTriton"]

METHOD = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass
class RecordingTriton(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers each message with itself as long as `gate` is open.

    Attributes:
        port: that of the loopback interface, set by `start`.
        refusal: status and message with which every call ends, or None.
        messages: those that arrived.
        metadata: that of the last call.
        deadlines: seconds that each call had left, None without a limit.
        cancelled: calls whose caller gave up.
        answered: calls that ended in good order.
    """

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    refusal: tuple[grpc.StatusCode, str] | None = None
    messages: list[bytes] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    deadlines: list[float | None] = field(default_factory=list)
    cancelled: int = 0
    answered: int = 0

    async def start(self) -> None:
        """Listen, on the port of an earlier start if there was one."""
        self._server = grpc.aio.server(handlers=[self], options=UNLIMITED)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """End at once, with whatever is in flight."""
        await self._server.stop(0)

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        try:
            await self._begin(context)
            return await self._echo(request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            await self._begin(context)
            async for request in requests:
                await context.write(await self._echo(request, context))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.answered += 1

    async def _begin(self, context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        self.deadlines.append(context.time_remaining())
        await context.send_initial_metadata((("first", "yes"),))
        context.set_trailing_metadata((("of-triton", "yes"), ("of-triton-bin", b"\0\xff")))

    async def _echo(self, request: bytes, context: Any) -> bytes:
        self.messages.append(request)
        await self.gate.wait()
        if self.refusal:
            await context.abort(*self.refusal, (("of-refusal", "yes"),))
        self.answered += context.code() is None
        return request

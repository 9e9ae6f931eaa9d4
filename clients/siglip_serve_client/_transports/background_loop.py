"""Performs operations in an event loop, which costs less for each request in flight than a thread does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.requests import Call, Describe, Operation, Pause, Register, Step, Work
from siglip_serve_client._transports.http_transport import AsyncTransport, Endpoint, connect_async
from siglip_serve_client.errors import ClientError

__all__ = ["Engine", "Outcome", "Progress", "ThreadedEngine"]

T = TypeVar("T")
Outcome: TypeAlias = NDArray[np.float32] | ClientError | OSError
Progress: TypeAlias = Callable[[int], object]


class Engine:
    """Runs operations in the running event loop; `connections` are those that HTTP keeps open."""

    def __init__(self, endpoint: Endpoint, connections: int) -> None:
        self._endpoint, self._connections = endpoint, connections
        self._connected: AsyncTransport | None = None

    async def run(self, operation: Operation[T]) -> T:
        """What the operation returns."""
        try:
            step = next(operation)
            while True:
                try:
                    result = await self._perform(step)
                except BaseException as error:  # noqa: BLE001 - the operation raises what it does not handle
                    step = operation.throw(error)
                else:
                    step = operation.send(result)
        except StopIteration as end:
            return end.value

    async def outcome(self, operation: Operation[NDArray[np.float32]]) -> Outcome:
        """What the operation returns, or the error that concerns it alone."""
        try:
            return await self.run(operation)
        except (ClientError, OSError) as error:
            return error

    async def close(self) -> None:
        """Close the connections."""
        connected, self._connected = self._connected, None
        if connected is not None:
            await connected.close()

    async def _perform(self, step: Step) -> Any:
        if isinstance(step, Work):
            return await asyncio.to_thread(step.function)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if self._connected is None:  # here and not earlier: connections belong to the running loop
            self._connected = connect_async(self._endpoint, self._connections)
        if isinstance(step, Call):
            return await self._connected.infer(step)
        if isinstance(step, Describe):
            return await self._connected.describe(step)
        if isinstance(step, Register):
            return await self._connected.register(step)
        return await self._connected.withdraw(step)


class ThreadedEngine:
    """An engine in a loop in a thread of its own, for callers that wait; a context manager.

    Args:
        concurrency: operations that run at the same time; others wait for their turn.
    """

    def __init__(self, endpoint: Endpoint, concurrency: int) -> None:
        self._engine = Engine(endpoint, concurrency)
        self._turns = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="siglip-serve-client", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, operation: Operation[NDArray[np.float32]]) -> Future[Outcome]:
        """Begin an operation when it is its turn."""
        return asyncio.run_coroutine_threadsafe(self._in_turn(operation), self._loop)

    async def _in_turn(self, operation: Operation[NDArray[np.float32]]) -> Outcome:
        async with self._turns:
            return await self._engine.outcome(operation)

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._engine.close()
        await self._loop.shutdown_default_executor()

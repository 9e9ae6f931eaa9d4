"""Many operations at the same time, up to a limit. Each has its own result or error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.link import Outcome
from siglip_serve_client.errors import ClientError

__all__ = ["Turns"]

S = TypeVar("S")


class Turns:
    """Lets `concurrency` operations of an event loop run at the same time. The others wait for their turn."""

    def __init__(self, concurrency: int) -> None:
        self._free = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(
        self, operation: Callable[[S], Awaitable[NDArray[np.float32]]], item: S
    ) -> asyncio.Task[Outcome]:
        """Begin an operation on an item when it is its turn."""
        task = asyncio.create_task(self.outcome(operation, item))
        self._remember(task)
        return task

    async def outcome(self, operation: Callable[[S], Awaitable[NDArray[np.float32]]], item: S) -> Outcome:
        """The result of an operation, or the error that concerns its item alone, to be run as a task."""
        self._remember(asyncio.current_task())
        async with self._free:
            try:
                return await operation(item)
            except (ClientError, OSError) as error:
                return error

    async def cancel(self) -> None:
        """Cancel all operations, and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _remember(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None and task not in self._tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

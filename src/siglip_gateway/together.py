"""Single inputs of several requests, sent to Triton together while it is busy.

A request to Triton costs the gateway, the gRPC door and Triton the same whether it has one row or eight. An
input goes at once while few requests are in flight. Otherwise it waits until one ends, and then goes with
others that waited. So an idle server adds no latency.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.errors import DeadlineError, InvalidInputError, ModelDiedError

__all__ = ["Together"]

R = TypeVar("R", bound=str | bytes)

_CALLS = 8  # in flight, from which on inputs wait. Together with other workers they keep all decoders busy
_BYTES = 2**20  # of the inputs of one call: large pictures are decoded in parallel, not one after the other
# What one input may do to its neighbours. Each is then asked for alone.
_OF_ONE = (InvalidInputError, ModelDiedError)


@dataclass(eq=False)
class _Row(Generic[R]):
    value: R
    answer: asyncio.Future[NDArray[np.float32]]
    since: float = field(default_factory=time.monotonic)


class Together(Generic[R]):
    """Embeds inputs that may share a request.

    Args:
        send: embeds inputs in one request: [N, D] float32.
        most: inputs of one request.
        patience: seconds that an input waits for its request.
    """

    def __init__(
        self,
        send: Callable[[Sequence[R]], Coroutine[Any, Any, NDArray[np.float32]]],
        most: int,
        patience: float,
    ) -> None:
        self._send, self._most, self._patience = send, most, patience
        self._waiting: deque[_Row[R]] = deque()
        self._calls: set[asyncio.Task[NDArray[np.float32]]] = set()

    async def embed(self, value: R) -> NDArray[np.float32]:
        """The vector [1, D] float32 of an input.

        Raises:
            ClientError: as `send` does for this input alone, or it waited for too long.
        """
        row = _Row(value, asyncio.get_running_loop().create_future())
        self._waiting.append(row)
        self._go_on()
        return await row.answer

    def _go_on(self) -> None:
        while self._waiting and len(self._calls) < _CALLS:
            rows = self._take()
            if rows:
                self._start(rows)

    def _take(self) -> list[_Row[R]]:
        """The next rows that go together. Those that waited for too long are answered."""
        rows: list[_Row[R]] = []
        size, now = 0, time.monotonic()
        while self._waiting and len(rows) < self._most:
            row = self._waiting[0]
            size += len(row.value)
            if rows and size > _BYTES:
                break
            self._waiting.popleft()
            if row.answer.done():  # its caller has gone
                size -= len(row.value)
            elif now - row.since > self._patience:
                row.answer.set_exception(
                    DeadlineError(f"the inference server was busy for {self._patience:g} s")
                )
            else:
                rows.append(row)
        return rows

    def _start(self, rows: Sequence[_Row[R]]) -> None:
        call = asyncio.ensure_future(self._send([row.value for row in rows]))
        self._calls.add(call)
        call.add_done_callback(partial(self._ended, rows))

    def _ended(self, rows: Sequence[_Row[R]], call: asyncio.Task[NDArray[np.float32]]) -> None:
        self._calls.discard(call)
        error = asyncio.CancelledError() if call.cancelled() else call.exception()  # cancelled: the loop ends
        if isinstance(error, _OF_ONE) and len(rows) > 1:
            for row in rows:
                self._start([row])
        else:
            for index, row in enumerate(rows):
                if row.answer.done():  # its caller has gone
                    continue
                if error is None:
                    row.answer.set_result(call.result()[index : index + 1])
                else:
                    row.answer.set_exception(error)
        self._go_on()

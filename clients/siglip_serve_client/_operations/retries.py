"""Send requests again that a busy server refused or a server that is being started again did not answer.

Every request may be sent twice. Embeddings, labels, maps and teams are functions of their inputs, and the
state of a fit travels with the request, so a server keeps nothing of an earlier one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from siglip_serve_client._operations.requests import CONTROL_TIMEOUT, Answer, Call, Transport
from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    ModelDiedError,
    RestartingError,
    UnavailableError,
    UnreachableError,
)

__all__ = ["RESTART_WAIT", "PersistentTransport"]

T = TypeVar("T")
RESTART_WAIT = 120.0  # seconds that clients wait for a lost server, unless told otherwise
# Seconds of the pauses after which a busy server is asked again; each pause is drawn from half of it to all.
_BACK_OFF = (0.2, 0.6, 2.0, 6.0)
# The same for a server that is being started again. It is asked until it answers, so the last one repeats.
_RESTART_BACK_OFF = (0.2, 0.4, 0.7, 1.0)
# Seconds for an address that accepted a connection and closed it, but never answered: it may be another
# program's.
_UNPROVEN_WAIT = 30.0
# Seconds for a model that is loaded again. The request itself may be what ends the model's process.
_MODEL_WAIT = 60.0


class PersistentTransport:
    """A transport that repeats requests within their timeouts.

    - A busy server is asked five times, and so is one that refused a request because of another caller's.
    - A request that a dead model process failed is repeated for a minute.
    - A server that answered before is waited for when it cannot be reached or breaks a connection. At an
      address that never answered, a refused connection is an error at once.

    Args:
        transport: sends the requests.
        restart_wait: seconds for which a server that was lost is waited for, by all requests together.
    """

    def __init__(self, transport: Transport, restart_wait: float) -> None:
        self._transport = transport
        self._restart_wait = restart_wait
        self._answered = False  # the server did, at any time
        self._accepted = False  # the address took a connection
        self._lost_since: float | None = None

    async def infer(self, call: Call) -> Answer:
        """Send a request and return the model's answer."""
        return await self._persist(
            call.model, call.timeout, lambda left: self._transport.infer(replace(call, timeout=left))
        )

    async def parameters(self, model: str, timeout: float) -> dict[str, str]:
        """The string parameters in the configuration of a model."""
        return await self._persist(model, timeout, lambda left: self._transport.parameters(model, left))

    async def register(self, name: str, size: int) -> None:
        """Let the server know a region of shared memory."""
        await self._persist(
            "shared memory", CONTROL_TIMEOUT, lambda _left: self._transport.register(name, size)
        )

    async def withdraw(self, name: str) -> None:
        """Let the server forget a region. This is not repeated: a server that was restarted knows none."""
        await self._transport.withdraw(name)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def _persist(self, what: str, timeout: float, send: Callable[[float], Awaitable[T]]) -> T:
        """Send a request until it is answered, refused or late.

        Raises:
            ClientError: the server refused the request, failed, or did not answer.
        """
        deadline = time.monotonic() + timeout
        attempts = _Attempts()
        last: ClientError | None = None
        while True:
            try:
                answer = await send(max(deadline - time.monotonic(), 0.001))
            except ClientError as error:
                # The time was over in the middle of an attempt: how the one before it failed says more.
                is_late = last is not None and isinstance(error, DeadlineError)
                pause = 0.0 if is_late else attempts.pause(error, self._wait(error))
                if pause is None:
                    raise
                last = last if is_late else error
            else:
                self._note_answer()
                return answer
            await asyncio.sleep(min(pause, max(deadline - time.monotonic(), 0)))
            if is_late or time.monotonic() >= deadline:
                if isinstance(last, ModelDiedError | UnreachableError):
                    raise last
                raise DeadlineError(f"{what} did not answer within {timeout:g} s: {last}") from last

    def _note_answer(self) -> None:
        self._answered, self._lost_since = True, None

    def _wait(self, error: ClientError) -> float:
        """Seconds for which the server is still waited for after this error."""
        if isinstance(error, ModelDiedError):
            self._note_answer()
            return min(_MODEL_WAIT, self._restart_wait)
        if not isinstance(error, RestartingError | UnreachableError):
            if not isinstance(error, DeadlineError):
                self._note_answer()
            return 0.0
        now = time.monotonic()
        self._accepted |= isinstance(error, RestartingError)
        self._lost_since = self._lost_since or now
        longest = self._restart_wait if self._answered else _UNPROVEN_WAIT if self._accepted else 0.0
        return min(longest, self._restart_wait) - (now - self._lost_since)


class _Attempts:
    """The pauses between the attempts of one request."""

    def __init__(self) -> None:
        self._busy, self._restarting = 0, 0
        self._died_since: float | None = None

    def pause(self, error: ClientError, wait: float) -> float | None:
        """Seconds until the next attempt, or None if there is none.

        Args:
            error: of the attempt before.
            wait: seconds for which the server is still waited for.
        """
        if type(error) is UnavailableError:
            self._busy += 1
            return _drawn(_BACK_OFF[self._busy - 1]) if self._busy <= len(_BACK_OFF) else None
        if not isinstance(error, ModelDiedError | RestartingError | UnreachableError):
            return None
        if isinstance(error, ModelDiedError):
            now = time.monotonic()
            self._died_since = self._died_since or now
            wait -= now - self._died_since
        if wait <= 0:
            return None
        self._restarting += 1
        return _drawn(_RESTART_BACK_OFF[min(self._restarting, len(_RESTART_BACK_OFF)) - 1])


def _drawn(longest: float) -> float:
    return random.uniform(longest / 2, longest)

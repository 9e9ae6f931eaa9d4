"""Protection of Triton: keys, turns, and limits of bodies, before a request costs anything."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from siglip_gateway.refusals import Refusal

__all__ = ["Keys", "Turns", "read_body"]

T = TypeVar("T")

# Headers in which the clients of the dialects send a key, besides `Authorization: Bearer`.
_HEADERS = (
    "api-key",
    "x-api-key",
    "x-cohere-api-key",
    "x-openai-api-key",
    "x-jinaai-api-key",
    "x-weaviate-api-key",
)
_DRAINED = 8  # times the largest body, which is read and dropped so that the caller reads the refusal


class Keys:
    """The keys that let a caller in. Without any, every caller is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Mapping[str, str]) -> None:
        """Check the key of a request. The time this takes does not depend on the key.

        Raises:
            Refusal: 401, it has no key or a wrong one.
        """
        if not self._digests:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers[name] for name in _HEADERS if name in headers]
        given += [bearer.strip()] if scheme.lower() == "bearer" else []
        right = False
        for key in given:
            digest = hashlib.sha256(key.encode()).digest()
            for known in self._digests:
                right |= hmac.compare_digest(digest, known)
        if not right:
            problem = "the key is not valid" if any(given) else "a key is needed"
            hint = "send it as `Authorization: Bearer KEY`, or in the header api-key or x-api-key"
            raise Refusal(401, f"{problem}: {hint}", code="invalid_api_key")


class Turns:
    """Lets `running` requests work at a time. Others wait, at most `waiting` of them.

    Work that has begun is never cancelled: a caller that gives up leaves it to its end, because a cancelled
    request can end Triton.
    """

    def __init__(self, running: int, waiting: int, timeout: float) -> None:
        self._free = asyncio.Semaphore(running)
        self._most_waiting, self._timeout = waiting, timeout
        self._work: set[asyncio.Task[Any]] = set()
        self.running = 0
        self.waiting = 0

    async def take(self) -> None:
        """Wait for a turn. Each turn is ended with `give`, or taken over by `finish`.

        Raises:
            Refusal: 429, too many wait, or 503, the turn did not come in time.
        """
        if self._free.locked() and self.waiting >= self._most_waiting:
            raise Refusal(429, "too many requests wait; try again later", code="overloaded", retry_after=1)
        if not self._free.locked():  # no wait, and so no timer
            await self._free.acquire()
            self.running += 1
            return
        self.waiting += 1
        try:
            await asyncio.wait_for(self._free.acquire(), self._timeout)
        except TimeoutError:
            raise Refusal(
                503, "the server is too busy; try again later", code="overloaded", retry_after=5
            ) from None
        finally:
            self.waiting -= 1
        self.running += 1

    def give(self) -> None:
        """End a turn."""
        self.running -= 1
        self._free.release()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, which runs to its end if the caller gives up. The turn ends with it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def drain(self, timeout: float) -> None:
        """Wait until all work has ended."""
        if self._work:
            await asyncio.wait(self._work, timeout=timeout)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        self.give()
        if not task.cancelled():
            task.exception()  # a caller that gave up does not read it


async def read_body(request: Request, most: int, timeout: float) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 413, it is too large, 415, it is compressed, or 408, it does not arrive in time.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed; send it as it is", code="unsupported_encoding")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    parts.append(chunk)
                else:
                    parts.clear()
                    if size > _DRAINED * most:
                        break
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {timeout:g} s", code="timeout") from None
    if size > most:
        raise Refusal(413, f"the body has more than {most} bytes", code="body_too_large")
    return b"".join(parts)

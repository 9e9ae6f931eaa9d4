"""An event loop in a thread, in which `Client` runs its operations while its callers wait."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from siglip_serve_client._operations.link import Link

__all__ = ["BackgroundLoop"]

T = TypeVar("T")
_END_TIMEOUT = 5.0  # seconds for the end of the loop


class BackgroundLoop:
    """The loop of all clients of this process, from their first request to the end of the process.

    They share one loop, because gRPC wakes every loop of a process for each event of any of them.
    """

    _lock = threading.RLock()  # garbage collection inside of it may close a client
    _running: BackgroundLoop | None = None

    @classmethod
    def of(cls, link: Link) -> BackgroundLoop:
        """The running loop, which closes this link when it ends."""
        with cls._lock:
            if cls._running is None:
                cls._running = cls()
            cls._running._links.add(link)
            return cls._running

    @classmethod
    def close_later(cls, link: Link) -> None:
        """Begin to close a link, if it was ever used."""
        with cls._lock:
            if cls._running is not None and link in cls._running._links:
                cls._running.submit(link.close())

    def __init__(self) -> None:
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._held = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="siglip-serve-client", daemon=True
        )
        self._thread.start()

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation and return its result. An interrupted wait cancels it."""
        future = self.submit(operation)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, operation: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin an operation, without waiting for its end."""
        return asyncio.run_coroutine_threadsafe(operation, self._loop)

    def finish(self, operation: Coroutine[Any, Any, object]) -> None:
        """Run an operation to its end.

        Garbage collection may call this in the loop's own thread, where a wait would never end: there the
        operation is only begun.
        """
        if self._loop.is_closed():  # the process ends
            operation.close()
        elif threading.current_thread() is self._thread:
            self.submit(operation)
        else:
            self.run(operation)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the loop running, also where this process forks."""
        with self._lock:
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    async def _is_idle(self) -> bool:
        return not self._held and len(asyncio.all_tasks()) == 1

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in list(self._links):
            await link.disconnect()
        await self._loop.shutdown_default_executor()

    def end(self) -> None:
        """Cancel all operations, close all connections, and end the thread."""
        with suppress(TimeoutError):  # a server that does not answer
            self.submit(self._close()).result(_END_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_TIMEOUT)
        self._loop.close()


def _at_exit() -> None:
    loop, BackgroundLoop._running = BackgroundLoop._running, None
    if loop is not None:
        loop.end()


def _before_fork() -> None:
    """End a loop that is idle: the child would have no thread for it, and gRPC no way to recover.

    Clients connect again with their next request, in the parent and in the child. A loop at work is left to
    the parent, and then gRPC does not work in the child.
    """
    BackgroundLoop._lock.acquire()
    loop = BackgroundLoop._running
    if (
        loop is not None
        and threading.current_thread() is not loop._thread
        and loop.submit(loop._is_idle()).result()
    ):
        _at_exit()


def _after_fork_in_child() -> None:
    BackgroundLoop._running = None
    BackgroundLoop._lock.release()


atexit.register(_at_exit)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=BackgroundLoop._lock.release,
    after_in_child=_after_fork_in_child,
)

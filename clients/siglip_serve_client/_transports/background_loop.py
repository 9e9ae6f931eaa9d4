"""An event loop in a thread, in which `Client` runs its operations while its callers wait."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["BackgroundLoop"]

T = TypeVar("T")


class BackgroundLoop:
    """A running loop; `shared` gives the one that all clients of a process use.

    One loop for all, since gRPC wakes every loop of a process for each event of any of them.
    """

    _lock = threading.RLock()  # garbage collection inside of it may close a client
    _running: dict[int, BackgroundLoop] = {}  # noqa: RUF012 - by process: a forked one has no thread

    @classmethod
    def shared(cls) -> BackgroundLoop:
        """The loop of this process; the first call starts it."""
        with cls._lock:
            if os.getpid() not in cls._running:
                cls._running[os.getpid()] = cls()
            return cls._running[os.getpid()]

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="siglip-serve-client", daemon=True
        )
        self._thread.start()
        atexit.register(self._stop)

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """What the operation returns or raises; an interrupted wait cancels it."""
        future = self.submit(operation)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, operation: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin an operation, without waiting for its end."""
        return asyncio.run_coroutine_threadsafe(operation, self._loop)

    def finish(self, operation: Coroutine[Any, Any, T]) -> None:
        """Run an operation to its end.

        Garbage collection may call this in the loop's own thread, where a wait would never end: there the
        operation is only begun.
        """
        if threading.current_thread() is self._thread:
            self.submit(operation)
        else:
            self.run(operation)

    def _stop(self) -> None:
        if os.getpid() != self._process:  # a forked process shares the loop's files, but has not its thread
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._loop.close()

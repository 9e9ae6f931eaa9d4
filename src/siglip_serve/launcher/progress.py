"""Notice processes that make no progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple

import psutil

from siglip_serve.launcher.log import size

__all__ = ["Progress", "call_watched"]

_INTERVAL = 0.25
_PAUSE = 0.5  # between two measurements, which read a file of each process
# An idle model process takes less than 0.1% of a core.
_LEAST_SECONDS, _LEAST_SHARE = 0.05, 0.02
# A process of low priority may get less than that on a busy machine, but it is always ready to run.
_BUSY = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class _Work(NamedTuple):
    pids: frozenset[int]
    cpu: float  # seconds
    read: int  # bytes from disks
    log: int  # bytes

    def follows(self, earlier: _Work, idle: float, share: float) -> bool:
        """Compare with the work of some `idle` seconds ago; less than `share` of a core is none."""
        others = self.pids, self.read, self.log
        least = max(_LEAST_SECONDS, share * idle)
        return others != (earlier.pids, earlier.read, earlier.log) or self.cpu - earlier.cpu > least


class Progress:
    """Measures for how long some processes have done nothing.

    New or ended processes are work, and so are CPU time, bytes read from a disk, a wait for a disk or for a
    core, and new lines of the log.

    Args:
        processes: lists them.
        log_file: the log whose growth counts.
        least_share: of a core, below which CPU time does not count.
    """

    def __init__(
        self,
        processes: Callable[[], Iterable[psutil.Process]],
        log_file: Path | None = None,
        least_share: float = _LEAST_SHARE,
    ) -> None:
        self._processes = processes
        self._log_file = log_file
        self._least_share = least_share
        self._idle = 0.0
        self._looked = time.monotonic()
        self._work = self._measure()[0]

    def idle(self) -> float:
        """Measure for how many seconds nothing was done, as far as this method was called in them.

        A pause between two calls counts as one second at most. If the whole machine was suspended, the
        processes have no part in it.
        """
        now = time.monotonic()
        if now - self._looked < _PAUSE:
            return self._idle
        self._idle += min(now - self._looked, 1.0)
        self._looked = now
        work, waits = self._measure()
        if waits or work.follows(self._work, self._idle, self._least_share):
            self._work, self._idle = work, 0.0
        return self._idle

    def _measure(self) -> tuple[_Work, bool]:
        pids, cpu, read, waits = set(), 0.0, 0, False
        for process in self._processes():
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    waits |= process.status() in _BUSY
                read += process.io_counters().read_bytes
            except psutil.Error:
                continue
            pids.add(process.pid)
            cpu += times.user + times.system
        return _Work(frozenset(pids), cpu, read, size(self._log_file) if self._log_file else 0), waits


def call_watched(function: Callable[[], None], check: Callable[[], None]) -> None:
    """Call `function` in a thread of its own, and `check` every quarter of a second until it has returned.

    Raises:
        Exception: from `function`; or from `check`, which leaves `function` to its thread.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - for the caller, who raises it
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    while not wait([outcome], timeout=_INTERVAL).done:
        check()
    outcome.result()

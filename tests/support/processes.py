"""Which processes still run."""

import time
from collections.abc import Iterable

import psutil


def still_running(processes: Iterable[psutil.Process], timeout: float = 0.0) -> list[psutil.Process]:
    """List those of `processes` that still run after `timeout` seconds.

    A process that has ended is not listed, even if its parent has not asked for its exit status yet. Orphans
    become children of the system's first process, which may take its time or, in containers, never ask.
    """
    deadline = time.monotonic() + timeout
    left = [process for process in processes if _runs(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if _runs(process)]
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False

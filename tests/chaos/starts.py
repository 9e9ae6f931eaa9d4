"""Starts on a busy machine, in some of which a model process is frozen for a while."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from tests.chaos.context import Context
from tests.chaos.processes import HELPER, TRITON, family
from tests.chaos.report import Report, percentile
from tests.chaos.server import ChaosError, Target

__all__ = ["busy", "run", "tell"]

_FROZEN = 3.0  # seconds


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tell(report: Report, name: str, seconds: list[float], failures: list[str]) -> None:
    """Add the lines of some starts."""
    count = len(seconds) + len(failures)
    longest = max(seconds, default=0)
    text = f"{len(seconds)} served, median {percentile(seconds, 0.5):.1f} s, longest {longest:.1f} s"
    report.add("starts", f"{count} starts {name}", text, f"{count} served", bool(failures) or not count)
    for failure in failures:
        report.find("starts", "start", failure)


async def run(context: Context) -> None:
    """Start with busy processes, and start with a model process that is frozen for a while."""
    await asyncio.to_thread(_run, context)


def _run(context: Context) -> None:
    options = context.options
    end = time.monotonic() + options.starts_minutes * 60
    with busy(options.busy):
        _some(context, f"with {options.busy} busy processes", options.starts, False, end)
    frozen = f"in which a process was frozen for {_FROZEN:.0f} s"
    _some(context, frozen, options.frozen_starts, True, end)


def _some(context: Context, name: str, count: int, freeze: bool, end: float) -> None:
    rng = random.Random(f"starts:{context.options.seed}:{freeze}")
    seconds: list[float] = []
    failures: list[str] = []
    for number in tqdm(range(count), desc=f"starts {name}", unit="start"):
        if time.monotonic() > end:
            context.report.find("starts", "cut", f"{number} of {count} starts {name}")
            break
        target = Target(context.recipe, context.folder / f"start-{number}-{int(freeze)}.server.log")
        frozen = _freeze_later(rng) if freeze else None
        begin = time.monotonic()
        try:
            target.start()
            seconds.append(time.monotonic() - begin)
        except ChaosError as error:
            text = str(error)
            said = text if len(text) < 600 else f"{text[:200]} ... {text[-400:]}"
            failures.append(f"start {number} failed after {time.monotonic() - begin:.0f} s: {said}")
        finally:
            target.stop()
            if frozen is not None:
                frozen.join()
    if count:
        tell(context.report, name, seconds, failures)


def _models() -> list[int]:
    """Process ids of the model processes below this process."""
    members = family(os.getpid()).values()
    return sorted(m.pid for m in members if m.kind != TRITON and not m.kind.endswith((HELPER, " door")))


def _freeze_later(rng: random.Random) -> threading.Thread:
    """Freeze a random model process at a random moment of the start that follows."""
    delay, choice = rng.uniform(0.0, 4.0), rng.random()

    def freeze() -> None:
        deadline = time.monotonic() + 60
        while not _models() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delay)
        if models := _models():
            pid = models[int(choice * len(models))]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(_FROZEN)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=freeze, daemon=True)
    thread.start()
    return thread

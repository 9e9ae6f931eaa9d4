"""Processes that do nothing are told from those that work."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from siglip_serve.launcher import progress
from siglip_serve.launcher.progress import Progress, call_watched


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.01)


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def idle_after(measured: Progress, seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        measured.idle()
        time.sleep(0.05)
    return measured.idle()


def test_sleeping_is_no_progress(sleeper: psutil.Process) -> None:
    assert idle_after(Progress(lambda: [sleeper]), 1.0) == pytest.approx(1.0, abs=0.3)


def test_computing_is_progress_even_if_a_little(sleeper: psutil.Process) -> None:
    """A twentieth of a core, as on a machine with many busy processes."""
    code = (
        "import time\n"
        "while True:\n"
        "    end = time.process_time() + 0.01\n"
        "    while time.process_time() < end: pass\n"
        "    time.sleep(0.2)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as busy:
        measured = Progress(lambda: [sleeper, psutil.Process(busy.pid)])
        time.sleep(0.5)
        most = max(idle_after(measured, 0.2) for _ in range(15))
        busy.kill()
    assert most < 2.5


def test_new_processes_and_lines_are_progress(sleeper: psutil.Process, tmp_path: Path) -> None:
    log = tmp_path / "log"
    present: list[psutil.Process] = []
    measured = Progress(lambda: present, log)
    assert idle_after(measured, 0.3) > 0.2
    present.append(sleeper)
    assert measured.idle() == 0.0
    assert idle_after(measured, 0.3) > 0.2
    log.write_text("a line\n")
    assert measured.idle() == 0.0


def test_a_suspended_machine_is_not_taken_for_idle_processes(
    sleeper: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Progress(lambda: [sleeper])
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert measured.idle() == 1.0


def test_processes_that_have_ended_are_left_out(sleeper: psutil.Process) -> None:
    measured = Progress(lambda: [sleeper])
    sleeper.kill()
    sleeper.wait()
    assert measured.idle() == 0.0
    assert idle_after(measured, 0.3) > 0.2


def test_checks_until_the_function_returns() -> None:
    done = threading.Event()
    checks = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            done.set()

    call_watched(lambda: _wait(done), check)
    assert len(checks) >= 3


def test_raises_the_functions_error_and_that_of_the_check() -> None:
    def fails() -> None:
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        call_watched(fails, lambda: None)
    with pytest.raises(TimeoutError, match="too late"):
        call_watched(lambda: time.sleep(1), fails)


def _wait(event: threading.Event) -> None:
    event.wait(10)

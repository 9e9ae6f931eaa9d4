"""The driver of one machine, with worker processes that start, refuse and end as a test asks them to."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from siglip_serve.bulk import backlog, child, local
from siglip_serve.bulk.job import Job
from siglip_serve.bulk.local import run_local
from siglip_serve.bulk.progress import Progress, Summary
from siglip_serve.bulk.units import Unit
from siglip_serve.config import Settings
from siglip_serve.errors import ServerStartError, SettingsError

# A worker of the same protocol that computes nothing. Its checkpoint says how it behaves.
PROGRAM = """
import os, sys
from multiprocessing.connection import Connection
from pathlib import Path
from siglip_serve.bulk.worker import Finished
from siglip_serve.bulk.worker_process import Ready, Refused
channel = Connection(int(sys.argv[2]))
job = channel.recv().job
with Path(job.output, "starts").open("a") as file:
    file.write(".")
way = job.settings.checkpoint
if way == "ends while it starts":
    os._exit(1)
if way == "refuses":
    channel.send(Refused("no such tower"))
channel.send(Ready("a worker"))
held = []
while (unit := channel.recv()) is not None:
    held.append(unit)
    if unit.source == "deadly":
        os._exit(1)
    channel.send(Finished(held.pop(0).name, rows=1))
"""


def drive(folder: Path, way: str, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> Summary:
    monkeypatch.setattr(child, "_PROGRAM", PROGRAM)
    monkeypatch.setattr(local, "_PAUSE", 0.0)
    monkeypatch.setattr(backlog, "_MOST_DEATHS", 3)
    units = [Unit(f"u{number}", "tar", source) for number, source in enumerate(sources)]
    progress = Progress(len(units), 0, "none")
    with redirect_stderr(io.StringIO()):
        run_local(Job(Settings(checkpoint=way), str(folder), device="cpu"), units, progress)
    return progress.close()


def test_a_unit_that_ends_its_worker_is_given_up_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drive(tmp_path, "", ["a", "deadly", "b", "c", "d"], monkeypatch)
    assert found.units == 4
    assert found.lost == {"u1": "deadly: the process that worked on it has ended, 3 times"}
    assert found.restarts == 3


def test_a_worker_that_does_not_start_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerStartError, match="cpu: its process ended 4 times while it started"):
        drive(tmp_path, "ends while it starts", ["a"], monkeypatch)
    assert (tmp_path / "starts").read_text() == "...."


def test_a_worker_that_refuses_ends_the_job_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="no such tower"):
        drive(tmp_path, "refuses", ["a"], monkeypatch)
    assert (tmp_path / "starts").read_text() == "."


def test_a_process_ends_with_any_of_its_threads() -> None:
    program = (
        "import threading, time; from siglip_serve.bulk.worker import end_with_any_thread; "
        "end_with_any_thread(); threading.Thread(target=lambda: 1 / 0, daemon=True).start(); time.sleep(60)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr

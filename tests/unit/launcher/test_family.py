"""The processes of a server."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from siglip_serve.launcher.family import ModelProcesses, Stopped, family, mapped_files

MODEL = "siglip_vision_model"


def test_a_process_that_does_not_run_has_no_family() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert family(process.pid) == []


def test_knows_a_model_process_although_the_system_tells_no_more_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "triton_python_backend_stub"
    stub.write_bytes(Path("/bin/sh").read_bytes())
    stub.chmod(0o755)
    with subprocess.Popen([str(stub), "-c", "sleep 60; :", f"/{MODEL}/"]) as process:
        find = ModelProcesses([MODEL])
        while process.pid not in find(family(os.getpid())):
            time.sleep(0.01)

        def refuse(_: psutil.Process) -> list[str]:
            raise psutil.AccessDenied(process.pid)

        monkeypatch.setattr(psutil.Process, "cmdline", refuse)
        assert find(family(os.getpid()))[process.pid] == MODEL
        children = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert process.pid not in find(family(os.getpid()))
        for child in children:
            child.kill()


def test_a_child_of_a_model_process_is_not_one(tmp_path: Path) -> None:
    """Until it replaces its program, it has the name and the arguments of its parent."""
    stub = tmp_path / "triton_python_backend_stub"
    stub.write_bytes(Path("/bin/sh").read_bytes())
    stub.chmod(0o755)
    command = [str(stub), "-c", "(sleep 60; :); :", f"/{MODEL}/"]
    with subprocess.Popen(command, start_new_session=True) as process:
        while len(family(process.pid)) < 3:
            time.sleep(0.01)
        of = family(process.pid)
        assert of[1].name() == of[0].name()
        assert ModelProcesses([MODEL])(of) == {process.pid: MODEL}
        os.killpg(process.pid, signal.SIGKILL)


def test_notices_what_was_stopped_for_long() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        of = [psutil.Process(process.pid)]
        patient, impatient = Stopped(60.0), Stopped(0.0)
        assert impatient.overdue(of) == []
        os.kill(process.pid, signal.SIGSTOP)
        while not impatient.overdue(of):
            time.sleep(0.01)
        assert patient.overdue(of) == []
        os.kill(process.pid, signal.SIGCONT)
        while impatient.overdue(of):
            time.sleep(0.01)
        process.kill()


def test_finds_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_bytes(b"\0" * mmap.PAGESIZE)
    own = [psutil.Process()]
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        assert file in mapped_files(own)
    assert file not in mapped_files(own)

"""The watcher, with short-lived processes in place of servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher import back_off, watcher
from siglip_serve.launcher.family import ModelProcesses, family
from siglip_serve.launcher.log import Journal
from siglip_serve.launcher.status import Status
from siglip_serve.launcher.watcher import Actions, Repeated, Watcher

DIES, ENDS, LIVES = "kill -KILL $$", "exit 0", "exec sleep 60"
MODEL = "siglip_vision_model"
Make = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_INTERVAL", 0.02)
    monkeypatch.setattr(watcher, "_RETRY", 0.05)
    monkeypatch.setattr(back_off, "_DELAYS", (0.0, 0.01, 0.02))


@pytest.fixture
def make() -> Iterator[Make]:
    """Starts processes, which are killed after the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(command, start_new_session=True))
        return made[-1]

    yield start
    for process in made:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.wait()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


class Server:
    """Runs one command after the other in place of the server, and notes what is asked of it."""

    def __init__(self, *commands: str) -> None:
        self.left = list(commands)
        self.started: list[subprocess.Popen[bytes]] = []
        self.loaded: list[str] = []
        self.refusing = False
        self.failures = 0
        self.hanging: subprocess.Popen[bytes] | None = None
        self.second: Path | None = None
        self.asked: Callable[[], bool | None] = lambda: None  # the log cannot tell

    def restart(self) -> subprocess.Popen[bytes]:
        if not self.left:
            raise ServerStartError("the port is taken\nmore")
        command = self.left.pop(0)
        if command == "fails":
            raise ServerStartError("the disk is gone")
        self.started.append(subprocess.Popen(["sh", "-c", command]))
        return self.started[-1]

    def load(self, model: str) -> None:
        self.loaded.append(model)
        if len(self.loaded) <= self.failures:
            raise OSError("cannot load")
        if self.hanging is not None:
            self.hanging.wait()
            raise ConnectionResetError("the server died")
        if self.second is not None and len(self.loaded) == 1:
            self.second.touch()
            wait_for(lambda: self.second is not None and self.second.read_text() == "ended\n")
            raise OSError("the model process died")

    def actions(self, **more: Callable[[], None]) -> Actions:
        return Actions(self.load, self.restart, lambda: self.refusing, self.asked, **more)


def watch(server: Server, log: Path, status: Status | None = None) -> list[str]:
    """The lines that the watcher wrote until it ended."""
    first = server.restart()
    thread = Watcher(first, [], server.actions(), Journal(log), status or Status(), 15.0)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return said(log).splitlines()


def with_model(make: Make, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A server with one model process, and the process id of that.

    A second one starts when the file `second` appears, and the file says when that has ended.
    """
    stub, pid_file = folder / "triton_python_backend_stub", folder / "pid"
    stub.write_bytes(Path("/bin/sh").read_bytes())
    stub.chmod(0o755)
    run = '"$0" -c "sleep 60; :" "$3" & echo $! > "$1"; wait'
    script = f"{run}; while [ ! -e $2 ]; do sleep 0.05; done; {run}; echo ended > $2; sleep 60"
    server = make("sh", "-c", script, str(stub), str(pid_file), str(folder / "second"), f"/{MODEL}/")
    wait_for(lambda: ModelProcesses([MODEL])(family(server.pid)) and pid_file.read_text().strip())
    return server, int(pid_file.read_text())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_ends_without_being_asked_is_started_again_whatever_its_status(log: Path) -> None:
    server = Server(ENDS, ENDS, ENDS)
    server.asked = lambda: not server.left
    lines = watch(server, log)
    assert sum(line.startswith("siglip-serve: tritonserver died (status 0); starting") for line in lines) == 2
    assert lines[-1] == "siglip-serve: tritonserver ended on request"


def test_starts_a_server_again_however_often_it_dies(log: Path) -> None:
    status = Status()
    lines = watch(Server(*[DIES] * 12, ENDS), log, status)
    assert (
        sum(line.startswith("siglip-serve: tritonserver died (signal 9); starting") for line in lines) == 12
    )
    assert status.describe()[1]["restarts"] == 12


def test_goes_on_after_a_restart_that_failed(log: Path) -> None:
    status = Status()
    lines = watch(Server(DIES, "fails", "fails", ENDS), log, status)
    assert lines[0] == "siglip-serve: tritonserver died (signal 9); starting it again"
    failed = "siglip-serve: starting tritonserver again failed: the disk is gone; starting it again in 0 s"
    assert lines[1:3] == [failed, failed]
    assert lines[3].startswith("siglip-serve: tritonserver: served again after 0.")
    assert status.describe()[1]["failure"] is None


def test_tells_why_it_cannot_start_the_server(log: Path) -> None:
    status = Status()
    server = Server(DIES)
    thread = Watcher(server.restart(), [], server.actions(), Journal(log), status, 15.0)
    thread.start()
    wait_for(lambda: status.describe()[1]["attempts"] > 5)
    served, facts = status.describe()
    assert not served
    assert (facts["status"], facts["failure"]) == ("restarting", "the port is taken\nmore")
    assert facts["last_death"].endswith("tritonserver died (signal 9)")
    thread.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_leaves_a_server_alone_that_ended_on_request(log: Path) -> None:
    server = Server(ENDS, ENDS)
    assert watch(server, log) == ["siglip-serve: tritonserver ended on request"]
    assert server.left == [ENDS]


def test_names_the_status_of_a_server_that_failed(log: Path) -> None:
    first, second, _ = watch(Server("exit 3", ENDS), log)
    assert first == "siglip-serve: tritonserver died (status 3); starting it again"
    assert second.startswith("siglip-serve: tritonserver: served again after 0.")


@pytest.mark.parametrize("unwritable", ["/dev/full", "/proc/nowhere/log"])
def test_watches_on_without_a_log_or_standard_error(unwritable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    status = Status()
    watch(Server(DIES, DIES, ENDS), Path(unwritable), status)
    assert status.describe()[1]["restarts"] == 2


def test_continues_after_any_error(log: Path) -> None:
    calls = 0

    def once() -> bool:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RuntimeError(f"call {calls}")
        return False

    thread = Repeated("watcher", Journal(log), once)
    thread.start()
    thread.join(10)
    assert calls == 3
    assert log.read_text().splitlines()[1] == "siglip-serve: watcher: RuntimeError: call 2; it continues"


def test_failure_of_the_hook_does_not_end_the_watching(log: Path) -> None:
    calls: list[int] = []

    def also() -> None:
        calls.append(len(calls))
        raise OSError("no door")

    server = Server(LIVES, ENDS)
    first = server.restart()
    thread = Watcher(first, [], server.actions(also=also), Journal(log), Status(), 15.0)
    thread.start()
    wait_for(lambda: len(calls) > 1)
    first.kill()
    thread.join(10)
    assert not thread.is_alive()
    assert "served again" in log.read_text()


@contextmanager
def watching(
    process: subprocess.Popen[bytes], server: Server, log: Path, stalled_after: float = 15.0
) -> Iterator[Status]:
    """Watch a server with one model until the end of the block."""
    status = Status()
    status.served()
    thread = Watcher(process, [MODEL], server.actions(), Journal(log), status, stalled_after)
    thread.start()
    try:
        yield status
    finally:
        thread.stop()
        thread.join(10)
        for started in server.started:
            started.kill()
            started.wait()
    assert not thread.is_alive()


def test_loads_the_model_of_a_stopped_process_again(
    make: Make, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "STOPPED_TOO_LONG", 0.2)
    process, pid = with_model(make, tmp_path)
    server = Server()
    with watching(process, server, log) as status:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: "served again" in said(log))
        wait_for(lambda: status.describe()[1]["status"] == "serving")
    lines = said(log).splitlines()
    assert lines[0] == f"siglip-serve: {MODEL}: process {pid} was stopped for 0 s; killing it"
    assert lines[1] == f"siglip-serve: {MODEL}: model process {pid} died; loading the model again"
    assert server.loaded == [MODEL]
    assert status.describe()[1]["model_deaths"] == 1


def test_a_stopped_server_is_started_again(make: Make, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "STOPPED_TOO_LONG", 0.2)
    process = make("sleep", "60")
    with watching(process, Server(LIVES), log):
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: "tritonserver: served again" in said(log))
    assert said(log).startswith(f"siglip-serve: tritonserver: process {process.pid} was stopped")


def test_retries_a_model_that_could_not_be_loaded(make: Make, tmp_path: Path, log: Path) -> None:
    process, pid = with_model(make, tmp_path)
    server = Server()
    server.failures = 2
    with watching(process, server, log) as status:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "served again" in said(log))
    assert server.loaded == [MODEL] * 3
    assert said(log).count("loading again failed: cannot load") == 2
    assert status.describe()[1]["model_deaths"] == 1


def test_loads_nothing_while_the_port_is_closed_and_ends_a_server_that_hangs(
    make: Make, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_END_WITHOUT_MODELS", 0.2)
    process, pid = with_model(make, tmp_path)
    server = Server(LIVES)
    server.refusing = True
    thread = Watcher(process, [MODEL], server.actions(), Journal(log), Status(), 15.0)
    thread.start()
    os.kill(pid, signal.SIGKILL)
    thread.join(10)
    assert not thread.is_alive()
    assert thread.hung_at_end
    assert process.poll() == -signal.SIGKILL
    assert server.loaded == []
    assert server.left == [LIVES]  # it was asked to end


def test_kills_tritonserver_if_loading_a_model_hangs(make: Make, tmp_path: Path, log: Path) -> None:
    process, pid = with_model(make, tmp_path)
    server = Server(LIVES)
    server.hanging = process
    with watching(process, server, log, stalled_after=1.0):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "tritonserver: served again" in said(log))
    hangs = f"siglip-serve: model {MODEL} made no progress for 1 s; killing tritonserver"
    assert hangs in said(log).splitlines()


def test_kills_only_the_new_process_that_hangs(make: Make, tmp_path: Path, log: Path) -> None:
    """The server then reports that loading failed, and the model is loaded once more."""
    process, pid = with_model(make, tmp_path)
    server = Server()
    server.second = tmp_path / "second"
    with watching(process, server, log, stalled_after=1.0):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "served again" in said(log))
    lines = [line for line in said(log).splitlines() if "no progress" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"siglip-serve: model {MODEL} made no progress for 1 s; killing process ")
    assert process.poll() is None


def said(log: Path) -> str:
    return log.read_text() if log.is_file() else ""  # a device may have no end

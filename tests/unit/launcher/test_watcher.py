"""The watcher, with short-lived processes in place of servers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.watcher import Watcher

DIES, ENDS = "kill -KILL $$", "exit 0"


def process(command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", command])


def never(_: str) -> None:
    raise AssertionError("no model process was there")


class Restart:
    """Runs one command after the other in place of the server."""

    def __init__(self, *commands: str) -> None:
        self.left = list(commands)

    def __call__(self) -> subprocess.Popen[bytes]:
        if not self.left:
            raise ServerStartError("the port is taken")
        return process(self.left.pop(0))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def watch(command: str, restart: Restart, log: Path) -> list[str]:
    """The lines that the watcher wrote until it ended."""
    watcher = Watcher(process(command), [], never, restart, log)
    watcher.start()
    watcher.join(30)
    assert not watcher.is_alive()
    return log.read_text().splitlines() if log.exists() else []


def test_gives_up_a_server_that_dies_a_fourth_time(log: Path) -> None:
    restart = Restart(DIES, DIES, DIES, ENDS)
    lines = watch(DIES, restart, log)
    assert lines.count("siglip-serve: tritonserver died (signal 9); starting it again") == 3
    assert lines[-1] == "siglip-serve: tritonserver died (signal 9), 4 times within 600 s; giving up"
    assert restart.left == [ENDS]


def test_forgets_deaths_of_long_ago(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglip_serve.launcher.watcher._WITHIN", 0.0)
    assert not any("giving up" in line for line in watch(DIES, Restart(DIES, DIES, DIES, DIES, ENDS), log))


def test_leaves_a_server_alone_that_ended_on_request(log: Path) -> None:
    restart = Restart(ENDS)
    assert watch(ENDS, restart, log) == []
    assert restart.left == [ENDS]


def test_names_the_status_of_a_server_that_failed(log: Path) -> None:
    first, second = watch("exit 3", Restart(ENDS), log)
    assert first == "siglip-serve: tritonserver died (status 3); starting it again"
    assert second.startswith("siglip-serve: tritonserver: served again after 0.")


def test_says_why_a_restart_failed(log: Path) -> None:
    lines = watch(DIES, Restart(), log)
    assert lines[-1] == "siglip-serve: starting tritonserver again failed: the port is taken"

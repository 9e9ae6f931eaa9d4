"""The launcher's processes of doors: real ones, without a Triton behind them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from programs import free_port
from wire import OPENER

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher import ServeOptions, server
from siglip_serve.launcher.doors import GATEWAY, Doors
from siglip_serve.launcher.family import Stopped
from siglip_serve.launcher.ports import free_ports

STATUS = "127.0.0.1:9"  # of a launcher that does not answer
OPTIONS = ServeOptions(Path("models"), "checkpoint", device="cpu")


class Opened:
    """Doors of both kinds, with their processes and what they said."""

    def __init__(self) -> None:
        self.ports = {"grpc": free_port(), "http": free_port()}
        self.doors = Doors("127.0.0.1", self.ports)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.said: list[str] = []

    def run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        self.processes.append(subprocess.Popen(command))
        return self.processes[-1]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    built = Opened()
    try:
        built.doors.take_ports()
        built.doors.start(built.run, built.said.append, STATUS, tmp_path)
        built.doors.wait_until_open(60)
        yield built
    finally:
        built.doors.stop(5)


def test_starts_dead_processes_again_on_the_same_port(opened: Opened) -> None:
    first = list(opened.processes)
    opened.doors.watch()
    assert opened.processes == first
    time.sleep(1.1)  # a process that dies sooner is not started at once
    for process in first:
        process.kill()
        process.wait()
    opened.doors.watch()
    opened.doors.wait_until_open(60)
    assert len(opened.processes) == 2 * len(first)
    pids = {process.pid for process in first}
    assert {line for line in opened.said if "died; starting it again" in line} == set(opened.said)
    assert {int(line.split()[3]) for line in opened.said} == pids


def test_kills_a_process_that_is_stopped(opened: Opened) -> None:
    """The watch after that starts it again."""
    opened.doors._stopped = Stopped(0.1)
    stopped = opened.processes[0]
    stopped.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while stopped.poll() is None:
        assert time.monotonic() < deadline
        opened.doors.watch()
        time.sleep(0.02)
    assert opened.said[0] == f"door: process {stopped.pid} was stopped for 5 s; killing it"


def test_waits_before_it_starts_a_process_that_dies_at_once(tmp_path: Path) -> None:
    dies = [sys.executable, "-c", "raise SystemExit(1)"]
    started = []

    def run(_: Sequence[str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(dies))
        started[-1].wait()
        return started[-1]

    doors = Doors("127.0.0.1", {"grpc": free_port()})
    try:
        doors.take_ports()
        doors.start(run, lambda _: None, STATUS, tmp_path)
        begun = len(started)
        with pytest.raises(ServerStartError, match=r"^the grpc door at 127\.0\.0\.1:\d+ did not open$"):
            doors.wait_until_open(60)
        for _ in range(20):
            doors.watch()
        assert len(started) == begun
    finally:
        doors.stop(1)


def test_no_other_program_gets_the_ports_until_the_end(opened: Opened) -> None:
    opened.processes[0].kill()
    for port in opened.ports.values():
        with pytest.raises(ServerStartError, match="cannot be bound"):
            free_ports("127.0.0.1", {"gRPC": port})
    opened.doors.stop(5)
    assert free_ports("127.0.0.1", {"gRPC": opened.ports["grpc"]}) == [opened.ports["grpc"]]
    assert not any(psutil.pid_exists(process.pid) for process in opened.processes)


def test_triton_can_listen_where_its_own_port_is_held() -> None:
    doors = Doors("127.0.0.1", {"grpc": free_port()})
    try:
        address = doors.take_ports()["grpc"]
        with socket.socket() as triton:
            triton.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            triton.bind(address)
            triton.listen()
            socket.create_connection(address).close()
    finally:
        doors.stop(1)


def test_names_a_public_port_that_was_taken_meanwhile() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        doors = Doors("127.0.0.1", {"grpc": port})
        with pytest.raises(
            ServerStartError, match=f"^grpc port {port} on 127.0.0.1: Address already in use$"
        ):
            doors.take_ports()
        doors.stop(1)


def test_without_doors_there_is_nothing_to_do(tmp_path: Path) -> None:
    doors = Doors("127.0.0.1", {})
    assert doors.take_ports() == {}
    doors.start(lambda _: pytest.fail("no process"), pytest.fail, STATUS, tmp_path)
    doors.wait_until_open(0)
    doors.watch()
    doors.stop(0)


@pytest.mark.parametrize(
    ("http", "grpc", "expected"),
    [(False, False, ["http", "grpc"]), (True, False, ["grpc"]), (False, True, ["http"]), (True, True, [])],
)
def test_doors_stand_before_triton_unless_the_options_differ(
    http: bool, grpc: bool, expected: list[str]
) -> None:
    assert server._doors_of(replace(OPTIONS, direct_http=http, direct_grpc=grpc)) == expected


def test_the_gateway_is_a_door_of_the_loopback_interface(tmp_path: Path) -> None:
    port, grpc = free_port(), free_port()
    doors = Doors("0.0.0.0", {GATEWAY: port}, f"127.0.0.1:{grpc}")
    processes: list[subprocess.Popen[bytes]] = []

    def run(command: Sequence[str]) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command))
        return processes[-1]

    try:
        assert doors.take_ports() == {}  # Triton needs no port of its own for it
        doors.start(run, print, STATUS, tmp_path)
        doors.wait_until_open(60)
        with OPENER.open(f"http://127.0.0.1:{port}/.well-known/live", timeout=10) as answer:
            assert answer.status == 204
        addresses = {found.laddr for found in psutil.Process(processes[0].pid).net_connections("tcp")}
        assert addresses == {("127.0.0.1", port)}
    finally:
        doors.stop(10)
    assert [process.returncode for process in processes] == [0] * len(processes)


def test_the_gateway_ends_before_the_door_that_it_asks_through() -> None:
    ended: list[str] = []
    doors = Doors("127.0.0.1", {})

    class Recorded:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def ask_to_end(self) -> None:
            ended.append(f"ask {self.kind}")

        def end(self, timeout: float) -> None:
            assert timeout > 0
            ended.append(f"end {self.kind}")

    doors._processes = [Recorded(kind) for kind in ("grpc", GATEWAY, "http", GATEWAY)]  # type: ignore[misc]
    doors.stop(5)
    assert ended == [
        *(f"ask {GATEWAY}", f"ask {GATEWAY}", f"end {GATEWAY}", f"end {GATEWAY}"),
        *("ask grpc", "ask http", "end grpc", "end http"),
    ]

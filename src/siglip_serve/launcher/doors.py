"""The doors in front of Triton's ports, and the gateway: start their processes, watch them, stop them.

`siglip_gateway.doors` says why Triton needs doors. They have the public ports, and Triton has ports of its
own on the loopback interface. The gateway is one more door, on the loopback interface, which asks Triton
through its public gRPC port.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.family import STOPPED_TOO_LONG, Stopped, find, kill
from siglip_serve.launcher.ports import bind
from siglip_serve.launcher.processes import end
from siglip_serve.machine import available_cores

__all__ = ["GATEWAY", "Doors"]

GATEWAY = "gateway"

_LOOPBACK = "127.0.0.1"
_MOST_HTTP = 256  # requests that Triton's HTTP server may have from all processes of the door
_MOST_ON_GPU = 4096  # inferences of one model from all processes of the gRPC door
_MOST_PER_CORE, _LEAST = 8, 64
_PAUSE = 1.0  # seconds between two starts of a process that dies at once

Run = Callable[[Sequence[str]], subprocess.Popen[bytes]]


class Doors:
    """The processes of all doors of one server. Without ports there are none, and all methods do nothing.

    Args:
        host: IPv4 address that callers use.
        ports: public port by the kind of the door, `grpc`, `http` or `gateway`.
        grpc_url: Triton's public gRPC address, `host:port`, for the gateway.
        gateway: further options of the gateway.
        device: `cpu` or `cuda`, on which the models run.
    """

    def __init__(
        self,
        host: str,
        ports: Mapping[str, int],
        grpc_url: str = "",
        gateway: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self._host = host
        self._ports = ports
        self._grpc_url, self._gateway_options, self._device = grpc_url, gateway, device
        self._own: dict[str, int] = {}
        self._held = ExitStack()
        self._processes: list[_Process] = []
        self._watched = threading.Lock()  # so that no process is started again while all are being stopped
        self._say: Callable[[str], None] = print
        self._stopped = Stopped(STOPPED_TOO_LONG)

    def take_ports(self) -> dict[str, tuple[str, int]]:
        """Hold the public ports and choose Triton's own, until `stop`.

        A held port is given to no other program, also not for outgoing connections, while a process that
        listens there is being started.

        Returns:
            Triton's address and port by kind.

        Raises:
            ServerStartError: a public port was taken by another program.
        """
        for kind, port in self._ports.items():
            try:
                self._hold(self._host_of(kind), port, socket.SO_REUSEPORT)
            except OSError as error:
                where = f"{kind} port {port} on {self._host_of(kind)}"
                raise ServerStartError(f"{where}: {error.strerror}") from error
        kinds = [kind for kind in self._ports if kind != GATEWAY]
        self._own = {kind: self._hold(_LOOPBACK, 0, socket.SO_REUSEADDR) for kind in kinds}
        return {kind: (_LOOPBACK, port) for kind, port in self._own.items()}

    def start(self, run: Run, say: Callable[[str], None], launcher: str, folder: Path) -> None:
        """Start all processes, after `take_ports`.

        Args:
            run: starts a command.
            say: writes a line for the operator.
            launcher: address of the `GET /health` that the HTTP door passes on (`launcher.status`).
            folder: directory of this run, for files of the gateway.
        """
        self._say = say
        for kind, port in self._ports.items():
            count = _process_count()
            command = self._gateway(port, folder) if kind == GATEWAY else self._door(kind, port)
            of_one_model = str(_inferences(self._device) // count)
            if kind == "http":
                command += ["--max-in-flight", str(_MOST_HTTP // count), "--max-of-one-model", of_one_model]
                command += ["--launcher", launcher]
            if kind == "grpc":
                command += ["--max-in-flight", of_one_model]
            self._processes += [_Process(kind, command, run) for _ in range(count)]

    def wait_until_open(self, seconds: float) -> None:
        """Wait until every door takes connections.

        Raises:
            ServerStartError: one does not, or a process has ended.
        """
        deadline = time.monotonic() + seconds
        for kind, port in self._ports.items():
            host = self._host_of(kind)
            while not _listens(_LOOPBACK if host == "0.0.0.0" else host, port):
                if time.monotonic() > deadline or any(process.is_dead() for process in self._processes):
                    raise ServerStartError(f"the {kind} door at {host}:{port} did not open")
                time.sleep(0.02)

    def watch(self) -> None:
        """Start processes again that have died, and kill those that a signal has stopped for seconds."""
        with self._watched:
            self._kill_stopped()
            for process in self._processes:
                if process.is_dead() and time.monotonic() - process.started > _PAUSE:
                    self._say(f"{process.kind} door: process {process.pid} died; starting it again")
                    with suppress(OSError):  # no process can be started now
                        process.start()

    def stop(self, timeout: float) -> None:
        """Let calls in flight complete, then end every process.

        Args:
            timeout: seconds until calls that are still in flight are abandoned.
        """
        with self._watched:
            processes, self._processes = self._processes, []
        deadline = time.monotonic() + timeout
        # The gateway's calls pass through the gRPC door, so it ends before the doors do.
        first = [process for process in processes if process.kind == GATEWAY]
        for together in (first, [process for process in processes if process.kind != GATEWAY]):
            for process in together:
                process.ask_to_end()
            for process in together:
                process.end(max(deadline - time.monotonic(), 0))
        self._held.close()

    def _kill_stopped(self) -> None:
        for stopped in self._stopped.overdue(seen for process in self._processes for seen in process.seen):
            self._say(f"door: process {stopped.pid} was stopped for {STOPPED_TOO_LONG:.0f} s; killing it")
            kill(stopped)

    def _host_of(self, kind: str) -> str:
        return _LOOPBACK if kind == GATEWAY else self._host

    def _door(self, kind: str, port: int) -> list[str]:
        command = [sys.executable, "-m", "siglip_gateway.doors", kind]
        return [*command, "--listen", f"{self._host}:{port}", "--triton", f"{_LOOPBACK}:{self._own[kind]}"]

    def _gateway(self, port: int, folder: Path) -> list[str]:
        counters = folder / "counters"
        counters.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "siglip_gateway", "--triton", self._grpc_url]
        command += ["--host", _LOOPBACK, "--port", str(port), "--no-access-log"]
        return [*command, "--share-port", "--metrics-folder", str(counters), *self._gateway_options]

    def _hold(self, address: str, port: int, option: int) -> int:
        """Bind a port that others may bind as well if they set `option`; return it."""
        held = self._held.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, option, 1)
        bind(held, address, port)
        return int(held.getsockname()[1])


class _Process:
    """One process of a door, which is running from the beginning."""

    def __init__(self, kind: str, command: Sequence[str], run: Run) -> None:
        self.kind = kind
        self._command, self._run = command, run
        self.start()

    def start(self) -> None:
        self.started = time.monotonic()
        self._process = self._run(self._command)
        self.seen = find(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def ask_to_end(self) -> None:
        self._process.terminate()

    def end(self, timeout: float) -> None:
        end(self._process, timeout, None)


def _process_count() -> int:
    """Choose the processes of one door.

    A process passes some 2,000 gRPC calls per second and then fills one core. A CPU of fewer than 8 cores
    embeds less than that. Four pass 8,000, about as many as the models of a machine with a GPU take.
    """
    return min(max(available_cores() // 4, 1), 4)


def _inferences(device: str) -> int:
    """Choose the inferences of one model that Triton has at once from all processes of a door.

    The rest waits in the door, where those of callers that give up end at once. A core computes one at a
    time, so more than a few per core make nothing faster. A GPU computes hundreds together.
    """
    return _MOST_ON_GPU if device == "cuda" else max(_MOST_PER_CORE * available_cores(), _LEAST)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True

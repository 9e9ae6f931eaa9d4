"""Program of a process with one worker. The driver sends units over a socket. The process ends with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from siglip_serve.bulk.job import Job
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Worker, end_with_any_thread
from siglip_serve.errors import ServerStartError, SiglipServeError

__all__ = ["Assignment", "Ready", "Refused", "Usage", "main"]

_USAGE_SECONDS = 1.0
_SWITCH_SECONDS = 0.0005  # the thread that feeds the GPU need not wait longer for the others

# torch's OpenMP reads it when torch is first imported. Threads that spin while they wait would take the cores
# from the processes that decode.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Assignment:
    """The first message of the driver.

    Attributes:
        job: to be run.
        device: `cpu` or `cuda:<index>`.
        cores: of the machine that this process may use.
    """

    job: Job
    device: str
    cores: int


@dataclass(frozen=True)
class Ready:
    """The worker waits for units. Its description is for people."""

    description: str


@dataclass(frozen=True)
class Refused:
    """The worker cannot run the job, and no other could."""

    reason: str


@dataclass(frozen=True)
class Usage:
    """Pictures of this process so far, and the part of its time that each stage was busy."""

    values: dict[str, float]


class _Channel:
    """A connection that several threads send to."""

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        return self._connection.recv()


def main(arguments: Sequence[str]) -> None:
    """Do the units that the driver sends, until it sends None or ends.

    Args:
        arguments: the descriptor of the socket.
    """
    channel = _Channel(int(arguments[0]))
    assignment: Assignment = channel.receive()
    job = assignment.job
    end_with_any_thread()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        worker = Worker(job, job.load_config(), assignment.device, job.settings.decoders, assignment.cores)
    except ServerStartError:
        raise  # a process that decodes has been killed: the next start may succeed
    except SiglipServeError as error:
        channel.send(Refused(str(error)))
        return
    threading.Thread(target=_receive, args=(channel, worker), daemon=True).start()
    channel.send(Ready(worker.description))
    stopped = threading.Event()
    threading.Thread(target=_send_usage, args=(channel, worker, stopped), daemon=True).start()
    worker.run(channel.send)
    stopped.set()
    channel.send(Usage(worker.usage()))
    os._exit(0)  # threads of C++ libraries, such as Lance's, would end an orderly exit with an abort


def _receive(channel: _Channel, worker: Worker) -> None:
    """Queue units. Without a driver the process ends."""
    try:
        while True:
            unit: Unit | None = channel.receive()
            worker.add(unit)
            if unit is None:
                return
    except (EOFError, OSError):
        os._exit(1)


def _send_usage(channel: _Channel, worker: Worker, stopped: threading.Event) -> None:
    while not stopped.wait(_USAGE_SECONDS):
        try:
            channel.send(Usage(worker.usage()))
        except OSError:
            os._exit(1)

"""Run a job on this machine: one worker process per GPU, or one on the CPU, replaced if it dies."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait

from siglip_serve.bulk import worker_process
from siglip_serve.bulk.backlog import Backlog
from siglip_serve.bulk.child import start_child
from siglip_serve.bulk.job import Job
from siglip_serve.bulk.progress import Progress
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished
from siglip_serve.bulk.worker_process import Assignment, Ready, Refused, Usage
from siglip_serve.errors import ServerStartError, SettingsError
from siglip_serve.machine import available_cores, gpu_capabilities

__all__ = ["devices_of", "run_local"]

_MOST_STARTS = 3  # in a row that fail
_PAUSE = 1.0  # seconds before a process is replaced


def devices_of(job: Job) -> list[str]:
    """Devices of this machine that the job runs on.

    Raises:
        SettingsError: GPUs are asked for, and there are none.
    """
    found = [f"cuda:{number}" for number in range(len(gpu_capabilities()))]
    if job.device == "cuda" and not found:
        raise SettingsError("device cuda: the NVIDIA driver shows no GPUs")
    return found if found and job.device != "cpu" else ["cpu"]


def run_local(job: Job, units: Iterable[Unit], progress: Progress) -> None:
    """Do all units on this machine.

    Args:
        job: to be run.
        units: that are not finished.
        progress: told about everything.

    Raises:
        SettingsError: the workers cannot run the job.
        ServerStartError: they do not start.
    """
    devices = devices_of(job)
    _Driver(job, units, progress, devices).run()


class _Driver:
    def __init__(self, job: Job, units: Iterable[Unit], progress: Progress, devices: list[str]) -> None:
        self._progress, self._backlog = progress, Backlog(units, progress)
        cores = max(1, available_cores() // len(devices))
        self._workers = [_WorkerProcess(job, device, cores) for device in devices]

    def run(self) -> None:
        try:
            while self._workers:
                self._feed()
                ready = wait([worker.channel for worker in self._workers])
                for worker in [worker for worker in self._workers if worker.channel in ready]:
                    self._hear(worker)
        finally:
            for worker in self._workers:
                worker.end()

    def _feed(self) -> None:
        for worker in self._workers:
            while worker.ready and not worker.told_end and self._backlog.has_room(worker.units.values()):
                unit = self._backlog.take()
                # A unit that is in flight elsewhere may come back, so the end is told when all are done.
                if unit is None and any(other.units for other in self._workers):
                    break
                worker.send(unit)

    def _hear(self, worker: _WorkerProcess) -> None:
        try:
            message = worker.channel.recv()
        except (EOFError, OSError):
            self._ended(worker)
            return
        if isinstance(message, Refused):
            raise SettingsError(message.reason)
        if isinstance(message, Ready):
            worker.ready = True
            self._progress.note(f"{worker.name}: {message.description}")
        elif isinstance(message, Usage):
            self._progress.usage(worker.name, message.values)
        elif isinstance(message, Finished):
            worker.starts = 0
            self._backlog.settle(worker.units.pop(message.unit), message)

    def _ended(self, worker: _WorkerProcess) -> None:
        worker.end()
        if worker.told_end and not worker.units:
            self._workers.remove(worker)
            return
        worker.starts += 1
        if worker.starts > _MOST_STARTS and not worker.ready:
            raise ServerStartError(f"{worker.name}: its process ended {worker.starts} times while it started")
        self._progress.restarted(worker.name, len(worker.units))
        self._backlog.put_back(worker.units.values(), "the process that worked on it has ended")
        time.sleep(_PAUSE)
        worker.start()


class _WorkerProcess:
    """A worker's process.

    Attributes:
        name: of its device.
        channel: to the process.
        units: in flight, by name.
        ready: it waits for units.
        told_end: it was told that no more units come.
        starts: since a unit was last finished.
    """

    def __init__(self, job: Job, device: str, cores: int) -> None:
        self.name, self._assignment = device, Assignment(job, device, cores)
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.units: dict[str, Unit] = {}
        self.ready = self.told_end = False
        self._process, self.channel = start_child(worker_process.__name__)
        self._put(self._assignment)

    def send(self, unit: Unit | None) -> None:
        """Hand over a unit, or None as the end."""
        if unit is None:
            self.told_end = True
        else:
            self.units[unit.name] = unit
        self._put(unit)

    def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self.channel.close()
        self._process.kill()
        self._process.wait()

    def _put(self, message: object) -> None:
        with suppress(OSError):  # its end is noticed when the channel is read
            self.channel.send(message)

"""Run a job on a Ray cluster: one actor per GPU, or one per node without GPUs. Ray places and restarts them.

An actor holds the same worker as a process of one machine. The units that were in flight on an actor that
died are handed to others, and to the actor itself once Ray has restarted it. Actors for which the cluster has
no room yet wait, which is what makes an autoscaling cluster grow.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from siglip_serve.bulk.backlog import IN_FLIGHT, Backlog
from siglip_serve.bulk.job import Job
from siglip_serve.bulk.progress import Progress
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished, Worker, end_with_any_thread
from siglip_serve.errors import ServerStartError, SettingsError, SiglipServeError

__all__ = ["RayOptions", "run_ray"]

_USAGE_SECONDS = 2.0
_STARTS = 3  # of a worker, until its actor gives up
# An actor that ends so often in a row before it takes units is given up. Lost nodes end some starts too.
_MOST_STARTS = 5
_LEAST_PATIENCE = 120.0  # seconds until then, at least: Ray may report one death several times


@dataclass(frozen=True)
class RayOptions:
    """Choices about the cluster.

    Attributes:
        address: of the cluster; empty: that of the environment variable RAY_ADDRESS, or a new one on this
            machine.
        workers: actors. 0 is one per GPU of the cluster, or one per node if the job runs on CPUs.
        worker_cpus: cores of an actor. 0 shares those of the smallest node among its GPUs.
    """

    address: str = ""
    workers: int = 0
    worker_cpus: int = 0


def run_ray(job: Job, units: Iterable[Unit], progress: Progress, options: RayOptions) -> None:
    """Do all units on a cluster.

    Args:
        job: to be run.
        units: that are not finished.
        progress: told about everything.
        options: about the cluster.

    Raises:
        SettingsError: the actors cannot run the job.
        ServerStartError: there is no cluster.
    """
    try:
        ray.init(address=options.address or None, ignore_reinit_error=True, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServerStartError(f"--address {options.address or 'of the environment'}: {error}") from error
    try:
        _Driver(units, progress, _actors(job, options)).run()
    finally:
        ray.shutdown()


def _actors(job: Job, options: RayOptions) -> list[_Actor]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node for node in nodes if node.get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    on_gpu = job.device == "cuda" or (job.device == "auto" and gpus > 0)
    if on_gpu:
        nodes = [node for node in nodes if node.get("GPU")] or nodes
    each = min((node["CPU"] / max(1, node.get("GPU", 0) if on_gpu else 1) for node in nodes), default=1)
    cpus = options.worker_cpus or max(1, int(each))
    count = options.workers or (gpus if on_gpu else len(nodes)) or 1
    made = _RayWorker.options(  # type: ignore[attr-defined]
        num_cpus=cpus, num_gpus=1 if on_gpu else 0, max_restarts=-1, max_concurrency=IN_FLIGHT + 2
    )
    device = "cuda:0" if on_gpu else "cpu"  # an actor sees its own GPU alone
    return [
        _Actor(f"{device.partition(':')[0]} {number}", made.remote(job, device, cpus))
        for number in range(count)
    ]


@ray.remote
class _RayWorker:
    """A worker that runs in a thread of the actor, while calls wait for their units."""

    def __init__(self, job: Job, device: str, cores: int) -> None:
        self._job, self._device, self._cores = job, device, cores
        self._worker: Worker | None = None
        self._refused = ""
        self._started = threading.Event()
        self._waiting: dict[str, _Call] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def ready(self) -> tuple[str, str]:
        """Wait until the worker takes units. Returns its description, or the reason why it cannot run."""
        self._started.wait()
        return (self._worker.description if self._worker else ""), self._refused

    def do(self, unit: Unit) -> Finished:
        """Do a unit."""
        if self._worker is None:
            raise RuntimeError(self._refused)
        call = self._waiting.setdefault(unit.name, _Call())
        self._worker.add(unit)
        call.ended.wait()
        self._waiting.pop(unit.name, None)
        return call.outcome

    def usage(self) -> dict[str, float]:
        """Report what `Worker.usage` does."""
        return self._worker.usage() if self._worker else {}

    def _run(self) -> None:
        end_with_any_thread()  # if the device fails, too; Ray restarts the actor
        try:
            self._worker = self._start()
        except (SiglipServeError, OSError, RuntimeError) as error:  # RuntimeError: torch's, of the device
            self._refused = f"{socket.gethostname()}: {error}"
            return
        finally:
            self._started.set()
        self._worker.run(self._report)

    def _start(self) -> Worker:
        config, decoders = self._job.load_config(), self._job.settings.decoders
        start = partial(Worker, self._job, config, self._device, decoders, self._cores)
        for _ in range(_STARTS - 1):
            with suppress(ServerStartError):  # a process that decodes was killed
                return start()
        return start()

    def _report(self, outcome: Finished) -> None:
        call = self._waiting.get(outcome.unit)
        if call is not None:  # None: the unit was asked for twice, because the first answer was late
            call.outcome = outcome
            call.ended.set()


@dataclass
class _Call:
    outcome: Finished = field(default_factory=lambda: Finished(""))
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Actor:
    """An actor as the driver sees it.

    Attributes:
        name: for people.
        handle: of Ray.
        calls: what is under way: units, or names of methods.
        ready: it takes units.
        failed_starts: in a row.
        failing_since: when the first of them failed.
        asked: when its usage was last asked for.
    """

    name: str
    handle: Any
    calls: dict[Any, Unit | str] = field(default_factory=dict)
    ready: bool = False
    failed_starts: int = 0
    failing_since: float = 0.0
    asked: float = 0.0

    @property
    def units(self) -> list[Unit]:
        """Units in flight."""
        return [call for call in self.calls.values() if isinstance(call, Unit)]

    def ask_ready(self) -> None:
        """Ask whether it takes units. Ray answers when there is room for the actor."""
        self.calls[self.handle.ready.remote()] = "ready"


class _Driver:
    def __init__(self, units: Iterable[Unit], progress: Progress, actors: list[_Actor]) -> None:
        self._progress, self._backlog, self._actors = progress, Backlog(units, progress), actors

    def run(self) -> None:
        for actor in self._actors:
            actor.ask_ready()
        while self._feed():
            owners = {call: actor for actor in self._actors for call in actor.calls}
            done, _ = ray.wait(list(owners), num_returns=1, timeout=_USAGE_SECONDS)
            for call in done:
                self._hear(owners[call], call)

    def _feed(self) -> bool:
        """Hand out units. False when nothing is left and nothing under way."""
        now = time.monotonic()
        for actor in self._actors:
            while actor.ready and self._backlog.has_room(actor.units):
                unit = self._backlog.take()
                if unit is None:
                    break
                actor.calls[actor.handle.do.remote(unit)] = unit
            if actor.ready and "usage" not in actor.calls.values() and now > actor.asked + _USAGE_SECONDS:
                actor.asked = now
                actor.calls[actor.handle.usage.remote()] = "usage"
        return any(actor.units for actor in self._actors) or not self._backlog.is_empty()

    def _hear(self, actor: _Actor, call: Any) -> None:
        asked = actor.calls.pop(call)
        try:
            answer = ray.get(call)
        except RayTaskError as error:
            if isinstance(asked, Unit):
                self._backlog.settle(asked, Finished(asked.name, error=f"{asked.source}: {error}"))
            return
        except RayError:  # of the actor, its node, or the node's memory
            self._died(actor, asked)
            return
        if asked == "ready":
            description, refused = answer
            if refused:
                raise SettingsError(refused)
            actor.ready, actor.failed_starts = True, 0
            self._progress.note(f"{actor.name}: {description}")
        elif asked == "usage":
            self._progress.usage(actor.name, answer)
        elif isinstance(asked, Unit):
            self._backlog.settle(asked, answer)

    def _died(self, actor: _Actor, asked: Unit | str) -> None:
        if actor.ready:
            self._progress.restarted(actor.name, len(actor.units) + isinstance(asked, Unit))
        actor.ready = False
        if isinstance(asked, Unit):
            self._backlog.put_back([asked], "the actor that worked on it has ended")
        if asked == "ready":
            now = time.monotonic()
            actor.failing_since = actor.failing_since if actor.failed_starts else now
            actor.failed_starts += 1
            if actor.failed_starts >= _MOST_STARTS and now - actor.failing_since >= _LEAST_PATIENCE:
                self._give_up(actor)
                return
        if "ready" not in actor.calls.values():
            actor.ask_ready()

    def _give_up(self, actor: _Actor) -> None:
        """Leave the units to the other actors.

        Raises:
            ServerStartError: there are no others.
        """
        ray.kill(actor.handle)
        self._actors.remove(actor)
        reason = f"{actor.name}: its process ended {actor.failed_starts} times while it started"
        if not self._actors:
            raise ServerStartError(f"{reason}; the logs of Ray's workers say why")
        self._progress.note(f"{reason}; the others go on without it")

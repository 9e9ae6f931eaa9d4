"""Load on a server: requests of one picture each, from several client processes, timed and checked.

Closed loop: every request that ends is followed by the next, so that a fixed number is in flight.
Open loop: requests are sent at times that were drawn before, however slow the answers are. The
latency counts from the time drawn, so that a server that stalls cannot hide the requests that it delayed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.cpu_time import cpu_of, cpu_used, machine_cpu
from benchmarks.load_clients import Client, Target, connect
from benchmarks.records import cosine

__all__ = ["Arrivals", "Expected", "Load", "Record", "Result", "first_answers", "run", "send_times", "wrong"]

Arrivals = Literal["poisson", "fixed"]
Expected = NDArray[np.float32] | Mapping[int, NDArray[np.float32]]

LATE = 0.005  # seconds after its time at which a request of the open loop counts as sent late
_DRAIN = 60.0  # seconds to wait for the last answers
_LEAD = 0.3  # seconds between "all clients are ready" and the first request
_FLOOR = 0.99  # cosine to the first answer of the same picture


@dataclass(frozen=True)
class Load:
    """A load to send.

    Attributes:
        concurrency: requests in flight over all processes, in the open loop the most there may be.
        rate: requests per second over all processes, None for the closed loop.
        check: one answer of this number is checked in full.
        server_pid: the process whose CPU time, and whose descendants', is accounted.
    """

    target: Target
    pictures: Sequence[bytes]
    concurrency: int
    processes: int = 1
    seconds: float = 10.0
    warmup: float = 2.0
    rate: float | None = None
    arrivals: Arrivals = "poisson"
    seed: int = 0
    check: int = 64
    server_pid: int | None = None


@dataclass
class Record:
    """Counts and latencies of one client process in the measured time.

    Attributes:
        latencies: seconds, of the requests that were answered well.
        completed: good answers that came in the measured time.
        statuses: errors by status; WRONG is an answer that failed its check, UNANSWERED one that never came.
        late, unsent: requests of the open loop that were sent after their time, or not at all.
        checked: answers that were checked in full.
        cpu: seconds of CPU time.
    """

    latencies: list[float] = field(default_factory=list)
    completed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    late: int = 0
    unsent: int = 0
    checked: int = 0
    cpu: float = 0.0


@dataclass(frozen=True)
class Result:
    """All client processes together.

    Attributes:
        latencies: seconds.
        client_cpu: seconds of CPU time, of all client processes.
        busy_cores: cores of the machine that were busy, clients included.
        server_cpu: seconds of CPU time by what the process is.
    """

    load: Load
    latencies: NDArray[np.float64]
    completed: int
    statuses: Counter[str]
    late: int
    unsent: int
    checked: int
    client_cpu: float
    busy_cores: float
    server_cpu: dict[str, float]

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.completed / self.load.seconds

    def columns(self) -> dict[str, str]:
        """The result as a row of a table."""
        latencies = self.latencies if len(self.latencies) else np.array([np.nan])
        p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) * 1000
        images = self.completed or np.nan
        server = {name: 1000 * seconds / images for name, seconds in self.server_cpu.items()}
        return {
            "images_per_second": f"{self.rate:.1f}",
            "p50_ms": f"{p50:.2f}",
            "p95_ms": f"{p95:.2f}",
            "p99_ms": f"{p99:.2f}",
            "errors": str(sum(self.statuses.values())),
            "statuses": " ".join(f"{name}:{count}" for name, count in sorted(self.statuses.items())),
            "late": str(self.late),
            "unsent": str(self.unsent),
            "checked": str(self.checked),
            "client_cpu_ms": f"{1000 * self.client_cpu / images:.3f}",
            "server_cpu_ms": f"{sum(server.values()):.3f}" if server else "",
            "server_cpu_by_process": "; ".join(
                f"{name} {value:.3f}" for name, value in server.items() if value >= 0.0005
            ),
            "busy_cores": f"{self.busy_cores:.2f}",
            "cores": str(os.cpu_count()),
        }


def send_times(load: Load, process: int) -> NDArray[np.float64]:
    """When one client process sends its requests of the open loop, in seconds from the start.

    Each process has its share of the rate. Poisson arrivals of the shares add up to Poisson arrivals of
    the whole; fixed ones are interleaved.
    """
    if load.rate is None:
        raise ValueError("the closed loop has no send times")
    share = load.rate / load.processes
    until = load.warmup + load.seconds
    if load.arrivals == "fixed":
        return np.arange(process / load.rate, until, 1 / share)
    rng = np.random.default_rng([load.seed, process])
    gaps = rng.exponential(1 / share, int(until * share + 10 * np.sqrt(until * share) + 10))
    times = np.cumsum(gaps)
    return times[times < until]


def wrong(answer: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> bool:
    """True if an embedding is not what the same picture had at first."""
    if answer is None or answer.shape != expected.shape or not np.isfinite(answer).all():
        return True
    return not (cosine(answer, expected) >= _FLOOR).all()


def first_answers(target: Target, pictures: Sequence[bytes]) -> NDArray[np.float32]:
    """The embedding of each picture, one request after the other."""
    client = connect(target, pictures)
    rows = []
    for picture in range(len(pictures)):
        client.send(picture, picture)
        ended = client.wait(_DRAIN)
        if not ended or ended[0][1]:
            raise RuntimeError(
                f"{target.url}: the first request failed: {ended[0][1] if ended else 'no answer'}"
            )
        row = client.embedding(ended[0][2])
        if row is None or not np.isfinite(row).all():
            raise RuntimeError(f"{target.url}: the first answer is not an embedding")
        rows.append(row)
    client.close()
    return np.stack(rows)


class Driver:
    """Sends the requests of one client process and books their answers."""

    def __init__(self, client: Client, load: Load, process: int, expected: Expected) -> None:
        self.client, self.load = client, load
        self.expected = expected if isinstance(expected, Mapping) else dict(enumerate(expected))
        self.record = Record()
        self.offset = process * len(load.pictures) // load.processes  # processes send different pictures
        self.limit = load.concurrency // load.processes + (process < load.concurrency % load.processes)
        self.due = send_times(load, process).tolist() if load.rate else None
        self.sent: dict[int, float] = {}  # request in flight -> the time that its latency counts from
        self.count = 0

    def drive(self, start: float) -> Record:
        """Run the whole load. `start` is a time of `time.perf_counter`."""
        self.start = start
        self.warm = start + self.load.warmup
        self.end = self.warm + self.load.seconds
        cpu = None
        while (now := time.perf_counter()) < self.end:
            if cpu is None and now >= self.warm:
                cpu = time.process_time()
            self._book(self.client.wait(min(self._send(now), self.end - now)))
        self.record.cpu = time.process_time() - (cpu or 0.0)
        if self.due is not None:
            # The open loop counts every request of the measured time, also those answered after it.
            self.record.unsent = sum(self.start + due >= self.warm for due in self.due[self.count :])
        deadline = time.perf_counter() + _DRAIN
        while self.sent and (left := deadline - time.perf_counter()) > 0:
            self._book(self.client.wait(left))
        self.record.statuses["UNANSWERED"] += len(self.sent)
        self.record.statuses = +self.record.statuses
        return self.record

    def _send(self, now: float) -> float:
        """Send the requests that are due, and return the seconds until the next request."""
        while len(self.sent) < self.limit:
            since = now
            if self.due is not None:
                if self.count >= len(self.due):
                    return _DRAIN
                since = self.start + self.due[self.count]
                if since > now:
                    return since - now
                if since >= self.warm and now > since + LATE:
                    self.record.late += 1
            self.sent[self.count] = since
            self.client.send(self.count, (self.offset + self.count) % len(self.load.pictures))
            self.count += 1
            now = time.perf_counter()
        return _DRAIN

    def _book(self, answers: Sequence[tuple[int, str, bytes]]) -> None:
        now = time.perf_counter()
        for ticket, error, body in answers:
            since = self.sent.pop(ticket)
            in_time = self.warm <= now < self.end
            counts = in_time if self.due is None else since >= self.warm
            status = error
            picture = (self.offset + ticket) % len(self.load.pictures)
            if not error and ticket % self.load.check == 0 and picture in self.expected:
                self.record.checked += counts
                status = "WRONG" if wrong(self.client.embedding(body), self.expected[picture]) else ""
            if status:
                self.record.statuses[status] += counts
                continue
            self.record.completed += in_time
            if counts:
                self.record.latencies.append(now - since)


def run(load: Load, expected: Expected) -> Result:
    """Put the load on the server and wait for all answers.

    Args:
        expected: the embedding of each picture, or of some by their index: other answers are not checked.
    """
    context = multiprocessing.get_context("spawn")
    results, start, begin = context.Queue(), context.Value("d", 0.0), context.Event()
    shared = (results, start, begin)
    workers = [
        context.Process(target=_work, args=(load, process, expected, shared))
        for process in range(load.processes)
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            results.get(timeout=120)
        start.value = time.perf_counter() + _LEAD
        begin.set()
        _sleep_until(start.value + load.warmup)
        machine, server = machine_cpu(), cpu_of(load.server_pid)
        _sleep_until(start.value + load.warmup + load.seconds)
        busy, used = machine_cpu() - machine, cpu_used(server, cpu_of(load.server_pid))
        records: list[Record] = [results.get(timeout=_DRAIN + 60) for _ in workers]
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()
    return Result(
        load=load,
        latencies=np.concatenate([np.array(record.latencies) for record in records]),
        completed=sum(record.completed for record in records),
        statuses=sum((record.statuses for record in records), Counter()),
        late=sum(record.late for record in records),
        unsent=sum(record.unsent for record in records),
        checked=sum(record.checked for record in records),
        client_cpu=sum(record.cpu for record in records),
        busy_cores=busy / load.seconds,
        server_cpu=used,
    )


def _work(load: Load, process: int, expected: Expected, shared: tuple[Any, Any, Any]) -> None:
    results, start, begin = shared
    client = connect(load.target, load.pictures)
    driver = Driver(client, load, process, expected)
    results.put("ready")
    begin.wait(120)
    _sleep_until(start.value)
    results.put(driver.drive(start.value))
    client.close()


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))

"""Records of all requests, one file per client process, and the figures computed from them."""

from __future__ import annotations

import csv
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.bench import BenchError

__all__ = ["Recorder", "Summary", "summarise"]

_LATE = 0.005  # seconds after its time at which a request of the open loop counts as sent late


class Recorder:
    """Writes one line per request: when it was due, sent and ended, the process's CPU time, and the fault.

    Times are in seconds of `time.perf_counter`, which all processes of a machine share on Linux.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"{os.getpid()}.csv").open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def __call__(self, due: float, sent: float, ended: float, fault: str) -> None:
        times = (f"{due:.6f}", f"{sent:.6f}", f"{ended:.6f}", f"{time.process_time():.6f}")
        self._writer.writerow((*times, fault))

    def flush(self) -> None:
        """Write all lines to the file."""
        self._file.flush()

    def close(self) -> None:
        """Write all lines to the file, and close it."""
        self._file.close()


@dataclass(frozen=True)
class Summary:
    """Figures of one load.

    Attributes:
        seconds: measured time.
        answered: good answers that came in the measured time.
        latencies: seconds, of the requests that count; in the open loop from the time they were due.
        faults: number of failed requests by fault, in the whole run with warm-up and end.
        late: requests of the open loop that a busy client sent more than 5 ms late.
        client_cpu: seconds of CPU time per client process, in the measured time.
    """

    seconds: float
    answered: int
    latencies: NDArray[np.float64]
    faults: Counter[str] = field(default_factory=Counter)
    late: int = 0
    client_cpu: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """Good answers per second."""
        return self.answered / self.seconds

    @property
    def errors(self) -> int:
        """Failed requests."""
        return sum(self.faults.values())

    def percentile(self, percent: float) -> float:
        """Latency in ms that `percent` of the requests did not exceed, or nan without a request."""
        return float(np.percentile(self.latencies, percent)) * 1000 if len(self.latencies) else float("nan")


def summarise(folder: Path, warmup: float, seconds: float, is_open: bool) -> Summary:
    """The figures of `seconds` seconds, which begin `warmup` seconds after the last process sent its first.

    The closed loop counts requests answered in this time, and the open loop requests due in it.

    Raises:
        BenchError: if there is nothing to count.
    """
    processes = [rows for path in sorted(folder.glob("*.csv")) if (rows := _read(path))]
    if not processes:
        raise BenchError("no request was sent")
    begin = max(rows[0][0][1] for rows in processes) + warmup
    # A run that was shorter than asked for is measured until its last answer.
    end = min(begin + seconds, max(times[2] for rows in processes for times, _ in rows))
    if end <= begin:
        raise BenchError(f"no request was answered after the warm-up of {warmup:g} s")
    faults: Counter[str] = Counter()
    latencies: list[float] = []
    answered = late = 0
    for rows in processes:
        for (due, sent, ended, _), fault in rows:
            counts = begin <= (due if is_open else ended) < end
            if fault:
                faults[fault] += 1
                continue
            answered += begin <= ended < end
            late += is_open and counts and sent - due > _LATE
            if counts:
                latencies.append(ended - due)
    cpu = tuple(_cpu(rows, begin, end) for rows in processes)
    return Summary(end - begin, answered, np.array(latencies), faults, late, cpu)


_Row = tuple[tuple[float, float, float, float], str]


def _read(path: Path) -> list[_Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[_Row] = [
            ((float(due), float(sent), float(ended), float(cpu)), fault)
            for due, sent, ended, cpu, fault in csv.reader(file)
        ]
    return sorted(rows, key=lambda row: row[0][1])


def _cpu(rows: list[_Row], begin: float, end: float) -> float:
    inside = [(ended, cpu) for (_, _, ended, cpu), _ in rows if begin <= ended < end]
    if len(inside) < 2:
        return 0.0
    (first, before), (last, after) = min(inside), max(inside)
    return (after - before) / (last - first) * (end - begin) if last > first else 0.0

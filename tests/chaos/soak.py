"""Minutes of honest traffic, and the slopes of what each kind of process holds."""

from __future__ import annotations

import asyncio
import csv
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil
from tqdm import tqdm

from tests.chaos.context import Context, Site
from tests.chaos.processes import HELPER
from tests.chaos.report import Report, percentile
from tests.chaos.traffic import Ask, Traffic

__all__ = ["Sample", "Slope", "run", "slope", "tell"]

_EVERY = 10.0  # seconds between samples
_WARM = 0.25  # of all samples, left out
_ENOUGH = 20  # samples from which slopes are judged
# Per hour, from which a slope is a fault if it is also larger than its uncertainty.
_LIMITS = {"rss": 64.0, "pss": 64.0, "descriptors": 20.0, "threads": 10.0, "shared_memory": 32.0}
_UNITS = {"rss": "MiB", "pss": "MiB", "shared_memory": "MiB", "descriptors": "", "threads": ""}


@dataclass(frozen=True)
class Sample:
    """Resources that the processes of one kind hold together, at `seconds` since the begin; memory in MiB."""

    seconds: float
    kind: str
    processes: int
    rss: float
    pss: float
    descriptors: float
    threads: float
    shared_memory: float = 0.0


@dataclass(frozen=True)
class Slope:
    """A line through samples: change per hour, its standard error, and the last value."""

    per_hour: float
    error: float
    last: float


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Fit a line by least squares. Fewer than three samples give an infinite error."""
    count = len(values)
    if count < 3 or max(seconds) == min(seconds):
        return Slope(0.0, math.inf, values[-1] if values else 0.0)
    mean_x, mean_y = sum(seconds) / count, sum(values) / count
    spread = sum((x - mean_x) ** 2 for x in seconds)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(seconds, values, strict=True)) / spread
    rest = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in zip(seconds, values, strict=True))
    return Slope(rise * 3600, math.sqrt(rest / (count - 2) / spread) * 3600, values[-1])


def tell(report: Report, samples: Sequence[Sample]) -> None:
    """Add a line for each kind of process: its slopes after the warm-up."""
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[sample.kind].append(sample)
    for kind, found in sorted(kinds.items()):
        warm = found[int(len(found) * _WARM) :]
        parts, rising = [], []
        for name, limit in _LIMITS.items():
            line = slope([one.seconds for one in warm], [getattr(one, name) for one in warm])
            unit = _UNITS[name]
            if name == "shared_memory" and kind != "/dev/shm":
                continue
            if kind == "/dev/shm" and name != "shared_memory":
                continue
            parts.append(
                f"{name} {line.last:.0f} {unit} {line.per_hour:+.1f} ± {2 * line.error:.1f} per hour"
            )
            if len(warm) >= _ENOUGH and line.per_hour - 2 * line.error > limit:
                rising.append(name)
        expected = "no slope beyond its limit" if len(warm) >= _ENOUGH else ""
        report.add("soak", kind, ", ".join(parts), expected, bool(rising))


def take(site: Site, begin: float) -> list[Sample]:
    """Read what the processes hold now."""
    found: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for pid, kind in site.target.members().items():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            memory = process.memory_full_info()
            held = (memory.rss / 2**20, memory.pss / 2**20, process.num_fds(), process.num_threads())
            found[kind.removesuffix(HELPER)].append(held)
    now = time.monotonic() - begin
    samples = [
        Sample(now, kind, len(rows), *(sum(column) for column in zip(*rows, strict=True)))
        for kind, rows in found.items()
    ]
    shared = sum(site.target.shared_memory().values()) / 2**20
    return [*samples, Sample(now, "/dev/shm", 0, 0, 0, 0, 0, shared)]


async def run(context: Context) -> None:
    """Ask for `--minutes`, and sample every ten seconds."""
    options = context.options
    async with context.site("soak") as site:
        traffic = Traffic(
            site.target.grpc, site.target.http, site.canaries.state, options.tolerance, options.seed
        )
        await traffic.learn()
        traffic.pause = 0.01
        samples: list[Sample] = []
        begin = time.monotonic()
        async with traffic.running(options.callers):
            bar = tqdm(total=int(options.minutes * 60), desc="soak", unit="s")
            while time.monotonic() - begin < options.minutes * 60:
                await asyncio.sleep(min(_EVERY, options.minutes * 60 / 6))
                samples += await asyncio.to_thread(take, site, begin)
                bar.update(int(time.monotonic() - begin) - bar.n)
            bar.close()
        deaths = [death.kind for death in site.target.deaths() if not death.kind.endswith(HELPER)]
    _write(context, samples)
    tell(context.report, samples)
    _tell_calls(context.report, traffic.asked, traffic.lost)
    context.report.add(
        "soak", "deaths of processes", f"{len(deaths)} {', '.join(deaths)}".strip(), "0", bool(deaths)
    )


def _write(context: Context, samples: Sequence[Sample]) -> None:
    with (context.folder / "soak.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Sample.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)


def _tell_calls(report: Report, asked: Sequence[Ask], lost: int) -> None:
    bad = [ask for ask in asked if ask.error or ask.wrong]
    for ask in bad:
        report.find(
            "soak", "wrong" if ask.wrong else "error", f"{ask.client} {ask.name}: {ask.error}{ask.wrong}"
        )
    wrong = sum(bool(ask.wrong) for ask in asked)
    text = f"{len(bad) - wrong} errors, {wrong} wrong, {lost} lost"
    report.add("soak", f"{len(asked)} calls", text, "0, 0, 0", bool(bad or lost))
    quarter = len(asked) // 4
    for name, part in (("first", asked[:quarter]), ("last", asked[-quarter:] if quarter else [])):
        waits = [ask.seconds for ask in part]
        p50, p99 = percentile(waits, 0.5) * 1000, percentile(waits, 0.99) * 1000
        report.add("soak", f"wait in the {name} quarter", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms")

"""Progress of a job: a bar for people, or JSON lines for programs, and the summary at the end."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm import tqdm

from siglip_serve.bulk.worker import STAGES, Finished

__all__ = ["Progress", "ProgressForm", "Summary"]

ProgressForm = Literal["auto", "json", "none"]

_JSON_SECONDS = 5.0
_WINDOW = 30.0  # seconds over which the rate is taken
_NAMED = 20  # units that failed, in the summary


@dataclass
class Summary:
    """Outcome of a run.

    Attributes:
        units: finished in this run.
        rows: pictures with an embedding.
        failed: pictures without.
        restarts: of processes that had died.
        lost: units that were not finished, with the reason.
        seconds: that the run took.
        slowest: the stage that was busiest.
        busy: part of the time that each stage was busy, the mean of all devices.
    """

    units: int = 0
    rows: int = 0
    failed: int = 0
    restarts: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: str = ""
    busy: dict[str, float] = field(default_factory=dict)


class Progress:
    """Counts, and shows.

    Args:
        total: units of the whole job.
        done: of these, finished before this run.
        form: `auto` shows a bar on a terminal; `json` writes a line every five seconds to standard output.
    """

    def __init__(self, total: int, done: int, form: ProgressForm = "auto") -> None:
        self.summary = Summary()
        self._total, self._before, self._form = total, done, form
        self._begin = self._shown = time.monotonic()
        self._usage: dict[str, dict[str, float]] = {}
        self._earlier = 0.0  # pictures of processes that have died
        self._window: list[tuple[float, float]] = [(self._begin, 0.0)]
        disable = None if form == "auto" else True
        self._bar = tqdm(total=total, initial=done, unit="unit", disable=disable)

    def finished(self, outcome: Finished) -> None:
        """Count a unit."""
        if outcome.error:
            self.summary.lost[outcome.unit] = outcome.error
            self.note(f"{outcome.unit} is not finished: {outcome.error}")
        else:
            self.summary.units += 1
            self.summary.rows += outcome.rows
            self.summary.failed += outcome.failed
            self._bar.update()
        self._show()

    def usage(self, device: str, values: dict[str, float]) -> None:
        """Take what a worker says of itself."""
        self._usage[device] = values
        now = time.monotonic()
        self._window.append((now, self.pictures))
        while len(self._window) > 2 and self._window[0][0] < now - _WINDOW:
            del self._window[0]
        self._show()

    def restarted(self, device: str, units: int) -> None:
        """Count a process that has died, and whose units are done again."""
        self.summary.restarts += 1
        self._earlier += self._usage.pop(device, {}).get("pictures", 0.0)
        self.note(f"{device}: its process has ended and is replaced; {units} units are done again")

    def note(self, text: str) -> None:
        """Show a line."""
        if self._form != "json":
            self._bar.write(f"siglip-serve: {text}", file=sys.stderr)

    @property
    def pictures(self) -> float:
        """Pictures that were embedded or refused in this run."""
        return self._earlier + sum(values.get("pictures", 0.0) for values in self._usage.values())

    @property
    def rate(self) -> float:
        """Pictures per second, over the last seconds."""
        (begin, first), (end, last) = self._window[0], self._window[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    def close(self) -> Summary:
        """End the bar, and return the outcome."""
        found = self.summary
        found.seconds = time.monotonic() - self._begin
        if self._usage:
            devices = len(self._usage)
            found.busy = {
                stage: sum(values.get(stage, 0.0) for values in self._usage.values()) / devices
                for stage in STAGES
            }
            found.slowest = max(STAGES, key=lambda stage: found.busy[stage])
        self._bar.close()
        if self._form == "json":
            self._line(final=True)
        return found

    def describe(self, output: str) -> str:
        """The summary as text."""
        found = self.summary
        if not found.units and not found.lost:
            return f"{output}: all {self._total} units are finished"
        rate = self.pictures / max(found.seconds, 1e-9)
        lines = [f"{output}: {found.rows} embeddings in {found.units} units, {rate:.0f} images/s"]
        if found.busy:
            shares = ", ".join(f"{stage} {found.busy[stage]:.0%}" for stage in STAGES)
            lines.append(f"busy: {shares}; the slowest stage is {found.slowest}")
        if found.failed:
            pictures = "1 picture has" if found.failed == 1 else f"{found.failed} pictures have"
            lines.append(f"{pictures} no embedding; the reasons are in {output}/failed")
        lines += [f"not finished: {name}: {reason}" for name, reason in list(found.lost.items())[:_NAMED]]
        if found.lost:
            units = "1 unit is" if len(found.lost) == 1 else f"{len(found.lost)} units are"
            lines.append(f"{units} not finished; the same command tries again")
        return "\n".join(lines)

    def _show(self) -> None:
        now = time.monotonic()
        if self._form == "json":
            if now >= self._shown + _JSON_SECONDS:
                self._shown = now
                self._line()
        else:
            self._bar.set_postfix_str(
                f"{self.rate:.0f} images/s, {self.summary.failed} failed", refresh=False
            )

    def _line(self, final: bool = False) -> None:
        found = self.summary
        done = self._before + found.units
        elapsed = time.monotonic() - self._begin
        left = (self._total - done) * elapsed / found.units if found.units else None
        values: dict[str, Any] = {
            "units": done,
            "units_total": self._total,
            "pictures": int(self.pictures),
            "embedded": found.rows,
            "failed": found.failed,
            "units_lost": len(found.lost),
            "restarts": found.restarts,
            "images_per_second": round(self.rate if not final else self.pictures / max(elapsed, 1e-9), 2),
            "eta_seconds": None if left is None else round(left),
            "devices": self._usage,
        }
        if final:
            values |= {"final": True, "slowest": found.slowest}
        print(json.dumps(values), flush=True)

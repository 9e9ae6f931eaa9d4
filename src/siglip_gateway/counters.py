"""Counters of the gateway in the text format of Prometheus.

Worker processes share them through files: each writes its own, and reads those of all for an answer.
Counts of a worker that has ended stay in the sums.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

__all__ = ["Counters"]

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_HELP = {
    "siglip_gateway_requests_total": ("counter", "requests by API and status"),
    "siglip_gateway_inputs_total": ("counter", "texts and pictures that were embedded"),
    "siglip_gateway_request_bytes_total": ("counter", "bytes of bodies"),
    "siglip_gateway_request_seconds": ("histogram", "seconds from a request to its answer"),
    "siglip_gateway_running": ("gauge", "requests that are worked on"),
    "siglip_gateway_waiting": ("gauge", "requests that wait for their turn"),
}
_WRITTEN = 0.5  # seconds between two writes of a worker's file


class Counters:
    """Counts requests and inputs.

    Args:
        folder: shared with the other worker processes, or None if there are none.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)
        self._file = Path(folder) / f"{os.getpid()}.json" if folder else None
        self._written = 0.0

    def request(self, api: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._values[f'siglip_gateway_requests_total{{api="{api}",status="{status}"}}'] += 1
        name = "siglip_gateway_request_seconds"
        for bound in _BUCKETS:
            # Buckets of Prometheus include all shorter times.
            self._values[f'{name}_bucket{{api="{api}",le="{bound:g}"}}'] += seconds <= bound
        self._values[f'{name}_bucket{{api="{api}",le="+Inf"}}'] += 1
        self._values[f'{name}_count{{api="{api}"}}'] += 1
        self._values[f'{name}_sum{{api="{api}"}}'] += seconds
        self._share()

    def inputs(self, texts: int, pictures: int) -> None:
        """Count inputs that were embedded."""
        self._values['siglip_gateway_inputs_total{kind="text"}'] += texts
        self._values['siglip_gateway_inputs_total{kind="image"}'] += pictures

    def body(self, size: int) -> None:
        """Count the bytes of a body."""
        self._values["siglip_gateway_request_bytes_total"] += size

    def text(self, running: int, waiting: int) -> str:
        """The counters of all workers, and how many requests run and wait in this one."""
        whole = self._values.copy()
        if self._file is not None:
            for file in self._file.parent.glob("*.json"):
                if file != self._file:
                    for key, value in json.loads(file.read_text(encoding="utf-8")).items():
                        whole[key] += value
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            family = {key: value for key, value in whole.items() if key.startswith(name)}
            lines += [
                f"{key} {value:g}" if value % 1 else f"{key} {int(value)}" for key, value in family.items()
            ]
            if kind == "gauge":
                lines.append(f"{name} {running if name.endswith('running') else waiting}")
        return "\n".join(lines) + "\n"

    def _share(self) -> None:
        now = time.monotonic()
        if self._file is not None and now - self._written > _WRITTEN:
            self._written = now
            fresh = self._file.with_suffix(".new")
            fresh.write_text(json.dumps(self._values), encoding="utf-8")
            fresh.replace(self._file)

"""Ten times more requests than the server can compute, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import psutil

from tests.chaos.canaries import requests
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.messages import Infer, grpc_bytes, http_bytes
from tests.chaos.processes import HELPER, TRITON
from tests.chaos.report import Report
from tests.chaos.senders import command
from tests.chaos.server import ChaosError
from tests.chaos.wires import Outcome

__all__ = ["descriptors", "payload", "run", "send_from_processes", "tell"]

_TIMES = 10
_SENDERS = 2
_MEASURE = 6.0  # seconds of the closed loop that measures the capacity
_SPARE = 16  # descriptors that may stay open after the load, those of the last callers
_AFTER = 5.0


def payload(request: Infer, via: str) -> dict[str, Any]:
    """The body of a request for a sender, with path and headers for HTTP."""
    if via == "grpc":
        return {"body": grpc_bytes(request), "path": "", "headers": {}}
    head, _, body = http_bytes(request).partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    size = {name: value for name, value in lines if name.startswith("Inference")}
    return {"body": body, "path": f"/v2/models/{request.model}/infer", "headers": size}


async def send_from_processes(count: int, timeout: float, **options: Any) -> list[dict[str, Any]]:
    """Run senders, and return what each counted.

    Raises:
        ChaosError: a sender failed.
    """

    async def one() -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(*command(**options), stdout=asyncio.subprocess.PIPE)
        try:
            out, _ = await asyncio.wait_for(process.communicate(), timeout)
        except TimeoutError:
            process.kill()
            raise ChaosError(f"a sender did not end within {timeout:.0f} s") from None
        if process.returncode:
            raise ChaosError(f"a sender ended with {process.returncode}")
        return dict(json.loads(out))

    return list(await asyncio.gather(*(one() for _ in range(count))))


def descriptors(site: Site) -> int:
    """Open descriptors of tritonserver and the doors."""
    total = 0
    for pid, kind in site.target.members().items():
        if kind == TRITON or kind.endswith(" door"):
            with suppress(psutil.Error):
                total += psutil.Process(pid).num_fds()
    return total


async def run(context: Context) -> None:
    """Measure the capacity, then send ten times as much over each protocol."""
    options = context.options
    async with context.site("overload") as site:
        request = requests()["embed_image jpeg"]
        for via, address in (("grpc", site.target.grpc), ("http", site.target.http)):
            if not address:
                continue
            given = {**payload(request, via), "via": via, "address": address}
            quiet = {"loop": "closed", "in_flight": 16, "seconds": _MEASURE}
            found = await send_from_processes(1, 60, **given, **quiet)
            capacity = found[0]["counts"].get(Outcome.ANSWERED, 0) / found[0]["seconds"]
            await asyncio.sleep(_AFTER)
            before, deaths = descriptors(site), len(_deaths(site))
            peak = asyncio.create_task(_peak(site))
            rate = _TIMES * capacity / _SENDERS
            load = {"loop": "open", "rate": rate, "seconds": options.overload_seconds}
            found = await send_from_processes(_SENDERS, options.overload_seconds + 150, **given, **load)
            await asyncio.sleep(_AFTER)
            after = descriptors(site)
            peak.cancel()
            died = len(_deaths(site)) - deaths
            tell(context.report, via, capacity, found, died)
            most = max([before, after, *_PEAKS])
            text = f"{before} before, {most} at most, {after} {_AFTER:.0f} s after"
            context.report.add(
                "overload", f"{via}: open descriptors", text, "as before", after > before + _SPARE
            )
            took = await wait_until_right(site, 120)
            context.report.add(
                "overload", f"{via}: right answers again after", _seconds(took), "", took is None
            )


_PEAKS: list[int] = []


async def _peak(site: Site) -> None:
    _PEAKS.clear()
    while True:
        _PEAKS.append(descriptors(site))
        await asyncio.sleep(0.5)


def _seconds(took: float | None) -> str:
    return "never" if took is None else f"{took:.1f} s"


def _deaths(site: Site) -> list[str]:
    return [death.kind for death in site.target.deaths() if not death.kind.endswith(HELPER)]


def tell(report: Report, via: str, capacity: float, found: list[dict[str, Any]], died: int) -> None:
    """Add the lines of one protocol."""
    sent, seconds = sum(one["sent"] for one in found), max(one["seconds"] for one in found)
    counts = {outcome: sum(one["counts"].get(outcome, 0) for one in found) for outcome in Outcome}
    never = sum(one["never"] for one in found) + counts[Outcome.HANG]
    text = f"{sent / seconds:.0f} per second for {seconds:.0f} s, {sent / seconds / max(capacity, 0.1):.1f} x"
    report.add("overload", f"{via}: offered, at a capacity of {capacity:.0f} per second", text)
    report.add(
        "overload", f"{via}: answered, refused", f"{counts[Outcome.ANSWERED]}, {counts[Outcome.REFUSED]}"
    )
    report.add("overload", f"{via}: never answered", never, "0", bool(never))
    lost, internal = counts[Outcome.LOST], counts[Outcome.INTERNAL]
    report.add("overload", f"{via}: connection closed without an answer", lost, "0", bool(lost))
    report.add("overload", f"{via}: INTERNAL", internal, "0", bool(internal))
    report.add("overload", f"{via}: deaths of processes", died, "0", bool(died))

"""Callers that give up early, while a patient one is measured."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tqdm import tqdm

from tests.chaos.canaries import requests
from tests.chaos.context import Context, Site, wait_until_right
from tests.chaos.messages import INFER
from tests.chaos.overload import payload, send_from_processes
from tests.chaos.processes import HELPER
from tests.chaos.report import Report, percentile
from tests.chaos.server import ChaosError
from tests.chaos.wires import GrpcWire, Outcome

__all__ = ["MODES", "Patient", "run", "tell"]

_CALLERS = 16
_CANARY = "embed_image jpeg"
_SLOWER = 2.0  # times that the patient caller may wait longer than among patient ones
_REFUSED = 0.01  # of the requests of the patient caller
_DELAYS = (0.0002, 0.001, 0.004, 0.01, 0.02)
# Name, protocol, kind of caller, and the seconds after which it gives up.
MODES: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("deadlines of 0.5 to 8 ms", "grpc", "deadline", (0.0005, 0.001, 0.002, 0.004, 0.008)),
    ("deadlines of 20 ms", "grpc", "deadline", (0.02,)),
    ("deadlines of 50 ms", "grpc", "deadline", (0.05,)),
    ("deadlines of 100 ms", "grpc", "deadline", (0.1,)),
    ("cancelled after 0.2 to 20 ms", "grpc", "cancel", _DELAYS),
    ("HTTP connections closed after 0.2 to 20 ms", "http", "gone", _DELAYS),
)


class Patient:
    """One caller that waits for each answer, and what it got."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed: list[str] = []
        self.refused = self.wrong = 0

    async def ask(self, site: Site, until: asyncio.Task[Any]) -> None:
        """Ask one request after the other until a task ends."""
        async with GrpcWire(site.target.grpc, 1) as wire:
            while not until.done():
                reply = await wire.send(INFER, site.canaries.messages[_CANARY])
                if reply.outcome is Outcome.ANSWERED:
                    self.seconds.append(reply.seconds)
                    self.wrong += bool(site.canaries.check(_CANARY, reply.body))
                elif reply.outcome is Outcome.REFUSED:
                    self.refused += 1
                    await asyncio.sleep(0.05)
                else:
                    self.failed.append(f"{reply.outcome} {reply.status} {reply.message}"[:200])
                    await asyncio.sleep(0.05)

    @property
    def p99(self) -> float:
        """Milliseconds."""
        return percentile(self.seconds, 0.99) * 1000


def tell(
    report: Report, name: str, patient: Patient, usual: float, died: float | None, counts: dict[str, int]
) -> None:
    """Add the lines of one kind of impatient caller.

    Args:
        report: receives them.
        name: of the kind.
        patient: the caller beside them.
        usual: its p99 among patient callers, in milliseconds.
        died: seconds until a process died, or None.
        counts: calls of the impatient callers by outcome.
    """
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    alive = "alive" if died is None else f"a process died after {died:.1f} s"
    report.add("deadlines", f"{name}: {told or 'no count'}", alive, "alive", died is not None)
    if died is None:
        slow = patient.p99 > _SLOWER * usual
        text = f"p99 {patient.p99:.0f} ms, longest {max(patient.seconds, default=0) * 1000:.0f} ms"
        expected = f"p99 within {_SLOWER:g} x {usual:.0f} ms"
        report.add(
            "deadlines", f"{name}: the patient caller, {len(patient.seconds)} answers", text, expected, slow
        )
        many = patient.refused > _REFUSED * (len(patient.seconds) + patient.refused)
        report.add("deadlines", f"{name}: its refusals", patient.refused, f"{_REFUSED:.0%} at most", many)
        bad = len(patient.failed) + patient.wrong
        report.add(
            "deadlines",
            f"{name}: its failures, wrong answers",
            f"{len(patient.failed)}, {patient.wrong}",
            "0, 0",
            bad > 0,
        )
        for failure in patient.failed:
            report.find("deadlines", "patient caller", f"{name}: {failure}")


async def run(context: Context) -> None:
    """Measure the patient caller alone, among patient callers, and beside each kind of impatient ones."""
    options = context.options
    async with context.site("deadlines") as site:
        seconds = options.deadline_seconds
        request = requests()[_CANARY]
        quiet = min(seconds, 30.0)
        alone = Patient()
        await alone.ask(site, asyncio.create_task(asyncio.sleep(quiet)))
        context.report.add("deadlines", "the patient caller alone", f"p99 {alone.p99:.0f} ms")
        among = Patient()
        given = {**payload(request, "grpc"), "via": "grpc", "address": site.target.grpc}
        others = {"loop": "closed", "in_flight": _CALLERS, "seconds": quiet}
        task = asyncio.create_task(send_from_processes(1, quiet + 60, **given, **others))
        await among.ask(site, task)
        context.report.add("deadlines", f"among {_CALLERS} patient callers", f"p99 {among.p99:.0f} ms")
        chosen = [MODES[number - 1] for number in options.deadline_kinds]
        for name, via, loop, delays in tqdm(chosen, desc="deadlines", unit="kind"):
            address = site.target.grpc if via == "grpc" else site.target.http
            if address:
                given = {
                    **payload(request, via),
                    "via": via,
                    "loop": loop,
                    "delays": delays,
                    "in_flight": _CALLERS,
                }
                await _one(context, site, name, {**given, "seconds": seconds}, among.p99)


async def _one(context: Context, site: Site, name: str, given: dict[str, Any], usual: float) -> None:
    before, begin = len(_deaths(site)), time.monotonic()
    given["address"] = site.target.grpc if given["via"] == "grpc" else site.target.http
    load = asyncio.create_task(send_from_processes(1, given["seconds"] + 120, **given))
    patient = Patient()
    asking = asyncio.create_task(patient.ask(site, load))
    died = None
    while not load.done():
        await asyncio.wait([load], timeout=0.25)
        new = _deaths(site)[before:]
        if new and died is None:
            died = new[0] - begin
            break
    if died is not None:
        load.cancel()
    found = (await asyncio.gather(load, return_exceptions=True))[0]
    await asking
    if isinstance(found, ChaosError):
        context.report.find("deadlines", "sender", f"{name}: {found}")
    counts = found[0]["counts"] if isinstance(found, list) else {}
    tell(context.report, name, patient, usual, died, counts)
    if await wait_until_right(site, 240) is None:
        context.report.add("deadlines", f"{name}: served again", "never", "", True)
        if not site.target.owned:
            raise ChaosError("the server did not come back")
        await asyncio.to_thread(site.target.restart)
        await wait_until_right(site, 240)


def _deaths(site: Site) -> list[float]:
    return [death.at for death in site.target.deaths() if not death.kind.endswith(HELPER)]

"""The lines of the table that a run of the fuzzer adds."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from typing import Protocol

from tests.chaos.cases.base import Case
from tests.chaos.context import Site
from tests.chaos.processes import HELPER, Death
from tests.chaos.report import Report, percentile
from tests.chaos.verdicts import Answered, Tally, Window, reason, windows
from tests.chaos.wires import HANG, Outcome, Reply

__all__ = ["Ran", "tell"]

_MOST_AGAIN = 40
_UNREADABLE = re.compile("[Uu]nable to parse|failed to parse|failed to get request params|JSON")


class Ran(Protocol):
    """A finished run of the fuzzer."""

    site: Site
    tally: Tally
    canary_seconds: list[float]
    canary_replies: list[Answered]
    wrong: int
    canaries_sent: int
    served: list[float]
    died: list[Death]

    async def again(self, name: str, limit: float = ...) -> tuple[Case, Reply]:
        """Send a case again, alone."""


async def tell(report: Report, ran: Ran, seconds: float) -> None:
    """Add what a run found; cases that were not answered are sent again alone."""
    tally, deaths = ran.tally, ran.site.target.deaths()
    dead = windows(deaths, ran.served, time.monotonic())
    add = report.add
    add(
        "fuzz", "cases sent", f"{tally.total} in {seconds:.0f} s, {tally.total / seconds * 60:.0f} per minute"
    )
    add("fuzz", "answered", tally.sum(Outcome.ANSWERED))
    add("fuzz", "refused", tally.sum(Outcome.REFUSED))
    add("fuzz", "connections closed after a request that cannot be read", tally.sum(Outcome.ENDED))
    kinds = ", ".join(death.kind for death in ran.died)
    add("fuzz", "deaths of processes", f"{len(ran.died)} {kinds}".strip(), "0", bool(ran.died))
    helpers = sum(death.kind.endswith(HELPER) for death in deaths)
    if helpers:
        add("fuzz", "helper processes ended by their model", helpers)
    await _tell_unanswered(report, ran, dead)
    _tell_internal(report, tally, dead)
    lost = tally.faults(Outcome.LOST, dead)
    for answered in lost:
        report.find("fuzz", "lost", answered.reply.message, answered.name)
    add("fuzz", "connections closed without an answer, server alive", len(lost), "0", bool(lost))
    disturbed = len(tally.odd) - sum(
        len(tally.faults(o, dead)) for o in (Outcome.LOST, Outcome.INTERNAL, Outcome.HANG)
    )
    add("fuzz", "cases that failed because a process had died", disturbed)
    _tell_canaries(report, ran, dead)


async def _tell_unanswered(report: Report, ran: Ran, dead: list[Window]) -> None:
    late = ran.tally.faults(Outcome.HANG, dead)
    slow = 0
    for answered in late[:_MOST_AGAIN]:
        item, reply = await ran.again(answered.name)
        alone = reply.seconds > HANG or reply.outcome is Outcome.HANG
        slow += alone
        told = f"alone {reply.outcome} after {reply.seconds:.1f} s: {item.about}"
        report.find("fuzz", "unanswered", told, answered.name)
    rest = f", {slow} of {min(len(late), _MOST_AGAIN)} also when alone" if late else ""
    report.add("fuzz", f"unanswered after {HANG:.0f} s", f"{len(late)}{rest}", "0", bool(late))


def _tell_internal(report: Report, tally: Tally, dead: list[Window]) -> None:
    """Tell apart the messages that Triton's or gRPC's parsers do not understand, and all others."""
    for unreadable in (True, False):
        groups: dict[str, list[Answered]] = defaultdict(list)
        for answered in tally.faults(Outcome.INTERNAL, dead):
            if bool(_UNREADABLE.search(answered.reply.message)) is unreadable:
                groups[reason(answered.reply.message)].append(answered)
        kind = "INTERNAL for what cannot be parsed" if unreadable else "INTERNAL"
        for text, members in sorted(groups.items(), key=lambda group: -len(group[1])):
            report.find("fuzz", kind, f"{len(members)} x {text}", members[0].name)
            for answered in members[1:]:
                report.find("fuzz", f"{kind}, further", answered.reply.message, answered.name)
        total = sum(map(len, groups.values()))
        reasons = f" for {len(groups)} reasons" if total else ""
        report.add("fuzz", kind, f"{total}{reasons}", "0", bool(total))


def _tell_canaries(report: Report, ran: Ran, dead: list[Window]) -> None:
    failed = [one for one in ran.canary_replies if not any(window.covers(one.reply) for window in dead)]
    for answered in failed:
        reply = answered.reply
        report.find("fuzz", "canary", f"{answered.name}: {reply.outcome} {reply.status} {reply.message}")
    report.add("fuzz", "honest requests beside them", ran.canaries_sent)
    report.add("fuzz", "wrong answers to these", ran.wrong, "0", bool(ran.wrong))
    report.add("fuzz", "failures of these, no process dead", len(failed), "0", bool(failed))
    p50, p99 = (percentile(ran.canary_seconds, share) * 1000 for share in (0.5, 0.99))
    longest = max(ran.canary_seconds, default=0)
    report.add("fuzz", "their wait: p50, p99, longest", f"{p50:.0f} ms, {p99:.0f} ms, {longest:.2f} s")

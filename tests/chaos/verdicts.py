"""Verdicts on the replies to a fuzzer's cases, given the deaths of the server's processes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.chaos.processes import HELPER, Death
from tests.chaos.wires import Outcome, Reply

__all__ = ["Answered", "Tally", "Window", "reason", "suspects", "windows"]

_BEFORE, _AFTER = 1.0, 2.0
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+|'[^']*'")


@dataclass(frozen=True)
class Answered:
    """A case that has ended: its name, kind, and reply."""

    name: str
    kind: str
    reply: Reply


@dataclass(frozen=True)
class Window:
    """The time in which requests may fail because a process died, until it was served again."""

    death: Death
    end: float

    def covers(self, reply: Reply) -> bool:
        """True if a reply came, or was awaited, while the process was dead."""
        return reply.at >= self.death.at - _BEFORE and reply.at - reply.seconds <= self.end + _AFTER


def windows(deaths: Iterable[Death], served: Sequence[float], now: float) -> list[Window]:
    """Pair each death with the next time at which all was served again.

    Args:
        deaths: of model processes, doors and tritonserver; those of helpers are left out.
        served: times of time.monotonic(), in order.
        now: stands for a time that did not come yet.
    """
    return [
        Window(death, next((time for time in served if time > death.at), now))
        for death in deaths
        if not death.kind.endswith(HELPER)
    ]


def suspects(death: Death, ended: Iterable[Answered], most: int = 40) -> list[str]:
    """Names of the cases that were under way when a process died, the likeliest first.

    Their replies were lost, or came from the server's side as INTERNAL, or came just then.
    """
    found = [
        answered
        for answered in ended
        if answered.reply.at >= death.at - _BEFORE and answered.reply.at - answered.reply.seconds <= death.at
    ]
    order = {Outcome.LOST: 0, Outcome.INTERNAL: 1, Outcome.HANG: 2, Outcome.ENDED: 3}
    found.sort(key=lambda answered: order.get(answered.reply.outcome, 4))
    return [answered.name for answered in found[:most]]


def reason(message: str) -> str:
    """A message without its numbers and quoted names, by which alike ones are counted."""
    return _NUMBERS.sub("#", " ".join(message.split()))[:160]


class Tally:
    """Outcomes by kind of case, and what of them is a fault."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.odd: list[Answered] = []  # lost, INTERNAL or unanswered
        self.total = 0

    def note(self, answered: Answered) -> None:
        """Count a case."""
        self.total += 1
        self.counts[answered.kind][answered.reply.outcome] += 1
        if answered.reply.outcome in {Outcome.LOST, Outcome.INTERNAL, Outcome.HANG}:
            self.odd.append(answered)

    def sum(self, outcome: Outcome) -> int:
        """Cases of one outcome."""
        return sum(counter[outcome] for counter in self.counts.values())

    def faults(self, outcome: Outcome, dead: Sequence[Window]) -> list[Answered]:
        """Odd replies of one outcome that no death explains."""
        return [
            answered
            for answered in self.odd
            if answered.reply.outcome is outcome and not any(window.covers(answered.reply) for window in dead)
        ]

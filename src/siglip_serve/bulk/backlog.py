"""Units that are left to do, those that have to be done again among them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from siglip_serve.bulk.progress import Progress
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished

__all__ = ["IN_FLIGHT", "Backlog"]

IN_FLIGHT = 3  # units of one worker: two are read, and one waits
_MOST_DEATHS = 8  # of workers that had a unit in flight, until the unit counts as failed
_ATTEMPTS = 3  # for a unit that cannot be read or written


class Backlog:
    """Hands out units.

    Args:
        units: to be done.
        progress: told about those that are finished, or given up.
    """

    def __init__(self, units: Iterable[Unit], progress: Progress) -> None:
        self._units: Iterator[Unit] = iter(units)
        self._progress = progress
        self._again: deque[Unit] = deque()
        self._deaths: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def take(self) -> Unit | None:
        """The next unit, or None if none is left at the moment."""
        return self._again.popleft() if self._again else next(self._units, None)

    @property
    def empty(self) -> bool:
        """True if no unit is left at the moment."""
        if not self._again and (unit := next(self._units, None)) is not None:
            self._again.append(unit)
        return not self._again

    def settle(self, unit: Unit, outcome: Finished) -> None:
        """Take the outcome of a unit. One that failed comes again after the others."""
        self._failures[unit.name] += bool(outcome.error)
        if outcome.error and self._failures[unit.name] < _ATTEMPTS:
            self._again.append(unit)
        else:
            self._progress.finished(outcome)

    def put_back(self, units: Iterable[Unit], reason: str) -> None:
        """Take back units whose worker has died.

        Args:
            units: that it had in flight.
            reason: why a unit is given up, if this happens too often.
        """
        for unit in units:
            self._deaths[unit.name] += 1
            if self._deaths[unit.name] < _MOST_DEATHS:
                self._again.append(unit)
            else:
                self._progress.finished(
                    Finished(unit.name, error=f"{unit.source}: {reason}, {_MOST_DEATHS} times")
                )

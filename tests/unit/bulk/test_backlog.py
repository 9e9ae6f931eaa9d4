"""The backlog of units: those whose worker has died come back, at first together and then alone."""

from __future__ import annotations

from siglip_serve.bulk.backlog import IN_FLIGHT, Backlog
from siglip_serve.bulk.progress import Progress
from siglip_serve.bulk.units import Unit
from siglip_serve.bulk.worker import Finished


def units(count: int) -> list[Unit]:
    return [Unit(f"u{number}", "tar", f"/{number}.tar") for number in range(count)]


def take(backlog: Backlog) -> list[Unit]:
    """Take units for a worker until it has no room."""
    held: list[Unit] = []
    while backlog.has_room(held) and (unit := backlog.take()) is not None:
        held.append(unit)
    return held


def test_units_are_handed_out_in_their_order() -> None:
    made = units(IN_FLIGHT + 2)
    backlog = Backlog(made, Progress(len(made), 0, "none"))
    assert take(backlog) == made[:IN_FLIGHT]
    assert not backlog.is_empty()
    assert take(backlog) == made[IN_FLIGHT:]
    assert backlog.is_empty()
    assert backlog.take() is None


def test_a_unit_that_ends_its_worker_takes_no_others_along() -> None:
    made = units(6)
    progress = Progress(len(made), 0, "none")
    backlog = Backlog(made, progress)
    deadly = made[1]
    for _ in range(100):
        held = take(backlog)
        if deadly in held:
            backlog.put_back(held, "its worker has ended")
        else:
            for unit in held:
                backlog.settle(unit, Finished(unit.name, rows=1))
    assert backlog.is_empty()
    assert progress.summary.units == 5
    assert progress.summary.lost == {"u1": "/1.tar: its worker has ended, 8 times"}


def test_one_death_does_not_make_units_wait_for_others() -> None:
    made = units(IN_FLIGHT)
    backlog = Backlog(made, Progress(len(made), 0, "none"))
    held = take(backlog)
    backlog.put_back(held, "its worker has ended")
    assert take(backlog) == held


def test_a_unit_that_fails_comes_again_after_the_others() -> None:
    made = units(2)
    progress = Progress(len(made), 0, "none")
    backlog = Backlog(made, progress)
    order = []
    while (unit := backlog.take()) is not None:
        order.append(unit.name)
        backlog.settle(unit, Finished(unit.name, error="no" if unit.name == "u0" else ""))
    assert order == ["u0", "u1", "u0", "u0"]
    assert progress.summary.lost == {"u0": "no"}

"""The queue of units: those whose process has ended come back, at first together and then alone."""

from __future__ import annotations

from siglip_serve.bulk.unit_queue import IN_FLIGHT, UnitQueue
from siglip_serve.bulk.units import Unit


def units(count: int) -> list[Unit]:
    return [Unit(f"u{number}", "tar", f"/{number}.tar") for number in range(count)]


def take(queue: UnitQueue) -> list[Unit]:
    """Take units for a worker until it has no room."""
    held: list[Unit] = []
    while queue.has_room(held) and (unit := queue.next()) is not None:
        held.append(unit)
    return held


def test_units_are_handed_out_in_their_order() -> None:
    made = units(IN_FLIGHT + 2)
    queue = UnitQueue(made)
    assert take(queue) == made[:IN_FLIGHT]
    assert take(queue) == made[IN_FLIGHT:]
    assert queue.next() is None


def test_a_unit_that_ends_its_process_takes_no_others_along() -> None:
    made = units(6)
    queue = UnitQueue(made)
    deadly, outcomes, finished = made[1], [], []
    for _ in range(100):
        held = take(queue)
        if not held:
            break
        if deadly in held:
            ended = [queue.died(unit, "the process") for unit in reversed(held)]
            outcomes += [outcome for outcome in ended if outcome is not None]
        else:
            finished += held
    assert sorted(unit.name for unit in finished) == ["u0", "u2", "u3", "u4", "u5"]
    (outcome,) = outcomes
    assert (outcome.unit, outcome.error) == ("u1", "/1.tar: the process that worked on it ended 8 times")


def test_one_death_does_not_make_a_unit_wait_for_others() -> None:
    made = units(4)
    queue = UnitQueue(made)
    held = take(queue)
    for unit in reversed(held):
        assert queue.died(unit, "the process") is None
    assert take(queue) == held


def test_a_unit_can_be_put_back() -> None:
    made = units(2)
    queue = UnitQueue(made)
    unit = queue.next()
    assert unit is not None
    queue.put_back(unit)
    assert take(queue) == made

"""From which overlap of two boxes on a tracker doubts a locked track."""

from __future__ import annotations

import numpy as np
import pytest
from siglip_serve_client import TeamTracker


def doubts(offset: float, **options: float) -> bool:
    """True if a second box of 10x20 pixels, moved to the right, unlocks track 7."""
    tracker = TeamTracker(**options)  # type: ignore[arg-type]
    for _ in range(12):
        tracker.update([7], [0])
    assert not tracker.needs_label([7])[0]
    boxes = np.array([[0, 0, 10, 20], [offset, 0, 10 + offset, 20]])
    tracker.update([7, 8], [-1, -1], boxes=boxes)
    return bool(tracker.needs_label([7])[0])


@pytest.mark.parametrize(
    ("offset", "overlaps"), [(2, True), (5, True), (5.3, True), (5.5, False), (6, False)]
)
def test_doubts_a_track_from_three_tenths_of_the_union_on(offset: float, overlaps: bool) -> None:
    # The intersection over the union is (10 - offset) / (10 + offset): 0.307 at 5.3, 0.290 at 5.5.
    assert doubts(offset) is overlaps


def test_an_overlap_of_exactly_the_most_is_none() -> None:
    assert not doubts(5, max_overlap=1 / 3)
    assert doubts(5, max_overlap=0.333)
    assert not doubts(0, max_overlap=1)


@pytest.mark.parametrize("max_age", [0, 3])
def test_forgets_a_track_that_was_away_longer_than_its_age(max_age: int) -> None:
    tracker = TeamTracker(max_age=max_age)
    tracker.update([7], [0])
    for _ in range(max_age):
        tracker.update([], [])
    assert len(tracker) == 1
    tracker.update([], [])
    assert len(tracker) == 0


def test_needs_a_label_exactly_recheck_frames_after_the_last() -> None:
    tracker = TeamTracker(recheck=3)
    for _ in range(12):
        tracker.update([7], [0])
    needed = []
    for _ in range(4):
        needed.append(bool(tracker.needs_label([7])[0]))
        tracker.update([7], [-1])
    assert needed == [False, False, True, True]


def test_starts_again_with_two_votes_for_the_team_of_before() -> None:
    tracker = TeamTracker()
    for _ in range(12):
        tracker.update([7], [0])
    tracker.update([7], [1], overlaps=[True])
    answers = [int(tracker.update([7], [1])[0]) for _ in range(3)]
    assert answers == [0, 0, 1]

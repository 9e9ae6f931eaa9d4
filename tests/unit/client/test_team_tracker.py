"""Votes over tracks, on sequences whose right answer is known by eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from siglip_serve_client import TeamTracker, resolve_goalkeepers

FAR = [[0, 0, 10, 20], [100, 0, 110, 20]]
CLOSE = [[0, 0, 10, 20], [2, 0, 12, 20]]


def feed(tracker: TeamTracker, labels: Sequence[int], track: int = 7) -> list[int]:
    """The answers to the labels of one track, a frame each."""
    return [int(tracker.update([track], [label])[0]) for label in labels]


def locked(label: int = 0, **options: Any) -> TeamTracker:
    """A tracker whose track 7 is locked."""
    tracker = TeamTracker(**options)
    feed(tracker, [label] * 12)
    assert not tracker.needs_label([7])[0]
    return tracker


def test_the_majority_counts() -> None:
    assert feed(TeamTracker(), [1, 0, 1, 1, 0, 1]) == [1, 1, 1, 1, 1, 1]


def test_a_draw_of_votes_does_not_change_the_team() -> None:
    assert feed(TeamTracker(), [0, 1, 1, 0, 0]) == [0, 0, 1, 1, 0]


def test_the_latest_vote_decides_between_new_leaders() -> None:
    assert feed(TeamTracker(), [0, 1, 2, 1, 2, 2]) == [0, 0, 0, 1, 1, 2]


def test_flicker_does_not_show() -> None:
    labels = [0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0] * 5
    assert set(feed(TeamTracker(), labels)) == {0}


def test_only_the_window_counts() -> None:
    tracker = TeamTracker(window=5, lock_votes=5)
    assert feed(tracker, [0, 0, 0, 0, 1, 1, 1]) == [0, 0, 0, 0, 0, 0, 1]


def test_no_label_is_no_vote() -> None:
    assert feed(TeamTracker(), [-1, -1, 1, -1, -1, -1, -1]) == [-1, -1, 1, 1, 1, 1, 1]


def test_unsure_labels_are_no_votes() -> None:
    tracker = TeamTracker(min_margin=0.2)
    assert tracker.update([1, 2], [0, 0], [0.19, 0.2]).tolist() == [-1, 0]
    assert tracker.update([1, 2], [1, 1], [np.nan, 0.1]).tolist() == [-1, 0]


def test_twelve_of_fifteen_votes_lock() -> None:
    tracker = TeamTracker()
    feed(tracker, [0, 1] + [0] * 10 + [1])
    assert tracker.needs_label([7]).tolist() == [True]
    feed(tracker, [0])
    assert tracker.needs_label([7]).tolist() == [False]


def test_a_locked_track_needs_a_label_every_recheck_frames() -> None:
    tracker = locked(recheck=5)
    asked = []
    for _ in range(12):
        needed = bool(tracker.needs_label([7])[0])
        asked.append(needed)
        assert tracker.update([7], [0 if needed else -1]).tolist() == [0]
    assert [frame for frame, needed in enumerate(asked) if needed] == [4, 9]


def test_one_vote_against_a_lock_asks_again_and_changes_nothing() -> None:
    tracker = locked()
    assert feed(tracker, [1]) == [0]
    assert tracker.needs_label([7])[0]
    assert feed(tracker, [0]) == [0]
    assert not tracker.needs_label([7])[0]


def test_three_of_five_votes_against_it_break_a_lock() -> None:
    """A tracker swapped two players without an overlap that was seen."""
    tracker = locked()
    assert feed(tracker, [1, 0, 1, 1]) == [0, 0, 0, 1]
    assert tracker.needs_label([7])[0]
    assert feed(tracker, [1] * 20) == [1] * 20
    assert not tracker.needs_label([7])[0]


def test_an_overlap_unlocks_and_what_comes_after_it_decides() -> None:
    tracker = TeamTracker()
    for _ in range(12):
        tracker.update([7, 8], [0, 1], boxes=FAR)
    assert tracker.needs_label([7, 8]).tolist() == [False, False]
    # The crops of these frames show both players: their labels are not counted, nor worth asking for.
    for _ in range(5):
        assert tracker.needs_label([7, 8], boxes=CLOSE).tolist() == [False, False]
        assert tracker.update([7, 8], [1, 0], boxes=CLOSE).tolist() == [0, 1]
    # The tracker has swapped them meanwhile: two votes of before are outnumbered by three.
    answers = [tracker.update([7, 8], [1, 0], boxes=FAR).tolist() for _ in range(3)]
    assert answers == [[0, 1], [0, 1], [1, 0]]


def test_an_overlap_without_a_swap_changes_nothing() -> None:
    tracker = TeamTracker()
    for frame in range(60):
        near = 20 <= frame < 25
        labels = [1, 1] if near else [0, 1]
        assert tracker.update([7, 8], labels, boxes=CLOSE if near else FAR).tolist() == [0, 1]


def test_a_track_that_begins_in_an_overlap_gets_a_team() -> None:
    tracker = TeamTracker()
    assert tracker.needs_label([7, 8], overlaps=[True, True]).tolist() == [True, True]
    assert tracker.update([7, 8], [0, 1], overlaps=[True, True]).tolist() == [0, 1]


def test_overlaps_may_be_given() -> None:
    tracker = locked()
    tracker.update([7], [-1], overlaps=[True])
    assert tracker.needs_label([7])[0]


def test_a_small_overlap_does_not_unlock() -> None:
    tracker = locked()
    boxes = [[0, 0, 10, 20], [8, 0, 18, 20]]
    tracker.update([7, 8], [-1, -1], boxes=boxes)
    assert not tracker.needs_label([7])[0]


def test_boxes_without_an_area_overlap_nothing() -> None:
    tracker = locked()
    tracker.update([7, 8], [-1, -1], boxes=[[5, 5, 5, 5]] * 2)
    assert not tracker.needs_label([7])[0]


@pytest.mark.parametrize(
    ("ids", "answer", "then"),
    [
        pytest.param(None, 0, 1, id="the ids stay"),
        pytest.param({0: 1, 1: 0}, 1, 1, id="the ids are others"),
        pytest.param({1: 0}, -1, 1, id="the team is gone"),
    ],
)
def test_after_a_refit_tracks_keep_their_team_and_lock_again(
    ids: Mapping[int, int] | None, answer: int, then: int
) -> None:
    tracker = locked()
    tracker.refit(ids)
    assert feed(tracker, [-1]) == [answer]
    assert tracker.needs_label([7])[0]
    assert feed(tracker, [1, 1, 1])[-1] == then


def test_lost_tracks_are_forgotten() -> None:
    tracker = TeamTracker(max_age=10)
    for track in range(1000):
        tracker.update([track], [0])
        assert len(tracker) <= 11
    assert feed(tracker, [-1], track=0) == [-1]
    assert feed(tracker, [-1], track=999) == [0]


def test_a_track_that_comes_back_in_time_keeps_its_team() -> None:
    tracker = locked(max_age=10)
    for _ in range(10):
        tracker.update([], [])
    assert feed(tracker, [-1]) == [0]


def test_tracks_can_be_forgotten() -> None:
    tracker = locked()
    tracker.forget([7, 8])
    assert len(tracker) == 0
    assert feed(tracker, [-1]) == [-1]


def test_unknown_tracks_get_their_own_label_and_leave_nothing() -> None:
    tracker = TeamTracker()
    assert tracker.update([-1, -1, 3], [1, -1, 0]).tolist() == [1, -1, 0]
    assert len(tracker) == 1
    assert tracker.needs_label([-1, 3]).tolist() == [True, True]


def test_a_frame_without_tracks_has_no_teams() -> None:
    tracker = TeamTracker()
    teams = tracker.update([], [], [], boxes=[])
    assert teams.shape == (0,)
    assert teams.dtype == np.int32
    assert tracker.needs_label([]).shape == (0,)


def test_the_labels_that_come_in_are_not_changed() -> None:
    labels = np.array([-1, 1], dtype=np.int32)
    TeamTracker().update(np.array([3, 4]), labels)
    assert labels.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([7, 7], [0, 0]), {}, "7 comes more than once"),
        (([7], [0, 0]), {}, r"labels: shape \[2\], expected \[1\]"),
        (([[7]], [0]), {}, r"track_ids: shape \[1, 1\]"),
        (([7], [0], [0.1, 0.2]), {}, r"margins: shape \[2\]"),
        (([7], [0]), {"boxes": [[0, 0, 1]]}, r"boxes: shape \[1, 3\], expected \[1, 4\]"),
        (([7], [0]), {"boxes": [[0, 0, 1, 1]], "overlaps": [True]}, "one of them"),
        (([7], [0]), {"overlaps": [True, False]}, r"overlaps: shape \[2\]"),
    ],
)
def test_wrong_arrays_are_refused(arguments: Any, options: Any, message: str) -> None:
    tracker = TeamTracker()
    with pytest.raises(ValueError, match=message):
        tracker.update(*arguments, **options)
    assert len(tracker) == 0


def test_tracks_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        TeamTracker().update([1.5], [0])


@pytest.mark.parametrize("options", [{"lock_votes": 16}, {"lock_votes": 7}, {"recheck": 0}, {"max_age": -1}])
def test_impossible_options_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        TeamTracker(**options)


PLAYERS = [[10, 30], [20, 34], [80, 30], [90, 34], [50, 0]]


def test_a_keeper_gets_the_nearer_team() -> None:
    assert resolve_goalkeepers(PLAYERS, [0, 0, 1, 1, -1], [[2, 34], [99, 34]]).tolist() == [0, 1]
    assert resolve_goalkeepers(PLAYERS, [1, 1, 0, 0, -1], [[2, 34], [99, 34]]).tolist() == [1, 0]


def test_teams_may_have_any_number() -> None:
    assert resolve_goalkeepers(PLAYERS, [2, 2, 5, 5, -1], [[2, 34], [99, 34]]).tolist() == [2, 5]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, -1], [-1] * 5])
def test_a_keeper_has_no_team_if_one_team_is_absent(labels: list[int]) -> None:
    assert resolve_goalkeepers(PLAYERS, labels, [[2, 34]]).tolist() == [-1]


def test_keepers_without_a_position_have_no_team() -> None:
    players = np.array([*PLAYERS[:4], [np.nan, np.nan]])
    found = resolve_goalkeepers(players, [0, 0, 1, 1, 1], np.array([[np.nan, 0], [99, 34]]))
    assert found.tolist() == [-1, 1]
    assert found.dtype == np.int32


def test_no_keepers_and_no_players() -> None:
    assert resolve_goalkeepers(PLAYERS, [0, 0, 1, 1, 1], []).shape == (0,)
    assert resolve_goalkeepers([], [], [[1, 2]]).tolist() == [-1]


def test_positions_have_two_coordinates() -> None:
    with pytest.raises(ValueError, match=r"positions: shape \[1, 3\]"):
        resolve_goalkeepers([[1, 2, 3]], [0], [])

"""Votes over a track: a single crop may be labelled wrongly, but a player's team does not change."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["TeamTracker", "resolve_goalkeepers"]

# A locked team is given up when most of the latest votes are against it: at least 3 of 5.
_LATEST = 5
_AGAINST = 3
# Votes that a team keeps when its track starts again. New votes must outnumber them.
_KEPT = 2

Ids = NDArray[np.int32]


@dataclass
class _Track:
    votes: deque[int]
    label: int = -1
    locked: bool = False
    seen: int = 0
    voted: int = 0


@dataclass(kw_only=True)
class TeamTracker:
    """The team of each track, by the majority of its latest labels. It needs no images and no server.

    A track's team is the one with the most of its last `window` votes. A draw does not change it.
    When one team has `lock_votes` of them, the track is *locked*: it keeps this team, and needs a new label
    only every `recheck` frames. A track is unlocked by

    - votes against it: after one vote for another team the track needs a label in every frame, and when at
      least 3 of the latest 5 votes are against the locked team, only these 5 count from then on;
    - an overlap with another track, where a tracker may swap the two: the label of such a frame is not
      counted (its crop shows two players), and the track starts again with 2 votes for the team it had;
    - `refit`, which starts it again likewise.

    Labels of -1 and margins below `min_margin` are no votes. Threads must not share a tracker.

    Attributes:
        window: number of votes that count.
        lock_votes: number of votes for one team that lock the track.
        recheck: frames after which a locked track needs a label again.
        max_age: frames after which an unseen track is forgotten.
        min_margin: 0 to 1; votes of a smaller margin do not count.
        max_overlap: 0 to 1. A larger intersection over union of two boxes is an overlap.
    """

    window: int = 15
    lock_votes: int = 12
    recheck: int = 30
    max_age: int = 150
    min_margin: float = 0.0
    max_overlap: float = 0.3
    _frame: int = field(default=0, init=False, repr=False)
    _tracks: dict[int, _Track] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.window // 2 < self.lock_votes <= self.window:
            raise ValueError(
                f"lock_votes: {self.lock_votes}, expected more than half of window {self.window}"
            )
        if self.recheck < 1 or self.max_age < 0:
            raise ValueError(f"recheck {self.recheck}, max_age {self.max_age}: expected at least 1 and 0")

    def __len__(self) -> int:
        """Tracks that are remembered."""
        return len(self._tracks)

    def needs_label(
        self, track_ids: ArrayLike, *, boxes: ArrayLike | None = None, overlaps: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """The tracks of the next frame that are worth a classification. Call it before `update`.

        Args:
            track_ids: [N] whole numbers.
            boxes, overlaps: as for `update`.

        Returns:
            bool [N]; False for locked tracks, unless their team is in doubt or had no label for `recheck`
            frames, and for overlapping tracks that have a team, as the label would not count.
        """
        ids = _numbers(track_ids)
        mixed = self._overlapping(len(ids), boxes, overlaps)
        pairs = zip(ids, mixed, strict=True)
        return np.array(
            [self._needs_label(int(number), bool(blur)) for number, blur in pairs], dtype=np.bool_
        )

    def update(
        self,
        track_ids: ArrayLike,
        labels: ArrayLike,
        margins: ArrayLike | None = None,
        *,
        boxes: ArrayLike | None = None,
        overlaps: ArrayLike | None = None,
    ) -> Ids:
        """Count the labels of one frame, and return the team of each of its tracks.

        Args:
            track_ids: [N] whole numbers, each once. Negative ones are unknown, may come several times, and
                get their own label back.
            labels: [N], from `classify_teams`; -1 where a track was not classified or got no team.
            margins: [N], from `classify_teams`.
            boxes: [N, 4] of x0, y0, x1, y1: overlaps are found from them.
            overlaps: [N] bool, instead of boxes: which tracks overlap another one.

        Returns:
            int32 [N], the teams; -1 for tracks without any vote so far.

        Raises:
            TypeError, ValueError: arrays of other shapes or kinds, or a track twice.
        """
        ids = _numbers(track_ids)
        known = ids[ids >= 0]
        if len(np.unique(known)) < len(known):
            raise ValueError(f"track_ids: {_twice(known)} comes more than once in one frame")
        rows = _column("labels", labels, len(ids)).astype(np.int32)
        counted = rows >= 0
        if margins is not None:
            counted &= _column("margins", margins, len(ids)) >= self.min_margin
        mixed = self._overlapping(len(ids), boxes, overlaps)
        self._frame += 1
        teams = rows.copy()
        for row in np.flatnonzero(ids >= 0):
            track = self._tracks.setdefault(int(ids[row]), _Track(deque(maxlen=self.window)))
            track.seen = self._frame
            if mixed[row] and track.label >= 0:
                _start_again(track)
            elif counted[row]:
                self._vote(track, int(rows[row]))
            if rows[row] >= 0:
                track.voted = self._frame
            teams[row] = track.label
        self._forget_old()
        return teams

    def refit(self, ids: Mapping[int, int] | None = None) -> None:
        """Continue with another fit: tracks keep their teams, and have to lock them again.

        Args:
            ids: the new fit's team for each old one, if the fit was made without `prev_state` and has other
                numbers. Teams that it does not name are forgotten.
        """
        for track in self._tracks.values():
            if ids is not None:
                track.label = ids.get(track.label, -1)
            _start_again(track)

    def forget(self, track_ids: Iterable[int]) -> None:
        """Remove tracks, as after a cut when their numbers start again. Unknown ones are ignored."""
        for number in track_ids:
            self._tracks.pop(int(number), None)

    def _needs_label(self, number: int, mixed: bool) -> bool:
        track = self._tracks.get(number)
        if number < 0 or track is None or track.label < 0:
            return True
        if mixed or not track.locked:
            return not mixed
        in_doubt = track.votes[-1] != track.label
        return in_doubt or self._frame + 1 - track.voted >= self.recheck

    def _vote(self, track: _Track, label: int) -> None:
        track.votes.append(label)
        if track.locked:
            latest = list(track.votes)[-_LATEST:]
            if sum(vote != track.label for vote in latest) < _AGAINST:
                return
            track.locked = False
            track.votes = deque(latest, maxlen=self.window)
        counts = Counter(track.votes)
        most = max(counts.values())
        if counts[track.label] < most:
            # Of several teams that lead alike, the one that was voted for last.
            track.label = next(vote for vote in reversed(track.votes) if counts[vote] == most)
        track.locked = most >= self.lock_votes

    def _overlapping(
        self, count: int, boxes: ArrayLike | None, overlaps: ArrayLike | None
    ) -> NDArray[np.bool_]:
        if boxes is not None and overlaps is not None:
            raise ValueError("boxes and overlaps: expected one of them")
        if overlaps is not None:
            return _column("overlaps", overlaps, count).astype(np.bool_)
        if boxes is None or count == 0:
            return np.zeros(count, dtype=np.bool_)
        corners = np.asarray(boxes, dtype=np.float64)
        if corners.shape != (count, 4):
            raise ValueError(f"boxes: shape {list(corners.shape)}, expected [{count}, 4]")
        return _largest_overlap(corners) > self.max_overlap

    def _forget_old(self) -> None:
        oldest = self._frame - self.max_age
        for number in [number for number, track in self._tracks.items() if track.seen < oldest]:
            del self._tracks[number]


def resolve_goalkeepers(positions: ArrayLike, labels: ArrayLike, goalkeeper_positions: ArrayLike) -> Ids:
    """The team of each goalkeeper: the one whose players' centre is nearest.

    Args:
        positions: [N, 2] of the players: metres on the pitch, or pixels (a box's bottom centre) where the
            camera shows about half of it.
        labels: [N], their teams; -1 are left out, as are positions that are not finite.
        goalkeeper_positions: [G, 2] in the same coordinates.

    Returns:
        int32 [G]; -1 for all where fewer than two teams are seen, and where a position is not finite.

    Raises:
        TypeError, ValueError: arrays of other shapes or kinds.
    """
    players = _points("positions", positions)
    keepers = _points("goalkeeper_positions", goalkeeper_positions)
    teams = _column("labels", labels, len(players)).astype(np.int32)
    usable = (teams >= 0) & np.isfinite(players).all(axis=1)
    present = np.unique(teams[usable])
    found = np.full(len(keepers), -1, dtype=np.int32)
    placed = np.isfinite(keepers).all(axis=1)
    if len(present) >= 2:
        centres = np.stack([players[usable & (teams == team)].mean(axis=0) for team in present])
        distances = np.linalg.norm(keepers[placed][:, None] - centres, axis=2)
        found[placed] = present[distances.argmin(axis=1)]
    return found


def _start_again(track: _Track) -> None:
    track.locked = False
    track.votes.clear()
    if track.label >= 0:
        track.votes.extend([track.label] * _KEPT)


def _largest_overlap(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    # The largest intersection over union of each box [N, 4] with any other one.
    low = np.maximum(boxes[:, None, :2], boxes[:, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    area = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = area[:, None] + area - common
    ratio = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    np.fill_diagonal(ratio, 0)
    return np.asarray(ratio.max(axis=1))


def _numbers(track_ids: ArrayLike) -> NDArray[np.integer[Any]]:
    ids = np.asarray(track_ids)
    if ids.ndim != 1:
        raise ValueError(f"track_ids: shape {list(ids.shape)}, expected [N]")
    if len(ids) and ids.dtype.kind not in "iu":
        raise TypeError(f"track_ids: array of {ids.dtype}, expected whole numbers; -1 stands for unknown")
    return ids


def _twice(ids: NDArray[np.integer[Any]]) -> int:
    numbers, counts = np.unique(ids, return_counts=True)
    return int(numbers[counts > 1][0])


def _column(name: str, values: ArrayLike, count: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (count,):
        raise ValueError(f"{name}: shape {list(array.shape)}, expected [{count}]")
    return array


def _points(name: str, values: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(values, dtype=np.float64)
    if points.size == 0:
        return points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name}: shape {list(points.shape)}, expected [N, 2]")
    return points

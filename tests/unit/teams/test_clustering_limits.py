"""Fits in which each threshold and each share matters; on easy matches the teams are found without them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from siglip_serve.teams.clustering import Hints, fit, predict

WIDTH = 64
STAMP = {"version": "1"}

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Squad:
    """Embeddings [N, D]; the first crops are players of known teams, the others belong to none."""

    embeddings: Rows
    team: NDArray[np.int64]

    @property
    def teams(self) -> int:
        """Number of teams."""
        return int(self.team.max()) + 1

    def accuracy(self, labels: NDArray[np.int32]) -> float:
        """Share of the players whose label is right, with the teams named in the best way."""
        own = labels[: len(self.team)]
        return max(
            float((np.array(names)[self.team] == own).mean()) for names in permutations(range(self.teams))
        )


def squad(seed: int, teams: int = 2, others: float = 0.25) -> Squad:
    """Teams of unlike sizes and spreads, each in two shades, and up to `others` strays per player."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(8 * teams, 12 * teams))
    weights = rng.uniform(0.2, 1, teams)
    team = np.sort(np.r_[np.arange(teams), rng.choice(teams, count - teams, p=weights / weights.sum())])
    strays = int(rng.integers(0, int(others * count) + 1))
    kits = rng.normal(size=(teams, WIDTH)) * rng.uniform(0.5, 1)
    noise = rng.uniform(0.1, 0.4, teams)
    shade = rng.integers(0, 2, count)
    shades = rng.normal(size=(teams, 2, WIDTH)) * rng.uniform(0, 0.5)
    kinds = int(rng.integers(1, 4))
    stray_kits = rng.normal(size=(kinds, WIDTH)) * rng.uniform(0.5, 2.5)
    players = kits[team] + shades[team, shade] + rng.normal(size=(count, WIDTH)) * noise[team][:, None]
    away = stray_kits[rng.integers(0, kinds, strays)] + rng.normal(size=(strays, WIDTH)) * 0.2
    return Squad((3 * rng.normal(size=WIDTH) + np.r_[players, away]).astype(np.float32), team)


def one_kit(seed: int, teams: int) -> Rows:
    """A squad whose players all wear the same, with its strays moved near them."""
    rng = np.random.default_rng(seed)
    given = squad(seed, teams, 0.2)
    count, strays = len(given.team), len(given.embeddings) - len(given.team)
    kit = rng.normal(size=WIDTH)
    rows = kit + rng.normal(size=(count, WIDTH)) * 0.3 + 3 * rng.normal(size=WIDTH)
    near = rows.mean(axis=0) + rng.normal(size=(strays, WIDTH)) * rng.uniform(0.3, 1)
    return np.r_[rows, near].astype(np.float32)


@dataclass(frozen=True)
class Swaps:
    """Embeddings [N, D] of tracks in changing light, some of whose crops show a player of the other team."""

    embeddings: Rows
    team: NDArray[np.int64]
    track: NDArray[np.int64]


def swaps(seed: int) -> Swaps:
    """Two teams under one to four lights; up to a quarter of the crops are swapped."""
    rng = np.random.default_rng(seed)
    tracks, crops = int(rng.integers(8, 24)), int(rng.integers(4, 12))
    strength, lights = rng.uniform(0.5, 2), int(rng.integers(1, 5))
    kits, directions = rng.normal(size=(2, WIDTH)), rng.normal(size=(lights, WIDTH))
    track = np.repeat(np.arange(tracks), crops)
    team = (np.arange(tracks) % 2)[track]
    count = len(track)
    seen = np.where(rng.random(count) < rng.uniform(0, 0.25), 1 - team, team)
    rows = kits[seen] + rng.normal(size=(tracks, WIDTH))[track] * 0.2 + rng.normal(size=(count, WIDTH)) * 0.2
    rows += rng.normal(size=(count, lights)) @ directions * strength
    return Swaps((3 * rng.normal(size=WIDTH) + rows).astype(np.float32), team, track)


@pytest.mark.parametrize("seed", [13, 30, 42, 82, 187])
def test_finds_two_teams_among_strays(seed: int) -> None:
    given = squad(seed, others=0.33)
    assert given.accuracy(fit(given.embeddings, Hints(), STAMP).teams.labels) == 1


@pytest.mark.parametrize("seed", [12, 14, 69])
def test_trims_few_crops_where_players_are_told(seed: int) -> None:
    given = squad(seed, others=0.12)
    hints = Hints(players=np.ones(len(given.embeddings), dtype=np.bool_))
    assert given.accuracy(fit(given.embeddings, hints, STAMP).teams.labels) == 1


@pytest.mark.parametrize(("teams", "seed"), [(3, 9), (4, 2)])
def test_finds_several_teams_among_strays(teams: int, seed: int) -> None:
    given = squad(seed, teams)
    assert given.accuracy(fit(given.embeddings, Hints(teams=teams), STAMP).teams.labels) == 1


@pytest.mark.parametrize("seed", [88, 90])
def test_removes_the_light_and_not_the_kits_where_crops_were_swapped(seed: int) -> None:
    given = swaps(seed)
    labels = fit(given.embeddings, Hints(tracks=given.track), STAMP).teams.labels
    assert ((labels == given.team).all()) or (labels == 1 - given.team).all()


def test_compares_the_separation_of_kept_crops_with_chance() -> None:
    assert fit(one_kit(12, 3), Hints(teams=3), STAMP).status == ("LOW_SEPARATION",)
    for seed in (2, 22):
        assert fit(squad(seed, 3, 0.2).embeddings, Hints(teams=3), STAMP).status == ("OK",), seed


def kits(count: int, teams: int = 2, seed: int = 0) -> tuple[Rows, NDArray[np.int64]]:
    """`count` crops of teams that nothing confuses, and their teams."""
    rng = np.random.default_rng(seed)
    team = np.arange(count) % teams
    shared = 3 * rng.normal(size=WIDTH)
    return (
        (shared + rng.normal(size=(teams, WIDTH))[team] + 0.2 * rng.normal(size=(count, WIDTH))).astype(
            np.float32
        ),
        team,
    )


@pytest.mark.parametrize("seed", range(12))
def test_fits_crops_of_which_all_but_two_are_the_same(seed: int) -> None:
    """By chance such crops fall into one cluster, which has no other to be apart from."""
    crops = np.tile(np.random.default_rng(seed).normal(size=(1, 64)).astype(np.float32), (11, 1))
    crops[0, 0] *= 1e-3
    crops[1, 1] = 0
    assert "LOW_SUPPORT" in fit(crops, Hints(), STAMP).status


def test_reports_fewer_than_30_crops() -> None:
    rows, _ = kits(30)
    assert fit(rows, Hints(), STAMP).status == ("OK",)
    assert fit(rows[:29], Hints(), STAMP).status == ("LOW_SUPPORT",)


def test_counts_crops_of_players_as_support() -> None:
    rows, _ = kits(40)
    players = np.arange(40) < 29
    assert fit(rows, Hints(players=players), STAMP).status == ("LOW_SUPPORT",)
    tracks = np.arange(40) // 4
    assert "LOW_SUPPORT" not in fit(rows, Hints(tracks=tracks), STAMP).status


@pytest.mark.parametrize(("distance", "same"), [(0.004, True), (0.006, False)])
def test_calls_crops_the_same_that_differ_by_less_than_arithmetic_leaves(distance: float, same: bool) -> None:
    rows = np.zeros((40, WIDTH))
    rows[:, 0] = 1
    rows[::2, 1], rows[1::2, 1] = distance, -distance
    rows[:, 2] = 1e-4 * np.random.default_rng(0).normal(size=40)
    found = fit(rows.astype(np.float32), Hints(), STAMP)
    assert (found.status == ("DEGENERATE",)) is same
    assert (found.state is None) is same


def test_gives_no_margin_to_a_crop_that_looks_like_the_other_team() -> None:
    rows, team = kits(80)
    track = np.where(team == 0, 0, 10) + np.arange(80) // 2 % 10  # 20 tracks of 4 crops, each of one team
    track[0], track[1] = track[1], track[0]
    found = fit(rows, Hints(tracks=track), STAMP)
    assert found.state is not None
    names = found.teams.labels[[2, 3]]
    assert found.teams.labels[[0, 1]].tolist() == names[::-1].tolist()
    assert found.teams.margin[[0, 1]].tolist() == [0, 0]
    assert (found.teams.margin[2:] > 0.3).all()
    assert (predict(found.state, rows).margin[:2] > 0.3).all()


def test_takes_each_crop_of_an_unknown_track_as_a_track_of_its_own() -> None:
    rows, team = kits(40)
    unknown = fit(rows, Hints(tracks=np.full(40, -1)), STAMP)
    alone = fit(rows, Hints(), STAMP)
    assert unknown.state is not None
    assert alone.state is not None
    assert unknown.state.to_bytes() == alone.state.to_bytes()
    assert (unknown.teams.labels == alone.teams.labels).all()
    mixed = np.where(np.arange(40) < 20, np.arange(40) // 2 * 2 + team, -1 - team)
    assert fit(rows, Hints(tracks=mixed), STAMP).status == ("OK",)


@pytest.mark.parametrize("names", list(permutations(range(3), 2)))
def test_names_all_teams_from_crops_of_two(names: tuple[int, int]) -> None:
    rows, team = kits(60, teams=3)
    anchors = np.full(60, -1, dtype=np.int32)
    for row in range(2):
        anchors[row::3][:4] = names[row]
    third = 3 - sum(names)
    found = fit(rows, Hints(anchors=anchors, teams=3), STAMP)
    assert "ANCHOR_CONFLICT" not in found.status
    assert (found.teams.labels == np.array([*names, third])[team]).all()


@pytest.mark.parametrize("names", list(permutations(range(3))))
def test_names_all_teams_from_crops_of_each(names: tuple[int, ...]) -> None:
    rows, team = kits(60, teams=3)
    anchors = np.full(60, -1, dtype=np.int32)
    anchors[:3] = names
    found = fit(rows, Hints(anchors=anchors, teams=3), STAMP)
    assert (found.teams.labels == np.array(names)[team]).all()


def test_keeps_the_ids_of_a_state_with_more_teams() -> None:
    rows, team = kits(60, teams=3)
    before = fit(rows, Hints(teams=3), STAMP)
    for absent in range(3):
        some = team != absent
        found = fit(rows[some], Hints(previous=before.state), STAMP)
        kept = before.teams.labels[some]
        assert set(found.teams.labels) == {0, 1}
        known = kept < 2  # there is no id 2 among two teams
        assert (found.teams.labels[known] == kept[known]).all()


def test_prefers_one_named_crop_to_an_earlier_state() -> None:
    rows, team = kits(40)
    before = fit(rows, Hints(), STAMP)
    anchors = np.full(40, -1, dtype=np.int32)
    anchors[0] = 1 - before.teams.labels[0]
    found = fit(rows, Hints(anchors=anchors, previous=before.state), STAMP)
    assert (found.teams.labels == 1 - before.teams.labels).all()
    assert found.status == ("OK",)
    assert len(set(zip(team.tolist(), found.teams.labels.tolist(), strict=True))) == 2


def test_prefers_an_earlier_state_to_the_places_of_the_clusters() -> None:
    rows, _ = kits(40)
    plain = fit(rows, Hints(), STAMP)
    anchors = np.full(40, -1, dtype=np.int32)
    anchors[0] = 1 - plain.teams.labels[0]
    swapped = fit(rows, Hints(anchors=anchors), STAMP)
    for before in (plain, swapped):
        again = fit(rows, Hints(previous=before.state), STAMP)
        assert (again.teams.labels == before.teams.labels).all()


@pytest.mark.parametrize(("agree", "others", "conflict"), [(3, 2, False), (2, 2, True), (2, 3, True)])
def test_reports_a_conflict_unless_most_named_crops_agree(agree: int, others: int, conflict: bool) -> None:
    rows, team = kits(40)
    anchors = np.full(40, -1, dtype=np.int32)
    ours, theirs = np.flatnonzero(team == 0), np.flatnonzero(team == 1)
    anchors[ours[:agree]] = 0
    anchors[theirs[:others]] = 0
    anchors[theirs[others : others + 9]] = 1
    found = fit(rows, Hints(anchors=anchors), STAMP)
    assert (found.status == ("ANCHOR_CONFLICT",)) is conflict
    assert found.status == (("ANCHOR_CONFLICT",) if conflict else ("OK",))


def humps(apart: float, count: int) -> Rows:
    """Crops that lie somewhat more in two places than a single Gaussian does."""
    rng = np.random.default_rng(1)
    centre = np.where(np.arange(count) % 2 == 0, -apart, apart)[:, None] * np.eye(1, WIDTH) + np.eye(
        1, WIDTH, 1
    )
    spread = np.r_[0.04, np.full(WIDTH - 1, 0.01)]
    return (centre + rng.normal(size=(count, WIDTH)) * spread).astype(np.float32)


@pytest.mark.parametrize(("apart", "status"), [(0.06, "LOW_SEPARATION"), (0.08, "OK")])
def test_wants_more_than_chance_where_players_come_again(apart: float, status: str) -> None:
    hints = Hints(players=np.ones(60, dtype=np.bool_))
    assert fit(humps(apart, 60), hints, STAMP).status == (status,)


def test_wants_no_more_than_chance_of_as_many_crops_as_people_on_a_pitch() -> None:
    doubted = []
    for count in (25, 26):
        hints = Hints(players=np.ones(count, dtype=np.bool_))
        doubted.append("LOW_SEPARATION" in fit(humps(0.075, count), hints, STAMP).status)
    assert doubted == [False, True]


def test_an_outlier_is_off_where_no_team_varies() -> None:
    """A referee in a colour of his own is nearer to a team than many of its players in odd light."""
    rng = np.random.default_rng(0)
    kit, light, colour = np.eye(3, WIDTH, 1)
    team = np.arange(80) % 2
    players = np.eye(1, WIDTH) + np.where(team == 0, -0.3, 0.3)[:, None] * kit
    referees = players[:4] + 0.2 * colour
    players = players + 0.3 * rng.normal(size=(80, 1)) * light
    rows = (np.r_[players, referees] + 0.005 * rng.normal(size=(84, WIDTH))).astype(np.float32)
    found = fit(rows, Hints(players=np.arange(84) < 80), STAMP)
    score = found.teams.outlier_score
    assert score[80:].min() > 2
    assert (score[:80] < 2).mean() > 0.9
    assert len({*zip(team.tolist(), found.teams.labels[:80].tolist(), strict=True)}) == 2

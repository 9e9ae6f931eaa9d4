"""Teams of made-up embeddings, whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.typing import NDArray

from siglip_serve.errors import InvalidInputError, SettingsError
from siglip_serve.teams.clustering import Hints, fit, predict
from siglip_serve.teams.state import TeamState

WIDTH = 64
STAMP = {"version": "1"}


@dataclass(frozen=True)
class Match:
    """Embeddings [N, D] of players whose team and track are known."""

    embeddings: NDArray[np.float32]
    team: NDArray[np.int64]
    track: NDArray[np.int64]


def match(seed: int = 0, tracks: int = 20, crops: int = 6, light: float = 0.0, teams: int = 2) -> Match:
    """Two kits, a little noise; `light` moves each crop along three directions that are the same for all."""
    rng = np.random.default_rng(seed)
    kits = rng.normal(size=(teams, WIDTH))
    lights = rng.normal(size=(3, WIDTH))
    track = np.repeat(np.arange(tracks), crops)
    team = (np.arange(tracks) % teams)[track]
    count = len(track)
    moved = kits[team] + rng.normal(size=(tracks, WIDTH))[track] * 0.2 + rng.normal(size=(count, WIDTH)) * 0.2
    moved += rng.normal(size=(count, 3)) @ lights * light
    return Match((3 * rng.normal(size=WIDTH) + moved).astype(np.float32), team, track)


def accuracy(labels: NDArray[np.int32], team: NDArray[np.int64]) -> float:
    """The better of the two ways of naming two teams."""
    return float(max((labels == team).mean(), (labels == 1 - team).mean()))


@pytest.mark.parametrize("reducer", ["pca", "none"])
def test_two_kits_are_two_teams(reducer: str) -> None:
    known = match()
    found = fit(known.embeddings, Hints(), STAMP, reducer)  # type: ignore[arg-type]
    assert found.status == ("OK",)
    assert accuracy(found.teams.labels, known.team) == 1
    assert found.state is not None
    again = predict(found.state, known.embeddings)
    assert (again.labels == found.teams.labels).all()
    assert ((again.margin > 0) & (again.margin <= 1)).all()
    assert np.median(again.outlier_score) == pytest.approx(1, abs=0.1)
    sides = again.coordinates[:, 0]
    assert (sides[again.labels == 1].min() > sides[again.labels == 0].max()) or reducer == "none"


def test_ids_do_not_depend_on_the_order_of_the_crops() -> None:
    known = match()
    first = fit(known.embeddings, Hints(tracks=known.track), STAMP)
    assert first.state is not None
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(known.team))
        tracks = 1000 - known.track[order]  # their numbers mean nothing either
        again = fit(known.embeddings[order], Hints(tracks=tracks), STAMP)
        assert (again.teams.labels == first.teams.labels[order]).all()
        assert again.state is not None
        assert again.state.to_bytes() == first.state.to_bytes()


def test_a_refit_keeps_the_ids_of_the_state_before() -> None:
    known = match(crops=30)
    rng = np.random.default_rng(1)
    state = None
    names = None
    for _ in range(10):
        some = rng.choice(len(known.team), 120, replace=False)
        found = fit(known.embeddings[some], Hints(tracks=known.track[some], previous=state), STAMP)
        assert found.state is not None
        of_team = [int(found.teams.labels[known.team[some] == team][0]) for team in (0, 1)]
        assert names is None or of_team == names
        names, state = of_team, found.state


@pytest.mark.parametrize("swapped", [False, True])
def test_named_crops_name_the_teams(swapped: bool) -> None:
    known = match()
    wanted = 1 - known.team if swapped else known.team
    anchors = np.full(len(wanted), -1, dtype=np.int32)
    anchors[[0, 1, 6]] = wanted[[0, 1, 6]]  # two tracks, one of each team
    found = fit(known.embeddings, Hints(anchors=anchors), STAMP)
    assert found.status == ("OK",)
    assert (found.teams.labels == wanted).all()


def test_named_crops_that_contradict_what_is_seen_are_reported() -> None:
    known = match()
    anchors = np.full(len(known.team), -1, dtype=np.int32)
    same = np.flatnonzero(known.team == 0)
    anchors[same[:3]], anchors[same[6:9]] = 0, 1
    assert "ANCHOR_CONFLICT" in fit(known.embeddings, Hints(anchors=anchors), STAMP).status


def test_tracks_help_where_the_light_is_stronger_than_the_kits() -> None:
    crops, tracks = [], []
    for seed in range(5):
        known = match(seed, crops=12, light=1.5)
        crops.append(accuracy(fit(known.embeddings, Hints(), STAMP).teams.labels, known.team))
        with_tracks = fit(known.embeddings, Hints(tracks=known.track), STAMP)
        tracks.append(accuracy(with_tracks.teams.labels, known.team))
        assert with_tracks.state is not None
        held_out = predict(with_tracks.state, known.embeddings)
        assert accuracy(held_out.labels, known.team) > 0.95  # the light is taken out of single crops too
    assert np.mean(tracks) > 0.98
    assert np.mean(crops) < 0.9


def test_keepers_and_referees_do_not_move_the_teams() -> None:
    known = match()
    rng = np.random.default_rng(5)
    others = known.embeddings.mean(axis=0) + 6 * rng.normal(size=(40, WIDTH)).astype(np.float32)
    embeddings = np.concatenate([known.embeddings, others])
    players = np.arange(len(embeddings)) < len(known.team)
    found = fit(embeddings, Hints(players=players), STAMP)
    assert accuracy(found.teams.labels[players], known.team) == 1
    assert (found.teams.labels[~players] == -1).all()
    assert found.teams.outlier_score[~players].min() > found.teams.outlier_score[players].max()


def test_three_teams() -> None:
    known = match(tracks=30, teams=3)
    labels = fit(known.embeddings, Hints(teams=3), STAMP).teams.labels
    assert len({(int(a), int(b)) for a, b in zip(labels, known.team, strict=True)}) == 3


def test_crops_that_look_the_same_are_no_teams() -> None:
    found = fit(np.repeat(match().embeddings[:1], 40, axis=0), Hints(), STAMP)
    assert (found.state, found.status) == (None, ("DEGENERATE",))
    assert (found.teams.labels == -1).all()


def test_one_team_alone_is_reported() -> None:
    flagged = []
    for seed in range(10):
        known = match(seed, teams=1)
        flagged.append("LOW_SEPARATION" in fit(known.embeddings, Hints(tracks=known.track), STAMP).status)
    assert np.mean(flagged) >= 0.8


def test_few_crops_are_reported_and_fewer_refused() -> None:
    embeddings = match().embeddings[::6][:12]
    assert "LOW_SUPPORT" in fit(embeddings, Hints(), STAMP).status
    with pytest.raises(InvalidInputError, match="7 usable crops of players, expected at least 8"):
        fit(embeddings[:7], Hints(), STAMP)
    with pytest.raises(InvalidInputError, match="3 tracks of players, expected at least 4"):
        fit(embeddings, Hints(tracks=np.arange(12) % 3), STAMP)


def test_rows_that_mean_nothing_get_no_team_and_disturb_nobody() -> None:
    known = match()
    broken = known.embeddings.copy()
    broken[3], broken[17], broken[40] = np.nan, 0, np.inf
    found = fit(broken, Hints(), STAMP)
    kept = np.ones(len(broken), dtype=bool)
    kept[[3, 17, 40]] = False
    assert (found.teams.labels[~kept] == -1).all()
    assert accuracy(found.teams.labels[kept], known.team[kept]) == 1
    assert found.state is not None
    said = predict(found.state, broken)
    assert (said.labels[~kept] == -1).all()
    alone = predict(found.state, broken[kept])
    assert (alone.labels == said.labels[kept]).all()
    assert np.isfinite(said.outlier_score).all()


def test_no_crops_have_no_teams() -> None:
    state = fit(match().embeddings, Hints(), STAMP).state
    assert state is not None
    said = predict(state, np.zeros((0, WIDTH), dtype=np.float32))
    assert said.labels.dtype == np.int32
    assert [said.labels.shape, said.coordinates.shape] == [(0,), (0, 2)]


def test_embeddings_of_another_width_are_refused() -> None:
    state = fit(match().embeddings, Hints(), STAMP).state
    assert isinstance(state, TeamState)
    with pytest.raises(InvalidInputError, match="rows of 5 numbers, expected 64"):
        predict(state, np.ones((2, 5), dtype=np.float32))


@pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_finds_the_teams_in_any_order() -> None:
    known = match()
    hints = Hints(tracks=known.track)
    found = fit(known.embeddings, hints, STAMP, "umap")
    assert accuracy(found.teams.labels, known.team) == 1
    order = np.random.default_rng(0).permutation(len(known.team))
    again = fit(known.embeddings[order], Hints(tracks=known.track[order]), STAMP, "umap")
    assert (again.teams.labels == found.teams.labels[order]).all()
    assert found.state is not None
    assert (predict(found.state, known.embeddings).labels == found.teams.labels).all()


@pytest.mark.skipif(find_spec("umap") is not None, reason="umap-learn is installed")
def test_a_missing_umap_says_how_to_get_it() -> None:
    with pytest.raises(SettingsError, match=r"pip install -e '\.\[umap\]'"):
        fit(match().embeddings, Hints(), STAMP, "umap")


@pytest.mark.parametrize("seed", [1903, 2934])
def test_votes_do_not_leave_a_team_without_crops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tracks = int(rng.integers(4, 26))
    count, width = tracks * int(rng.integers(2, 7)), int(rng.choice([4, 16, 64]))
    track = rng.integers(0, tracks, count)
    crops = np.abs(rng.standard_t(1.5, size=(count, width))) * rng.choice([0.1, 1, 3])
    crops += rng.standard_t(1.5, size=(tracks, width))[track] * rng.choice([0, 0.1, 0.5])
    found = fit(crops.astype(np.float32), Hints(tracks=track), STAMP)
    assert set(found.teams.labels) == {0, 1}
    assert np.isfinite(found.teams.outlier_score).all()

"""The bundled tower on drawn clips, and the arithmetic of the benchmark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT

from benchmarks.teams import REGION, Encoder, Found, histograms, judge, ours, plain
from siglip_serve.checkpoint.config import load_config
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.teams.jersey import jersey_roi
from training.jerseys import Cast, Clip, Role, clip

JERSEY = ROOT / "checkpoints" / "siglip-tiny-jersey"
CAST = Cast(players=8, keepers=1, referees=2, frames=6)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(str(JERSEY), "cpu")


def jerseys(made: Clip) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    decode = Preprocessor(load_config(JERSEY).image, "pil").decode
    return [jersey_roi(decode(crop), REGION)[0] for crop in made.crops]


@pytest.mark.parametrize("tier", ["T0", "T3", "T5"])
def test_bundled_tower_tells_teams_apart(tier: str, encoder: Encoder) -> None:
    """On average: the rounding of a processor may move a player or two of one hard clip."""
    made = [clip(tier, seed, CAST) for seed in range(50, 54)]
    found = [judge(ours(encoder(jerseys(one)), one), one) for one in made]
    means = {name: np.mean([one[name] for one in found]) for name in found[0]}
    assert means["tracks"] >= 0.9
    assert means["held_out"] >= 0.8
    assert means["flips"] + means["renamed"] == 0
    assert means["outliers"] > 0.9


def test_colours_alone_do_not_tell_arrangements_apart() -> None:
    made = clip("T3", 50, CAST)
    assert judge(plain(histograms(jerseys(made)), made), made)["crops"] < 0.9


def test_judging_counts_what_is_wrong() -> None:
    made = clip("T0", 51, Cast(players=2, keepers=1, referees=1, frames=4))
    right = made.team.copy()
    perfect = judge(Found(right, refitted=right), made)
    assert [perfect[name] for name in ("crops", "tracks", "ari", "held_out", "flips", "renamed")] == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]
    swapped = judge(Found(np.where(right < 0, right, 1 - right), refitted=right), made)
    assert (swapped["crops"], swapped["renamed"]) == (1, 1)
    players = made.role == Role.PLAYER
    wrong = right.copy()
    wrong[np.flatnonzero(players & made.held_out)[0]] = 1 - wrong[np.flatnonzero(players & made.held_out)[0]]
    found = judge(Found(wrong), made)
    assert found["crops"] == 1
    assert found["held_out"] == 1 - 1 / (players & made.held_out).sum()


def test_one_team_has_no_accuracy() -> None:
    made = clip("T0", 51, Cast(players=2, keepers=1, referees=1, frames=2))
    one = replace(made, team=np.where(made.team < 0, -1, 0))
    found = judge(Found(np.zeros(len(one.team), dtype=np.int64), doubted=True), one)
    assert np.isnan(found["crops"])
    assert found["doubted"] == 1

"""Clusters among samples of which some belong to none."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from siglip_serve.teams.trimmed_kmeans import trimmed_kmeans

Rows = NDArray[np.float32]


def teams(seed: int, apart: float, others: int) -> tuple[Rows, NDArray[np.int64]]:
    """Rows [20 + others, 4] of two teams of ten, and of others far away; and their teams, -1 for others."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20 + others, 4))
    rows[:10, 0] += apart
    rows[20:, 1] += 60
    team = np.repeat([0, 1, -1], [10, 10, others])
    return rows.astype(np.float32), team


def accuracy(labels: NDArray[np.int64], team: NDArray[np.int64]) -> float:
    players = team >= 0
    share = (labels[players] == team[players]).mean()
    return float(max(share, 1 - share))


@pytest.mark.parametrize("others", [0, 3, 5])
def test_trimming_keeps_outliers_from_becoming_a_team(others: int) -> None:
    for seed in range(5):
        rows, team = teams(seed, 12, others)
        found = trimmed_kmeans(rows, 2, 0.25)
        assert accuracy(found.labels, team) == 1
        assert not found.kept[team == -1].any()


def test_without_trimming_outliers_become_a_team() -> None:
    rows, team = teams(0, 12, 5)
    assert accuracy(KMeans(2, n_init=10, random_state=0).fit_predict(rows), team) == 0.5


def test_a_given_start_names_the_clusters() -> None:
    rows, team = teams(1, 12, 3)
    start = np.array([[12, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    for chosen, wanted in ((start, team), (start[::-1], 1 - team)):
        found = trimmed_kmeans(rows, 2, 0.25, np.ascontiguousarray(chosen))
        assert (found.labels[:20] == wanted[:20]).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_samples_make_as_many_clusters(count: int) -> None:
    rows = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    found = trimmed_kmeans(rows, 2, 0.25)
    assert set(found.labels) == {0, 1}
    assert set(found.labels[found.kept]) == {0, 1}


def test_finds_three_clusters_of_unlike_size() -> None:
    rng = np.random.default_rng(0)
    team = np.repeat([0, 1, 2], [30, 20, 12])
    rows = (np.eye(3)[team] * 20 + rng.normal(size=(62, 3))).astype(np.float32)
    labels = trimmed_kmeans(rows, 3, 0.1).labels
    assert len({(int(a), int(b)) for a, b in zip(labels, team, strict=True)}) == 3


def test_two_pictures_shown_many_times() -> None:
    rows = np.repeat(np.eye(2, 4, dtype=np.float32), [20, 15], axis=0)
    labels = trimmed_kmeans(rows, 2, 0.25).labels
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1
    assert labels[0] != labels[20]


def test_keeps_at_least_two_samples_per_cluster() -> None:
    rows, _ = teams(0, 12, 0)
    assert trimmed_kmeans(rows, 2, 0.95).kept.sum() == 4
    assert trimmed_kmeans(rows[:3], 2, 0.95).kept.sum() == 3

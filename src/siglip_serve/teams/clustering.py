"""Teams from embeddings of players' jerseys: a fit, and a fitted model that is a value.

Jerseys of one team form a cluster. Single crops (folds, overlap, blur) and the light that
falls on one player blur the clusters. Where tracks are known, the mean of a track is therefore clustered
instead of its crops. The directions in which crops of one track differ most are removed from all embeddings.
Where roles are unknown, a quarter of the samples may be of no team (`trimmed_kmeans`).

Equal crops give equal ids in any order. Rows are put into an order of their own first. Ids
follow the clusters' positions, or the crops that the caller names, or an earlier state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from siglip_serve.config import TeamReducer
from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.errors import InvalidInputError, SettingsError
from siglip_serve.teams.spread import Spread
from siglip_serve.teams.state import TeamState
from siglip_serve.teams.trimmed_kmeans import Clusters, trimmed_kmeans

__all__ = ["MOST_TEAMS", "Fit", "Hints", "Teams", "fit", "predict", "warm_up"]

Rows = NDArray[np.float32]
Ids = NDArray[np.int32]

MOST_TEAMS = 8
_LEAST_CROPS = 8
_LEAST_TRACKS_A_TEAM = 2
_SUPPORT = 30
_COMPONENTS = 8
_UMAP_COMPONENTS = 3
_NUISANCES = 3
_LEAST_RESIDUALS = 10
# Samples that may be of no team. Two goalkeepers, a referee and two assistants beside twenty players are a
# fifth of the people on a pitch; where roles are told, few of them are wrong.
_STRAYS, _FEW_STRAYS = 0.25, 0.1
# Unit vectors of one picture differ by the rounding of 16-bit arithmetic: 2e-3.
_SAME = 0.005
# Clusters count as separate if of this many single Gaussians of the same spread, cut in two, at most one in
# twenty looks more so. More samples than people on a pitch show players again, who are no Gaussian:
# their light and poses rarely look 1.2 times as separate on real matches, and two teams mostly do.
_DRAWS, _MOST_DRAWN = 40, 200
_PEOPLE, _CLEARLY = 25, 1.2
_SEED = 0


@dataclass(frozen=True)
class Hints:
    """Facts that a caller may know of N crops. Each array is [N].

    Attributes:
        tracks: int64. Crops of one number show one player, negative numbers each their own.
        players: bool, False for keepers and referees, who are not clustered.
        anchors: int32, the team that a crop is known to be of, -1 where it is not.
        previous: an earlier state, whose ids are kept.
        teams: how many there are.
    """

    tracks: NDArray[np.int64] | None = None
    players: NDArray[np.bool_] | None = None
    anchors: Ids | None = None
    previous: TeamState | None = None
    teams: int = 2


@dataclass(frozen=True)
class Teams:
    """Teams of N crops.

    Attributes:
        labels: int32 [N], the team, -1 where there is none to say.
        margin: float32 [N], 0 half-way between two teams to 1 at a team's centre.
        outlier_score: float32 [N], distance from the team's centre in units of the spread within the teams,
            where 1 is the team's median at the fit.
        coordinates: float32 [N, 2]: along the line between the teams, and across.
    """

    labels: Ids
    margin: Rows
    outlier_score: Rows
    coordinates: Rows


@dataclass(frozen=True)
class Fit:
    """A fitted state, its crops' teams, and what there is to know about it.

    Attributes:
        state: None if no teams were found.
        teams: of all N crops. Crops of one track have one label, with a margin of 0 where a crop looks like
            another team. Crops that show no player have -1.
        status: OK, or some of the following. LOW_SUPPORT: fewer than 30 crops. LOW_SEPARATION: there may be
            one team only. DEGENERATE: all crops look the same. ANCHOR_CONFLICT: crops that were named as of
            different teams look as of one.
    """

    state: TeamState | None
    teams: Teams
    status: tuple[str, ...]


def fit(embeddings: Rows, hints: Hints, stamp: Mapping[str, str], reducer: TeamReducer = "pca") -> Fit:
    """Find the teams in N crops.

    Args:
        embeddings: [N, D]. Rows of zeros, or not finite, are left out.
        hints: further facts about the crops.
        stamp: names the maker of the embeddings.
        reducer: in which coordinates clusters are looked for: principal components, the embeddings
            themselves, or UMAP's. Predictions go by the centroids of what was found, in the first two.

    Raises:
        InvalidInputError: fewer than 8 usable crops.
    """
    from threadpoolctl import threadpool_limits

    # The matrices are small: threads would cost more than they give, and fight with the tower's.
    with threadpool_limits(1):
        return _fit(embeddings, hints, stamp, reducer)


def _fit(embeddings: Rows, hints: Hints, stamp: Mapping[str, str], reducer: TeamReducer) -> Fit:
    crops = _crops(embeddings, hints)
    origin = crops.means.mean(axis=0)
    if np.linalg.norm(crops.means - origin, axis=1).max() < _SAME:
        return Fit(None, _unassigned(len(embeddings)), ("DEGENERATE",))
    nuisances = _nuisances(crops.unit - crops.means[crops.track])
    samples = _without(crops.means - origin, nuisances)
    components = samples[:0] if reducer == "none" else _principal(samples)
    inner = _project(samples, components)  # [tracks, p]
    seen = _umap(samples) if reducer == "umap" else inner
    trimmed = _STRAYS if hints.players is None else _FEW_STRAYS
    found = trimmed_kmeans(seen, hints.teams, trimmed, _seeds(seen, crops, hints.teams))
    clusters, kept = found.labels, found.kept
    centroids = np.stack([inner[kept & (clusters == number)].mean(axis=0) for number in range(hints.teams)])
    view = _view(inner, centroids, components)
    places, rest = _split(_without(crops.unit - origin, nuisances), components)
    own = clusters[crops.track]
    # Without components the spread is looked for in those that there would be.
    basis = np.eye(len(components), dtype=np.float32) if len(components) else _principal(samples)
    spread = _spread(places - centroids[own], rest, own, basis, trimmed)
    of_crop = _of_crops(spread.distances(places, centroids), clusters, crops)
    names, conflict = _names(of_crop, centroids @ view[0], embeddings, crops, hints)
    centroids = centroids[np.argsort(names)]
    scales = np.ones(hints.teams, np.float32)
    state = TeamState(
        stamp, origin, nuisances, components, centroids, spread.axes, spread.sizes, scales, view
    )
    labels = names[of_crop]
    state = replace(state, scales=_scales(state, crops.unit, labels))
    said = predict(state, embeddings)
    of_all = np.full(len(embeddings), -1, dtype=np.int32)
    of_all[crops.rows] = labels
    notes = {
        "LOW_SUPPORT": len(crops.rows) < _SUPPORT,
        "LOW_SEPARATION": not _are_apart(inner, samples, found, trimmed),
        "ANCHOR_CONFLICT": conflict,
    }
    status = tuple(name for name, holds in notes.items() if holds)
    # A crop that looks like another team than its track has no margin.
    margin = np.where(said.labels == of_all, said.margin, 0).astype(np.float32)
    return Fit(state, replace(said, labels=of_all, margin=margin), status or ("OK",))


def predict(state: TeamState, embeddings: Rows) -> Teams:
    """The teams of N crops. N may be 0. Rows of zeros, or not finite, get the label -1.

    Args:
        state: fitted to embeddings of the same kind.
        embeddings: [N, D].

    Raises:
        InvalidInputError: D is not the state's.
    """
    if embeddings.shape[1:] != state.origin.shape:
        raise InvalidInputError(f"rows of {embeddings.shape[1]} numbers, expected {len(state.origin)}")
    teams = _unassigned(len(embeddings))
    rows = np.flatnonzero(_usable(embeddings))
    inner, rest = _place(state, _unit(embeddings[rows]))
    spread = Spread(state.axes, state.spreads)
    distance = spread.distances(inner, state.centroids)  # [n, k]
    order = np.argsort(distance, axis=1, kind="stable")
    nearest = np.take_along_axis(distance, order[:, :2], axis=1)  # [n, 2]
    teams.labels[rows] = order[:, 0]
    total = nearest.sum(axis=1)
    teams.margin[rows] = (nearest[:, -1] - nearest[:, 0]) / np.where(total == 0, 1, total)
    teams.outlier_score[rows] = np.hypot(nearest[:, 0], spread.outside(rest)) / state.scales[order[:, 0]]
    teams.coordinates[rows] = inner @ state.view.T
    return teams


def warm_up(reducer: TeamReducer) -> None:
    """Import what a fit needs. UMAP compiles at its first use, some ten seconds of work.

    Raises:
        SettingsError: umap-learn is not installed.
    """
    rows = np.random.default_rng(_SEED).normal(size=(2 * _SUPPORT, 16)).astype(np.float32)
    fit(rows, Hints(), {}, reducer)


@dataclass(frozen=True)
class _Crops:
    """The n crops that are clustered, in an order that only they decide.

    Attributes:
        rows: [n], where they were among all crops.
        unit: [n, D] at unit length.
        track: [n], number of each crop's track.
        means: [tracks, D].
        anchors: [n], teams that were named, -1 elsewhere, or None without any.
    """

    rows: NDArray[np.intp]
    unit: Rows
    track: NDArray[np.intp]
    means: Rows
    anchors: Ids | None


def _crops(embeddings: Rows, hints: Hints) -> _Crops:
    usable = _usable(embeddings)
    rows = np.flatnonzero(usable if hints.players is None else usable & hints.players)
    if len(rows) < _LEAST_CROPS:
        raise InvalidInputError(
            f"{len(rows)} usable crops of players, expected at least {_LEAST_CROPS}; "
            "60 crops of 10 players or more are recommended"
        )
    unit = _unit(embeddings[rows])
    order = np.argsort(unit.view(f"V{unit.strides[0]}")[:, 0], kind="stable")
    rows, unit = rows[order], unit[order]
    track = np.arange(len(rows))
    if hints.tracks is not None:
        known = hints.tracks[rows]
        keys = np.where(known < 0, -1 - track, known)  # negative numbers: each its own track
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        track = np.argsort(np.argsort(first))[number]  # numbered as they come, whatever the caller's numbers
    counts = np.bincount(track).astype(np.float32)
    least = _LEAST_TRACKS_A_TEAM * hints.teams
    if len(counts) < least:
        raise InvalidInputError(f"TRACK_ID: {len(counts)} tracks of players, expected at least {least}")
    means = np.zeros((len(counts), unit.shape[1]), dtype=np.float32)
    np.add.at(means, track, unit)
    means /= counts[:, None]
    return _Crops(rows, unit, track, means, None if hints.anchors is None else hints.anchors[rows])


def _usable(embeddings: Rows) -> NDArray[np.bool_]:
    finite = np.isfinite(embeddings).all(axis=1)
    usable: NDArray[np.bool_] = finite & (embeddings != 0).any(axis=1)
    return usable


def _unit(embeddings: Rows) -> Rows:
    return np.ascontiguousarray(l2_normalize(embeddings), dtype=np.float32)


def _unassigned(count: int) -> Teams:
    def zeros(*shape: int) -> Rows:
        return np.zeros(shape, dtype=np.float32)

    return Teams(np.full(count, -1, dtype=np.int32), zeros(count), zeros(count), zeros(count, 2))


def _nuisances(residuals: Rows) -> Rows:
    """The directions [m, D] in which crops of one track differ most, none where too few are known."""
    length = np.linalg.norm(residuals, axis=1, keepdims=True)
    moved = residuals[length[:, 0] > 0]
    if len(moved) < _LEAST_RESIDUALS:
        return residuals[:0]
    # Where a tracker has swapped two players, a crop differs from its track as much as the teams do from
    # each other: no crop counts for more than the median one.
    length = length[length > 0][:, None]
    moved = moved * np.minimum(1, np.median(length) / length)
    return np.asarray(np.linalg.svd(moved, full_matrices=False)[2][:_NUISANCES])


def _without(rows: Rows, directions: Rows) -> Rows:
    return np.asarray(rows - (rows @ directions.T) @ directions)


def _principal(samples: Rows) -> Rows:
    from sklearn.decomposition import PCA

    count = min(_COMPONENTS, len(samples) - 1, samples.shape[1])
    return np.asarray(PCA(count, svd_solver="full").fit(samples).components_, dtype=np.float32)


def _project(rows: Rows, components: Rows) -> Rows:
    return np.asarray(rows @ components.T) if len(components) else rows


def _place(state: TeamState, unit: Rows) -> tuple[Rows, Rows]:
    """Coordinates [n, p] of rows among the centroids, and how far [n] the rows lie outside of these."""
    return _split(_without(unit - state.origin, state.nuisances), state.components)


def _split(rows: Rows, components: Rows) -> tuple[Rows, Rows]:
    """Rows [n, D] along the components [n, p], and their lengths [n] outside of these."""
    inner = _project(rows, components)
    rest = (rows**2).sum(axis=1) - (inner**2).sum(axis=1)
    return inner, np.sqrt(np.maximum(rest, 0))


def _distances(rows: Rows, centroids: Rows) -> Rows:
    """Distance of each row [n, p] from each centroid [k, p]: [n, k]."""
    return np.asarray(np.linalg.norm(rows[:, None] - centroids, axis=2))


def _umap(samples: Rows) -> Rows:
    """Three coordinates by UMAP, seeded, in one thread."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorFlow is not there, and not needed
            from umap import UMAP
    except ModuleNotFoundError as error:
        raise SettingsError(
            "team_reducer umap: needs the extra umap (`.venv/bin/pip install -e '.[umap]'` in the checkout)"
        ) from error
    neighbours = min(15, len(samples) - 1)
    reducer = UMAP(n_components=_UMAP_COMPONENTS, n_neighbors=neighbours, random_state=_SEED, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few samples are fewer than it likes
        return np.asarray(reducer.fit_transform(samples), dtype=np.float32)


def _seeds(seen: Rows, crops: _Crops, teams: int) -> Rows | None:
    """Places [k, d] where the search starts: the named crops, if some are named of every team."""
    if crops.anchors is None or len(np.unique(crops.anchors[crops.anchors >= 0])) < teams:
        return None
    return np.stack([seen[crops.track[crops.anchors == team]].mean(axis=0) for team in range(teams)])


def _spread(inner: Rows, rest: Rows, cluster: NDArray[np.int64], basis: Rows, trimmed: float) -> Spread:
    """How crops lie around the means of their clusters. In each cluster the farthest do not count.

    Args:
        inner, rest: [n, p] and [n], the crops' places from the centroids of their clusters.
        cluster: [n], each crop's.
        basis: [q, p], directions in which the spread is looked for.
        trimmed: share that does not count.
    """
    far = np.hypot(np.linalg.norm(inner, axis=1), rest)
    kept = np.zeros(len(far), dtype=np.bool_)
    for number in np.unique(cluster):
        members = cluster == number
        kept |= members & (far <= np.quantile(far[members], 1 - trimmed))
    return Spread.of(inner[kept], rest[kept], basis)


def _of_crops(distances: Rows, clusters: NDArray[np.int64], crops: _Crops) -> NDArray[np.int64]:
    """The cluster [n] of each crop's track: that of most of its crops, or of its mean in a tie.

    It is what the means are throughout if a cluster would be left without a track.

    Args:
        distances: [n, k], of the crops from the centroids.
        clusters: [tracks], of the means.
        crops: whose tracks these are.
    """
    teams = distances.shape[1]
    votes = np.zeros((len(clusters), teams))
    np.add.at(votes, (crops.track, distances.argmin(axis=1)), 1)
    votes[np.arange(len(clusters)), clusters] += 0.5
    voted = votes.argmax(axis=1)
    if len(np.unique(voted)) < teams:
        voted = clusters
    return np.asarray(voted[crops.track])


def _view(inner: Rows, centroids: Rows, components: Rows) -> Rows:
    """Two directions [2, p]: between the centroids, and the samples' main one across."""
    along = np.linalg.svd(centroids - centroids.mean(axis=0), full_matrices=False)[2][:1]
    # A direction's sign is arbitrary; the embedding's own axes are not.
    outer = along[0] @ components if len(components) else along[0]
    along = along * np.sign(outer[np.abs(outer).argmax()])
    across = np.linalg.svd(_without(inner - inner.mean(axis=0), along), full_matrices=False)[2][:1]
    return np.concatenate([along, across]).astype(np.float32)


def _names(
    of_crop: NDArray[np.int64], positions: Rows, embeddings: Rows, crops: _Crops, hints: Hints
) -> tuple[Ids, bool]:
    """The id of each cluster, and whether crops that were named as of one team are not in its cluster.

    As the named crops say, then as the earlier state says, then along the line between the clusters.
    """
    from scipy.optimize import linear_sum_assignment

    teams = hints.teams
    votes = np.zeros((teams, teams))  # [cluster, id]
    votes[np.argsort(positions), np.arange(teams)] += 0.5 / len(crops.rows)
    if hints.previous is not None:
        before = predict(hints.previous, embeddings[crops.rows]).labels
        np.add.at(votes, (of_crop[before < teams], before[before < teams]), 1 / len(crops.rows))
    conflict = False
    if crops.anchors is not None:
        named = crops.anchors >= 0
        counts = np.zeros((teams, teams))
        np.add.at(counts, (of_crop[named], crops.anchors[named]), 1)
        votes += 2 * counts
    cluster, name = linear_sum_assignment(-votes)
    names = np.empty(teams, dtype=np.int32)
    names[cluster] = name
    if crops.anchors is not None:
        agree, all_named = counts[cluster, name], counts[:, name].sum(axis=0)
        conflict = bool(((2 * agree <= all_named) & (all_named > 0)).any())
    return names, conflict


def _scales(state: TeamState, unit: Rows, labels: Ids) -> Rows:
    """The median distance [k] of each team's crops from its centroid."""
    inner, rest = _place(state, unit)
    spread = Spread(state.axes, state.spreads)
    own = spread.distances(inner, state.centroids)[np.arange(len(labels)), labels]
    distance = np.hypot(own, spread.outside(rest))
    medians = [np.median(distance[labels == team]) for team in range(len(state.centroids))]
    return np.maximum(np.array(medians, dtype=np.float32), 1e-6)


def _are_apart(inner: Rows, samples: Rows, found: Clusters, trimmed: float) -> bool:
    """True if the clusters are farther apart than those that a single one would be cut into."""
    kept, teams = found.kept, int(found.labels.max()) + 1
    factor = _CLEARLY if len(samples) > _PEOPLE else 1
    if np.ptp(samples[kept], axis=0).max() < _SAME:
        return False
    by_chance = _separation_by_chance(samples[kept], teams, trimmed)
    return _separation(inner[kept], found.labels[kept]) >= factor * by_chance


def _separation_by_chance(samples: Rows, teams: int, trimmed: float) -> float:
    """`_separation` of 19 of 20 draws, at most, from one Gaussian with the samples' main spreads."""
    rng = np.random.default_rng(_SEED)
    count = min(len(samples), _MOST_DRAWN)  # more would only look less separate
    spread = np.linalg.svd(samples - samples.mean(axis=0), compute_uv=False) / np.sqrt(len(samples) - 1)
    found = []
    for _ in range(_DRAWS):
        drawn = (rng.normal(size=(count, len(spread))) * spread).astype(np.float32)
        inner = _project(drawn, _principal(drawn))
        clusters = trimmed_kmeans(inner, teams, trimmed, thorough=False)
        found.append(_separation(inner[clusters.kept], clusters.labels[clusters.kept]))
    return float(np.quantile(found, 0.95))


def _separation(inner: Rows, clusters: NDArray[np.intp]) -> float:
    """How far the two nearest clusters lie apart, in units of their spread along the line between them.

    It is 0 for one cluster alone, into which points fall that are all but the same.
    """
    numbers = np.unique(clusters)
    found = []
    for one in numbers:
        for other in numbers[numbers > one]:
            a, b = inner[clusters == one], inner[clusters == other]
            line = a.mean(axis=0) - b.mean(axis=0)
            spread = np.sqrt(((a @ line).var() + (b @ line).var()) / 2)
            found.append(float(line @ line / max(spread, 1e-12)))
    return min(found, default=0.0)

"""Accuracy of teams on drawn clips whose truth is known: our pipeline, and other ones.

    python -m benchmarks.teams --output benchmarks/results/teams.csv --sheets build/teams

Every clip follows from its tier and seed (`training.jerseys.clips` says what each tier is). The fit sees
the first half of its frames, and the second is held out. Goalkeepers and referees are among the crops,
unannounced, and outfield players are what counts. Ways:

    ours             as `fit_teams`: track means, within-track directions removed, PCA(8), trimmed KMeans
    ours, no tracks  the same without TRACK_ID
    recipe           UMAP(3) and KMeans(2) on single crops, whole, as published; needs umap-learn
    recipe, region   the same on the jersey's region
    hsv              a histogram of hue, saturation and value over the region, KMeans(2) on single crops
    hsv, tracks      the same on the mean of each track's histograms
    hsv, our fit     these histograms instead of embeddings in our pipeline

`ours` and `recipe` are run with every checkpoint. Numbers:

- accuracy of crops and of tracks (each track's majority) at the fit, accuracy of held-out crops, and the
  adjusted Rand index at the fit. All are under the better of the two ways to name the teams, which stays for
  the held-out half.
- the share of held-out tracks whose voted team (`TeamTracker`) is another than at the fit, per 1,000 frames
- the share of second fits, on the held-out half and with PREV_STATE, that name the teams the other way
- the area under the curve of the outlier score for goalkeepers and referees against players
- the share of fits that say LOW_SEPARATION (T7 has one team)
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client import TeamTracker
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from tqdm import tqdm

from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Pixels
from siglip_serve.teams import clustering
from siglip_serve.teams.clustering import Hints
from siglip_serve.teams.jersey import jersey_roi, parse_region
from siglip_serve.towers.siglip import load_vision
from training.jerseys import TIERS, Clip, Role, clip, contact_sheet

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "umap-learn")
REGION = parse_region("0.25,0.2,0.75,0.5")
BINS = (16, 4, 4)
STAMP = {"version": "1"}

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Answer of a way for a clip's N crops.

    Attributes:
        labels: [N], 0 or 1, or -1 for none.
        outlier_score: [N], if the way has one.
        refitted: [N], by a second fit on the held-out half that was told the first.
        doubted: whether the fit itself says that there may be one team only.
    """

    labels: Ids
    outlier_score: Rows | None = None
    refitted: Ids | None = None
    doubted: bool | None = None


Way = Callable[[Rows, Clip], Found]


class Encoder:
    """A checkpoint as the server runs it: crops -> mean over the patch tokens."""

    def __init__(self, name: str, device: str) -> None:
        config = load_config(resolve(name))
        self.name = config.path.name
        self._preprocess = Preprocessor(config.image, "pil")
        self._engine = VisionEngine(load_vision(config.path), config.image, Plan(device=device))

    def __call__(self, pictures: Sequence[Pixels]) -> Rows:
        """uint8 RGB pictures of any size -> float32 [N, D]."""
        pixels = np.stack([self._preprocess.resize(picture) for picture in pictures])
        found = self._engine(pixels, ["MEAN_EMBEDDING"]).rows(0, len(pixels))
        return np.asarray(found["MEAN_EMBEDDING"], dtype=np.float32)


def histograms(pictures: Sequence[Pixels]) -> Rows:
    """Square roots of HSV histograms, float32 [N, 256]: Euclidean distance is then Hellinger's."""
    rows = []
    for picture in pictures:
        hsv = np.asarray(Image.fromarray(picture).convert("HSV")).reshape(-1, 3)
        counts, _ = np.histogramdd(hsv, bins=BINS, range=[(0, 256)] * 3)
        rows.append(np.sqrt(counts.ravel() / len(hsv)))
    return np.array(rows, dtype=np.float32)


def ours(features: Rows, made: Clip, tracks: bool = True) -> Found:
    """Teams by the pipeline of `fit_teams` and `classify_teams`."""
    hints = Hints(tracks=made.track) if tracks else Hints()
    fitted = clustering.fit(features[~made.held_out], _some(hints, ~made.held_out), STAMP)
    labels = np.full(len(features), -1, dtype=np.int64)
    scores = np.zeros(len(features), dtype=np.float32)
    if fitted.state is None:
        return Found(labels)
    later = clustering.predict(fitted.state, features[made.held_out])
    labels[~made.held_out], labels[made.held_out] = fitted.teams.labels, later.labels
    scores[~made.held_out], scores[made.held_out] = fitted.teams.outlier_score, later.outlier_score
    hints = replace(_some(hints, made.held_out), previous=fitted.state)
    again = clustering.fit(features[made.held_out], hints, STAMP)
    refitted = np.full(len(features), -1, dtype=np.int64)
    refitted[made.held_out] = again.teams.labels
    return Found(labels, scores, refitted, "LOW_SEPARATION" in fitted.status)


def _some(hints: Hints, rows: NDArray[np.bool_]) -> Hints:
    return hints if hints.tracks is None else replace(hints, tracks=hints.tracks[rows])


def recipe(features: Rows, made: Clip) -> Found:
    """UMAP to three dimensions, then KMeans, on single crops. It is seeded, unlike the published code."""
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        reducer = UMAP(n_components=3, random_state=0)
        inner = reducer.fit_transform(features[~made.held_out])
        later = reducer.transform(features[made.held_out])
    return _kmeans(inner, later, made)


def plain(features: Rows, made: Clip) -> Found:
    """KMeans on single crops."""
    return _kmeans(features[~made.held_out], features[made.held_out], made)


def plain_tracks(features: Rows, made: Clip) -> Found:
    """KMeans on the mean of each track's rows. Held-out crops go to the nearest centroid."""
    fit, track = features[~made.held_out], made.track[~made.held_out]
    numbers, place = np.unique(track, return_inverse=True)
    means = np.stack([fit[track == number].mean(axis=0) for number in numbers])
    kmeans = KMeans(2, n_init=10, random_state=0).fit(means)
    labels = np.empty(len(features), dtype=np.int64)
    labels[~made.held_out] = kmeans.labels_[place]
    labels[made.held_out] = kmeans.predict(features[made.held_out])
    return Found(labels)


def _kmeans(fit: Rows, later: Rows, made: Clip) -> Found:
    kmeans = KMeans(2, n_init=10, random_state=0).fit(fit)
    labels = np.empty(len(made.track), dtype=np.int64)
    labels[~made.held_out], labels[made.held_out] = kmeans.labels_, kmeans.predict(later)
    return Found(labels)


def judge(found: Found, made: Clip) -> dict[str, float]:
    """The numbers of one clip, NaN where one has no meaning."""
    players = made.role == Role.PLAYER
    fit, later = players & ~made.held_out, players & made.held_out
    labels, one_team = found.labels, len(np.unique(made.team[players])) < 2
    if (labels[fit] != made.team[fit]).mean() > 0.5:
        labels = np.where(labels < 0, labels, 1 - labels)
    voted = {track: _majority(labels[fit & (made.track == track)]) for track in np.unique(made.track[fit])}
    # Under swapped track numbers a track's team is what most of its crops are.
    truth = {track: _majority(made.team[fit & (made.track == track)]) for track in voted}
    numbers = {
        "crops": _mean(labels[fit] == made.team[fit]),
        "tracks": _mean(voted[track] == truth[track] for track in voted),
        "ari": float(adjusted_rand_score(made.team[fit], labels[fit])),
        "held_out": _mean(labels[later] == made.team[later]),
        "flips": _flips(labels, made, voted),
        "renamed": float("nan"),
        "outliers": float("nan"),
        "doubted": float("nan" if found.doubted is None else found.doubted),
    }
    if one_team:
        numbers |= dict.fromkeys(("crops", "tracks", "ari", "held_out", "flips"), float("nan"))
    if found.refitted is not None and not one_team:
        numbers["renamed"] = float((found.refitted[later] != found.labels[later]).mean() > 0.5)
    if found.outlier_score is not None:
        numbers["outliers"] = float(roc_auc_score(~players, found.outlier_score))
    return numbers


def _flips(labels: Ids, made: Clip, voted: dict[int, int]) -> float:
    """Changes of the voted team of tracks that are one person, over held-out frames, per thousand frames."""
    tracker = TeamTracker()
    stable = [t for t in voted if len(np.unique(made.player[made.track == t])) == 1]
    last = dict(voted)
    changes = 0
    for frame in np.unique(made.frame):
        rows = np.flatnonzero((made.frame == frame) & np.isin(made.track, stable))
        said = tracker.update(made.track[rows], labels[rows])
        if frame in made.frame[made.held_out]:
            changes += sum(last[track] != team for track, team in zip(made.track[rows], said, strict=True))
            last |= dict(zip(made.track[rows].tolist(), said.tolist(), strict=True))
    return 1000 * changes / len(np.unique(made.frame[made.held_out]))


def _majority(values: Ids) -> int:
    numbers, counts = np.unique(values, return_counts=True)
    return int(numbers[counts.argmax()])


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean(list(values)))


@dataclass(frozen=True)
class Contender:
    """A way and its features."""

    way: str
    checkpoint: str
    features: Callable[[Sequence[Pixels]], Rows]
    region: bool
    find: Way


def contenders(encoders: Sequence[Encoder], with_recipe: bool) -> list[Contender]:
    """Everything that is compared, with each encoder."""
    found = []
    for encoder in encoders:
        found += [
            Contender("ours", encoder.name, encoder, True, ours),
            Contender("ours, no tracks", encoder.name, encoder, True, lambda f, made: ours(f, made, False)),
        ]
        if with_recipe:
            found += [
                Contender("recipe", encoder.name, encoder, False, recipe),
                Contender("recipe, region", encoder.name, encoder, True, recipe),
            ]
    return [
        *found,
        Contender("hsv", "", histograms, True, plain),
        Contender("hsv, tracks", "", histograms, True, plain_tracks),
        Contender("hsv, our fit", "", histograms, True, ours),
    ]


def measure(made: Clip, everyone: Sequence[Contender]) -> list[dict[str, Any]]:
    """The numbers of every contender on one clip."""
    decode = Preprocessor(load_config(resolve("checkpoints/siglip-tiny")).image, "pil").decode
    whole = [decode(crop) for crop in made.crops]
    region = [jersey_roi(picture, REGION)[0] for picture in whole]

    @cache
    def features(of: Callable[[Sequence[Pixels]], Rows], on_region: bool) -> Rows:
        return of(region if on_region else whole)

    rows = []
    for each in everyone:
        numbers = judge(each.find(features(each.features, each.region), made), made)
        rows.append({"way": each.way, "checkpoint": each.checkpoint, **numbers})
    return rows


def summary(rows: Sequence[dict[str, Any]], tiers: Sequence[str], column: str) -> str:
    """A table: a row a contender, a column a tier, the mean over seeds."""
    names = list(dict.fromkeys((row["way"], row["checkpoint"]) for row in rows))
    lines = [f"{column:24s}{'':24s}" + "".join(f"{tier:>9s}" for tier in tiers)]
    for way, checkpoint in names:
        cells = []
        for tier in tiers:
            mine = [
                r[column] for r in rows if (r["way"], r["checkpoint"], r["tier"]) == (way, checkpoint, tier)
            ]
            cells.append(f"{np.mean(mine):9.3f}" if np.isfinite(mine).all() else f"{'-':>9s}")
        lines.append(f"{way:24s}{checkpoint:24s}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=["checkpoints/siglip-tiny-jersey", "checkpoints/siglip-tiny"],
        help="directories or hub ids (default: %(default)s)",
    )
    parser.add_argument("--tiers", nargs="+", choices=list(TIERS), default=list(TIERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(15)), metavar="SEED")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the .csv file to write")
    parser.add_argument("--sheets", type=Path, help="folder for a picture of every tier's first clip")
    options = parser.parse_args()
    with_recipe = find_spec("umap") is not None
    if not with_recipe:
        print("skipped: recipe (umap-learn is not installed: pip install umap-learn)", file=sys.stderr)
    everyone = contenders([Encoder(name, options.device) for name in options.checkpoint], with_recipe)
    rows = []
    for tier in tqdm(options.tiers, unit="tier", disable=None):
        for seed in options.seeds:
            made = clip(tier, seed)
            rows += [{"tier": tier, "seed": seed, **numbers} for numbers in measure(made, everyone)]
            if options.sheets and seed == options.seeds[0]:
                options.sheets.mkdir(parents=True, exist_ok=True)
                contact_sheet(made).save(options.sheets / f"{tier}.png")
    for column in ("tracks", "crops", "ari", "held_out", "flips", "renamed", "outliers", "doubted"):
        print(summary(rows, options.tiers, column), end="\n\n")
    if options.output:
        said = about(PACKAGES)
        texts = [{k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
        write_csv(options.output, [{**said, **row} for row in texts])


if __name__ == "__main__":
    main()

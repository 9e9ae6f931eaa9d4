"""Accuracy of teams on frames of real matches, with the bundled tower.

    python -m benchmarks.football MATCHES.json --pictures DIR --output benchmarks/results/football.csv

MATCHES.json maps a match to its frames. A frame has `image`, a path below DIR, and `boxes`: each with `box`
(left, top, right, bottom in pixels), `role` (player, goalkeeper, referee) and `team` (0 or 1 of players, -1
where a box shows two or cannot be told, null where there is none). Boxes of team -1 are served, but not
counted. Nothing is fetched or kept: the pictures are read, and numbers come out.

Goalkeepers and referees are among the crops, unannounced, and no tracks are told. Ways:

    3 frames              a fit on each three successive frames of a match, of which the first follows the
                          last, the others held out
    1 frame               a fit on each frame alone, the others held out
    one team              a fit on the players of one team in each three successive frames
    one team and others   the same with the goalkeepers and referees of these frames

Numbers are means over a match's fits, and the rows of several matches are means over these. Recall and
precision of goalkeepers and referees are over all crops with a score above the mark of `siglip-serve teams`.
That mark is chosen on the first half of the matches, by name, at the fit with three frames, so that the lower
of recall and precision at the fit and held out is largest. The second half is what it is judged by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.commands.teams.labelled import OUTLIER
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from benchmarks.records import about, write_csv
from benchmarks.teams import REGION, STAMP, Encoder, Rows
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.teams import clustering
from siglip_serve.teams.clustering import Hints
from siglip_serve.teams.jersey import cut_box, jersey_roi

PACKAGES = ("torch", "scikit-learn", "numpy")
CHECKPOINT = "checkpoints/siglip-tiny-jersey"
MARKS = np.arange(10, 41) / 10
UNTOLD, NO_TEAM = -1, -2

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Match:
    """The N crops of a match.

    Attributes:
        features: [N, D].
        frame: [N], number of each crop's frame.
        player: [N], False for goalkeepers and referees.
        team: [N]; UNTOLD where a box shows two players, NO_TEAM for goalkeepers and referees.
    """

    features: Rows
    frame: NDArray[np.int64]
    player: Bools
    team: NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Outlier scores [n] of crops, and which of them are goalkeepers and referees."""

    values: Rows
    other: Bools

    @property
    def auroc(self) -> float:
        """The area under the curve for goalkeepers and referees against players."""
        return float(roc_auc_score(self.other, self.values))

    def recall(self, mark: float) -> float:
        """The share of goalkeepers and referees that is above the mark."""
        return float((self.values[self.other] > mark).mean())

    def precision(self, mark: float) -> float:
        """The share of goalkeepers and referees among what is above the mark, 0 if nothing is."""
        above = self.values > mark
        return float(self.other[above].mean()) if above.any() else 0.0


@dataclass(frozen=True)
class Outcome:
    """One fit: accuracies (NaN without held-out crops), scores at the fit and held out, the status."""

    fit: float
    held_out: float
    scores: Scores
    later: Scores
    doubted: bool


def read_matches(path: Path, pictures: Path, encoder: Encoder) -> dict[str, Match]:
    """The crops of every match in a file, as `fit_teams` would see them.

    Raises:
        OSError: a picture cannot be read.
    """
    decode = Preprocessor(load_config(resolve(CHECKPOINT)).image, "pil").decode
    matches = {}
    for name, frames in tqdm(json.loads(path.read_bytes()).items(), unit="match", disable=None):
        features = []
        for frame in frames:
            pixels = decode((pictures / frame["image"]).read_bytes())
            crops = [cut_box(pixels, np.array(box["box"], dtype=np.float32)) for box in frame["boxes"]]
            features.append(encoder([jersey_roi(crop, REGION)[0] for crop in crops]))
        boxes = [box for frame in frames for box in frame["boxes"]]
        matches[name] = Match(
            np.concatenate(features),
            np.repeat(np.arange(len(frames)), [len(frame["boxes"]) for frame in frames]),
            np.array([box["role"] == "player" for box in boxes]),
            np.array([NO_TEAM if box["team"] is None else box["team"] for box in boxes]),
        )
    return matches


def judge(match: Match, fitted: Bools) -> Outcome:
    """A fit on some crops of a match, judged on these and on all others."""
    found = clustering.fit(match.features[fitted], Hints(), STAMP)
    if found.state is None:
        raise ValueError(f"no teams in {fitted.sum()} crops: {', '.join(found.status)}")
    later = clustering.predict(found.state, match.features[~fitted])
    labels = np.empty(len(match.team), dtype=np.int64)
    values = np.empty(len(match.team), dtype=np.float32)
    labels[fitted], labels[~fitted] = found.teams.labels, later.labels
    values[fitted], values[~fitted] = found.teams.outlier_score, later.outlier_score
    known = match.team >= 0
    if (labels != match.team)[fitted & known].mean() > 0.5:
        labels = 1 - labels
    right, told = labels == match.team, match.team != UNTOLD
    return Outcome(
        float(right[fitted & known].mean()),
        float(right[~fitted & known].mean()) if (~fitted & known).any() else float("nan"),
        Scores(values[fitted & told], ~match.player[fitted & told]),
        Scores(values[~fitted & told], ~match.player[~fitted & told]),
        "LOW_SEPARATION" in found.status,
    )


def choices(match: Match, count: int) -> Iterator[Bools]:
    """The crops of this number of successive frames, from each frame on. The first frame follows the last."""
    frames = np.unique(match.frame)
    for first in range(len(frames)):
        yield np.isin(match.frame, np.roll(frames, -first)[:count])


def doubts(match: Match, others: bool) -> list[bool]:
    """For each team and each three frames: does a fit on this team alone report LOW_SEPARATION?"""
    found = []
    for team in (0, 1):
        worn = (match.team == team) | (others & ~match.player)
        for frames in choices(match, 3):
            status = clustering.fit(match.features[frames & worn], Hints(), STAMP).status
            found.append("LOW_SEPARATION" in status or "DEGENERATE" in status)
    return found


def pooled(outcomes: Sequence[Outcome]) -> tuple[Scores, Scores]:
    """The scores of several fits together: at the fit, and held out."""

    def together(scores: Sequence[Scores]) -> Scores:
        return Scores(
            np.concatenate([one.values for one in scores]), np.concatenate([one.other for one in scores])
        )

    return together([one.scores for one in outcomes]), together([one.later for one in outcomes])


def best_mark(outcomes: Sequence[Outcome]) -> float:
    """The mark at which the lowest of recall and precision, at the fit and held out, is largest."""
    both = pooled(outcomes)
    lowest = [min(min(s.recall(mark), s.precision(mark)) for s in both) for mark in MARKS]
    return float(MARKS[int(np.argmax(lowest))])


def of_fits(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
    """The numbers of the fits of one or several matches. Recall and precision are of held-out crops too."""
    scores, later = pooled([one for several in outcomes.values() for one in several])
    fit = [np.mean([one.fit for one in several]) for several in outcomes.values()]
    held_out = [np.mean([one.held_out for one in several]) for several in outcomes.values()]
    doubted = [one.doubted for several in outcomes.values() for one in several]
    return {
        "fit": float(np.mean(fit)),
        "fit_worst": float(np.min(fit)),
        "held_out": float(np.mean(held_out)),
        "held_out_worst": float(np.min(held_out)),
        "auroc": scores.auroc,
        "recall": scores.recall(OUTLIER),
        "precision": scores.precision(OUTLIER),
        "auroc_later": later.auroc,
        "recall_later": later.recall(OUTLIER),
        "precision_later": later.precision(OUTLIER),
        "doubted": float(np.mean(doubted)),
        "fits": len(doubted),
    }


def measure(matches: Mapping[str, Match]) -> list[dict[str, Any]]:
    """A row for each way and each match, both halves of the matches, and all of them."""
    names = sorted(matches)
    half = len(names) // 2
    scopes = {"all": names, "first half": names[:half], "second half": names[half:]}
    scopes |= {name: [name] for name in names}
    rows: list[dict[str, Any]] = []
    for count, way in ((3, "3 frames"), (1, "1 frame")):
        outcomes = {
            name: [judge(matches[name], some) for some in choices(matches[name], count)] for name in names
        }
        if count == 3:
            mark = best_mark([one for name in scopes["first half"] for one in outcomes[name]])
            print(f"the mark that the first half chooses: {mark:.1f}, in use: {OUTLIER:g}")
        rows += [
            {"way": way, "matches": scope, **of_fits({name: outcomes[name] for name in chosen})}
            for scope, chosen in scopes.items()
        ]
    for others, way in ((False, "one team"), (True, "one team and others")):
        doubted = {name: doubts(matches[name], others) for name in names}
        for scope, chosen in scopes.items():
            flat = [one for name in chosen for one in doubted[name]]
            blank = dict.fromkeys(rows[0], float("nan"))
            rows.append(
                {**blank, "way": way, "matches": scope, "doubted": float(np.mean(flat)), "fits": len(flat)}
            )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    numbers = [name for name in rows[0] if name not in ("way", "matches")]
    lines = [f"{'way':20s} {'matches':12s}" + "".join(f"{name:>16s}" for name in numbers)]
    for row in rows:
        cells = (f"{row[name]:16.3f}" if row[name] == row[name] else f"{'-':>16s}" for name in numbers)
        lines.append(f"{row['way']:20s} {row['matches']:12s}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("matches", type=Path, metavar="MATCHES.json", help="boxes, roles and teams")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="where the images lie")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the .csv file to write")
    options = parser.parse_args()
    rows = measure(read_matches(options.matches, options.pictures, Encoder(CHECKPOINT, options.device)))
    print(summary(rows))
    if options.output:
        said = about(PACKAGES)
        # Paths of the one who measured say nothing to others.
        said["command"] = (
            f"python -m benchmarks.football MATCHES.json --pictures DIR --output {options.output}"
        )
        texts = [{k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
        write_csv(options.output, [{**said, **row} for row in texts])


if __name__ == "__main__":
    main()

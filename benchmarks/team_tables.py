"""The tables of teams: rendered matches, and real ones."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["JERSEY", "TEAMS"]

_H200_X1, _EPYC = "NVIDIA H200 x1", "AMD EPYC"

_TIERS = ("T0", "T1", "T2", "T3", "T4", "T5", "T6", "T8")
JERSEY = "siglip-tiny-jersey"


def _by_tier(field: str, tiers: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(Column(tier, Cell(f"{{{field}:.2f}}", {"tier": tier}, "mean")) for tier in tiers)


def _measure(heading: str, field: str) -> tuple[Source, tuple[str | Cell, ...]]:
    source = Source("teams.csv", {"way": "ours", "checkpoint": JERSEY})
    tiers = (*_TIERS[:7], "T7", "T8")
    return source, (heading, *(Cell(f"{{{field}:.2f}}", {"tier": tier}, "mean") for tier in tiers))


TEAMS: Mapping[str, Table | Summary] = {
    "teams": Table(
        Source("teams.csv", {"tier": _TIERS}),
        (
            Key("tower", "checkpoint", {JERSEY: JERSEY, "siglip-tiny": "siglip-tiny", "": "none"}),
            Key(
                "way",
                "way",
                {
                    "ours": "this pipeline",
                    "ours, no tracks": "without `TRACK_ID`",
                    "recipe": "published recipe, whole crops",
                    "recipe, region": "published recipe, jersey region",
                    "hsv": "HSV histogram, KMeans",
                    "hsv, tracks": "HSV histogram, KMeans on track means",
                    "hsv, our fit": "HSV histogram in this pipeline",
                },
            ),
        ),
        _by_tier("tracks", _TIERS),
    ),
    "teams-measures": Summary(
        ("", "T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8"),
        (
            _measure("held-out crops right", "held_out"),
            _measure("adjusted Rand index of crops at the fit", "ari"),
            _measure("voted teams that changed on held-out frames", "flips"),
            _measure("refits with `PREV_STATE` that swapped the teams", "renamed"),
            _measure("goalkeepers and referees by `OUTLIER_SCORE`, AUROC", "outliers"),
            _measure("fits that report `LOW_SEPARATION`", "doubted"),
        ),
    ),
    "football": Table(
        Source("football.csv", {"matches": ("all", "second half")}),
        (
            Key(
                "fit on",
                "way",
                {
                    "3 frames": "three frames",
                    "1 frame": "one frame",
                    "one team": "one team of three frames",
                    "one team and others": "one team, keepers, referees",
                },
            ),
            Key("matches", "matches"),
        ),
        (
            Column("players right", Cell("{fit:.3f}", {})),
            Column("held out", Cell("{held_out:.3f}", {})),
            Column("worst match", Cell("{held_out_worst:.3f}", {})),
            Column("AUROC", Cell("{auroc:.3f}", {})),
            Column("recall", Cell("{recall:.2f}", {})),
            Column("precision", Cell("{precision:.2f}", {})),
            Column("recall, held out", Cell("{recall_later:.2f}", {})),
            Column("precision, held out", Cell("{precision_later:.2f}", {})),
            Column("`LOW_SEPARATION`", Cell("{doubted:.2f}", {})),
        ),
    ),
    "teams-latency": Table(
        Source("teams_latency.csv", {}),
        (
            Key("checkpoint", "checkpoint"),
            Key("device", "device", {_EPYC: "2 CPU cores", _H200_X1: "H200, 16 cores"}),
            Key("request", "way"),
        ),
        (
            Column("p50, ms", Cell("{p50_ms:.2f}", {})),
            Column("p95, ms", Cell("{p95_ms:.2f}", {})),
            Column("of it `team_predict`, ms", Cell("{team_predict_ms:.2f}", {})),
        ),
    ),
}

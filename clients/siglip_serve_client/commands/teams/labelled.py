"""Labelled players, and the colours and fonts that all pictures of teams share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.teams import Teams
from siglip_serve_client.commands.drawing import INK, PAPER, Color

__all__ = [
    "OUTLIER",
    "OUTLIERS",
    "Labelled",
    "team_color",
    "team_name",
    "text_color",
]

# An outlier score beyond this is marked; 1 is typical.
OUTLIER = 2.0
# The number of the outliers as a group of their own; -1 are players whom the server gave no team.
OUTLIERS = -2

# Okabe and Ito's palette, which colour-blind people can tell apart.
_PALETTE: tuple[Color, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
    (213, 94, 0),
    (0, 158, 115),
    (40, 40, 40),
)
_UNASSIGNED: Color = (150, 150, 150)


@dataclass(frozen=True)
class Labelled:
    """N players as the pictures show them.

    Attributes:
        teams: the answer of the server.
        names: [N]: a track or a number on a frame, a file's name on a sheet.
        tracks: [N], "" where unknown, or empty: no track is known.
    """

    teams: Teams
    names: Sequence[str]
    tracks: Sequence[str] = ()

    @property
    def groups(self) -> NDArray[np.int32]:
        """The group [N] of each player: the team, OUTLIERS, or -1 where there is no team."""
        labels = self.teams.labels
        far = (labels >= 0) & (self.teams.outlier_score > OUTLIER)
        return np.where(far, OUTLIERS, labels).astype(np.int32)

    @property
    def numbers(self) -> list[int]:
        """Groups that have a player: teams, then outliers, then players without a team."""
        found = np.unique(self.groups).tolist()
        return [*(number for number in found if number >= 0), *(n for n in (OUTLIERS, -1) if n in found)]

    def of(self, number: int) -> NDArray[np.intp]:
        """Rows of a group: of a team the surest first, of the outliers those least like any team."""
        rows = np.flatnonzero(self.groups == number)
        key = self.teams.outlier_score if number == OUTLIERS else self.teams.margin
        return np.asarray(rows[np.argsort(-key[rows], kind="stable")])

    def is_outlier(self, row: int) -> bool:
        """True if the row has a nearest team, and is unlike it."""
        return bool(self.groups[row] == OUTLIERS)


def team_name(number: int) -> str:
    """The name of a team, or of another group, in texts."""
    if number == OUTLIERS:
        return "outliers"
    return "unassigned" if number < 0 else f"team {number}"


def team_color(number: int) -> Color:
    if number == OUTLIERS:
        return PAPER
    return _UNASSIGNED if number < 0 else _PALETTE[number % len(_PALETTE)]


def text_color(ground: Color) -> Color:
    red, green, blue = ground
    return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK

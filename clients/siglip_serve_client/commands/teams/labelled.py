"""Labelled players, and the colours and fonts that all pictures of teams share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from siglip_serve_client._operations.teams import Teams

__all__ = [
    "FAINT",
    "INK",
    "OUTLIER",
    "PAPER",
    "Color",
    "Font",
    "Labelled",
    "font_of",
    "team_color",
    "team_name",
    "text_color",
]

# An outlier score beyond this is marked; 1 is typical.
OUTLIER = 2.0

Color: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

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
INK: Color = (34, 34, 34)
FAINT: Color = (105, 105, 105)
PAPER: Color = (255, 255, 255)


@dataclass(frozen=True)
class Labelled:
    """N players as the pictures show them.

    Attributes:
        teams: the answer of the server.
        names: [N], short: a track, a number.
    """

    teams: Teams
    names: Sequence[str]

    @property
    def numbers(self) -> list[int]:
        """Teams that have a player, and -1 last if some players have none."""
        found = np.unique(self.teams.labels).tolist()
        return [number for number in found if number >= 0] + [-1] * (-1 in found)

    def of(self, number: int) -> NDArray[np.intp]:
        """Rows of a team, the surest first."""
        rows = np.flatnonzero(self.teams.labels == number)
        return np.asarray(rows[np.argsort(-self.teams.margin[rows], kind="stable")])

    def is_outlier(self, row: int) -> bool:
        """True if the row is unlike every team."""
        return bool(self.teams.outlier_score[row] > OUTLIER)


def team_name(number: int) -> str:
    """The name of a team in texts."""
    return "unassigned" if number < 0 else f"team {number}"


def team_color(number: int) -> Color:
    return _UNASSIGNED if number < 0 else _PALETTE[number % len(_PALETTE)]


def text_color(ground: Color) -> Color:
    red, green, blue = ground
    return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


@lru_cache(maxsize=16)
def font_of(size: int) -> Font:
    return ImageFont.load_default(size)

"""A plot of the coordinates of players. Teams differ by colour and by shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from siglip_serve_client.commands.drawing import FAINT, INK, PAPER, Color, font_of
from siglip_serve_client.commands.teams.labelled import (
    OUTLIER,
    Labelled,
    team_color,
    team_name,
)

__all__ = ["scatter_plot"]

GRID: Color = (230, 230, 230)
Shape: TypeAlias = tuple[tuple[float, float], ...]

_SIZE = (1000, 680)
_PLOT = (84, 64, 800, 600)
_SMOOTH = 3  # the plot is drawn larger by this factor and then reduced, for smooth edges
_RADIUS = 6.5
_INSET = 14  # of points beyond the axes, from the border at which they are drawn
_FEWEST = 10  # with fewer points that are no outliers, the axes hold all points


@dataclass(frozen=True)
class _Scale:
    """From coordinates to places in the plot. Both axes have one scale, as distances have a meaning."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @staticmethod
    def of(points: NDArray[np.float64], inliers: NDArray[np.float64]) -> _Scale:
        """The scale that shows all inliers but stray ones, and other points that are not far from them."""
        left, top, right, bottom = _PLOT
        room = np.array([right - left, bottom - top], dtype=np.float64)
        least, most = (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(2), np.ones(2))
        if len(inliers) >= _FEWEST:
            low, high = np.percentile(inliers, (1, 99), axis=0)
            around = 0.3 * float((high - low).max())
            least, most = np.maximum(least, low - around), np.minimum(most, high + around)
        per_pixel = max(float(((most - least) / room).max()), 1e-6) * 1.12
        half = room * per_pixel / 2
        return _Scale((least + most) / 2 - half, (least + most) / 2 + half)

    def place(self, point: ArrayLike) -> tuple[float, float]:
        left, top, right, bottom = _PLOT
        x, y = (np.asarray(point) - self.low) / (self.high - self.low)
        return left + float(x) * (right - left), bottom - float(y) * (bottom - top)

    def within(self, point: ArrayLike) -> tuple[tuple[float, float], tuple[int, int]]:
        """The place of a point, moved to the border if it lies beyond, and the sides that it lies beyond.

        Sides are -1, 0 or 1 to the right and downwards.
        """
        left, top, right, bottom = _PLOT
        place = np.array(self.place(point))
        low, high = np.array([left, top]), np.array([right, bottom])
        beyond = (place > high).astype(int) - (place < low).astype(int)
        inside = np.clip(place, low + _INSET, high - _INSET)
        x, y = np.where(beyond == 0, place, inside).tolist()
        return (x, y), (int(beyond[0]), int(beyond[1]))

    def ticks(self, axis: int) -> list[float]:
        """Round numbers along an axis, about six."""
        low, high = float(self.low[axis]), float(self.high[axis])
        power = 10 ** math.floor(math.log10((high - low) / 6))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= (high - low) / 8)
        return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _polygon(corners: int, turn: float = 0.0, radius: float = _RADIUS, inner: float | None = None) -> Shape:
    """A regular polygon, or with an inner radius a star, turned by `turn` full circles."""
    count = corners if inner is None else 2 * corners
    shape = []
    for number in range(count):
        angle = 2 * math.pi * (number / count + turn)
        reach = inner if inner is not None and number % 2 else radius
        shape.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return tuple(shape)


# One per team; the last one is for players without a team.
_SHAPES: tuple[Shape, ...] = (
    _polygon(48),
    _polygon(4, 1 / 8, _RADIUS * 1.25),
    _polygon(3, 0, _RADIUS * 1.4),
    _polygon(4, 0, _RADIUS * 1.35),
    _polygon(3, 1 / 2, _RADIUS * 1.4),
    _polygon(5, 0, _RADIUS * 1.6, _RADIUS * 0.7),
    _polygon(6, 0, _RADIUS * 1.15),
    _polygon(4, 0, _RADIUS * 1.5, _RADIUS * 0.65),
    _polygon(4, 1 / 8, _RADIUS * 1.7, _RADIUS * 0.55),
)


class _Canvas:
    """Draws in the picture's own pixels on a canvas that is `_SMOOTH` times larger."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (_SIZE[0] * _SMOOTH, _SIZE[1] * _SMOOTH), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, ends: Sequence[float], color: Color, width: float = 1) -> None:
        self._draw.line([value * _SMOOTH for value in ends], fill=color, width=round(width * _SMOOTH))

    def text(self, place: tuple[float, float], text: str, size: int, color: Color, anchor: str) -> None:
        x, y = place
        font = font_of(size * _SMOOTH)
        self._draw.text((x * _SMOOTH, y * _SMOOTH), text, font=font, fill=color, anchor=anchor)

    def upright_text(self, place: tuple[float, float], text: str, size: int, color: Color) -> None:
        """Text that reads from below, centred at `place`."""
        font = font_of(size * _SMOOTH)
        left, top, right, bottom = self._draw.textbbox((0, 0), text, font=font)
        label = Image.new("RGB", (math.ceil(right - left), math.ceil(bottom - top)), PAPER)
        ImageDraw.Draw(label).text((-left, -top), text, font=font, fill=color)
        label = label.rotate(90, expand=True)
        x, y = (round(value * _SMOOTH) for value in place)
        self._image.paste(label, (x - label.width // 2, y - label.height // 2))

    def marker(self, place: tuple[float, float], number: int, size: float = 1) -> None:
        """A team's shape in its colour."""
        x, y = (value * _SMOOTH for value in place)
        shape = _SHAPES[-1 if number < 0 else number % (len(_SHAPES) - 1)]
        scale = size * _SMOOTH
        corners = [(x + dx * scale, y + dy * scale) for dx, dy in shape]
        self._draw.polygon(corners, fill=team_color(number), outline=PAPER, width=math.ceil(scale))

    def arrow(self, place: tuple[float, float], sides: tuple[int, int]) -> None:
        """A dark tip before a place, towards the sides."""
        direction = np.array(sides) / math.hypot(*sides)
        across = np.array([-direction[1], direction[0]])
        tip = np.array(place) + (_INSET - 1) * direction
        back = tip - 6 * direction
        corners = (tip, back + 6 * across, back - 6 * across)
        self._draw.polygon([tuple((corner * _SMOOTH).tolist()) for corner in corners], fill=INK)

    def ring(self, place: tuple[float, float]) -> None:
        x, y = (value * _SMOOTH for value in place)
        radius = (_RADIUS + 4) * _SMOOTH
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(box, outline=INK, width=round(1.8 * _SMOOTH))

    def finished(self) -> Image.Image:
        return self._image.reduce(_SMOOTH)


def scatter_plot(players: Labelled, title: str) -> Image.Image:
    """Draw the players' COORDINATES, a shape and a colour per team. Outliers have a ring.

    The axes are distances between embeddings of unit length, in two directions: the line on which the teams'
    centres differ most, and the direction across it in which the players do.

    The axes are as long as the players that are no outliers need. Points beyond them are drawn at the
    border with an arrow, and counted in the legend. Rows whose coordinates are not finite are left out. The
    legend counts all.
    """
    points = players.teams.coordinates.astype(np.float64)
    drawn = np.isfinite(points).all(axis=1)
    inliers = points[drawn & (players.teams.outlier_score <= OUTLIER)]
    scale = _Scale.of(points[drawn], inliers)
    canvas = _Canvas()
    _axes(canvas, scale, title)
    # The unsure first, under the others.
    order = np.argsort(players.teams.margin, kind="stable")
    beyond = _points(canvas, scale, players, order[drawn[order]].tolist())
    if not drawn.any():
        middle = ((_PLOT[0] + _PLOT[2]) / 2, (_PLOT[1] + _PLOT[3]) / 2)
        canvas.text(middle, "no crops", 18, FAINT, "mm")
    _legend(canvas, players, beyond)
    return canvas.finished()


def _points(canvas: _Canvas, scale: _Scale, players: Labelled, rows: Sequence[int]) -> int:
    """Draw the rows' points, and return how many of them lie beyond the axes."""
    size = min(1.0, max(0.4, math.sqrt(250 / max(1, len(players.teams)))))
    places = {row: scale.within(players.teams.coordinates[row]) for row in rows}
    for row, (place, _) in places.items():
        canvas.marker(place, int(players.teams.labels[row]), size)
    for row, (place, _) in places.items():
        if players.is_outlier(row):
            canvas.ring(place)
    beyond = [(place, sides) for place, sides in places.values() if any(sides)]
    for place, sides in beyond:
        canvas.arrow(place, sides)
    return len(beyond)


def _axes(canvas: _Canvas, scale: _Scale, title: str) -> None:
    left, top, right, bottom = _PLOT
    canvas.text((left, top / 2 + 2), title, 20, INK, "lm")
    for value in scale.ticks(0):
        x, _ = scale.place((value, scale.low[1]))
        canvas.line((x, top, x, bottom), GRID)
        canvas.text((x, bottom + 8), f"{value:.3g}", 13, FAINT, "mt")
    for value in scale.ticks(1):
        _, y = scale.place((scale.low[0], value))
        canvas.line((left, y, right, y), GRID)
        canvas.text((left - 8, y), f"{value:.3g}", 13, FAINT, "rm")
    canvas.line((left, top, right, top, right, bottom, left, bottom, left, top), FAINT, 1.2)
    canvas.text(((left + right) / 2, bottom + 46), "place along the line between the teams", 15, INK, "mm")
    canvas.upright_text((24, (top + bottom) / 2), "distance across that line", 15, INK)


def _legend(canvas: _Canvas, players: Labelled, beyond: int) -> None:
    x, y = _PLOT[2] + 28.0, _PLOT[1] + 14.0
    for number in players.numbers:
        canvas.marker((x, y), number)
        canvas.text((x + 20, y), f"{team_name(number)} ({len(players.of(number)):,})", 15, INK, "lm")
        y += 28
    outliers = sum(players.is_outlier(row) for row in range(len(players.teams)))
    if outliers:
        canvas.ring((x, y))
        canvas.text((x + 20, y), f"outlier ({outliers:,})", 15, INK, "lm")
        canvas.text((x + 20, y + 20), f"score above {OUTLIER:g}", 12, FAINT, "lm")
        y += 52
    if beyond:
        canvas.arrow((x, y + 8), (0, -1))
        canvas.text((x + 20, y), f"beyond the axes ({beyond:,})", 15, INK, "lm")

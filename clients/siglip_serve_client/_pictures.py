"""Pictures of teams: labelled frames, contact sheets of crops, scatter plots; drawn with Pillow alone.

Teams differ by colour and by number or shape, so that the pictures can be read without seeing colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from siglip_serve_client._teams import Teams

__all__ = ["OUTLIER", "Labelled", "contact_sheet", "labelled_frame", "scatter_plot", "team_name"]

# An outlier score beyond this is marked; 1 is typical.
OUTLIER = 2.0

Color: TypeAlias = tuple[int, int, int]
Box: TypeAlias = tuple[int, int, int, int]
_Shape: TypeAlias = tuple[tuple[float, float], ...]
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
_INK: Color = (34, 34, 34)
_FAINT: Color = (105, 105, 105)
_GRID: Color = (230, 230, 230)
_PAPER: Color = (255, 255, 255)


@dataclass(frozen=True)
class Labelled:
    """What is drawn of N players.

    Attributes:
        teams: what the server said.
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
        """Whether the row is unlike either team."""
        return bool(self.teams.outlier_score[row] > OUTLIER)


def team_name(number: int) -> str:
    """How a team is called in texts."""
    return "unassigned" if number < 0 else f"team {number}"


def _color(number: int) -> Color:
    return _UNASSIGNED if number < 0 else _PALETTE[number % len(_PALETTE)]


def _text_color(ground: Color) -> Color:
    red, green, blue = ground
    return _PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else _INK


@lru_cache(maxsize=16)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


# ---- a frame


def labelled_frame(frame: Image.Image, boxes: ArrayLike, players: Labelled) -> Image.Image:
    """The frame with a box in the team's colour around each player; a tag says team, name and margin.

    Args:
        frame: in whose pixels the boxes are.
        boxes: [N, 4] of x0, y0, x1, y1; those without an area inside of the frame are left out.
    """
    picture = frame.convert("RGB")
    draw = ImageDraw.Draw(picture)
    width = max(2, round(min(picture.size) / 270))
    font = _font(max(10, round(min(picture.size) / 80)))
    limits = np.array([picture.width, picture.height] * 2) - 1
    corners = np.nan_to_num(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
    x0, y0, x1, y1 = np.clip(corners, 0, limits).round().astype(int).T
    visible = np.flatnonzero((x0 < x1) & (y0 < y1))
    # Who stands in front has the lower feet, and is drawn over those behind.
    for row in visible[np.argsort(y1[visible], kind="stable")].tolist():
        place = (int(x0[row]), int(y0[row]), int(x1[row]), int(y1[row]))
        _frame_box(draw, place, players, row, width)
        _frame_tag(draw, place, players, row, font)
    _frame_legend(draw, players, font)
    return picture


def _frame_box(draw: ImageDraw.ImageDraw, box: Box, players: Labelled, row: int, width: int) -> None:
    x0, y0, x1, y1 = box
    # An edge around the colour keeps it visible on any ground; a thick dark one marks outliers.
    rim, ink = (width, _INK) if players.is_outlier(row) else (1, _PAPER)
    draw.rectangle((x0 - rim, y0 - rim, x1 + rim, y1 + rim), outline=ink, width=rim)
    draw.rectangle(box, outline=_color(int(players.teams.labels[row])), width=width)


def _frame_tag(draw: ImageDraw.ImageDraw, box: Box, players: Labelled, row: int, font: Font) -> None:
    number = int(players.teams.labels[row])
    lines = [f"{'?' if number < 0 else number}:{players.names[row]}", f"{players.teams.margin[row]:.2f}"]
    if players.is_outlier(row):
        lines[1] += "!"
    text = "\n".join(lines)
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, spacing=2)
    pad = 3
    width, height = math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad
    x = min(max(0, (box[0] + box[2] - width) // 2), max(0, draw.im.size[0] - width))
    y = max(0, box[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=_color(number), outline=_PAPER)
    color = _text_color(_color(number))
    draw.multiline_text(
        (x + pad - left, y + pad - top), text, font=font, fill=color, spacing=2, align="center"
    )


def _frame_legend(draw: ImageDraw.ImageDraw, players: Labelled, font: Font) -> None:
    """In the lower left corner, from the bottom: what the tags and the colours mean."""
    texts = [(_PAPER, "team:player, margin; ! outlier")]
    texts += [
        (_color(team), f"{team_name(team)}: {len(players.of(team))}") for team in reversed(players.numbers)
    ]
    boxes = [draw.textbbox((0, 0), text, font=font) for _, text in texts]
    line = math.ceil(max(box[3] for box in boxes)) + 6
    width = math.ceil(max(box[2] for box in boxes)) + 12
    bottom = draw.im.size[1] - 6
    for color, text in texts:
        draw.rectangle((6, bottom - line, 6 + width, bottom), fill=color)
        draw.text((12, bottom - line / 2), text, font=font, fill=_text_color(color), anchor="lm")
        bottom -= line


# ---- crops

_CELL_WIDTH, _CELL_HEIGHT = 72, 112
_GAP = 12
_CAPTION = 20
_TITLE = 52
_HEADING = 46
_COLUMNS = 14
_MOST_SHOWN = 6 * _COLUMNS


def contact_sheet(crops: Sequence[Image.Image | Path], players: Labelled, title: str) -> Image.Image:
    """The crops by team, the surest first, with names and margins; outliers have a dark frame.

    Args:
        crops: [N]; of a team of more than 84 only the surest and the least sure are drawn.

    Raises:
        OSError: a path that is drawn cannot be read.
    """
    groups = [(number, players.of(number)) for number in players.numbers]
    lines = [math.ceil(min(len(rows), _MOST_SHOWN) / _COLUMNS) for _, rows in groups]
    heights = [_HEADING + count * (_CELL_HEIGHT + _CAPTION + _GAP) + _GAP for count in lines]
    size = (_COLUMNS * (_CELL_WIDTH + _GAP) + 3 * _GAP, _TITLE + sum(heights) + _GAP)
    picture = Image.new("RGB", size, _PAPER)
    ImageDraw.Draw(picture).text((2 * _GAP, _TITLE // 2 + 4), title, font=_font(20), fill=_INK, anchor="lm")
    top = _TITLE
    for (number, rows), height in zip(groups, heights, strict=True):
        _heading(picture, number, len(rows), top)
        shown = rows
        if len(rows) > _MOST_SHOWN:
            shown = np.concatenate([rows[: _MOST_SHOWN // 2], rows[-_MOST_SHOWN // 2 :]])
        for place, row in enumerate(shown.tolist()):
            line, column = divmod(place, _COLUMNS)
            left = 2 * _GAP + column * (_CELL_WIDTH + _GAP)
            upper = top + _HEADING + line * (_CELL_HEIGHT + _CAPTION + _GAP)
            _cell(picture, (left, upper), crops[row], players, row)
        top += height
    return picture


def _heading(picture: Image.Image, number: int, count: int, top: int) -> None:
    draw = ImageDraw.Draw(picture)
    color = _color(number)
    draw.rectangle((2 * _GAP, top, picture.width - 2 * _GAP, top + _HEADING - 18), fill=color)
    text = f"{team_name(number)}: {_plural(count, 'crop')}"
    if count > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text += f"; the {half} surest and the {half} least sure are shown"
    middle = top + (_HEADING - 18) / 2
    draw.text((3 * _GAP, middle), text, font=_font(15), fill=_text_color(color), anchor="lm")


def _cell(
    picture: Image.Image, corner: tuple[int, int], crop: Image.Image | Path, players: Labelled, row: int
) -> None:
    draw = ImageDraw.Draw(picture)
    x, y = corner
    thumbnail = _thumbnail(crop)
    left = x + (_CELL_WIDTH - thumbnail.width) // 2
    upper = y + _CELL_HEIGHT - thumbnail.height
    picture.paste(thumbnail, (left, upper))
    if players.is_outlier(row):
        frame = (left - 4, upper - 4, left + thumbnail.width + 3, upper + thumbnail.height + 3)
        draw.rectangle(frame, outline=_INK, width=3)
    font, middle = _font(12), y + _CELL_HEIGHT + _CAPTION / 2 + 3
    draw.text((x, middle), _shortened(players.names[row], 7), font=font, fill=_INK, anchor="lm")
    margin = f"{players.teams.margin[row]:.2f}"
    draw.text((x + _CELL_WIDTH, middle), margin, font=font, fill=_FAINT, anchor="rm")


def _thumbnail(crop: Image.Image | Path) -> Image.Image:
    if isinstance(crop, Path):
        with Image.open(crop) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
    else:
        upright = crop.convert("RGB")
    # ImageOps.contain would make a side of 0 pixels of very thin crops.
    scale = min(_CELL_WIDTH / upright.width, _CELL_HEIGHT / upright.height)
    size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    return upright.resize(size, Image.Resampling.LANCZOS)


# ---- coordinates

_SIZE = (1000, 680)
_PLOT = (84, 64, 800, 600)
_SMOOTH = 3  # drawn so much larger and then reduced: smooth edges
_RADIUS = 6.5
_INSET = 14  # of points beyond the axes, from the border at which they are drawn
_FEWEST = 10  # with fewer points that are no outliers, the axes hold all points


@dataclass(frozen=True)
class _Scale:
    """From coordinates to places in the plot: one scale for both axes, as distances mean something."""

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


def _polygon(corners: int, turn: float = 0.0, radius: float = _RADIUS, inner: float | None = None) -> _Shape:
    """A regular polygon, or with an inner radius a star; `turn` in turns, from a corner at the top."""
    count = corners if inner is None else 2 * corners
    shape = []
    for number in range(count):
        angle = 2 * math.pi * (number / count + turn)
        reach = inner if inner is not None and number % 2 else radius
        shape.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return tuple(shape)


# One a team, and last the one of the unassigned.
_SHAPES: tuple[_Shape, ...] = (
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
        self._image = Image.new("RGB", (_SIZE[0] * _SMOOTH, _SIZE[1] * _SMOOTH), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, ends: Sequence[float], color: Color, width: float = 1) -> None:
        self._draw.line([value * _SMOOTH for value in ends], fill=color, width=round(width * _SMOOTH))

    def text(self, place: tuple[float, float], text: str, size: int, color: Color, anchor: str) -> None:
        x, y = place
        font = _font(size * _SMOOTH)
        self._draw.text((x * _SMOOTH, y * _SMOOTH), text, font=font, fill=color, anchor=anchor)

    def upright_text(self, place: tuple[float, float], text: str, size: int, color: Color) -> None:
        """Text that reads from below, centred at `place`."""
        font = _font(size * _SMOOTH)
        left, top, right, bottom = self._draw.textbbox((0, 0), text, font=font)
        label = Image.new("RGB", (math.ceil(right - left), math.ceil(bottom - top)), _PAPER)
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
        self._draw.polygon(corners, fill=_color(number), outline=_PAPER, width=math.ceil(scale))

    def arrow(self, place: tuple[float, float], sides: tuple[int, int]) -> None:
        """A dark tip before a place, towards the sides."""
        direction = np.array(sides) / math.hypot(*sides)
        across = np.array([-direction[1], direction[0]])
        tip = np.array(place) + (_INSET - 1) * direction
        back = tip - 6 * direction
        corners = (tip, back + 6 * across, back - 6 * across)
        self._draw.polygon([tuple((corner * _SMOOTH).tolist()) for corner in corners], fill=_INK)

    def ring(self, place: tuple[float, float]) -> None:
        x, y = (value * _SMOOTH for value in place)
        radius = (_RADIUS + 4) * _SMOOTH
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(box, outline=_INK, width=round(1.8 * _SMOOTH))

    def finished(self) -> Image.Image:
        return self._image.reduce(_SMOOTH)


def scatter_plot(players: Labelled, title: str) -> Image.Image:
    """The players' COORDINATES, a shape and a colour per team; outliers have a ring.

    The axes are as long as the players that are no outliers need. Points beyond them are drawn at the
    border with an arrow, and counted in the legend. Rows whose coordinates are not finite are left out; the
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
        canvas.text(middle, "no crops", 18, _FAINT, "mm")
    _legend(canvas, players, beyond)
    return canvas.finished()


def _points(canvas: _Canvas, scale: _Scale, players: Labelled, rows: Sequence[int]) -> int:
    """Draw the rows' points; how many of them lie beyond the axes."""
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
    canvas.text((left, top / 2 + 2), title, 20, _INK, "lm")
    for value in scale.ticks(0):
        x, _ = scale.place((value, scale.low[1]))
        canvas.line((x, top, x, bottom), _GRID)
        canvas.text((x, bottom + 8), f"{value:.3g}", 13, _FAINT, "mt")
    for value in scale.ticks(1):
        _, y = scale.place((scale.low[0], value))
        canvas.line((left, y, right, y), _GRID)
        canvas.text((left - 8, y), f"{value:.3g}", 13, _FAINT, "rm")
    canvas.line((left, top, right, top, right, bottom, left, bottom, left, top), _FAINT, 1.2)
    canvas.text(((left + right) / 2, bottom + 46), "between the teams", 15, _INK, "mm")
    canvas.upright_text((24, (top + bottom) / 2), "across", 15, _INK)


def _legend(canvas: _Canvas, players: Labelled, beyond: int) -> None:
    x, y = _PLOT[2] + 28.0, _PLOT[1] + 14.0
    for number in players.numbers:
        canvas.marker((x, y), number)
        canvas.text((x + 20, y), f"{team_name(number)} ({len(players.of(number)):,})", 15, _INK, "lm")
        y += 28
    outliers = sum(players.is_outlier(row) for row in range(len(players.teams)))
    if outliers:
        canvas.ring((x, y))
        canvas.text((x + 20, y), f"outlier ({outliers:,})", 15, _INK, "lm")
        canvas.text((x + 20, y + 20), f"score above {OUTLIER:g}", 12, _FAINT, "lm")
        y += 52
    if beyond:
        canvas.arrow((x, y + 8), (0, -1))
        canvas.text((x + 20, y), f"beyond the axes ({beyond:,})", 15, _INK, "lm")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _shortened(text: str, length: int) -> str:
    # Names of files differ at their ends. Pillow's font has no ellipsis.
    return text if len(text) <= length else f"..{text[2 - length :]}"

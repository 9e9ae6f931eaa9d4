"""A sheet of crops, sorted by team."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from siglip_serve_client.commands.drawing import FAINT, INK, PAPER, font_of, plural, shortened, thumbnail
from siglip_serve_client.commands.teams.labelled import (
    OUTLIER,
    OUTLIERS,
    Labelled,
    team_color,
    team_name,
    text_color,
)

__all__ = ["contact_sheet"]

_CELL_WIDTH, _CELL_HEIGHT = 92, 112
_GAP = 14
_CAPTION = 36
_TITLE = 52
_HEADING = 46
_COLUMNS = 12
_MOST_SHOWN = 7 * _COLUMNS


def contact_sheet(crops: Sequence[Image.Image | Path], players: Labelled, title: str) -> Image.Image:
    """The crops by team, the surest first, and then the outliers, the least like any team first.

    A caption identifies each crop: its name, its number among all crops, its track if known, and at the right
    its margin. Outliers have a frame in the colour of the team that they are nearest to, and their outlier
    score instead of the margin.

    Args:
        crops: [N]. A group of more than 84 is drawn with its first and its last crops only.

    Raises:
        OSError: a path that is drawn cannot be read.
    """
    groups = [(number, players.of(number)) for number in players.numbers]
    lines = [math.ceil(min(len(rows), _MOST_SHOWN) / _COLUMNS) for _, rows in groups]
    heights = [_HEADING + count * (_CELL_HEIGHT + _CAPTION + _GAP) + _GAP for count in lines]
    size = (_COLUMNS * (_CELL_WIDTH + _GAP) + 3 * _GAP, _TITLE + sum(heights) + _GAP)
    picture = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(picture).text((2 * _GAP, _TITLE // 2 + 4), title, font=font_of(20), fill=INK, anchor="lm")
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
    color = INK if number == OUTLIERS else team_color(number)
    draw.rectangle((2 * _GAP, top, picture.width - 2 * _GAP, top + _HEADING - 18), fill=color)
    text = f"{team_name(number)}: {plural(count, 'crop')}"
    if number == OUTLIERS:
        text += f" with an outlier score above {OUTLIER:g}, in the colour of the nearest team"
    if count > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        ends = ("least like any team", "most") if number == OUTLIERS else ("surest", "least sure")
        text += f"; the {half} {ends[0]} and the {half} {ends[1]} are shown"
    middle = top + (_HEADING - 18) / 2
    draw.text((3 * _GAP, middle), text, font=font_of(15), fill=text_color(color), anchor="lm")


def _cell(
    picture: Image.Image, corner: tuple[int, int], crop: Image.Image | Path, players: Labelled, row: int
) -> None:
    draw = ImageDraw.Draw(picture)
    x, y = corner
    thumbnail = _thumbnail(crop)
    left = x + (_CELL_WIDTH - thumbnail.width) // 2
    upper = y + _CELL_HEIGHT - thumbnail.height
    picture.paste(thumbnail, (left, upper))
    far = players.is_outlier(row)
    if far:
        frame = (left - 4, upper - 4, left + thumbnail.width + 3, upper + thumbnail.height + 3)
        draw.rectangle(frame, outline=team_color(int(players.teams.labels[row])), width=3)
    small, font = font_of(11), font_of(12)
    middle, right = y + _CELL_HEIGHT + 13, x + _CELL_WIDTH
    name = shortened(players.names[row], small, _CELL_WIDTH)
    draw.text((x, middle), name, font=small, fill=INK, anchor="lm")
    track = players.tracks[row] if players.tracks else ""
    value = f"{players.teams.outlier_score[row]:.1f}" if far else f"{players.teams.margin[row]:.2f}"
    number = f"#{row}" + f" t{track}" * bool(track)
    number = shortened(number, font, _CELL_WIDTH - font.getlength(value) - 4)
    draw.text((x, middle + 15), number, font=font, fill=FAINT, anchor="lm")
    draw.text((right, middle + 15), value, font=font, fill=FAINT, anchor="rm")


def _thumbnail(crop: Image.Image | Path) -> Image.Image:
    if not isinstance(crop, Path):
        return thumbnail(crop, _CELL_WIDTH, _CELL_HEIGHT)
    with Image.open(crop) as file:
        return thumbnail(file, _CELL_WIDTH, _CELL_HEIGHT)

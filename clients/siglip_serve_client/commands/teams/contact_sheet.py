"""A sheet of crops, sorted by team."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from siglip_serve_client.commands.teams.labelled import (
    FAINT,
    INK,
    PAPER,
    Labelled,
    font_of,
    team_color,
    team_name,
    text_color,
)

__all__ = ["contact_sheet"]

_CELL_WIDTH, _CELL_HEIGHT = 72, 112
_GAP = 12
_CAPTION = 20
_TITLE = 52
_HEADING = 46
_COLUMNS = 14
_MOST_SHOWN = 6 * _COLUMNS


def contact_sheet(crops: Sequence[Image.Image | Path], players: Labelled, title: str) -> Image.Image:
    """The crops by team, the surest first, with names and margins. Outliers have a dark frame.

    Args:
        crops: [N]. A team of more than 84 is drawn with its surest and its least sure crops only.

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
    color = team_color(number)
    draw.rectangle((2 * _GAP, top, picture.width - 2 * _GAP, top + _HEADING - 18), fill=color)
    text = f"{team_name(number)}: {_plural(count, 'crop')}"
    if count > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text += f"; the {half} surest and the {half} least sure are shown"
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
    if players.is_outlier(row):
        frame = (left - 4, upper - 4, left + thumbnail.width + 3, upper + thumbnail.height + 3)
        draw.rectangle(frame, outline=INK, width=3)
    font, middle = font_of(12), y + _CELL_HEIGHT + _CAPTION / 2 + 3
    draw.text((x, middle), _shortened(players.names[row], 7), font=font, fill=INK, anchor="lm")
    margin = f"{players.teams.margin[row]:.2f}"
    draw.text((x + _CELL_WIDTH, middle), margin, font=font, fill=FAINT, anchor="rm")


def _thumbnail(crop: Image.Image | Path) -> Image.Image:
    if isinstance(crop, Path):
        with Image.open(crop) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
    else:
        upright = crop.convert("RGB")
    # ImageOps.contain would give very thin crops a side of 0 pixels.
    scale = min(_CELL_WIDTH / upright.width, _CELL_HEIGHT / upright.height)
    size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    return upright.resize(size, Image.Resampling.LANCZOS)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _shortened(text: str, length: int) -> str:
    # Names of files differ at their ends. Pillow's font has no ellipsis.
    return text if len(text) <= length else f"..{text[2 - length :]}"

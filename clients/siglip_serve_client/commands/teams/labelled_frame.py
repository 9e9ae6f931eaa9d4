"""A frame with a labelled box around each player."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from siglip_serve_client.commands.drawing import INK, PAPER, Font, font_of
from siglip_serve_client.commands.teams.labelled import (
    OUTLIERS,
    Labelled,
    team_color,
    team_name,
    text_color,
)

__all__ = ["labelled_frame"]

Box: TypeAlias = tuple[int, int, int, int]


def labelled_frame(frame: Image.Image, boxes: ArrayLike, players: Labelled) -> Image.Image:
    """The frame with a box in the team's colour around each player. A tag says team, name and margin.

    Outliers have a white box with a dark edge, and the outlier score instead of a margin.

    Args:
        frame: the image that the boxes refer to, in its pixels.
        boxes: [N, 4] of x0, y0, x1, y1. Those without an area inside of the frame are left out.
    """
    picture = frame.convert("RGB")
    draw = ImageDraw.Draw(picture)
    width = max(2, round(min(picture.size) / 270))
    font = font_of(max(10, round(min(picture.size) / 80)))
    limits = np.array([picture.width, picture.height] * 2) - 1
    corners = np.nan_to_num(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
    x0, y0, x1, y1 = np.clip(corners, 0, limits).round().astype(int).T
    visible = np.flatnonzero((x0 < x1) & (y0 < y1))
    # Players in front have lower feet, and are drawn over those behind.
    for row in visible[np.argsort(y1[visible], kind="stable")].tolist():
        place = (int(x0[row]), int(y0[row]), int(x1[row]), int(y1[row]))
        _frame_box(draw, place, players, row, width)
        _frame_tag(draw, place, players, row, font)
    _frame_legend(draw, players, font)
    return picture


def _frame_box(draw: ImageDraw.ImageDraw, box: Box, players: Labelled, row: int, width: int) -> None:
    x0, y0, x1, y1 = box
    # An edge around the colour keeps it visible on any ground; a thick dark one marks outliers.
    rim, ink = (width, INK) if players.is_outlier(row) else (1, PAPER)
    draw.rectangle((x0 - rim, y0 - rim, x1 + rim, y1 + rim), outline=ink, width=rim)
    draw.rectangle(box, outline=team_color(int(players.groups[row])), width=width)


def _frame_tag(draw: ImageDraw.ImageDraw, box: Box, players: Labelled, row: int, font: Font) -> None:
    number = int(players.groups[row])
    far = number == OUTLIERS
    sign = "!" if far else "?" if number < 0 else str(number)
    value = f"{players.teams.outlier_score[row]:.1f}" if far else f"{players.teams.margin[row]:.2f}"
    text = f"{sign}:{players.names[row]}\n{value}"
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, spacing=2)
    pad = 3
    width, height = math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad
    x = min(max(0, (box[0] + box[2] - width) // 2), max(0, draw.im.size[0] - width))
    y = max(0, box[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=team_color(number), outline=INK if far else PAPER)
    color = text_color(team_color(number))
    draw.multiline_text(
        (x + pad - left, y + pad - top), text, font=font, fill=color, spacing=2, align="center"
    )


def _frame_legend(draw: ImageDraw.ImageDraw, players: Labelled, font: Font) -> None:
    """The meaning of tags and colours, in the lower left corner, from the bottom."""
    texts = [(PAPER, "team:player, margin; !:player, outlier score")]
    texts += [
        (team_color(team), f"{team_name(team)}: {len(players.of(team))}")
        for team in reversed(players.numbers)
    ]
    boxes = [draw.textbbox((0, 0), text, font=font) for _, text in texts]
    line = math.ceil(max(box[3] for box in boxes)) + 6
    width = math.ceil(max(box[2] for box in boxes)) + 12
    bottom = draw.im.size[1] - 6
    for color, text in texts:
        draw.rectangle((6, bottom - line, 6 + width, bottom), fill=color)
        draw.text((12, bottom - line / 2), text, font=font, fill=text_color(color), anchor="lm")
        bottom -= line

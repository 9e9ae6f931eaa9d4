"""A labelled grid: the picture, and for each prompt a heatmap with its score and a colour bar."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cmap
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from siglip_serve_client._operations.explain import Colormap, Explanation
from siglip_serve_client.commands.drawing import FAINT, INK, PAPER, Font, drawable, font_of

__all__ = ["heatmap_grid"]

_MARGIN, _BAR, _TICKS, _LINE, _SCORE = 14, 12, 62, 20, 24
_TITLE_SIZE, _SCORE_SIZE, _TICK_SIZE = 16, 13, 11
_MOST_LINES = 2
_LEAST_SIDE = 240  # smaller overlays are enlarged to it, by their longer side
_LEAST_TITLE = 180
# Their middle is 0: the limits of their bars are equally far from it.
_DIVERGING: frozenset[Colormap] = frozenset({"bwr"})
_ASPECT = 1.6  # of the whole sheet, about that of a screen


@dataclass(frozen=True)
class _Layout:
    """Sizes of a panel in pixels: the overlay, its title, and the whole with the colour bar."""

    width: int
    height: int
    title: int
    cell: tuple[int, int]


def heatmap_grid(
    picture: Image.Image, explanation: Explanation, colormap: Colormap = "bwr", joint: bool = True
) -> Image.Image:
    """The picture, and the overlay of each prompt, in rows and columns.

    Args:
        picture: upright.
        explanation: with overlays.
        colormap: of the overlays.
        joint: the overlays share one scale.

    Raises:
        ValueError: the explanation has no overlays.
    """
    if not explanation.overlays:
        raise ValueError("explanation: has no overlays; ask for them with overlays=True")
    layout, titles = _arrange(explanation)
    columns, rows = _grid(1 + len(titles), layout.cell)
    size = (_MARGIN + columns * layout.cell[0], _MARGIN + rows * layout.cell[1])
    sheet = Image.new("RGB", size, PAPER)
    maps = explanation.patch_maps
    for index, (left, top) in enumerate(_places(layout, columns, 1 + len(titles))):
        below = (left, top + layout.title)
        if index == 0:
            _title(sheet, below, ["image"], f"{picture.width} x {picture.height}")
            sheet.paste(picture.convert("RGB").resize((layout.width, layout.height)), below)
            continue
        _title(sheet, below, titles[index - 1], f"cosine {explanation.scores[index - 1]:.3f}")
        sheet.paste(explanation.overlays[index - 1].resize((layout.width, layout.height)), below)
        limits = _limits(maps if joint else maps[index - 1], colormap)
        _bar(sheet, (left + layout.width + 4, below[1]), layout.height, limits, colormap)
    return sheet


def _arrange(explanation: Explanation) -> tuple[_Layout, list[list[str]]]:
    """The sizes of all panels, which are the same, and the lines of each title."""
    width, height = explanation.overlays[0].size
    scale = max(1.0, _LEAST_SIDE / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    room = max(width + 4 + _BAR + _TICKS, _LEAST_TITLE)
    titles = [_lines(prompt, room) for prompt in explanation.prompts]
    title = _LINE * max(map(len, titles)) + _SCORE
    return _Layout(width, height, title, (room + _MARGIN, height + title + _MARGIN)), titles


def _grid(count: int, cell: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows for `count` panels: about the shape of a screen, with few empty places."""

    def cost(columns: int) -> float:
        rows = -(-count // columns)
        aspect = columns * cell[0] / (rows * cell[1])
        return abs(math.log(aspect / _ASPECT)) + (rows * columns - count) / count

    columns = min(range(1, count + 1), key=cost)
    return columns, -(-count // columns)


def _places(layout: _Layout, columns: int, count: int) -> Iterator[tuple[int, int]]:
    for index in range(count):
        row, column = divmod(index, columns)
        yield _MARGIN + column * layout.cell[0], _MARGIN + row * layout.cell[1]


def _lines(text: str, room: int) -> list[str]:
    """The text in at most `_MOST_LINES` lines of `room` pixels. Longer text ends in an ellipsis."""
    text, font = drawable(" ".join(text.split()), _TITLE_SIZE)
    lines: list[str] = []
    while text and len(lines) < _MOST_LINES:
        count = _fitting(text, room, font)
        if count < len(text) and len(lines) == _MOST_LINES - 1:
            lines.append(f"{text[: _fitting(text, room, font, '…')].rstrip()}…")
            break
        if count < len(text) and (space := text.rfind(" ", 1, count + 1)) > 0:
            count = space
        lines.append(text[:count].rstrip())
        text = text[count:].lstrip()
    return lines or [""]


def _fitting(text: str, room: int, font: Font, end: str = "") -> int:
    """The number of characters of the text that fit together with `end`, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + end) <= room else (low, middle - 1)
    return low


def _title(sheet: Image.Image, place: tuple[int, int], lines: list[str], score: str) -> None:
    """A title above a place. Titles of one line and of two end at the same height."""
    draw, (left, bottom) = ImageDraw.Draw(sheet), place
    draw.text((left, bottom - _SCORE + 1), score, FAINT, font_of(_SCORE_SIZE))
    for number, line in enumerate(reversed(lines), 1):
        draw.text((left, bottom - _SCORE - number * _LINE), line, INK, drawable(line, _TITLE_SIZE)[1])


def _limits(maps: NDArray[np.float32], colormap: Colormap) -> tuple[float, float]:
    """The least and the largest value that the colours stand for."""
    if colormap in _DIVERGING:
        most = float(np.abs(maps).max())
        return -most, most
    return float(maps.min()), float(maps.max())


def _bar(
    sheet: Image.Image, place: tuple[int, int], height: int, limits: tuple[float, float], colormap: Colormap
) -> None:
    """Colours from the largest value, on top, to the least. 0 is marked where it lies between them."""
    colors = np.rint(cmap.Colormap(colormap).lut(255)[::-1, :3] * 255).astype(np.uint8)
    strip = Image.fromarray(colors[:, None]).resize((_BAR, height), Image.Resampling.BILINEAR)
    sheet.paste(strip, place)
    draw, font = ImageDraw.Draw(sheet), font_of(_TICK_SIZE)
    low, high = limits
    right = place[0] + _BAR + 4
    first, last = _ticks(low, high)
    draw.text((right, place[1]), last, FAINT, font, anchor="lt")
    if height >= 2 * _TICK_SIZE:
        draw.text((right, place[1] + height), first, FAINT, font, anchor="lb")
    if low < 0 < high:
        zero = round(height * high / (high - low))
        if 1.5 * _TICK_SIZE < zero < height - 1.5 * _TICK_SIZE:
            draw.line((place[0], place[1] + zero, right - 2, place[1] + zero), INK)
            draw.text((right, place[1] + zero), "0", FAINT, font, anchor="lm")


def _ticks(low: float, high: float) -> tuple[str, str]:
    """Both with as many decimals as give the larger one three digits."""
    largest = max(abs(low), abs(high))
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), 9) if largest > 0 else 0
    # Adding 0 makes a rounded -0 a plain one.
    first, last = (f"{round(value, decimals) + 0.0:+.{decimals}f}" for value in (low, high))
    return first, last

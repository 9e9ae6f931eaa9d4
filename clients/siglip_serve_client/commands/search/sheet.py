"""A sheet of hits, or of groups of near-duplicates: thumbnails with score and id."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from siglip_serve_client.commands.drawing import (
    FAINT,
    INK,
    PAPER,
    Color,
    drawable,
    font_of,
    shortened,
    thumbnail,
)

__all__ = ["Cell", "Section", "sheet"]

_WIDTH, _HEIGHT, _GAP, _CAPTION, _TITLE, _HEADING = 180, 160, 14, 38, 50, 34
_COLUMNS = 5
_BOX: Color = (225, 225, 225)

Read = Callable[["Cell"], bytes]


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        row: of the collection.
        name: its id.
        score: as text.
        note: such as "same file".
    """

    row: int
    name: str
    score: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Cells that belong together, under a heading, if it is not empty."""

    cells: Sequence[Cell]
    heading: str = ""


def sheet(title: str, sections: Sequence[Section], read: Read) -> Image.Image:
    """Draw all cells. A picture that cannot be read is a grey box with the reason.

    Args:
        read: the file of a cell, or an OSError.
    """
    lines = [-(-len(section.cells) // _COLUMNS) for section in sections]
    line = _HEIGHT + _CAPTION + _GAP
    heights = [
        count * line + _HEADING * bool(section.heading)
        for count, section in zip(lines, sections, strict=True)
    ]
    picture = Image.new("RGB", (_COLUMNS * (_WIDTH + _GAP) + _GAP, _TITLE + sum(heights) + _GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    text, font = drawable(title, 18)
    draw.text((_GAP, _TITLE // 2), shortened(text, font, picture.width - 2 * _GAP), INK, font, anchor="lm")
    top = _TITLE
    for section, height in zip(sections, heights, strict=True):
        first = top
        if section.heading:
            draw.text((_GAP, top + _HEADING // 2), section.heading, INK, font_of(14), anchor="lm")
            first += _HEADING
        for place, cell in enumerate(section.cells):
            row, column = divmod(place, _COLUMNS)
            _draw(picture, (_GAP + column * (_WIDTH + _GAP), first + row * line), cell, read)
        top += height
    return picture


def _draw(picture: Image.Image, corner: tuple[int, int], cell: Cell, read: Read) -> None:
    draw = ImageDraw.Draw(picture)
    x, y = corner
    try:
        with Image.open(io.BytesIO(read(cell))) as file:
            small = thumbnail(file, _WIDTH, _HEIGHT)
        picture.paste(small, (x + (_WIDTH - small.width) // 2, y + _HEIGHT - small.height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no picture"
        draw.rectangle((x, y, x + _WIDTH - 1, y + _HEIGHT - 1), fill=_BOX)
        draw.text((x + _WIDTH // 2, y + _HEIGHT // 2), reason, FAINT, font_of(12), anchor="mm")
    draw.text((x, y + _HEIGHT + 11), cell.score, INK, font_of(14), anchor="lm")
    if cell.note:
        draw.text((x + _WIDTH, y + _HEIGHT + 11), cell.note, FAINT, font_of(12), anchor="rm")
    text, font = drawable(cell.name, 12)
    draw.text((x, y + _HEIGHT + 27), shortened(text, font, _WIDTH), FAINT, font, anchor="lm")
